"""What is shown at which step: stages of growing, low-frequency inputs, in whole steps.

`schedules` plans them once; everything downstream reads them from :meth:`Curriculum.at`. Vanilla MAE has one stage.
Position in training is ``p = compute spent / total compute`` in [0, 1]; learning rate and bandwidth are functions of p.
Standard library only.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

from .shapes import SizePx, as_size, fits_in, height_width, show_size


@dataclass(frozen=True)
class Stage:
    """One stage of training in plain numbers. Nothing downstream computes them again."""

    size_px: SizePx
    """Side of the input in pixels, or (height, width) when it is not square."""
    num_visible: int
    """Patches the encoder sees."""
    num_predicted: int
    """Masked patches the decoder predicts."""
    batch_size: int
    """Images per optimiser step, over all devices and accumulation."""
    steps: int = 0
    """Optimiser steps."""
    flops_per_image: float = 0.0
    """Training FLOPs (forward and backward, input operators) of one image."""
    update_flops: float = 0.0
    """FLOPs of a step that don't depend on its images: of an optimiser that multiplies matrices.

    Counted once, though every device repeats them, since a plan must not depend on how many there are.
    """
    cutoff_px: SizePx | None = None
    """Only frequencies that an image of this side holds are kept; None: all that the size holds."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Area range of the random resized crop."""
    augment: int = 0
    """RandAugment magnitude; 0 is off."""
    lr_scale: float = 1.0
    """Factor on the learning rate."""
    replay: int = 1
    """Steps that use a decoded sample: batch/replay samples of a step are fresh, the rest come from the buffer."""
    replay_depth: int = 1
    """Samples that the replay buffer holds for each sample of a step."""
    replay_bytes: int = 0
    """Memory of the replay buffer, over all devices; 0 where nothing is replayed."""
    views_per_image: int = 1
    """Crops from one decoded image."""
    masks_per_image: int = 1
    """Masks on one crop."""
    micro_scale: float = 1.0
    """Micro-batch size relative to full size, chosen so that every micro-batch costs the same FLOPs."""
    patches: int = 0
    """L, patches of the input's grid; 0: not planned."""
    loader_px: SizePx = 0
    """Size that leaves the loader: full size where the device does the low-frequency crop; 0: not planned."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "size_px", as_size(self.size_px))
        object.__setattr__(self, "loader_px", as_size(self.loader_px))
        if self.cutoff_px is not None:
            object.__setattr__(self, "cutoff_px", as_size(self.cutoff_px))
        object.__setattr__(self, "crop_scale", tuple(self.crop_scale))
        if self.batch_size % self.rows_per_image:
            raise ValueError(
                f"a batch of {self.batch_size} is no multiple of views_per_image × masks_per_image = "
                f"{self.rows_per_image}"
            )

    @property
    def height_width(self) -> tuple[int, int]:
        return height_width(self.size_px)

    @property
    def rows_per_image(self) -> int:
        """Rows of a batch that come from one decoded image."""
        return self.views_per_image * self.masks_per_image

    def micro_size(self, full: int) -> int:
        """Images of a micro-batch, where one of full-size images has `full`."""
        return int(full * self.micro_scale)

    def micro_batches(self, full: int, devices: int) -> int:
        """Micro-batches of a step on the device that has most rows; `full` as in :meth:`micro_size`."""
        group, rows = self.rows_per_image, -(-self.batch_size // devices)
        return micro_batch_count(rows, self.micro_size(full), group, self.batch_size % (devices * group) == 0)

    @property
    def images(self) -> int:
        """Images seen in this stage."""
        return self.steps * self.batch_size

    @property
    def flops(self) -> float:
        """Training FLOPs of this stage."""
        return self.steps * self.flops_per_step

    @property
    def flops_per_step(self) -> float:
        """Training FLOPs of one step."""
        return self.batch_size * self.flops_per_image + self.update_flops

    @property
    def groups(self) -> int:
        """Groups of rows in a batch: each shows one decoded image, fresh or replayed, in views × masks rows."""
        return self.batch_size // self.rows_per_image

    def decoded_before(self, step: int) -> int:
        """Images decoded in the first `step` steps of the stage.

        Group q takes a fresh image where (step + q) is a multiple of `replay`; at step 0 the buffer is empty: all do.
        """
        if step == 0:
            return 0
        rounds, rest = divmod(step - 1, self.replay)  # every round of `replay` steps renews each group once
        return self.groups * (1 + rounds) + sum(-((i - self.groups) // self.replay) for i in self._renewed(rest))

    def _renewed(self, steps: int) -> Iterable[int]:
        """First group that is renewed at step 1, 2, ... of a round; the others follow at a distance of `replay`."""
        return (-step % self.replay for step in range(1, steps + 1))


def micro_batch_count(rows: int, micro_size: int, group_size: int = 1, even: bool = True) -> int:
    """How many micro-batches of at most `micro_size` a rank's rows are cut into: so many that they are of one size, if
    that is possible, since each size is compiled, captured and given memory for itself.

    group_size: rows that stay together. even: all ranks have as many rows; else, cut by what divides them, they would
    differ in how many micro-batches they have.
    """
    groups = -(-rows // group_size)
    fewest = -(-groups // max(1, micro_size // group_size))
    # Up to twice as many: a power of two is always among them. Tiles of matrix products like multiples of 64.
    alike = [count for count in range(fewest, 2 * fewest + 1) if groups % count == 0] if even else []
    return next((c for c in alike if groups // c * group_size % 64 == 0), alike[0] if alike else fewest)


def check_views(prefix: str, crop_scale: tuple[float, float], augment: int = 0) -> None:
    """ValueError unless the areas of a random crop and the magnitude of RandAugment (0 to 30) are possible."""
    low, high = crop_scale
    if not 0 < low <= high <= 1:
        raise ValueError(f"{prefix}crop_scale must be two areas 0 < low <= high <= 1, got {low} {high}")
    if not 0 <= augment <= 30:
        raise ValueError(f"{prefix}augment must be a RandAugment magnitude from 0 (off) to 30, got {augment}")


ROW_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "mask_ratio": ("in [0, 1)", lambda value: 0 <= value < 1),
    "predict_ratio": ("in (0, 1]", lambda value: 0 < value <= 1),
    "batch_size": ("positive", lambda value: value > 0),
    "lr_scale": ("finite and not negative", lambda value: 0 <= value < math.inf),
    "replay": ("1 (off) or more", lambda value: value >= 1),
}


@dataclass(frozen=True)
class StageRow:
    """One row of a schedule as a user writes it: ratios and shares. Counts, where given, win over ratios."""

    size_px: SizePx
    """Side in pixels, or (height, width)."""
    share: float
    """Share of the compute or of the epochs, see `share_of`."""
    mask_ratio: float | None = None
    """Share of the patches that is masked; default: the run's."""
    num_visible: int | None = None
    """Visible patches, instead of a ratio."""
    predict_ratio: float | None = None
    """Share of the masked patches that is predicted; default: the run's."""
    num_predicted: int | None = None
    """Predicted patches, instead of a ratio."""
    batch_size: int | None = None
    """Images per step; default: the run's."""
    cutoff_px: SizePx | None = None
    """Keep only frequencies that an image of this side, below size_px, holds: low frequencies without fewer patches."""
    crop_scale: tuple[float, float] | None = None
    """Area range of the random resized crop; default: the run's."""
    augment: int | None = None
    """RandAugment magnitude; default: the run's."""
    lr_scale: float = 1.0
    """Factor on the learning rate."""
    replay: int | None = None
    """Steps that use a decoded sample; default: the run's."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "size_px", as_size(self.size_px))
        if self.cutoff_px is not None:
            object.__setattr__(self, "cutoff_px", as_size(self.cutoff_px))
            fits = min(height_width(self.cutoff_px)) > 0 and fits_in(self.cutoff_px, self.size_px)
            if not fits or self.cutoff_px == self.size_px:
                raise ValueError(
                    f"stages: cutoff_px {show_size(self.cutoff_px)} must be positive and smaller than size_px "
                    f"{show_size(self.size_px)}"
                )
        for name, (legal, holds) in ROW_RANGES.items():
            if (value := getattr(self, name)) is not None and not holds(value):
                raise ValueError(f"stages: {name} must be {legal}, got {value}")
        check_views("stages: ", self.crop_scale or (1.0, 1.0), self.augment or 0)


@dataclass(frozen=True)
class Curriculum:
    """The planned stages. Steps count from 0; `at(step)` is the stage that step belongs to."""

    stages: tuple[Stage, ...]
    num_images: int
    """Images in the data set: images seen / num_images = passes."""
    remainder_images: float = 0.0
    """Images asked for minus images planned: what rounding to whole steps left over."""

    @cached_property
    def _ends(self) -> tuple[int, ...]:
        return tuple(_running_sum(stage.steps for stage in self.stages))

    @property
    def total_steps(self) -> int:
        return self._ends[-1]

    @cached_property
    def total_images(self) -> int:
        return sum(stage.images for stage in self.stages)

    @cached_property
    def total_flops(self) -> float:
        return sum(stage.flops for stage in self.stages)

    @cached_property
    def update_share(self) -> float:
        """Share of the training FLOPs that doesn't depend on images: of updates."""
        return sum(stage.steps * stage.update_flops for stage in self.stages) / self.total_flops

    @cached_property
    def decoded_images(self) -> int:
        """Images that are decoded; fewer than are seen where samples are replayed or give several views."""
        return self.decoded_before(self.total_steps)

    def index(self, step: int) -> int:
        """Number of the stage that `step` belongs to."""
        if not 0 <= step < self.total_steps:
            raise IndexError(f"step {step} is outside the plan of {self.total_steps} steps")
        return bisect_right(self._ends, step)

    def at(self, step: int) -> Stage:
        """The stage of a step, 0 <= step < total_steps."""
        return self.stages[self.index(step)]

    def start(self, stage_index: int) -> int:
        """First step of a stage."""
        return self._ends[stage_index] - self.stages[stage_index].steps

    def images_before(self, step: int) -> int:
        """Images seen before `step`: the global number of that step's first sample. step <= total_steps."""
        return round(self._before(step, lambda stage: stage.batch_size))

    def decoded_before(self, step: int) -> int:
        """Images decoded before `step`. step <= total_steps."""
        pairs = zip(self.stages, self._ends, strict=True)
        return sum(s.decoded_before(min(max(step - (end - s.steps), 0), s.steps)) for s, end in pairs)

    def flops_before(self, step: int) -> float:
        """Training FLOPs spent before `step`."""
        return self._before(step, lambda stage: stage.flops_per_step)

    def position(self, step: int) -> float:
        """p in [0, 1]: the share of the total compute spent before `step`."""
        return self.flops_before(step) / self.total_flops

    def _before(self, step: int, per_step: Callable[[Stage], float]) -> float:
        done = 0.0
        for stage, end in zip(self.stages, self._ends, strict=True):
            in_stage = min(max(step - (end - stage.steps), 0), stage.steps)
            done += in_stage * per_step(stage)
        return done

    def passes(self, stage: Stage) -> float:
        """Passes over the data set in a stage."""
        return stage.images / self.num_images


def _running_sum(numbers: Iterable[int]) -> Iterable[int]:
    total = 0
    for number in numbers:
        total += number
        yield total
