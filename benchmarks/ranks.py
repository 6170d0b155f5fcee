"""Losses of the same run on 1, 2 and 4 ranks, side by side: the same total batch, data and masks on each.

    python benchmarks/ranks.py
    python benchmarks/ranks.py --ranks 1 2 --flags="--fsdp"   # further flags of main_pretrain.py for several ranks

A tiny model in fp32 on the CPU over gloo. Exit code 1 if a loss differs by more than rounding explains.
"""

from __future__ import annotations

import json
import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro
import yaml
from crash import RECIPE, Launch, draw_images, finish
from rich.console import Console
from rich.table import Table

from mae_et.cli import explain

TOLERANCE = 1e-4
"""Relative, of a loss."""
ROWS = 12
"""Steps that are printed."""


@dataclass(frozen=True)
class RanksConfig:
    """Compare the losses of runs on several numbers of ranks."""

    ranks: tuple[int, ...] = (1, 2, 4)
    """Numbers of processes; the first one is what the others are compared with."""
    total_batch_size: int = 8
    """Images per step over all ranks."""
    flags: str = ""
    """Further flags of main_pretrain.py for runs on several ranks."""


def main() -> None:
    options = tyro.cli(RanksConfig, use_underscores=True)
    with tempfile.TemporaryDirectory(prefix="ranks-") as temporary:
        folder = Path(temporary)
        draw_images(folder / "images")
        changes = {"precision": "fp32", "save_steps": 0, "total_batch_size": options.total_batch_size, "batch_size": 2}
        recipe = RECIPE | changes | {"data_path": str(folder / "images")}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        losses = []
        for ranks in options.ranks:
            flags = shlex.split(options.flags) if ranks > 1 else []
            finish(Launch(folder / "recipe.yaml", ranks, flags), folder / f"ranks{ranks}")
            lines = (folder / f"ranks{ranks}" / "metrics.jsonl").read_text().splitlines()
            losses.append([json.loads(line)["loss"] for line in lines])
    steps = len(losses[0])
    assert all(len(some) == steps for some in losses), "every run reports every step"
    worst = max(abs(other[i] / losses[0][i] - 1) for other in losses[1:] for i in range(steps))
    table = Table(title=f"Loss by step, total batch {options.total_batch_size} {options.flags}", title_justify="left")
    for head in ("step", *(f"{ranks} rank(s)" for ranks in options.ranks)):
        table.add_column(head, justify="right")
    for step in sorted({round(i * (steps - 1) / (ROWS - 1)) for i in range(ROWS)}):
        table.add_row(str(step + 1), *(f"{some[step]:.6f}" for some in losses))
    console = Console(width=120)
    console.print(table)
    console.print(f"largest relative difference over all {steps} steps: {worst:.1e}")
    raise SystemExit(worst > TOLERANCE)


if __name__ == "__main__":
    explain("ranks.py", main)
