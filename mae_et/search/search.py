"""Search a schedule with the two algorithms of EfficientTrain and EfficientTrain++, for MAE and for any data.

`greedy` (ET, arXiv 2211.09703, Algorithm 1) asks, from the first stage on, how small a stage may be without the final
quality falling below vanilla's. `sequential` (ET++, arXiv 2405.08768, Algorithm 2) gives every stage the same compute,
so that a smaller one takes more steps, and asks which size serves best. docs/search.md says what is done otherwise.

The algorithms decide; `trials` trains and evaluates; the results file remembers, so that a search can be killed.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import shutil
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..data.sources import open_source
from ..engine import run_folder
from ..evaluate.config import FinetuneConfig
from ..files import append_json_line, make_folder, read_json_lines, write_json_lines
from ..plan.build import build_curriculum
from ..plan.config import PretrainConfig
from ..plan.flags import RUN, names, to_dict
from .config import SearchConfig
from .space import TRIALS, Option, Schedule, SearchSpace, at_full, fill, growing
from .trials import Trial, Workers, seconds_of_vanilla

log = logging.getLogger(__name__)

RESULTS, RECIPE, PICTURE = "search.jsonl", "recipe.yaml", "candidates.png"
FORMAT = "mae_et-search/1"

Selected = list[list[Schedule]]
"""Schedules selected in each round."""
Evaluate = Callable[[Sequence[Schedule]], list[float]]
"""Scores of the schedules of a round, more is better. Raises OutOfBudget instead of starting what can't be paid."""


class OutOfBudget(ValueError):
    """The next candidates cost more than is left."""


def sequential(
    options: Sequence[Option], full: Option, num_stages: int, evaluate: Evaluate, halving: bool = False
) -> tuple[Schedule, Selected]:
    """ET++'s search: stage after stage, the option that scores best after the stages chosen before it.

    Sizes never shrink from one stage to the next, and the last stage, at full size, is not searched.
    halving: evaluate after half of a stage too, and go on with the better half of the candidates.
    """
    chosen: Schedule = ()
    selected: Selected = []
    rounds = 2 if halving else 1
    share = 1 / num_stages / rounds
    try:
        for _ in range(num_stages - 1):
            candidates = dict.fromkeys(growing(options, chosen), chosen)
            if list(candidates) == [at_full(full, chosen)]:
                break  # nothing to choose
            for i in range(rounds):
                candidates = {option: (*before, (option, share)) for option, before in candidates.items()}
                scores = dict(zip(candidates, evaluate(list(candidates.values())), strict=True))
                ranked = sorted(candidates, key=scores.get, reverse=True)  # stable: of equals the smallest
                keep = 1 if i == rounds - 1 else math.ceil(len(ranked) / 2)
                candidates = {option: candidates[option] for option in options if option in ranked[:keep]}
                selected.append(list(candidates.values()))
            (chosen,) = candidates.values()
    except OutOfBudget as stop:
        log.warning("%s; the rest of the stages is at full size", stop)
    return fill(chosen, full), selected


def greedy(
    options: Sequence[Option], full: Option, num_stages: int, evaluate: Evaluate, tolerance: float, group_size: int = 1
) -> tuple[Schedule, Selected]:
    """ET's search: from the first stage on, the smallest option with which the whole run is within `tolerance` of one
    at full size. Stages later than the one that is searched are at full size meanwhile.

    group_size: schedules evaluated side by side; more of them may cost runs that one after the other would not.
    """
    chosen: Schedule = ()
    selected: Selected = []
    share = 1 / num_stages
    try:
        goal = evaluate([fill((), full)])[0] - tolerance
        selected.append([])
        for _ in range(num_stages - 1):
            smaller = [(option, share) for option in growing(options, chosen) if option != at_full(full, chosen)]
            for group in _groups(smaller, group_size):
                schedules = [fill((*chosen, stage), full) for stage in group]
                passed = [i for i, score in enumerate(evaluate(schedules)) if score >= goal]
                selected.append([schedules[i] for i in passed[:1]])
                if passed:
                    chosen = (*chosen, group[passed[0]])
                    break
            else:
                break  # no later stage can be smaller either
    except OutOfBudget as stop:
        log.warning("%s; the rest of the stages is at full size", stop)
    return fill(chosen, full), selected


