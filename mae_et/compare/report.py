"""Rendering of a comparison: tables on the terminal, Markdown with pictures, and one self-contained HTML file."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from ..console import WideTable
from ..files import make_folder, write_json, write_text
from .figures import draw_figures
from .words import (
    AXIS_LABELS,
    ONLINE,
    answer_compute,
    answer_quality,
    captions,
    gibibytes,
    number,
    online_names,
    opening,
    spread,
    verdict,
    wide_note,
)

Row = Sequence[str]


def write_report(report: Mapping[str, Any], out: Path) -> list[Path]:
    """report.json, report.md with its pictures, and report.html, in a folder; returns their paths."""
    make_folder(out, "--out")
    figures = draw_figures(report)
    paths = [out / "report.json", out / "report.md", out / "report.html"]
    write_json(paths[0], report)
    write_text(paths[1], markdown(report))
    write_text(paths[2], html_page(report, figures))
    for name, figure in figures.items():
        path = out / f"{name}.png"
        figure.savefig(path, dpi=110, metadata={"Software": None})
        plt.close(figure)
        paths.append(path)
    return paths


# ── tables: heads and rows of text, for every kind of report ──


def arm_table(report: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """Cost and quality of each arm."""
    heads = ["arm", "n", "steps", "images", "passes", "FLOPs", "seconds", "data wait", "memory GiB"]
    energy = any(arm["energy_joules"] for arm in report["arms"])
    decoded = any(arm["decoded_images"] < arm["images"] for arm in report["arms"])
    online = online_names(report)
    heads += (["decoded"] if decoded else []) + (["energy kJ"] if energy else []) + list(report["protocols"])
    heads += [ONLINE[name] for name in online]
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
        row += [spread(arm["quality"].get(protocol)) for protocol in report["protocols"]]
        rows.append(row + [spread(arm["online"].get(name)) for name in online])
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
        *wide_note(report),
        f"Baseline: {', '.join(report['baseline'])}. ± is the sample standard deviation over seeds; brackets are 95 % "
        "bootstrap intervals over seeds; between the baseline's arms, quality is interpolated linearly in log cost. "
        "Accuracies are top-1 in per cent. Seconds are training and waiting for data.",
        "Per stage, the speed-ups are per image, against the baseline; their ratio is 1 where time falls as FLOPs do.",
    ]


def terminal_tables(report: Mapping[str, Any]) -> list[WideTable]:
    """The report as rich tables."""
    tables = []
    for title, build, keys in (
        ("Cost and quality", arm_table, 1),
        ("Two answers", answer_table, 2),
        ("Stages", stage_table, 2),
    ):
        heads, rows = build(report)
        shown = [i for i, head in enumerate(heads) if head not in ("visible", "predicted", "patches")]  # for the width
        names = [heads[i] for i in shown]
        tables.append(WideTable(title, names, [[row[i] for i in shown] for row in rows], left=names[:1], keys=keys))
    return tables


# ── files ──

SECTIONS = (
    ("Cost and quality", arm_table),
    ("Equal compute and equal quality", answer_table),
    ("Stages", stage_table),
    ("What the arms are", difference_table),
)


def markdown(report: Mapping[str, Any]) -> str:
    """report.md: the verdict, tables, and the pictures beside it."""
    words, first = captions(report), opening(report)
    parts = [f"# {report['title']}", "\n## Verdict\n"]
    for head, sentences in verdict(report):
        parts += [f"- **{head}**", *(f"  - {sentence}" for sentence in sentences)]
    parts.append("")
    parts += [f"![{words[name]}]({name}.png)" for name in first]
    parts += ["\n## How to read it\n", *(f"- {note}" for note in notes(report))]
    for title, build in SECTIONS:
        heads, rows = build(report)
        lines = [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)]
        parts.append(f"\n## {title}\n\n" + "\n".join(lines))
    parts.append("\n## Pictures\n")
    parts += [f"![{caption}]({name}.png)\n\n{caption}\n" for name, caption in words.items() if name not in first]
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


def html_page(report: Mapping[str, Any], figures: Mapping[str, Figure]) -> str:
    """report.html: the same in one file, pictures and figures included."""
    baseline = {f"{arm['name']} (baseline)" for arm in report["arms"] if arm["baseline"]}
    words, first = captions(report), opening(report)
    parts = [f"<h1>{html.escape(report['title'])}</h1>", "<h2>Verdict</h2><ul>"]
    for head, sentences in verdict(report):
        lines = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
        parts.append(f"<li><b>{html.escape(head)}</b><ul>{lines}</ul></li>")
    parts += ["</ul>", _pictures({name: words[name] for name in first}, figures), "<h2>How to read it</h2><ul>"]
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
    parts += ["<h2>Pictures</h2>", _pictures({n: text for n, text in words.items() if n not in first}, figures)]
    parts.append("<h2>Environment</h2><ul>")
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


def _pictures(captions: Mapping[str, str], figures: Mapping[str, Figure]) -> str:
    parts = ['<div class="pictures">']
    for name, caption in captions.items():
        image = io.BytesIO()
        figures[name].savefig(image, format="png", dpi=150, metadata={"Software": None})
        data = base64.b64encode(image.getvalue()).decode()
        text = html.escape(caption)
        parts.append(
            f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'
        )
    return "\n".join([*parts, "</div>"])
