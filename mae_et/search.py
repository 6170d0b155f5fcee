"""Finding a schedule: the two searches of EfficientTrain and EfficientTrain++, for MAE and for any data.

`greedy` (ET, arXiv 2211.09703, Algorithm 1) asks, from the first stage on, how small a stage may be without the final
quality falling below vanilla's. `sequential` (ET++, arXiv 2405.08768, Algorithm 2) gives every stage the same compute,
so that a smaller one takes more steps, and asks which size serves best. docs/search.md says what is done otherwise.

The algorithms decide; `trials` trains and judges; the results file remembers, so that a search can be killed.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import shutil
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from . import run_folder
from .config import PretrainConfig, choice, to_dict
from .cost import encoder_flops_per_image
from .curriculum import SCHEDULES, SizePx, StageRow, as_size, grid_of, height_width, scale_size, show_size
from .data.loader import default_workers
from .data.sources import open_source
from .plan import build_curriculum, describe_model, model_kwargs, vanilla_twin
from .spectral import OPERATORS
from .targets import TARGETS
from .trials import JUDGES, Trial, forget, run_all, seconds_of_vanilla

log = logging.getLogger(__name__)

ALGORITHMS = ("sequential", "greedy")
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


@dataclass(frozen=True)
class SearchConfig(PretrainConfig):
    """Search a curriculum for these data: all flags of pretraining, which describe one vanilla run, and these."""

    algorithm: str = "sequential"
    """sequential (equal compute, which size is best?) or greedy (how small without losing to vanilla?)."""
    num_stages: int = 5
    """Stages of the schedule; the last one is always at full size."""
    sizes: tuple[int, ...] = ()
    """Candidate sizes in pixels (heights, for inputs that aren't square); default: the published ones, scaled."""
    mask_ratios: tuple[float, ...] = ()
    """Candidate mask ratios of a stage; default: the run's."""
    targets: tuple[str, ...] = ()
    """Candidate targets, pixel and hog, chosen with the first stage for all of them; default: the run's."""
    operators: tuple[str, ...] = ()
    """Candidate operators, as --lowfreq, chosen with the first stage for all of them; default: the run's."""
    judge: tuple[str, ...] = ("knn", "linear_probe")
    """What judges, on held-out training images: knn, linear_probe (their mean, for both), or loss, without labels."""
    judge_images: int = 10_000
    """Labelled training images that kNN and linear probe use, at most."""
    tune: float = 0.1
    """Sequential: full-size training before a candidate is judged, in vanilla runs, in which the learning rate falls."""
    tolerance: float = 0.5
    """Greedy: how far below vanilla's quality a schedule may be, in points (of 100 × the loss, for that judge)."""
    num_seeds: int = 1
    """Seeds of every candidate; they count from --seed."""
    halving: bool = False
    """Sequential: judge after half of a stage's compute too, and go on with the better half of the candidates."""
    budget: float | None = None
    """Most compute that the search may take, in vanilla runs; where it ends, the rest of the stages is at full size."""
    jobs: int = 1
    """Trials side by side."""
    devices: tuple[str, ...] = ()
    """Where they run, in turn, e.g. cuda:0 cuda:1; default: --device."""
    dry_run: bool = False
    """Print what the search would cost and stop."""

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("--algorithm", self.algorithm, ALGORITHMS)
        for name, legal in (("judge", JUDGES), ("targets", TARGETS), ("operators", OPERATORS)):
            for value in getattr(self, name):
                choice(f"--{name}", value, legal)
        if not self.judge:
            raise ValueError(f"--judge is empty; choose from {', '.join(JUDGES)}")
        for name in ("judge_images", "num_seeds", "jobs", "tune", "budget"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"--{name} must be positive and finite, got {value}")
        if self.num_stages < 2:
            raise ValueError(f"--num_stages {self.num_stages}: the last stage is at full size; give at least 2")
        if self.tolerance < 0:
            raise ValueError(f"--tolerance must not be negative, got {self.tolerance}")
        if self.halving and self.algorithm == "greedy":
            raise ValueError("--halving is for --algorithm sequential: greedy stops at the first size that holds")
        if "loss" in self.judge and len(set(self.targets)) > 1:
            raise ValueError("--judge loss can't compare --targets, whose losses are of different things; use knn")
        if any(not 0 < ratio < 1 for ratio in self.mask_ratios):
            raise ValueError(f"--mask_ratios must be in (0, 1), got {' '.join(map(str, self.mask_ratios))}")
        if self.branch or self.start_epoch:
            raise ValueError("--branch and --start_epoch are for single runs, not for a search")


@dataclass(frozen=True)
class Option:
    """One way to spend a stage."""

    size_px: SizePx
    mask_ratio: float | None = None
    """None: the run's."""
    target: str = "pixel"
    lowfreq: str = "fourier"

    def row(self, share: float) -> StageRow:
        return StageRow(self.size_px, share, mask_ratio=self.mask_ratio)

    def __str__(self) -> str:
        ratio = "" if self.mask_ratio is None else f"@{self.mask_ratio:g}"
        return f"{show_size(self.size_px)}{ratio}"


Schedule = tuple[tuple[Option, float], ...]
"""What is shown, and for which share of a vanilla run's compute (of its epochs, for `greedy`)."""
Taken = list[list[Schedule]]
"""Of the schedules of each call of a judge, those that the search went on with."""
Judge = Callable[[Sequence[Schedule]], list[float]]
"""Scores of schedules, more is better; raises OutOfBudget instead of starting what can't be paid."""


class OutOfBudget(ValueError):
    """The next candidates cost more than is left."""


def sequential(
    options: Sequence[Option], full: Option, num_stages: int, judge: Judge, halving: bool = False
) -> tuple[Schedule, Taken]:
    """ET++'s search: stage after stage, the option that is judged best after the stages chosen before it.

    Sizes never shrink from one stage to the next, and the last stage, at full size, is not searched.
    """
    share, chosen, taken = 1 / num_stages, (), []
    parts = (0.5, 0.5) if halving else (1.0,)
    try:
        for _ in range(num_stages - 1):
            alive = {option: chosen for option in growing(options, chosen)}
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
) -> tuple[Schedule, Taken]:
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


