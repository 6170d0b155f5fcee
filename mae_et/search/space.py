"""What a search may choose from: options for a stage, schedules made of them, their runs, and what those cost."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..data.loader import default_workers
from ..plan.build import as_vanilla, build_curriculum
from ..plan.config import PretrainConfig
from ..plan.cost import encoder_flops_per_image
from ..plan.curriculum import StageRow
from ..plan.report import describe_model, model_kwargs
from ..plan.schedules import SCHEDULES, scale_size
from ..plan.shapes import OPERATORS, TARGETS, SizePx, as_size, choice, grid_of, height_width, show_size
from .trials import JUDGES, Trial, loss_flops

ALGORITHMS = ("sequential", "greedy")


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
    """Sequential: full-size training, with a falling learning rate, before a candidate is judged, in vanilla runs."""
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
        self.base = as_vanilla(PretrainConfig(**{f.name: getattr(config, f.name) for f in fields(PretrainConfig)}))
        # The shares are of exact compute, so that stages of equal share cost the same.
        self.base = replace(
            self.base, allocation="flops", resume="", overwrite=False, picture_steps=0, keep_checkpoints=1
        )
        if self.base.num_workers is None and config.jobs > 1:
            self.base = replace(self.base, num_workers=max(1, default_workers() // config.jobs))
        vanilla = build_curriculum(self.base, self.num_images)
        self.vanilla_flops = vanilla.total_flops
        self.full = Option(config.input_size, None, config.target, config.lowfreq)
        self.options = self._options()
        model = describe_model(self.base)
        probed = config.holdout + min(config.judge_images, self.num_images)
        costs = {name: probed * encoder_flops_per_image(model, model.num_patches) for name in config.judge}
        if "loss" in costs:
            costs["loss"] = loss_flops(config.holdout, vanilla.stages[0])
        self._judge_flops = sum(costs.values())

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

    @property
    def sizes(self) -> str:
        """The options, for people."""
        return ", ".join(dict.fromkeys(map(str, self.options)))

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
        """`greedy`: the whole run. `sequential`: the trunk at the peak learning rate, and its fall at full size."""
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
        trials, share = [], 1 / self.config.num_stages
        if self.config.algorithm == "greedy":
            trials.append(fill((), self.full))
        for stage in range(self.config.num_stages - 1):
            before = tuple((self.options[0], share) for _ in range(stage))
            some = growing(self.options, before)
            if self.config.algorithm == "greedy":
                trials += [fill((*before, (o, share)), self.full) for o in some if o != at_full(self.full, before)]
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
