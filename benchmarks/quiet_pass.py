"""Time the arms of a study anew, on a quiet machine: one step of every stage of every arm in turn, loader included.

    python benchmarks/quiet_pass.py docs/results/solar_cells_patch6
    python -m mae_et compare docs/results/solar_cells_patch6 --out docs/results/solar_cells_patch6

A run's own seconds are those of its hour, with whatever else ran then. Here what slows the machine slows all arms
alike. Each run gets a timing.json, also in an archive; `compare` takes seconds from there where all runs have one.

An arm's steps are dealt out to its seeds, so that their spread is that of the clock. Real images from the path in the
runs' configuration, real stages, model and optimiser, in one process; no checkpoint is needed. The loader runs in that
process, without workers, as in a run with --num_workers 0.
"""

from __future__ import annotations

import mae_et  # noqa: F401, before torch: it sets how OpenMP threads wait

# isort: split
import dataclasses
import json
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from equal_accuracy import archived, locked, write_archive
from synthetic import Stopwatch, synthetic_run

from mae_et import files
from mae_et.cli import explain
from mae_et.compare.arms import Arm, group
from mae_et.compare.runs import RunRecord, Timing, read_run, runs_in
from mae_et.data.sources import count_images, open_source
from mae_et.engine import runtime
from mae_et.engine.pretrain import warm_up
from mae_et.engine.run_folder import TIMING


@dataclass(frozen=True)
class QuietPassConfig:
    """Time the steps of all runs of a study in turn."""

    results: tyro.conf.Positional[Path]
    """Folder of run folders, or of their runs.zip."""
    rounds: int = 10
    """Steps of each stage for every seed."""


def main() -> None:
    options = tyro.cli(QuietPassConfig, use_underscores=True)
    if options.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {options.rounds}")
    if not options.results.is_dir():
        raise FileNotFoundError(f"{options.results}: no such folder; give a study's --keep")
    runs = {name: read_run(folder) for name, folder in runs_in(options.results).items()}
    pretrained = {name: run for name, run in runs.items() if run.ledger}
    if not pretrained:
        raise FileNotFoundError(f"{options.results} holds no pretraining run")
    asked = {(run.config.device, run.config.precision) for run in pretrained.values()}
    if len(asked) > 1:  # what auto became may be one after all
        used = [(run.config, run.environment.get("precision")) for run in pretrained.values()]
        asked = {(config.device, precision or config.precision) for config, precision in used}
    if len(asked) > 1:
        raise ValueError(f"the runs ask for several devices or precisions, {sorted(asked)}; time those of one")
    if several := [str(run.folder) for run in pretrained.values() if run.environment.get("devices", 1) > 1]:
        raise ValueError(f"{several[0]} was made on several devices; this pass has one process")
    began = time.perf_counter()
    timings = measure(list(pretrained.values()), options.rounds, *asked.pop())
    book(options.results, {name: timings[run.folder] for name, run in pretrained.items()})
    print(f"timed {len(pretrained)} runs in {time.perf_counter() - began:.0f} s")


def measure(runs: list[RunRecord], rounds: int, device: str, precision: str) -> dict[Path, Timing]:
    """Timing of each run, by its folder. ValueError where a run would have other stages here."""
    began = time.strftime("%Y-%m-%d %H:%M:%S")
    arms = group(runs)
    seeds = max(len(arm.runs) for arm in arms)
    with runtime.start(device, precision) as rt:
        watches = {arm.name: watch(arm, rt) for arm in arms}
        for each in range(rounds * seeds):
            for arm in arms:
                for stage in watches[arm.name]:
                    if each % seeds < len(arm.runs):  # an arm with fewer seeds sits the others' turns out
                        stage.step()
        return {
            run.folder: timing(watches[arm.name], i, len(arm.runs), rt.describe(), began)
            for arm in arms
            for i, run in enumerate(arm.runs)
        }


def watch(arm: Arm, rt: runtime.Runtime) -> list[Stopwatch]:
    """Stopwatches of an arm's stages."""
    first = arm.runs[0]
    config = replace(first.config, num_workers=0)
    run = synthetic_run(config, rt, count_images(config))
    run.value_range = first.environment.get("value_range")
    planned = [(stage.size_px, stage.steps) for stage in run.curriculum.stages]
    if planned != (ran := [(cost.size_px, cost.steps) for cost in first.ledger.stages]):
        raise ValueError(f"{first.folder} ran stages (size, steps) {ran}, its configuration plans {planned} here")
    warm_up(run)
    source = open_source(config.data_path, "train")
    return [Stopwatch.of(run, stage, source) for stage in run.curriculum.stages]


def timing(stages: list[Stopwatch], turn: int, turns: int, device: str, began: str) -> Timing:
    """Medians of every `turns`-th step of each stage, from number `turn` on."""
    waits = [stage.data_seconds[turn::turns] for stage in stages]
    steps = [stage.seconds[turn::turns] for stage in stages]
    train = [[s - w for s, w in zip(*pair, strict=True)] for pair in zip(steps, waits, strict=True)]
    return Timing(device, began, len(steps[0]), *(tuple(map(statistics.median, each)) for each in (train, waits)))


def book(results: Path, timings: dict[str, Timing]) -> None:
    """Write each run's timing.json, beside its other files: in its folder, or in the archive."""
    runs, inside = runs_in(results), {}
    for name, timing in timings.items():
        text = json.dumps(dataclasses.asdict(timing), indent=1) + "\n"
        if isinstance(folder := runs[name], Path):
            files.write_text(folder / TIMING, text)
        else:
            inside[f"{name}/{TIMING}"] = text.encode()
    if inside:
        with locked(results):
            write_archive(results, archived(results) | inside)


if __name__ == "__main__":
    explain("quiet_pass.py", main)
