"""Kill a run at random moments, resume it each time, and compare its end bit for bit with an uninterrupted run.

    python benchmarks/crash.py                              # 20 kills, one process
    python benchmarks/crash.py --ranks 2 --accumulate       # two gloo ranks, gradients accumulated
    python benchmarks/crash.py --ranks 2 --flags=--fsdp     # the same with sharded checkpoints
    python benchmarks/crash.py --flags="--curriculum et_pp" # any further flags of main_pretrain.py, for both runs

Every other kill waits for a checkpoint to be in the middle of being written. With ranks, a kill hits now the whole
group, as a node that dies, now one random rank, after which the others must end by themselves. A tiny model on the CPU,
with a save at every step: it is the moments that are many. Exit code 1 if a weight, a moment of Adam, a count of the
ledger or a line of metrics.jsonl differs.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
import yaml
from PIL import Image
from rich.console import Console
from rich.table import Table

from mae_et import checkpoint
from mae_et.cli import explain

ROOT = Path(__file__).resolve().parents[1]

RECIPE = {
    "model": "mae_vit_tiny_patch16",
    "input_size": 32,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 2,
    "decoder_embed_dim": 32,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
    "curriculum": "et_pp",
    "epochs": 40,
    "warmup_epochs": 4,
    "batch_size": 8,
    "total_batch_size": 8,
    "num_workers": 1,
    "lr": 1e-3,
    "device": "cpu",
    "print_steps": 1,
    "save_steps": 1,
}
COUNTS = ("steps", "images", "visible_patches", "predicted_patches", "flops")
EXIT_SECONDS = 60
"""How soon the other ranks must have ended after one was killed."""


@dataclass
class Launch:
    """How main_pretrain.py is started: the same recipe each time, in its own process group."""

    recipe: Path
    ranks: int
    flags: list[str]

    @property
    def checkpoint(self) -> str:
        """What it saves on the way; at its end all write checkpoint.pt."""
        return "checkpoint.dcp" if "--fsdp" in self.flags and self.ranks > 1 else "checkpoint.pt"

    def start(self, folder: Path) -> subprocess.Popen:
        program = [sys.executable]
        if self.ranks > 1:
            program += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.ranks}"]
        program += [str(ROOT / "main_pretrain.py"), "--recipe", str(self.recipe), "--output_dir", str(folder)]
        # One thread: sums are then taken in the same order in every process.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        log = (folder.parent / f"{folder.name}.log").open("a")
        return subprocess.Popen(
            [*program, "--resume", "auto", *self.flags], stdout=log, stderr=log, env=environment, start_new_session=True
        )


@dataclass
class Kill:
    """One kill, for the table."""

    number: int
    victim: str
    step: int
    """Steps that the newest checkpoint holds afterwards."""
    during_save: bool
    """A half-written checkpoint was left."""
    seconds: float
    """From the kill to the end of the last process."""


@dataclass(frozen=True)
class CrashConfig:
    """Kill a run at random moments, resume it each time, and compare its end with an uninterrupted run."""

    kills: int = 20
    """How many."""
    ranks: int = 1
    """Processes of the run, over gloo."""
    accumulate: bool = False
    """Micro-batches of 2 images, so that steps accumulate."""
    flags: str = ""
    """Further flags of main_pretrain.py, for both runs."""
    seed: int = 0
    """Of the moments."""
    json: bool = False
    """Machine-readable output."""


def main() -> None:
    options = tyro.cli(CrashConfig, use_underscores=True)
    random.seed(options.seed)
    with tempfile.TemporaryDirectory(prefix="crash-") as temporary:
        folder = Path(temporary)
        draw_images(folder / "images")
        recipe = RECIPE | {"data_path": str(folder / "images")}
        recipe |= {"batch_size": 2} if options.accumulate else {"batch_size": 8 // options.ranks}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        launch = Launch(folder / "recipe.yaml", options.ranks, shlex.split(options.flags))
        finish(launch, folder / "whole")
        total = checkpoint.load(folder / "whole" / "checkpoint.pt")["step"]
        kills = [
            kill_once(launch, folder / "killed", number, total * (number + 1) // (options.kills + 1))
            for number in range(options.kills)
        ]
        finish(launch, folder / "killed")
        problems = differences(folder / "whole", folder / "killed")
        report(kills, total, problems, options)
    raise SystemExit(bool(problems))


def draw_images(folder: Path, count: int = 30) -> None:
    """Small smooth images, so that there is something to learn."""
    folder.mkdir()
    random_numbers = np.random.default_rng(0)
    for i in range(count):
        small = Image.fromarray(random_numbers.integers(0, 256, (3, 3, 3), dtype=np.uint8))
        small.resize((60, 48), Image.Resampling.BICUBIC).save(folder / f"{i:02}.png")


def finish(launch: Launch, folder: Path) -> None:
    """Run to the end of the curriculum."""
    if launch.start(folder).wait():
        sys.exit(f"the run failed:\n{(folder.parent / f'{folder.name}.log').read_text()[-3000:]}")


def kill_once(launch: Launch, folder: Path, number: int, until: int) -> Kill:
    """Resume, wait for about step `until` and a random moment after it, kill, and wait for the end of all processes."""
    process = launch.start(folder)
    while newest_step(folder) < until and process.poll() is None:
        time.sleep(0.002)
    time.sleep(random.uniform(0, 0.05))
    unfinished = folder / f".{launch.checkpoint}.tmp"
    deadline = time.monotonic() + 5
    while number % 2 and not unfinished.exists() and process.poll() is None and time.monotonic() < deadline:
        pass
    if process.poll() is not None:
        sys.exit(f"the run ended before kill {number + 1}: give it more epochs (--flags='--epochs N') or fewer --kills")
    began, ranks = time.monotonic(), workers(process.pid)
    if launch.ranks > 1 and number % 4 >= 2 and ranks:
        victim = random.choice(ranks)
        os.kill(victim, signal.SIGKILL)
        victim = f"rank (process {victim})"
    else:
        os.killpg(process.pid, signal.SIGKILL)
        victim = "all"
    try:
        process.wait(timeout=EXIT_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        sys.exit(f"kill {number + 1}: the other ranks did not end within {EXIT_SECONDS} s")
    seconds = time.monotonic() - began
    for pid in ranks:  # torchrun gives each rank a process group of its own
        if Path(f"/proc/{pid}").exists():
            os.kill(pid, signal.SIGKILL)
    during_save = unfinished.exists()
    content, _ = checkpoint.load_newest(folder / launch.checkpoint)
    return Kill(number + 1, victim, content["step"], during_save, seconds)


def newest_step(folder: Path) -> int:
    """Steps that metrics.jsonl tells of; 0 before there are any."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] + 1 if lines and lines[-1].endswith("}") else 0