def growing(options: Sequence[Option], chosen: Schedule) -> list[Option]:
    """Options for the stage after `chosen`: not smaller, and with the target and the operator of the first stage."""
    if not chosen:
        return list(options)
    first, last = chosen[0][0], chosen[-1][0]
    return [
        option
        for option in options
        if height_width(option.size_px) >= height_width(last.size_px)
        and (option.target, option.lowfreq) == (first.target, first.lowfreq)
    ]


def fill(chosen: Schedule, full: Option) -> Schedule:
    """`chosen`, and full size for the rest; neighbours that are the same become one stage."""
    rest = 1 - sum(share for _, share in chosen)
    merged: list[tuple[Option, float]] = []
    for option, share in (*chosen, (at_full(full, chosen), rest)):
        if merged and merged[-1][0] == option:
            share += merged.pop()[1]
        merged.append((option, share))
    return tuple(merged)


def at_full(full: Option, chosen: Schedule) -> Option:
    """Full size, with the target and the operator that `chosen` has."""
    return replace(full, target=chosen[0][0].target, lowfreq=chosen[0][0].lowfreq) if chosen else full


def batched(items: Sequence[Option], size: int) -> Iterator[Sequence[Option]]:
    for i in range(0, len(items), size):
        yield items[i : i + size]


# ── the space and its cost ──


