"""Finding a schedule: the two searches of EfficientTrain and EfficientTrain++, for MAE and for any data.

`greedy` (ET, arXiv 2211.09703, Algorithm 1) asks, from the first stage on, how small a stage may be without the final
quality falling below vanilla's. `sequential` (ET++, arXiv 2405.08768, Algorithm 2) gives every stage the same compute,
so that a smaller one takes more steps, and asks which size serves best. docs/search.md says what is done otherwise.

The algorithms decide; `trials` trains and judges; the results file remembers, so that a search can be killed.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..data.sources import open_source
from ..engine import run_folder
from ..plan.config import PretrainConfig
from ..plan.flags import to_dict
from .space import Option, Schedule, SearchConfig, Space, at_full, fill, growing
from .trials import Trial, Workers, delete_weights, seconds_of_vanilla

log = logging.getLogger(__name__)

RESULTS, RECIPE, PICTURE = "search.jsonl", "recipe.yaml", "candidates.png"
FORMAT = "mae_et-search/1"
#: What may change when a search goes on: it changes nothing about what is found.
FREE = frozenset(
    """
    recipe jobs devices budget dry_run output_dir log_dir overwrite resume device num_workers pin_mem num_images
    cache_gib print_steps save_steps save_minutes keep_checkpoints picture_steps print_config
    world_size local_rank dist_on_itp dist_url job_dir nodes ngpus use_volta32
    """.split()
)


Selected = list[list[Schedule]]
"""Of the schedules of each call of a judge, those that the search went on with."""
Judge = Callable[[Sequence[Schedule]], list[float]]
"""Scores of schedules, more is better; raises OutOfBudget instead of starting what can't be paid."""


class OutOfBudget(ValueError):
    """The next candidates cost more than is left."""


def sequential(
    options: Sequence[Option], full: Option, num_stages: int, judge: Judge, halving: bool = False
) -> tuple[Schedule, Selected]:
    """ET++'s search: stage after stage, the option that is judged best after the stages chosen before it.

    Sizes never shrink from one stage to the next, and the last stage, at full size, is not searched.
    """
    share, chosen, taken = 1 / num_stages, (), []
    parts = (0.5, 0.5) if halving else (1.0,)
    try:
        for _ in range(num_stages - 1):
            alive = dict.fromkeys(growing(options, chosen), chosen)
            if list(alive) == [at_full(full, chosen)]:
                break  # whatever a judge would say
            for i, part in enumerate(parts):
                alive = {option: (*before, (option, part * share)) for option, before in alive.items()}
                scores = dict(zip(alive, judge(list(alive.values())), strict=True))
                ranked = sorted(alive, key=scores.get, reverse=True)  # stable: of equals the smallest
                keep = 1 if i == len(parts) - 1 else math.ceil(len(ranked) / 2)
                alive = {option: alive[option] for option in options if option in ranked[:keep]}
                taken.append(list(alive.values()))
            (chosen,) = alive.values()
    except OutOfBudget as stop:
        log.warning("%s; the rest of the stages is at full size", stop)
    return fill(chosen, full), taken


def greedy(
    options: Sequence[Option], full: Option, num_stages: int, judge: Judge, tolerance: float, at_once: int = 1
) -> tuple[Schedule, Selected]:
    """ET's search: from the first stage on, the smallest option with which the whole run is within `tolerance` of one
    at full size. Stages later than the one that is searched are at full size meanwhile.

    at_once: schedules that are judged side by side; more of them may cost runs that one after the other would not.
    """
    share, chosen, taken = 1 / num_stages, (), []
    try:
        goal = judge([fill((), full)])[0] - tolerance
        taken.append([])
        for _ in range(num_stages - 1):
            smaller = [option for option in growing(options, chosen) if option != at_full(full, chosen)]
            found = None
            for some in batched(smaller, at_once):
                schedules = [fill((*chosen, (option, share)), full) for option in some]
                scores = judge(schedules)
                holding = [i for i, score in enumerate(scores) if score >= goal][:1]
                taken.append([schedules[i] for i in holding])
                if holding:
                    found = some[holding[0]]
                    break
            if not found:
                break  # and what comes later can't be smaller
            chosen = (*chosen, (found, share))
    except OutOfBudget as stop:
        log.warning("%s; the rest of the stages is at full size", stop)
    return fill(chosen, full), taken


