"""What waits for torch? CPU seconds of commands that train nothing, over those of `import torch`, in turn.

    python benchmarks/start.py

A round starts each command once, and a bare `import torch`; the ratio is that of the same round.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from mae_et.cli import explain

ROOT = Path(__file__).parent.parent
COMMANDS = {
    "import torch": ("-c", "import torch"),
    "main_pretrain.py --help": ("main_pretrain.py", "--help"),
    "main_finetune.py --help": ("main_finetune.py", "--help"),
    "a wrong flag": ("main_pretrain.py", "--mask_ratoi", "0.5"),
    "a wrong recipe": ("main_pretrain.py", "--recipe", "nonsense"),
    "plan": ("-m", "mae_et", "plan", "--recipe", "in1k_vitb_etpp400_hog", "--vs", "in1k_vitb_mae1600"),
    "compare --help": ("-m", "mae_et", "compare", "--help"),
    "search --help": ("-m", "mae_et", "search", "--help"),
    "export --help": ("-m", "mae_et", "export", "--help"),
}


@dataclass(frozen=True)
class StartConfig:
    """CPU seconds of commands over those of `import torch`."""

    rounds: int = 5
    """Starts of each."""


def main() -> None:
    options = tyro.cli(StartConfig)
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(options.rounds):
        for name, arguments in COMMANDS.items():
            seconds[name].append(cpu_seconds(arguments))
    table = Table(title=f"CPU seconds, median of {options.rounds}, and their share of `import torch`")
    for head in ("command", "CPU seconds", "of import torch"):
        table.add_column(head, justify="left" if head == "command" else "right")
    for name, values in seconds.items():
        shares = [value / torch for value, torch in zip(values, seconds["import torch"], strict=True)]
        table.add_row(name, f"{median(values):.2f}", f"{median(shares):.2f}")
    Console().print(table)


def cpu_seconds(arguments: tuple[str, ...]) -> float:
    """User and system time of one start; its exit code doesn't matter."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


if __name__ == "__main__":
    explain("start.py", main)
