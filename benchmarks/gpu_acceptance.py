"""Does mae_et work on this GPU, and is it fast? One command, under 9 minutes on an H100, no network, one JSON.

    python benchmarks/gpu_acceptance.py --json gpu_acceptance.json [--budget 530] [--steps env parity …]
    python tests/nullgpu benchmarks/gpu_acceptance.py --dry_run --steps sync      # whether it runs, without a GPU

Each step has a process of its own, since a CUDA error spoils a process, and a limit of seconds; what it has found is on
disk when it is stopped. A check has a name, a value, a limit and whether it passed; other numbers are `measured`. Steps
that don't fit into the budget are skipped, and say so. Exit status: the number of failed checks, 100 at most.

Correctness is in gpu_correct.py, speed in gpu_speed.py.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Where each step is, and the seconds that it may take; what matters most comes first.
STEPS = {
    "env": ("gpu_speed", 40),
    "parity": ("gpu_correct", 80),
    "sync": ("gpu_correct", 40),
    "speed": ("gpu_speed", 150),
    "rival": ("gpu_speed", 60),
    "loader": ("gpu_speed", 80),
    "ranks": ("gpu_correct", 60),
    "resume": ("gpu_correct", 60),
    "attention": ("gpu_speed", 30),
    "out_of_memory": ("gpu_correct", 20),
    "downstream": ("gpu_correct", 60),
}
SHORTEST_SECONDS = 10
"""With less left, a step isn't begun."""


@dataclass
class Report:
    """What one step has found, on disk after every line."""

    path: Path
    dry_run: bool
    """Numbers mean nothing: they are reported, and not checked."""
    checks: list[dict[str, Any]] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)

    def check(self, name: str, passed: bool, value: Any = None, limit: Any = None) -> None:
        self.checks.append({"name": name, "value": value, "limit": limit, "passed": bool(passed)})
        wanted = "" if limit is None else f" (wanted: {limit})"
        print(f"{'ok  ' if passed else 'FAIL'} {name}: {value}{wanted}", flush=True)
        self._save()

    def below(self, name: str, value: float, limit: float) -> None:
        self.check(name, self.dry_run or (math.isfinite(value) and value < limit), value, f"< {limit:g}")

    def at_least(self, name: str, value: float, limit: float) -> None:
        self.check(name, self.dry_run or value >= limit, value, f">= {limit:g}")

    def note(self, name: str, value: Any) -> None:
        self.measured[name] = value
        print(f"     {name}: {json.dumps(value)}", flush=True)
        self._save()

    def _save(self) -> None:
        self.path.write_text(json.dumps({"checks": self.checks, "measured": self.measured}, indent=1))


@dataclass(frozen=True)
class Options:
    json: Path
    work: Path
    budget: float
    steps: list[str]
    only: str
    dry_run: bool
    scale_limits: float

    @classmethod
    def parse(cls) -> Options:
        parser = argparse.ArgumentParser(
            description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        parser.add_argument("--json", type=Path, default=Path("gpu_acceptance.json"), help="what was found")
        parser.add_argument("--work", type=Path, default=Path("gpu_acceptance"), help="folder for logs and runs")
        parser.add_argument("--budget", type=float, default=530, help="seconds for all steps")
        parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="what to run")
        parser.add_argument("--only", choices=["", *STEPS], default="", help="run one step in this process")
        parser.add_argument("--dry_run", action="store_true", help="tiny models; numbers are not checked")
        parser.add_argument("--scale_limits", type=float, default=1, help="factor on the steps' seconds")
        return cls(**vars(parser.parse_args()))


def run_step(name: str, seconds: float, options: Options) -> dict[str, Any]:
    """Run a step in a process of its own; what it has found, its seconds, and how it ended."""
    found, log, began = options.work / f"{name}.json", options.work / f"{name}.log", time.monotonic()
    found.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--only", name, "--work", str(options.work)]
    command += ["--dry_run"] if options.dry_run else []
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with its loaders' workers
            status = f"stopped after {seconds:.0f} s"
            process.wait()
    data = json.loads(found.read_text()) if found.exists() else {"checks": [], "measured": {}}
    if status:
        tail = log.read_text()[-1500:]
        data["checks"].append({"name": f"{name} ends", "value": status, "limit": 0, "passed": False, "tail": tail})
    return data | {"seconds": round(time.monotonic() - began, 1)}


def run_all(options: Options) -> int:
    """Run the steps that fit; returns the number of failed checks."""
    began, steps = time.monotonic(), {}
    options.work.mkdir(parents=True, exist_ok=True)
    for name in options.steps:
        limit = options.scale_limits * STEPS[name][1]
        seconds = min(limit, options.budget - (time.monotonic() - began))
        if seconds < SHORTEST_SECONDS:
            steps[name] = {"skipped": "no time left in the budget"}
            print(f"── {name}: skipped, no time left", flush=True)
        else:
            print(f"── {name}, {seconds:.0f} s at most", flush=True)
            steps[name] = run_step(name, seconds, options)
            print((options.work / f"{name}.log").read_text()[-4000:], flush=True)
        failed = [check["name"] for step in steps.values() for check in step.get("checks", []) if not check["passed"]]
        summary = {"failed": failed, "seconds": round(time.monotonic() - began, 1), "dry_run": options.dry_run}
        options.json.write_text(json.dumps(summary | {"steps": steps}, indent=1))
    print(f"{len(failed)} failed {failed}; {summary['seconds']:.0f} s; {options.json}")
    return min(len(failed), 100)


def main() -> None:
    options = Options.parse()
    if not options.only:
        sys.exit(run_all(options))
    import importlib

    import torch

    if options.dry_run:  # there is no null cuDNN
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.backends.cudnn.enabled = False
    step = getattr(importlib.import_module(STEPS[options.only][0]), options.only)
    step(Report(options.work / f"{options.only}.json", options.dry_run), options.work)
    sys.stdout.flush()
    os._exit(0)  # without the interpreter's end, in which CUDA can wait for what is gone


if __name__ == "__main__":
    main()