def batched(items: Sequence[Option], size: int) -> Iterator[Sequence[Option]]:
    for i in range(0, len(items), size):
        yield items[i : i + size]


# ── results ──


class Results:
    """search.jsonl: what this search is, then one line for every trial that is done. Only appended to."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path, self.by_name = path, {}
        lines = path.read_text().splitlines() if path.exists() else []
        whole = []
        for line in lines:
            try:
                whole.append(json.loads(line))
            except json.JSONDecodeError:
                break  # the last line of a killed search may be half a line
        if not whole:
            path.parent.mkdir(parents=True, exist_ok=True)
            run_folder.write_text(path, json.dumps({"format": FORMAT, "search": identity}) + "\n")
            return
        if whole[0].get("format") != FORMAT:
            raise ValueError(f"--output_dir: {path} is not a results file of a search")
        for name, value in identity.items():
            if (was := whole[0]["search"].get(name)) != value:
                raise ValueError(
                    f"--output_dir: {path} is of another search: {name} was {was}, is {value}; choose another folder, "
                    "or replace it with --overwrite"
                )
        if len(whole) < len(lines):
            run_folder.write_text(path, "".join(json.dumps(record) + "\n" for record in whole))
        self.by_name = {record["name"]: record for record in whole[1:]}

    def add(self, record: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self.by_name[record["name"]] = record

    @property
    def flops(self) -> float:
        return sum(record["flops"] for record in self.by_name.values())


class CandidateEvaluator:
    """Judges schedules by trials over all seeds: those that are in the results, and new ones within the budget."""

    def __init__(self, space: Space, results: Results, workers: Workers) -> None:
        self.space, self.results, self.workers = space, results, workers
        self.rounds: list[dict[Schedule, list[float]]] = []
        """What was asked for, in order, with the scores over the seeds."""
        self.trunks: set[str] = set()
        """Folders whose weights later trials may branch from."""
        self.exhausted = False

    def __call__(self, schedules: Sequence[Schedule]) -> list[float]:
        space, config, known = self.space, self.space.config, self.results.by_name
        seeds = range(config.seed, config.seed + config.num_seeds)
        trials = {(s, seed): space.trial(s, seed) for s in schedules for seed in seeds}
        missing = [key for key, trial in trials.items() if trial.name not in known]
        left = math.inf if config.budget is None else config.budget - self.results.flops / space.vanilla_flops
        if (needed := sum(space.cost(schedule) for schedule, _ in missing)) > left:
            self.exhausted = True
            raise OutOfBudget(f"--budget {config.budget:g}: {needed:.2f} vanilla runs are needed, {left:.2f} left")
        for record in self.workers.run([trials[key] for key in missing]):
            record |= {"round": len(self.rounds)}
            self.results.add(record)
            scores = ", ".join(f"{name} {abs(value):.2f}" for name, value in record["scores"].items())
            log.info("%s: %s, after %.0f s", record["name"], scores, record["seconds"])
        self._tidy(trials.values())
        found = {s: [known[trials[s, seed].name]["score"] for seed in seeds] for s in schedules}
        self.rounds.append(found)
        return [statistics.fmean(scores) for scores in found.values()]

    def _tidy(self, trials: Iterable[Trial]) -> None:
        """Delete weights that no later trial begins with: of what was judged, and of trunks that were passed over."""
        now = {trial.trunk.output_dir for trial in trials if trial.trunk}
        for folder in (self.trunks, {trial.config.output_dir for trial in trials}):
            for path in folder:
                delete_weights(Path(path))
        self.trunks = now


@dataclass(frozen=True)
class Found:
    """The end of a search."""

    space: Space
    schedule: Schedule
    rounds: list[dict[Schedule, list[float]]]
    """What was judged together, with the scores over the seeds."""
    taken: Selected
    results: Results
    config: PretrainConfig
    """A whole run of the schedule."""

    @property
    def cost(self) -> float:
        """In vanilla runs."""
        return self.results.flops / self.space.vanilla_flops

    @property
    def hours(self) -> float:
        """Of one device."""
        return sum(record["seconds"] for record in self.results.by_name.values()) / 3600


def prepare_space(config: SearchConfig) -> Space:
    """The space of a search over the data at hand. ValueError for what can't be searched."""
    source = open_source(config.data_path, "train")
    space = Space(config, len(source), source.labels is not None)
    if config.budget is not None and config.budget < space.cheapest():
        raise ValueError(f"--budget {config.budget:g} is less than one candidate, {space.cheapest():.2f} vanilla runs")
    return space