def _groups(stages: Sequence[tuple[Option, float]], size: int) -> list[Sequence[tuple[Option, float]]]:
    return [stages[i : i + size] for i in range(0, len(stages), size)]


# ── results ──


class Results:
    """search.jsonl: what this search is, then one line for every trial that is done. Only appended to."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        """Read the file, or begin it. ValueError if it is of another search."""
        self.path = path
        records = read_json_lines(path)
        if not records:
            make_folder(path.parent, "--output_dir")
            records = [{"format": FORMAT, "search": identity}]
        if records[0].get("format") != FORMAT:
            raise ValueError(f"--output_dir: {path} is not a results file of a search")
        for name, value in identity.items():
            if (was := records[0]["search"].get(name)) != value:
                raise ValueError(
                    f"--output_dir: {path} is of another search: {name} was {was}, is {value}; choose another folder, "
                    "or replace it with --overwrite"
                )
        write_json_lines(path, records)  # without the half line that a killed search may leave
        self.by_name = {record["name"]: record for record in records[1:]}

    def add(self, record: dict[str, Any]) -> None:
        append_json_line(self.path, record)
        self.by_name[record["name"]] = record

    @property
    def flops(self) -> float:
        return sum(record["flops"] for record in self.by_name.values())


class CandidateEvaluator:
    """Scores schedules by trials over all seeds: those that are in the results, and new ones within the budget."""

    def __init__(self, space: SearchSpace, results: Results, workers: Workers) -> None:
        self.space, self.results, self.workers = space, results, workers
        self.rounds: list[dict[Schedule, list[float]]] = []
        """Schedules evaluated together, with their scores over the seeds."""
        self.base_runs: set[str] = set()
        """Folders whose weights later trials may branch from."""
        self.exhausted = False

    def __call__(self, schedules: Sequence[Schedule]) -> list[float]:
        space, config, done = self.space, self.space.config, self.results.by_name
        seeds = range(config.seed, config.seed + config.num_seeds)
        trials = {key: space.trial(*key) for key in itertools.product(schedules, seeds)}
        missing = [key for key, trial in trials.items() if trial.name not in done]
        left = math.inf if config.budget is None else config.budget - self.results.flops / space.vanilla_flops
        if (needed := sum(space.cost(schedule) for schedule, _ in missing)) > left:
            self.exhausted = True
            raise OutOfBudget(f"--budget {config.budget:g}: {needed:.2f} vanilla runs are needed, {left:.2f} left")
        for record in self.workers.run([trials[key] for key in missing]):
            self.results.add(record | {"round": len(self.rounds)})
            scores = ", ".join(f"{name} {abs(value):.2f}" for name, value in record["scores"].items())
            log.info("%s: %s, after %.0f s", record["name"], scores, record["seconds"])
        self._delete_weights(trials.values())
        scores = {s: [done[trials[s, seed].name]["score"] for seed in seeds] for s in schedules}
        self.rounds.append(scores)
        return [statistics.fmean(values) for values in scores.values()]

    def _delete_weights(self, trials: Iterable[Trial]) -> None:
        """Delete weights that no later trial branches from: of evaluated runs, and of base runs of earlier rounds."""
        for trial in trials:
            run_folder.delete_weights(Path(trial.config.output_dir))
        self.delete_base_runs()
        self.base_runs = {trial.base_run.output_dir for trial in trials if trial.base_run}

    def delete_base_runs(self) -> None:
        """Delete the weights that the last round left for later trials."""
        for folder in self.base_runs:
            run_folder.delete_weights(Path(folder))


# ── the command ──


@dataclass(frozen=True)
class SearchResult:
    """Schedule that a search found, and how."""

    space: SearchSpace
    schedule: Schedule
    config: PretrainConfig
    """A run of the schedule on all training images."""
    rounds: list[dict[Schedule, list[float]]]
    """Schedules evaluated together, with their scores over the seeds."""
    selected: Selected
    results: Results

    @property
    def cost(self) -> float:
        """In vanilla runs."""
        return self.results.flops / self.space.vanilla_flops

    @property
    def hours(self) -> float:
        """Of one device."""
        return sum(record["seconds"] for record in self.results.by_name.values()) / 3600


def search(config: SearchConfig) -> SearchResult | None:
    """Search, or with `dry_run` only say what it would cost; the same call goes on with a search that was killed.

    Raises ValueError, OSError or CheckpointError, with one line, for whatever the user can mend.
    """
    if "RANK" in os.environ:
        raise ValueError("a search gives each trial a device: start it without torchrun, with --jobs and --devices")
    space, out = open_space(config), Path(config.output_dir)
    for line in forecast(space):
        log.info(line)
    if config.dry_run:
        return None
    if (out / TRIALS).exists():
        if not (out / RESULTS).exists():
            raise FileExistsError(f"--output_dir: {out / TRIALS} is not of a search; choose another folder")
        if config.overwrite:
            shutil.rmtree(out / TRIALS)
    if config.overwrite:
        (out / RESULTS).unlink(missing_ok=True)
    results = Results(out / RESULTS, identity(space))
    if results.by_name:
        log.info("going on after %d trials", len(results.by_name))
    try:
        with Workers(config.jobs, config.devices or (config.device,)) as workers:
            evaluate = CandidateEvaluator(space, results, workers)
            stages = space.options, space.full, config.num_stages
            if config.algorithm == "sequential":
                schedule, selected = sequential(*stages, evaluate, config.halving)
            else:
                schedule, selected = greedy(*stages, evaluate, config.tolerance, config.jobs)
    except (KeyboardInterrupt, SystemExit):
        log.warning("stopped; the same command goes on")
        raise
    if not evaluate.exhausted:  # with a larger budget, the search would go on from its base runs
        evaluate.delete_base_runs()
    return SearchResult(space, schedule, space.recipe(schedule), evaluate.rounds, selected, results)


def open_space(config: SearchConfig) -> SearchSpace:
    """The search space over the data at hand. ValueError for what can't be searched."""
    source = open_source(config.data_path, "train")
    space = SearchSpace(config, len(source), source.labels is not None)
    if list(space.options) == [space.full]:
        raise ValueError("--sizes leave only full size, so there is nothing to search; add a smaller one")
    for option in space.options:  # before the first trial, what would end the search after it
        try:
            build_curriculum(space.recipe(((option, 1.0),)), len(source))
        except ValueError as error:
            raise ValueError(f"a recipe that the search may find would not run: {error}") from error
    labelled = min(config.judge_images, space.num_images)
    if "knn" in config.judge and labelled < FinetuneConfig.k:
        raise ValueError(
            f"--judge knn takes {FinetuneConfig.k} neighbours, but may use {labelled} labelled images; judge by "
            "linear_probe or loss"
        )
    if config.budget is not None and config.budget < (least := space.least_cost()):
        raise ValueError(f"--budget {config.budget:g} is less than the first choice takes, {least:.2f} vanilla runs")
    return space


def forecast(space: SearchSpace) -> list[str]:
    """What the search will cost at most, in sentences."""
    config = space.config
    trials, cost = space.worst_case()
    device = (config.devices or (config.device,))[0]
    seconds = seconds_of_vanilla(replace(space.vanilla, device=device), space.num_images)
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


def identity(space: SearchSpace) -> dict[str, Any]:
    """What must not change when a search goes on: all flags but those whose role is RUN, and the number of images."""
    values, fixed = to_dict(space.config), names(SearchConfig, lambda role: role is not RUN)
    return {name: values[name] for name in fixed} | {"num_images": space.num_images}
