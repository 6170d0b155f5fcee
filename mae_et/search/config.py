"""Configuration of a search: the flags of pretraining, which describe one vanilla run, and its own. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from ..plan.config import PretrainConfig
from ..plan.flags import EVALUATION, NOT_NEGATIVE, POSITIVE, RUN, SEED, SHARE_BETWEEN, TASK, OneOf
from ..plan.shapes import OPERATORS, TARGETS

ALGORITHMS = ("sequential", "greedy")
JUDGES = ("knn", "linear_probe", "loss")


@dataclass(frozen=True)
class SearchFlags:
    group: ClassVar[str] = "search"

    algorithm: Annotated[str, TASK, OneOf(ALGORITHMS)] = "sequential"
    """sequential (equal compute, which size is best?) or greedy (how small without losing to vanilla?)."""
    num_stages: Annotated[int, TASK] = 5
    """Stages of the schedule; the last one is always at full size."""
    sizes: Annotated[tuple[int, ...], TASK, POSITIVE] = ()
    """Candidate sizes in pixels (heights, for inputs that aren't square); default: the published ones, scaled."""
    mask_ratios: Annotated[tuple[float, ...], TASK, SHARE_BETWEEN] = ()
    """Candidate mask ratios of a stage; default: the run's."""
    targets: Annotated[tuple[str, ...], TASK, OneOf(TARGETS)] = ()
    """Candidate targets, pixel and hog, chosen with the first stage for all of them; default: the run's."""
    operators: Annotated[tuple[str, ...], TASK, OneOf(tuple(OPERATORS))] = ()
    """Candidate operators, as --lowfreq, chosen with the first stage for all of them; default: the run's."""
    judge: Annotated[tuple[str, ...], EVALUATION, OneOf(JUDGES)] = ("knn", "linear_probe")
    """What judges, on held-out training images: knn, linear_probe (their mean, for both), or loss, without labels."""
    judge_images: Annotated[int, EVALUATION, POSITIVE] = 10_000
    """Labelled training images that kNN and linear probe use, at most."""
    tune: Annotated[float, TASK, POSITIVE] = 0.1
    """Sequential: full-size training, with a falling learning rate, before a candidate is judged, in vanilla runs."""
    tolerance: Annotated[float, TASK, NOT_NEGATIVE] = 0.5
    """Greedy: how far below vanilla's quality a schedule may be, in points (of 100 × the loss, for that judge)."""
    num_seeds: Annotated[int, SEED, POSITIVE] = 1
    """Seeds of every candidate; they count from --seed."""
    halving: Annotated[bool, TASK] = False
    """Sequential: judge after half of a stage's compute too, and go on with the better half of the candidates."""
    budget: Annotated[float | None, RUN, POSITIVE] = None
    """Most compute that the search may take, in vanilla runs; where it ends, the rest of the stages is at full size."""
    jobs: Annotated[int, RUN, POSITIVE] = 1
    """Trials side by side."""
    devices: Annotated[tuple[str, ...], RUN] = ()
    """Where they run, in turn, e.g. cuda:0 cuda:1; default: --device."""
    dry_run: Annotated[bool, RUN] = False
    """Print what the search would cost and stop."""


@dataclass(frozen=True)
class SearchConfig(SearchFlags, PretrainConfig):
    """Search a curriculum for these data: all flags of pretraining, which describe one vanilla run, and these."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.judge:
            raise ValueError(f"--judge is empty; choose from {', '.join(JUDGES)}")
        if self.num_stages < 2:
            raise ValueError(f"--num_stages {self.num_stages}: the last stage is at full size; give at least 2")
        if self.halving and self.algorithm == "greedy":
            raise ValueError("--halving is for --algorithm sequential: greedy stops at the first size that holds")
        if "loss" in self.judge and len({self.target, *self.targets}) > 1:
            raise ValueError(
                "--judge loss can't compare --targets, whose losses are of different things; use knn, or --target alone"
            )
        if self.world_size > 1:
            raise ValueError("--world_size is for single runs: a search gives each trial one of --devices, see --jobs")
        if "linear_probe" in self.judge and any(d.startswith("mps") for d in self.devices or (self.device,)):
            raise ValueError("--judge linear_probe is solved in float64, which mps hasn't; use --judge knn or loss")
        if self.branch or self.start_epoch:
            raise ValueError("--branch and --start_epoch are for single runs, not for a search")