def forecast(space: Space) -> list[str]:
    """What the search will cost at most, in sentences."""
    config = space.config
    trials, cost = space.most()
    device = (config.devices or (config.device,))[0]
    seconds = seconds_of_vanilla(replace(space.base, device=device), space.num_images)
    lines = [
        f"{config.algorithm} search: {config.num_stages} stages of {space.sizes} px; {space.num_images:,} images to "
        f"train on, {config.holdout:,} held out to judge by {' and '.join(config.judge)}",
        f"a vanilla run: {space.vanilla_flops:.2e} FLOPs, {seconds / 3600:.2g} h of one device, without loading data",
        f"the search: at most {trials} trials ({config.num_seeds} seed(s)), {cost:.2f} vanilla runs, "
        f"{cost * space.vanilla_flops:.2e} FLOPs, about {cost * seconds / 3600:.2g} h",
    ]
    if config.budget is not None and config.budget < cost:
        lines.append(f"--budget {config.budget:g} may end it earlier")
    return lines


def search(config: SearchConfig) -> Found | None:
    """Search, or with `dry_run` only say what it would cost; the same call goes on with a search that was killed.

    Raises ValueError, OSError or CheckpointError, with one line, for whatever the user can mend.
    """
    if "RANK" in os.environ:
        raise ValueError("a search gives each trial a device: start it without torchrun, with --jobs and --devices")
    space, out = prepare_space(config), Path(config.output_dir)
    for line in forecast(space):
        log.info(line)
    if config.dry_run:
        return None
    if config.overwrite and (out / RESULTS).exists():
        (out / RESULTS).unlink()
        shutil.rmtree(out / "runs", ignore_errors=True)
    identity = {k: v for k, v in to_dict(space.config).items() if k not in FREE} | {"num_images": space.num_images}
    results = Results(out / RESULTS, identity)
    if results.by_name:
        log.info("going on after %d trials", len(results.by_name))
    with Workers(config.jobs, config.devices or (config.device,)) as workers:
        judge = CandidateEvaluator(space, results, workers)
        if config.algorithm == "sequential":
            schedule, taken = sequential(space.options, space.full, config.num_stages, judge, config.halving)
        else:
            schedule, taken = greedy(space.options, space.full, config.num_stages, judge, config.tolerance, config.jobs)
    if not judge.exhausted:  # with a larger budget, the search would go on from its trunks
        for folder in (out / "runs").glob("*"):
            delete_weights(folder)
    whole = replace(
        space.run("", schedule, config.seed),
        holdout=0,
        output_dir="./output_dir",
        num_workers=None,
        device="auto",
        keep_checkpoints=config.keep_checkpoints,
    )
    return Found(space, schedule, judge.rounds, taken, results, whole)
