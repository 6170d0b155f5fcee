"""Rendering of a comparison: tables on the terminal, Markdown with pictures, and one self-contained HTML file."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from rich.table import Table

from ..files import write_json, write_text

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

AXIS_LABELS = {"flops": "training FLOPs", "seconds": "training seconds"}
#: Okabe and Ito's colours, which people with any colour vision can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = "osD^vP*X"
FIGURE_INCHES = (5.6, 4.2)
"""Small enough for its text to be read on a phone."""
Row = Sequence[str]


def write_report(report: Mapping[str, Any], out: Path) -> list[Path]:
    """report.json, report.md with its pictures, and report.html, in a folder; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    figures = draw_figures(report)
    paths = [out / "report.json", out / "report.md", out / "report.html"]
    write_json(paths[0], report)
    write_text(paths[1], markdown(report, figures))
    write_text(paths[2], html_page(report, figures))
    for name, (figure, _) in figures.items():
        path = out / f"{name}.png"
        figure.savefig(path, dpi=110, metadata={"Software": None})
        plt.close(figure)
        paths.append(path)
    return paths


# ── figures in words ──


def number(value: float | None, digits: int = 3) -> str:
    """1.27e+13 and 0.0123 as people write them; – for nothing."""
    if value is None:
        return "–"
    if value and not 1e-3 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def spread(summary: Mapping[str, Any] | None, show: Callable[[float], str] = lambda v: f"{v:.2f}") -> str:
    """81.20 ± 0.15, without the spread for one seed."""
    if summary is None:
        return "–"
    return show(summary["mean"]) + (f" ± {show(summary['std'])}" if summary["std"] is not None else "")


def gibibytes(value: float) -> str:
    return f"{value / 2**30:.2f}"


def answer_compute(row: Mapping[str, Any]) -> str:
    """+0.83 [0.41, 1.20], or why there is no answer."""
    if row["difference"] is None:
        return "outside the baseline's arms"
    return f"{row['difference']:+.2f}" + interval(row["interval"], "+.2f")


def answer_quality(row: Mapping[str, Any]) -> str:
    """1.93× [1.41, 2.60], or that the baseline has it already, or never."""
    if row["status"] == "no baseline":
        return "not evaluated"
    if row["status"] == "below":
        return f"less than {row['shortest'] / row['cost']:.2f}×: its shortest arm has it" + interval(
            row["interval"], ".2f"
        )
    if row["status"] == "not reached":
        return f"not reached within {row['longest'] / row['cost']:.2f}×" + interval(row["interval"], ".2f")
    return f"{row['ratio']:.2f}×" + interval(row["interval"], ".2f")


def interval(ends: Sequence[float | None] | None, form: str) -> str:
    """[0.41, 1.20]; … for an end outside the baseline's arms; nothing without repeated seeds, or with both outside."""
    if ends is None or not any(ends):
        return ""
    return f" [{', '.join('…' if end is None else format(end, form) for end in ends)}]"


# ── tables: heads and rows of text, for every kind of report ──


