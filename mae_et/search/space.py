"""Search space: candidate stages and schedules, the trials that compare them, and what those cost."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..data.workers import default_workers
from ..plan.build import as_vanilla, build_curriculum, shape_of
from ..plan.config import PretrainConfig
from ..plan.cost import encoder_flops_per_image
from ..plan.curriculum import StageRow
from ..plan.schedules import SCHEDULES, scale_size
from ..plan.shapes import SizePx, area_px, as_size, fits_in, grid_of, height_width, show_size
from .config import SearchConfig
from .trials import Trial, held_out_loss_flops


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


TRIALS = "trials"
"""Folder of the runs of a search. It is the search's own: their weights are deleted, and --overwrite deletes it."""
Schedule = tuple[tuple[Option, float], ...]
"""Options in order, each with its share of a vanilla run's compute (of its epochs, for `greedy`)."""


def growing(options: Sequence[Option], chosen: Schedule) -> list[Option]:
    """Options for the stage after `chosen`: no side shrinks, and target and operator stay those of the first stage."""
    if not chosen:
        return list(options)
    first, last = chosen[0][0], chosen[-1][0]
    return [
        option
        for option in options
        if fits_in(last.size_px, option.size_px) and (option.target, option.lowfreq) == (first.target, first.lowfreq)
    ]


def fill(chosen: Schedule, full: Option) -> Schedule:
    """Add full size for the share that `chosen` leaves, and merge neighbours that are the same option."""
    left = 1 - sum(share for _, share in chosen)
    merged: list[tuple[Option, float]] = []
    for option, share in (*chosen, (at_full(full, chosen), left)):
        if merged and merged[-1][0] == option:
            share += merged.pop()[1]
        merged.append((option, share))
    return tuple(merged)


def at_full(full: Option, chosen: Schedule) -> Option:
    """Full size, with the target and the operator that `chosen` has."""
    return replace(full, target=chosen[0][0].target, lowfreq=chosen[0][0].lowfreq) if chosen else full


def name_of(schedule: Schedule) -> str:
    """16-24-32 for stages of equal share, with target and operator; shares that differ are named."""
    equal = len({round(share, 6) for _, share in schedule}) == 1
    words = [f"{option}" if equal else f"{option}x{share:.3g}" for option, share in schedule]
    first = schedule[0][0]
    return "-".join([*words, first.target, first.lowfreq])


