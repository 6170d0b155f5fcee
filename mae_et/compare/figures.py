"""Pictures of a comparison."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from .words import AXIS_LABELS, ONLINE, captions, number

#: Okabe and Ito's colours, which people with any colour vision can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = "osD^vP*X"
COLUMN_CHARACTERS = 40
FIGURE_INCHES = (5.6, 4.2)
"""Small enough for its text to be read on a phone."""


def draw_figures(report: Mapping[str, Any]) -> dict[str, Figure]:
    """Pictures by name, those that :func:`captions` names."""
    arms = [arm for arm in report["arms"] if arm["stages"]]
    figures = {}
    for name in captions(report):
        kind, _, rest = name.partition("-")
        if name == "loss":
            figures[name] = _draw_loss(arms)
        elif kind == "online":
            figures[name] = _draw_online(arms, rest)
        elif kind == "stages":
            figures[name] = _draw_stages(arms, rest)
        else:
            protocol, _, axis = name.rpartition("-")
            figures[name] = _draw_quality(report, arms, protocol, axis)
    return figures


def _draw_quality(report: Mapping, arms: Sequence[Mapping], protocol: str, axis: str) -> Figure:
    figure, plot = plt.subplots(figsize=FIGURE_INCHES, layout="constrained")
    families = list(dict.fromkeys(arm["family"] for arm in arms if protocol in arm["quality"]))
    ticks = []
    for i, family in enumerate(families):
        turn, place = divmod(i, len(COLOURS))  # each turn, a colour has another marker
        colour, marker, points = COLOURS[place], MARKERS[(place + turn) % len(MARKERS)], []
        members = [arm for arm in arms if arm["family"] == family and protocol in arm["quality"]]
        for arm in members:
            cost = arm["flops"] if axis == "flops" else arm["seconds"]["mean"]
            summary = arm["quality"][protocol]
            points.append((cost, summary["mean"]))
            ticks += [cost] if arm["baseline"] else []
            plot.plot([cost] * summary["n"], summary["values"], marker, color=colour, alpha=0.35, ms=4, mew=0)
        label = family if len(members) > 1 else members[0]["name"]
        plot.plot(
            *zip(*sorted(points), strict=True), "-", marker=marker, color=colour, ms=6, lw=1.5, label=_shown(label)
        )
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
    _legend(figure)
    return figure


def _legend(figure: Figure) -> None:
    """Below the plot, in two columns where the names fit into them."""
    names = figure.axes[0].get_legend_handles_labels()[1]
    if not names:
        return
    columns = 1 if any(len(name) > COLUMN_CHARACTERS for name in names) else 2
    figure.legend(loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def _shown(name: str) -> str:
    """A name in a legend, from which matplotlib leaves out those that begin with an underscore."""
    return textwrap.fill(f" {name}" if name.startswith("_") else name, 2 * COLUMN_CHARACTERS, drop_whitespace=False)


def _draw_loss(arms: Sequence[Mapping]) -> Figure:
    figure, axis = plt.subplots(figsize=FIGURE_INCHES, layout="constrained")
    for i, arm in enumerate(arms):
        for j, curve in enumerate(arm["loss"]):
            colour, dashes = COLOURS[i % len(COLOURS)], "-" if i < len(COLOURS) else "--"
            axis.plot(
                curve["p"],
                curve["loss"],
                dashes,
                color=colour,
                lw=1,
                alpha=0.8,
                label=None if j else _shown(arm["name"]),
            )
    axis.set_xlabel("p, share of the compute")
    axis.set_ylabel("training loss")
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.yaxis.set_minor_formatter(FuncFormatter(lambda v, _: f"{v:.2g}"))
    axis.grid(alpha=0.25, which="both")
    _legend(figure)
    return figure


def _draw_online(arms: Sequence[Mapping], name: str) -> Figure:
    figure, plot = plt.subplots(figsize=FIGURE_INCHES, layout="constrained")
    for i, arm in enumerate(arms):
        for j, curve in enumerate(curve for curve in arm["online_curves"] if name in curve):
            colour, dashes = COLOURS[i % len(COLOURS)], "-" if i < len(COLOURS) else "--"
            label = None if j else _shown(arm["name"])
            plot.plot(curve["flops"], curve[name], dashes, color=colour, lw=1, alpha=0.8, label=label)
    plot.set_xscale("log")
    plot.set_xlabel(AXIS_LABELS["flops"])
    plot.set_ylabel(ONLINE[name] + (", top-1 %" if name.startswith("knn") else ""))
    plot.grid(alpha=0.25)
    _legend(figure)
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