def arm_table(report: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """Cost and quality of each arm."""
    heads = ["arm", "n", "steps", "images", "passes", "FLOPs", "seconds", "data wait", "memory GiB"]
    energy = any(arm["energy_joules"] for arm in report["arms"])
    decoded = any(arm["decoded_images"] < arm["images"] for arm in report["arms"])
    heads += (["decoded"] if decoded else []) + (["energy kJ"] if energy else []) + list(report["protocols"])
    rows = []
    for arm in report["arms"]:
        row = [arm["name"] + (" (baseline)" if arm["baseline"] else ""), str(arm["n"])]
        if arm["stages"]:
            row += [f"{arm['steps']:,}", f"{arm['images']:,.0f}", number(arm["passes"]), number(arm["flops"])]
            row += [spread(arm["seconds"], number), f"{arm['data_wait']['mean']:.0%}"]
            row.append(gibibytes(arm["peak_memory_bytes"]["mean"]))
        else:
            row += ["–"] * 7
        row += [number(arm["decoded_images"])] if decoded else []
        row += [spread(arm["energy_joules"], lambda v: number(v / 1e3))] if energy else []
        rows.append(row + [spread(arm["quality"].get(protocol)) for protocol in report["protocols"]])
    return heads, rows


def stage_table(report: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """Cost of each arm, split by stage."""
    heads = ["arm", "size px", "patches", "steps", "images", "visible", "predicted", "FLOPs", "share"]
    heads += ["seconds", "share", "images/s", "data wait", "speed-up in FLOPs", "in seconds", "ratio"]
    rows = []
    for arm in report["arms"]:
        for stage in arm["stages"]:
            row = [arm["name"], stage["size_px"]]
            row += [f"{stage[key]:,}" for key in ("patches", "steps", "images")]
            row += [number(stage[key]) for key in ("visible_patches", "predicted_patches", "flops")]
            row += [f"{stage['flops_share']:.0%}", spread(stage["seconds"], number), f"{stage['seconds_share']:.0%}"]
            row += [number(stage["images_per_second"]), f"{stage['data_wait']:.0%}", f"{stage['speedup_flops']:.2f}×"]
            untimed = stage["speedup_seconds"] is None
            row += ["–", "–"] if untimed else [f"{stage['speedup_seconds']:.2f}×", f"{stage['seconds_per_flop']:.2f}"]
            rows.append(row)
    return heads, rows


def answer_table(report: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """Both answers, for FLOPs and for seconds."""
    heads = ["arm", "evaluation", "top-1", "at equal FLOPs", "at equal seconds"]
    heads += ["baseline's FLOPs for it", "baseline's seconds for it"]
    compute = {(r["arm"], r["protocol"], r["axis"]): r for r in report["equal_compute"]}
    quality = {(r["arm"], r["protocol"], r["axis"]): r for r in report["equal_quality"]}
    rows = []
    for arm, protocol, axis in compute:
        if axis == "flops":
            keys = [(arm, protocol, a) for a in AXIS_LABELS]
            row = [arm, protocol, f"{compute[keys[0]]['quality']:.2f}"]
            row += [answer_compute(compute[key]) for key in keys]
            rows.append(row + [answer_quality(quality[key]) for key in keys])
    return heads, rows


def difference_table(report: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """Every field in which the arms differ."""
    fields = list(dict.fromkeys(field for arm in report["arms"] for field in arm["differs"]))

    def show(value: Any) -> str:
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return "; ".join(" ".join(f"{k}={v}" for k, v in row.items()) for row in value)
        return "–" if value in (None, [], "") else str(value)

    rows = [
        [arm["name"], *(show(arm["differs"].get(field)) for field in fields)] for arm in report["arms"] if arm["stages"]
    ]
    return ["arm", *fields], rows


def notes(report: Mapping[str, Any]) -> list[str]:
    """Sentences that must stand beside the figures."""
    forced = [f"FORCED although not comparable: {difference}" for difference in report["forced"]]
    return [
        *forced,
        *report["warnings"],
        f"Baseline: {', '.join(report['baseline'])}. ± is the sample standard deviation over seeds; brackets are 95 % "
        "bootstrap intervals over seeds; between the baseline's arms, quality is interpolated linearly in log cost. "
        "Accuracies are top-1 in per cent. Seconds are training and waiting for data.",
        "Per stage, the speed-ups are per image, against the baseline; their ratio is 1 where time falls as FLOPs do.",
    ]


def terminal_tables(report: Mapping[str, Any]) -> list[Table]:
    """The report as rich tables."""
    tables = []
    for title, build in (("Cost and quality", arm_table), ("Two answers", answer_table), ("Stages", stage_table)):
        heads, rows = build(report)
        shown = [i for i, head in enumerate(heads) if head not in ("visible", "predicted", "patches")]  # for the width
        table = Table(title=title, title_justify="left")
        for i in shown:
            table.add_column(heads[i], justify="left" if i == 0 else "right", overflow="fold")
        for row in rows:
            table.add_row(*(row[i] for i in shown))
        tables.append(table)
    return tables


# ── pictures ──


def draw_figures(report: Mapping[str, Any]) -> dict[str, tuple[Figure, str]]:
    """Pictures by name, each with its caption."""
    arms = [arm for arm in report["arms"] if arm["stages"]]
    figures = {}
    for protocol in report["protocols"]:
        for axis, label in AXIS_LABELS.items():
            caption = f"{protocol}: top-1 against {label}. Lines join arms that differ only in length; dots are seeds."
            figures[f"{protocol}-{axis}"] = _draw_quality(report, arms, protocol, axis), caption
    if any(arm["loss"] for arm in arms):
        caption = "Training loss against the share of the compute, each stage at its own size, so not on one scale."
        figures["loss"] = _draw_loss(arms), caption
    for axis, label in AXIS_LABELS.items():
        figures[f"stages-{axis}"] = _draw_stages(arms, axis), f"{label[0].upper()}{label[1:]} of every arm, by stage."
    return figures


def _draw_quality(report: Mapping, arms: Sequence[Mapping], protocol: str, axis: str) -> Figure:
    figure, plot = plt.subplots(figsize=FIGURE_INCHES, layout="constrained")
    families = list(dict.fromkeys(arm["family"] for arm in arms if protocol in arm["quality"]))
    ticks = []
    for i, family in enumerate(families):
        colour, marker, points = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], []
        for arm in arms:
            if arm["family"] == family and protocol in arm["quality"]:
                cost = arm["flops"] if axis == "flops" else arm["seconds"]["mean"]
                summary = arm["quality"][protocol]
                points.append((cost, summary["mean"]))
                ticks += [cost] if arm["baseline"] else []
                plot.plot([cost] * summary["n"], summary["values"], marker, color=colour, alpha=0.35, ms=4, mew=0)
        plot.plot(*zip(*sorted(points), strict=True), "-", marker=marker, color=colour, ms=6, lw=1.5, label=family)
    for arm in report["arms"]:
        if not arm["stages"] and protocol in arm["quality"]:
            level = arm["quality"][protocol]["mean"]
            plot.axhline(level, color="#666666", ls=":", lw=1)
            style = {"xycoords": ("axes fraction", "data"), "va": "bottom", "fontsize": 8, "color": "#666666"}
            plot.annotate(arm["name"], (0.02, level), **style)
    plot.set_xscale("log")
    plot.set_xticks(ticks, [number(tick, 2) for tick in ticks])  # the baseline's arms
    plot.xaxis.set_minor_formatter(NullFormatter())
    plot.set_xlabel(AXIS_LABELS[axis])
    plot.set_ylabel(f"{protocol}, top-1 %")
    plot.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def _draw_loss(arms: Sequence[Mapping]) -> Figure:
    figure, axis = plt.subplots(figsize=FIGURE_INCHES, layout="constrained")
    for i, arm in enumerate(arms):
        for j, curve in enumerate(arm["loss"]):
            colour, dashes = COLOURS[i % len(COLOURS)], "-" if i < len(COLOURS) else "--"
            axis.plot(
                curve["p"], curve["loss"], dashes, color=colour, lw=1, alpha=0.8, label=None if j else arm["name"]
            )
    axis.set_xlabel("p, share of the compute")
    axis.set_ylabel("training loss")
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.yaxis.set_minor_formatter(FuncFormatter(lambda v, _: f"{v:.2g}"))
    axis.grid(alpha=0.25, which="both")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def _draw_stages(arms: Sequence[Mapping], axis: str) -> Figure:
    figure, plot = plt.subplots(figsize=(FIGURE_INCHES[0], 1.2 + 0.3 * len(arms)), layout="constrained")
    sizes = list(dict.fromkeys(stage["size_px"] for arm in arms for stage in arm["stages"]))
    sizes.sort(key=lambda size: [int(side) for side in size.split("×")])
    shades = {size: plt.get_cmap("viridis")(0.15 + 0.75 * i / max(1, len(sizes) - 1)) for i, size in enumerate(sizes)}
    for row, arm in enumerate(arms):
        left = 0.0
        for stage in arm["stages"]:
            width = stage["flops"] if axis == "flops" else stage["seconds"]["mean"]
            plot.barh(row, width, left=left, color=shades[stage["size_px"]], height=0.7)
            left += width
    plot.set_xlabel(AXIS_LABELS[axis])
    plot.set_yticks(range(len(arms)), [arm["name"] for arm in arms], fontsize=8)
    plot.invert_yaxis()
    handles = [plt.Rectangle((0, 0), 1, 1, color=shade) for shade in shades.values()]
    labels = [f"{size} px" for size in shades]
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


# ── files ──

SECTIONS = (
    ("Cost and quality", arm_table),
    ("Equal compute and equal quality", answer_table),
    ("Stages", stage_table),
    ("What the arms are", difference_table),
)


def markdown(report: Mapping[str, Any], figures: Mapping[str, tuple[Figure, str]]) -> str:
    """report.md: tables, and the pictures beside it."""
    parts = [f"# {report['title']}", *(f"- {note}" for note in notes(report))]
    for title, build in SECTIONS:
        heads, rows = build(report)
        lines = [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)]
        parts.append(f"\n## {title}\n\n" + "\n".join(lines))
    parts.append("\n## Pictures\n")
    parts += [f"![{caption}]({name}.png)\n\n{caption}\n" for name, (_, caption) in figures.items()]
    parts.append("\n## Environment\n")
    parts += [f"- {name}: {', '.join(values)}" for name, values in report["environment"].items()]
    return "\n".join(parts) + "\n"


STYLE = """
:root{color-scheme:light}
body{font:16px/1.5 system-ui,sans-serif;margin:0 auto;max-width:72rem;padding:1rem;color:#1a1a1a;background:#fff}
h1{font-size:1.5rem;margin:.5rem 0}h2{font-size:1.15rem;margin:2rem 0 .5rem}
.scroll{overflow-x:auto;-webkit-overflow-scrolling:touch;border:1px solid #ddd;border-radius:6px}
table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums;width:100%}
th,td{padding:.35rem .6rem;text-align:right;white-space:nowrap;border-bottom:1px solid #eee}
th{background:#f5f5f5;vertical-align:bottom}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:#fff;max-width:11rem;white-space:normal}
th:first-child{background:#f5f5f5}
tr.baseline td{background:#eef5fb}
figure{margin:1rem 0}figure img{width:100%;height:auto;display:block}figcaption{font-size:.85rem;color:#555}
ul{padding-left:1.2rem}li.forced{color:#b00020;font-weight:600}
.pictures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));gap:1rem}
@media print{body{font-size:10pt;max-width:none;padding:0}.scroll{overflow:visible;border:0}
table{font-size:6.5pt}th,td{padding:1.5pt 2.5pt;white-space:normal}figure,tr{break-inside:avoid}
.pictures{display:block}@page{size:A4 landscape;margin:12mm}}
"""


def html_page(report: Mapping[str, Any], figures: Mapping[str, tuple[Figure, str]]) -> str:
    """report.html: the same in one file, pictures and figures included."""
    baseline = {f"{arm['name']} (baseline)" for arm in report["arms"] if arm["baseline"]}
    parts = [f"<h1>{html.escape(report['title'])}</h1>", "<ul>"]
    for note in notes(report):
        forced = ' class="forced"' if note.startswith("FORCED") else ""
        parts.append(f"<li{forced}>{html.escape(note)}</li>")
    parts.append("</ul>")
    for title, build in SECTIONS:
        heads, rows = build(report)
        parts += [f"<h2>{title}</h2>", '<div class="scroll"><table><thead><tr>']
        parts += [f"<th>{html.escape(head)}</th>" for head in heads] + ["</tr></thead><tbody>"]
        for row in rows:
            parts.append('<tr class="baseline">' if row[0] in baseline else "<tr>")
            parts += [f"<td>{html.escape(cell)}</td>" for cell in row] + ["</tr>"]
        parts.append("</tbody></table></div>")
    parts.append('<h2>Pictures</h2><div class="pictures">')
    for figure, caption in figures.values():
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=150, metadata={"Software": None})
        data = base64.b64encode(image.getvalue()).decode()
        words = html.escape(caption)
        parts.append(
            f'<figure><img alt="{words}" src="data:image/png;base64,{data}"><figcaption>{words}</figcaption></figure>'
        )
    parts.append("</div><h2>Environment</h2><ul>")
    parts += [f"<li>{html.escape(k)}: {html.escape(', '.join(v))}</li>" for k, v in report["environment"].items()]
    parts.append("</ul>")
    # All values, for programs that read the page.
    data = json.dumps(report).replace("<", "\\u003c")
    parts.append(f'<script type="application/json" id="report">{data}</script>')
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
        f'initial-scale=1"><title>{html.escape(report["title"])}</title><style>{STYLE}</style></head><body>'
        + "\n".join(parts)
        + "</body></html>\n"
    )