class SearchSpace:
    """Options and trials of a configuration, and their cost in vanilla runs. ValueError for what can't be searched."""

    def __init__(self, config: SearchConfig, num_images: int, labelled: bool) -> None:
        if not config.holdout:
            config = replace(config, holdout=min(10_000, max(1, num_images // 10)))
        probes = [name for name in config.judge if name != "loss"]
        if probes and not labelled:
            raise ValueError(
                f"--judge {' '.join(probes)} needs labels, and --data_path {config.data_path} has none; choose "
                "--judge loss"
            )
        self.num_images = num_images - config.holdout
        if self.num_images < 1:
            raise ValueError(f"--holdout {config.holdout} leaves nothing of {num_images} training images")
        self.config = config
        self.vanilla = _vanilla_run(config)
        curriculum = build_curriculum(self.vanilla, self.num_images)
        self.vanilla_flops = curriculum.total_flops
        self.full = Option(config.input_size, None, config.target, config.lowfreq)
        self.options = _options(config, shape_of(config).patch_size)
        self._evaluation_flops = 0.0
        if probes:  # all of them share one extraction of features
            shape, images = shape_of(config), config.holdout + min(config.judge_images, self.num_images)
            self._evaluation_flops += images * encoder_flops_per_image(shape, shape.num_patches)
        if "loss" in config.judge:
            self._evaluation_flops += held_out_loss_flops(config.holdout, curriculum.stages[0])

    @property
    def sizes(self) -> str:
        """The options, for people."""
        return ", ".join(dict.fromkeys(map(str, self.options)))

    def kind(self, option: Option) -> str:
        """Target and operator of an option, each only where candidates differ in it."""
        options = (*self.options, self.full)
        varied = [name for name in ("target", "lowfreq") if len({getattr(o, name) for o in options}) > 1]
        return " ".join(getattr(option, name) for name in varied)

    def label(self, schedule: Schedule) -> str:
        """16→20→32, the sizes of a schedule, with mask ratios, target and operator where a search chooses them."""
        return f"{'→'.join(str(option) for option, _ in schedule)} {self.kind(schedule[0][0])}".rstrip()

    # ── trials ──

    def run(self, name: str, schedule: Schedule, seed: int, **changes: Any) -> PretrainConfig:
        """Configuration of a run of a schedule, whose shares are of one vanilla run and may add to more or less."""
        total, first = sum(share for _, share in schedule), schedule[0][0]
        return replace(
            self.vanilla,
            curriculum="custom",
            stages=tuple(option.row(share / total) for option, share in schedule),
            share_of="epochs" if self.config.algorithm == "greedy" else "compute",
            epochs=self.vanilla.epochs * total,
            target=first.target,
            norm_pix_loss=self.vanilla.norm_pix_loss and first.target != "hog",
            lowfreq=first.lowfreq,
            seed=seed,
            recipe="",
            output_dir=str(Path(self.config.output_dir) / TRIALS / f"{name}-seed{seed}"),
            **changes,
        )

    def recipe(self, schedule: Schedule) -> PretrainConfig:
        """A run of a schedule on all training images, wherever it will run."""
        return replace(
            self.run("", schedule, self.config.seed),
            holdout=0,
            probe_every=0.0,  # looks at the images that were held out
            output_dir="./output_dir",
            log_dir=self.config.log_dir,
            num_workers=None,
            device="auto",
            keep_checkpoints=self.config.keep_checkpoints,
        )

    def trial(self, schedule: Schedule, seed: int) -> Trial:
        """What is run to score a schedule.

        `greedy`: the whole run. `sequential`: a base run at the peak learning rate, which goes on from that of the
        stages before, and a branch of it that is annealed at full size and evaluated.
        """
        config, name = self.config, name_of(schedule)
        judge_images = config.judge_images if config.judge_images < self.num_images else None
        if config.algorithm == "greedy":
            return Trial(f"{name}-seed{seed}", self.run(name, schedule, seed), None, config.judge, judge_images)
        before = schedule[:-1]
        branch = self.run(name_of(before), before, seed).output_dir if before else ""
        # Held for longer than any base run takes: its learning rate never falls.
        base_run = self.run(name, schedule, seed, hold_epochs=2 * self.vanilla.epochs, branch=branch)
        annealed = self.run(
            f"{name}-judged",
            (*schedule, (at_full(self.full, schedule), config.tune)),
            seed,
            hold_epochs=max(0.0, base_run.epochs - self.vanilla.warmup_epochs),
            branch=base_run.output_dir,
        )
        return Trial(f"{name}-seed{seed}", annealed, base_run, config.judge, judge_images)

    # ── costs, in vanilla runs ──

    def cost(self, schedule: Schedule) -> float:
        """Of one trial: training of what its branch has not trained yet, and evaluation."""
        if self.config.algorithm == "sequential":
            training = schedule[-1][1] + self.config.tune
        else:
            curriculum = build_curriculum(self.run("", schedule, 0), self.num_images)
            training = curriculum.total_flops / self.vanilla_flops
        return training + self._evaluation_flops / self.vanilla_flops

    def worst_case(self) -> tuple[int, float]:
        """(trials, their cost) if all options have to be tried at every stage."""
        schedules, share = [], 1 / self.config.num_stages
        if self.config.algorithm == "greedy":
            schedules.append(fill((), self.full))
        for stage in range(self.config.num_stages - 1):
            before = tuple((self.options[0], share) for _ in range(stage))
            options, full = growing(self.options, before), at_full(self.full, before)
            if self.config.algorithm == "greedy":
                schedules += [fill((*before, (option, share)), self.full) for option in options if option != full]
            elif not self.config.halving:
                schedules += [(*before, (option, share)) for option in options]
            else:
                half, better = share / 2, options[: math.ceil(len(options) / 2)]
                schedules += [(*before, (option, half)) for option in options]
                schedules += [(*before, (option, half), (option, half)) for option in better]
        seeds = self.config.num_seeds
        return seeds * len(schedules), seeds * sum(map(self.cost, schedules))

    def least_cost(self) -> float:
        """Of what is evaluated before anything is chosen: all candidates of the first stage, or one and vanilla."""
        share = 1 / self.config.num_stages / (2 if self.config.halving else 1)
        if self.config.algorithm == "greedy":
            cost = self.cost(fill((), self.full)) + self.cost(fill(((self.options[0], share),), self.full))
        else:
            cost = sum(self.cost(((option, share),)) for option in growing(self.options, ()))
        return cost * self.config.num_seeds


def _vanilla_run(config: SearchConfig) -> PretrainConfig:
    """The run that a search's flags of pretraining describe, as vanilla MAE."""
    run = as_vanilla(PretrainConfig(**{f.name: getattr(config, f.name) for f in fields(PretrainConfig)}))
    workers = run.num_workers
    if workers is None and config.jobs > 1:
        workers = max(1, default_workers() // config.jobs)
    return replace(
        run,
        allocation="flops",  # the shares are of exact compute, so that stages of equal share cost the same
        num_workers=workers,
        log_dir=None,  # each in its run folder
        resume="",
        overwrite=False,
        picture_steps=0,
        keep_checkpoints=1,
    )


def _options(config: SearchConfig, patch_px: int) -> list[Option]:
    """All options, the cheapest first, full size among them."""
    if config.sizes:
        sizes = [_in_proportion(height, config.input_size, patch_px) for height in config.sizes]
    else:
        sizes = [scale_size(size, config.input_size, patch_px) for size, _ in SCHEDULES["et_pp_192"][1]]
    for size in sizes:
        try:
            grid_of(size, patch_px)
        except ValueError as error:
            raise ValueError(f"--sizes: {error}") from error
        if not fits_in(size, config.input_size):
            largest = show_size(config.input_size)
            raise ValueError(f"--sizes: {show_size(size)} px is larger than --input_size {largest}")
    options = itertools.starmap(
        Option,
        itertools.product(
            dict.fromkeys([*sizes, config.input_size]),
            config.mask_ratios or (None,),
            config.targets or (config.target,),
            config.operators or (config.lowfreq,),
        ),
    )
    return sorted(options, key=lambda option: (area_px(option.size_px), -(option.mask_ratio or 0)))


def _in_proportion(height: int, full_size_px: SizePx, patch_px: int) -> SizePx:
    """The size of that height whose proportions are nearest to those of the full size, in whole patches."""
    full_height, full_width = height_width(full_size_px)
    if full_height == full_width:
        return height
    return as_size((height, max(patch_px, round(height * full_width / full_height / patch_px) * patch_px)))
