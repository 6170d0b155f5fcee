"""What each ingredient of a stack gives: a picture of a study's arms, one changed thing after the other.

    python benchmarks/waterfall.py docs/results/STUDY --protocol linear_probe-mean --out FILE.png \\
        --chain ARM=LABEL ARM=LABEL … [--without ARM=LABEL …]

The first bar is the first arm of the chain, each further one what its arm has over the one before. Arms of `--without`
lack one thing of the last: their bars are what is lost. Lines are standard deviations over seeds, of the arm itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import tyro
from matplotlib.figure import Figure

from mae_et.cli import explain
from mae_et.compare.compare import CompareConfig, compare
from mae_et.compare.figures import COLOURS, FIGURE_INCHES
from mae_et.plan.shapes import choice

FLOPS_TOLERANCE = 0.03


@dataclass(frozen=True)
class WaterfallConfig:
    """Draw what each arm of a chain has over the one before."""

    results: tyro.conf.Positional[Path]
    """Folder of a study's kept runs."""
    protocol: str
    """Evaluation, as `compare` names it."""
    chain: tuple[str, ...]
    """ARM=LABEL, from the first arm to the full stack."""
    out: Path
    """PNG to write."""
    without: tuple[str, ...] = ()
    """ARM=LABEL, the full stack without one thing."""


class Bar(NamedTuple):
    """One arm: its label, mean and standard deviation over seeds (0 for one seed), and where the bar starts."""

    label: str
    mean: float
    std: float
    start: float


def bars(report: dict[str, Any], config: WaterfallConfig) -> list[Bar]:
    """Bars from the top to the bottom. ValueError names an arm that isn't there, or whose FLOPs differ."""
    arms = {arm["name"]: arm for arm in report["arms"]}
    if not config.chain:
        raise ValueError(f"--chain is empty; choose from {', '.join(arms)}")
    protocols = sorted({protocol for arm in arms.values() for protocol in arm["quality"]})
    choice("--protocol", config.protocol, protocols)
    found: list[Bar] = []
    flops: list[float] = []
    for word in (*config.chain, *config.without):
        name, _, label = word.partition("=")
        key = name.replace(" ", "_")
        if key not in arms or config.protocol not in arms[key]["quality"]:
            have = ", ".join(arm for arm in arms if config.protocol in arms[arm]["quality"])
            raise ValueError(f"no arm {name!r} with {config.protocol} in {config.results}; choose from {have}")
        quality = arms[key]["quality"][config.protocol]
        flops.append(arms[key]["flops"])
        before = found[: len(config.chain)][-1:]  # of those that lack one thing: the full stack
        start = before[0].mean if before else 0.0
        found.append(Bar(label or name, quality["mean"], quality["std"] or 0.0, start))
    if max(flops) > (1 + FLOPS_TOLERANCE) * min(flops):
        raise ValueError(f"the arms' FLOPs differ, {min(flops):.3g} to {max(flops):.3g}; compare at equal FLOPs")
    return found


def draw(found: Sequence[Bar], chain: int, protocol: str) -> Figure:
    """Horizontal bars on an axis that begins near the first; the first `chain` of them are the chain's."""
    figure, plot = plt.subplots(figsize=(FIGURE_INCHES[0], 1.0 + 0.42 * len(found)), layout="constrained")
    lowest = min(bar.mean - bar.std for bar in found)
    highest = max(bar.mean + bar.std for bar in found)
    left = lowest - 0.25 * (highest - lowest)
    for row, bar in enumerate(found):
        start = max(bar.start, left)
        colour = COLOURS[7] if row == 0 else COLOURS[2] if bar.mean >= bar.start else COLOURS[1]
        plot.barh(row, bar.mean - start, left=start, color=colour, height=0.6)
        plot.errorbar(bar.mean, row, xerr=bar.std, color="black", lw=1, capsize=2)
        change = "" if row == 0 else f" ({bar.mean - bar.start:+.1f})"
        beside = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
        plot.annotate(f"{bar.mean:.1f}{change}", (max(bar.mean + bar.std, start), row), **beside)
    if chain < len(found):
        plot.axhline(chain - 0.5, color="#666666", ls=":", lw=1)
    plot.set_xlim(left, highest + 0.25 * (highest - left))
    plot.set_yticks(range(len(found)), [bar.label for bar in found], fontsize=8)
    plot.invert_yaxis()
    plot.set_xlabel(f"{protocol}, top-1 %")
    return figure


def main() -> None:
    config = tyro.cli(WaterfallConfig, use_underscores=True)
    report = compare(CompareConfig((str(config.results),)))
    draw(bars(report, config), len(config.chain), config.protocol).savefig(config.out, dpi=110)


if __name__ == "__main__":
    explain("waterfall.py", main)