class Space:
    """What a configuration searches: options, trials, and what they cost in vanilla runs."""

    def __init__(self, config: SearchConfig, num_images: int, labelled: bool) -> None:
        if not config.holdout:
            config = replace(config, holdout=min(10_000, max(1, num_images // 10)))
        if not labelled and (wanted := [name for name in config.judge if name != "loss"]):
            raise ValueError(
                f"--judge {' '.join(wanted)} needs labels, and --data_path {config.data_path} has none; choose "
                "--judge loss"
            )
        self.num_images = num_images - config.holdout
        if self.num_images < 1:
            raise ValueError(f"--holdout {config.holdout} leaves nothing of {num_images} training images")
        self.config = config
        self.base = vanilla_twin(PretrainConfig(**{f.name: getattr(config, f.name) for f in fields(PretrainConfig)}))
        # The shares are of exact compute, so that stages of equal share cost the same.
        self.base = replace(
            self.base, allocation="flops", resume="", overwrite=False, picture_steps=0, keep_checkpoints=1
        )
        if self.base.num_workers is None and config.jobs > 1:
            self.base = replace(self.base, num_workers=max(1, default_workers() // config.jobs))
        self.vanilla_flops = build_curriculum(self.base, self.num_images).total_flops
        self.full = Option(config.input_size, None, config.target, config.lowfreq)
        self.options = self._options()
        model = describe_model(self.base)
        judged = config.holdout + min(config.judge_images, self.num_images)
        self._judge_flops = judged * encoder_flops_per_image(model, model.num_patches) * len(config.judge)

    def _options(self) -> list[Option]:
        """All options, the cheapest first, the full one among them."""
        config, patch_px = self.config, model_kwargs(self.config)["patch_size"]
        whole = height_width(config.input_size)
        if config.sizes:
            sizes = [_like(side, whole, patch_px) for side in sorted(set(config.sizes))]
        else:
            sizes = [scale_size(size, config.input_size, patch_px) for size, _ in SCHEDULES["et_pp_192"][1]]
        for size in sizes:
            try:
                grid_of(size, patch_px)
            except ValueError as error:
                raise ValueError(f"--sizes: {error}") from error
            if height_width(size) > whole:
                raise ValueError(f"--sizes: {show_size(size)} px is larger than --input_size {config.input_size}")
        kinds = list(
            itertools.product(
                config.mask_ratios or (None,), config.targets or (config.target,), config.operators or (config.lowfreq,)
            )
        )
        sizes = list(dict.fromkeys([*sizes, as_size(config.input_size)]))
        options = [Option(size, *kind) for size in sizes for kind in kinds]
        if not config.mask_ratios:
            return options
        ratio_first = {ratio: i for i, ratio in enumerate(sorted(config.mask_ratios, reverse=True))}
        return sorted(options, key=lambda o: (height_width(o.size_px), ratio_first[o.mask_ratio]))

    # ── trials ──

    def run(self, name: str, schedule: Schedule, seed: int, **changes: Any) -> PretrainConfig:
        """The configuration of a run of a schedule, whose shares are of one vanilla run and may add to more or less."""
        total, first = sum(share for _, share in schedule), schedule[0][0]
        hog = first.target == "hog"
        return replace(
            self.base,
            curriculum="custom",
            stages=tuple(option.row(share / total) for option, share in schedule),
            share_of="epochs" if self.config.algorithm == "greedy" else "compute",
            epochs=self.base.epochs * total,
            target=first.target,
            norm_pix_loss=self.base.norm_pix_loss and not hog,
            lowfreq=first.lowfreq,
            seed=seed,
            recipe="",
            output_dir=str(Path(self.config.output_dir) / "runs" / f"{name}-seed{seed}"),
            **changes,
        )

    def trial(self, schedule: Schedule, seed: int) -> Trial:
        """`greedy`: the whole run. `sequential`: the trunk at the peak learning rate, then a short fall at full size."""
        config, name = self.config, name_of(schedule)
        images = min(config.judge_images, self.num_images)
        how = {"judges": config.judge, "judge_images": images if images < self.num_images else None}
        if config.algorithm == "greedy":
            return Trial(f"{name}-seed{seed}", self.run(name, schedule, seed), **how)
        before = schedule[:-1]
        long = self.base.epochs * 2  # longer than any trunk: its learning rate never falls
        branch = self.run(name_of(before), before, seed).output_dir if before else ""
        trunk = self.run(name, schedule, seed, hold_epochs=long, branch=branch)
        spent = sum(share for _, share in schedule) * self.base.epochs
        judged = self.run(
            f"{name}-judged",
            (*schedule, (at_full(self.full, schedule), config.tune)),
            seed,
            hold_epochs=max(0.0, spent - self.base.warmup_epochs),
            branch=trunk.output_dir,
        )
        return Trial(f"{name}-seed{seed}", judged, trunk, **how)

    def cost(self, schedule: Schedule) -> float:
        """Of one trial, in vanilla runs: training of what its branch has not trained yet, and judging."""
        if self.config.algorithm == "sequential":
            training = schedule[-1][1] + self.config.tune
        else:
            config = self.run("", schedule, 0)
            training = build_curriculum(config, self.num_images).total_flops / self.vanilla_flops
        return training + self._judge_flops / self.vanilla_flops

    def most(self) -> tuple[int, float]:
        """(trials, their cost in vanilla runs) if all options have to be tried at every stage."""
        trials, cost = [], 0.0
        share = 1 / self.config.num_stages
        if self.config.algorithm == "greedy":
            trials.append(fill((), self.full))
        for stage in range(self.config.num_stages - 1):
            before = tuple((self.options[0], share) for _ in range(stage))
            some = growing(self.options, before)
            if self.config.algorithm == "greedy":
                trials += [fill((*before, (o, share)), self.full) for o in some if o != self.full]
            elif not self.config.halving:
                trials += [(*before, (option, share)) for option in some]
            else:
                trials += [(*before, (option, share / 2)) for option in some]
                trials += [(*before, (o, share / 2), (o, share / 2)) for o in some[: math.ceil(len(some) / 2)]]
        seeds = self.config.num_seeds
        cost = seeds * sum(self.cost(schedule) for schedule in trials)
        return seeds * len(trials), cost

    def cheapest(self) -> float:
        """The least that a search takes, in vanilla runs: one candidate, and vanilla where it is compared with."""
        share = 1 / self.config.num_stages / (2 if self.config.halving else 1)
        if self.config.algorithm == "greedy":
            first = self.cost(fill((), self.full)) + self.cost(fill(((self.options[0], share),), self.full))
        else:
            first = self.cost(((self.options[0], share),))
        return first * self.config.num_seeds


def _like(side_px: int, whole: tuple[int, int], patch_px: int) -> SizePx:
    """A size of that height and of about the full size's proportions."""
    height, width = whole
    if height == width:
        return side_px
    return as_size((side_px, max(patch_px, round(side_px * width / height / patch_px) * patch_px)))


def name_of(schedule: Schedule) -> str:
    """16-24-32 for stages of equal share; other shares, targets and operators are named."""
    shares = {round(share, 6) for _, share in schedule}
    words = [str(option) + ("" if len(shares) == 1 else f"x{share:.3g}") for option, share in schedule]
    first = schedule[0][0]
    return "-".join([*words, first.target, first.lowfreq])


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
            if whole[0]["search"].get(name) != value:
                raise ValueError(
                    f"--output_dir: {path} is of another search: {name} was {whole[0]['search'].get(name)}, is {value}; "
                    "choose another folder, or replace it with --overwrite"
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


class Judging:
    """Judges schedules by trials over all seeds: those that are in the results, and new ones within the budget."""

    def __init__(self, space: Space, results: Results) -> None:
        self.space, self.results = space, results
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
        devices = config.devices or (config.device,)
        for record in run_all([trials[key] for key in missing], config.jobs, devices):
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
                forget(Path(path))
        self.trunks = now


@dataclass(frozen=True)
class Found:
    """The end of a search."""

    space: Space
    schedule: Schedule
    rounds: list[dict[Schedule, list[float]]]
    """What was judged together, with the scores over the seeds."""
    taken: Taken
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
    seconds = seconds_of_vanilla(space.base, space.num_images)
    lines = [
        f"{config.algorithm} search over {config.num_stages} stages of {', '.join(dict.fromkeys(map(str, space.options)))}"
        f"; {space.num_images:,} images to train on, {config.holdout:,} held out to judge by {' and '.join(config.judge)}",
        f"at most {trials} trials ({config.num_seeds} seed(s)), {cost:.2f} vanilla runs, "
        f"{cost * space.vanilla_flops:.2e} FLOPs; about {cost * seconds / 3600:.2g} h of one device without loading data "
        f"(a vanilla run: {space.vanilla_flops:.2e} FLOPs, {seconds / 3600:.2g} h)",
    ]
    if config.budget is not None and config.budget < cost:
        lines.append(f"--budget {config.budget:g} may end it earlier")
    return lines


def search(config: SearchConfig) -> Found | None:
    """Search, or with `dry_run` only say what it would cost; the same call goes on with a search that was killed.

    Raises ValueError, OSError or CheckpointError, with one line, for whatever the user can mend.
    """
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
    judge = Judging(space, results)
    if config.algorithm == "sequential":
        schedule, taken = sequential(space.options, space.full, config.num_stages, judge, config.halving)
    else:
        schedule, taken = greedy(space.options, space.full, config.num_stages, judge, config.tolerance, config.jobs)
    if not judge.exhausted:  # with a larger budget, the search would go on from its trunks
        for folder in (out / "runs").glob("*"):
            forget(folder)
    whole = replace(
        space.run("", schedule, config.seed), holdout=0, output_dir="./output_dir", num_workers=None, device="auto"
    )
    return Found(space, schedule, judge.rounds, taken, results, whole)