def workers(launcher: int) -> list[int]:
    """Processes that a launcher has started."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children")
    return [int(pid) for pid in children.read_text().split()] if children.exists() else []


def differences(whole: Path, killed: Path) -> list[str]:
    """What the two runs don't have in common, bit for bit."""
    one, other = (checkpoint.load(folder / "checkpoint.pt") for folder in (whole, killed))
    found = [f"{name}: {a} and {b}" for name in ("step",) if (a := one[name]) != (b := other[name])]
    for part in ("model", "optimizer"):
        a, b = dict(tensors(one[part])), dict(tensors(other[part]))
        found += [f"{part}: {name}" for name in sorted(a.keys() | b.keys()) if not same(a.get(name), b.get(name))]
    for name in COUNTS:
        a, b = ([account[name] for account in state["ledger"]["stages"]] for state in (one, other))
        if a != b:
            found.append(f"ledger: {name}: {a} and {b}")
    lines = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (whole, killed)
    ]
    for name in ("step", "loss", "lr", "images"):
        if [line[name] for line in lines[0]] != [line[name] for line in lines[1]]:
            found.append(f"metrics.jsonl: {name}")
    return found


def tensors(value: Any, path: str = "") -> list[tuple[str, Any]]:
    """The leaves of nested dicts and lists, with their places."""
    if isinstance(value, dict):
        return [leaf for key in value for leaf in tensors(value[key], f"{path}.{key}")]
    if isinstance(value, (list, tuple)):
        return [leaf for i, item in enumerate(value) for leaf in tensors(item, f"{path}.{i}")]
    return [(path, value)]


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b


def report(kills: list[Kill], total: int, problems: list[str], options: CrashConfig) -> None:
    if options.json:
        result = {"steps": total, "ranks": options.ranks, "kills": [vars(kill) for kill in kills], "differs": problems}
        print(json.dumps(result, indent=1))
        return
    table = Table(
        title=f"{len(kills)} kills of a run of {total} steps on {options.ranks} rank(s)", title_justify="left"
    )
    for head in ("kill", "victim", "steps saved", "during a save", "seconds to the end"):
        table.add_column(head, justify="right")
    for kill in kills:
        saving = "yes" if kill.during_save else ""
        table.add_row(str(kill.number), kill.victim, str(kill.step), saving, f"{kill.seconds:.2f}")
    console = Console(width=120)
    console.print(table)
    console.print(f"{sum(kill.during_save for kill in kills)} of {len(kills)} kills hit the middle of a save")
    console.print("the end differs: " + "; ".join(problems[:5]) if problems else "the end is the same, bit for bit")


if __name__ == "__main__":
    explain("crash.py", main)
