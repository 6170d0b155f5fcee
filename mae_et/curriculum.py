"""What is shown at which step: stages of growing, low-frequency inputs, planned in whole steps before training.

A schedule is a literal list of rows (size, share); :func:`plan_stages` turns rows and durations into integers once,
and everything downstream reads them from :meth:`Curriculum.at`. Vanilla MAE is the schedule with one row.

Position in training is ``p = compute spent / total compute`` in [0, 1]; learning rate and bandwidth are functions of p.

Sources: EfficientTrain (ET), arXiv 2211.09703, Sec. 4; EfficientTrain++ (ET++), arXiv 2405.08768, Sec. 5.
Standard library only.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

SizePx = int | tuple[int, int]

#: (size at a full size of 224 px, share) per stage, and what the shares are shares of.
SCHEDULES: dict[str, tuple[str, tuple[tuple[int, float], ...]]] = {
    "vanilla": ("compute", ((224, 1.0),)),
    "et": ("epochs", ((160, 0.6), (192, 0.2), (224, 0.2))),  # ET, Table 5
    "et_pp": ("compute", ((96, 0.2), (160, 0.4), (224, 0.4))),  # ET++, Table 6
    "et_pp_192": ("compute", ((96, 0.2), (160, 0.4), (192, 0.2), (224, 0.2))),  # ET++ reference code, DeiT
}
#: (size at a full size of 224 px, times a decoded sample is used) of ET++'s replay buffer; larger stages don't replay.
REPLAY: tuple[tuple[int, int], ...] = ((96, 4), (160, 2))  # ET++ reference code
SHARES_OF = ("compute", "epochs")
ALLOCATIONS = ("area", "flops")
#: Factor on the learning rate for a batch that is so many times larger.
LR_SCALINGS: dict[str, Callable[[float], float]] = {"sqrt": math.sqrt, "linear": float, "none": lambda _: 1.0}


def height_width(size_px: SizePx) -> tuple[int, int]:
    """(height, width) of a size given as one number (square) or as (height, width)."""
    return (size_px, size_px) if isinstance(size_px, int) else (int(size_px[0]), int(size_px[1]))


def as_size(size_px: SizePx | Sequence[int]) -> SizePx:
    """One number for a square, (height, width) otherwise: one way to write each size, so sizes compare equal."""
    if isinstance(size_px, int):
        return size_px
    if len(size_px) not in (1, 2) or not all(isinstance(side, int) for side in size_px):
        raise ValueError(f"a size is one integer or (height, width) in pixels; got {size_px!r}")
    height, width = size_px[0], size_px[-1]
    return height if height == width else (height, width)


def grid_of(size_px: SizePx, patch_px: int) -> tuple[int, int]:
    """Patches (rows, columns) of an image. ValueError if a side is not a positive multiple of the patch."""
    height, width = height_width(size_px)
    if height < patch_px or width < patch_px or height % patch_px or width % patch_px:
        raise ValueError(
            f"size {show_size(size_px)} px is not divisible by the patch ({patch_px} px): {_near(size_px, patch_px)}"
        )
    return height // patch_px, width // patch_px


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
    """Images of a micro-batch relative to full size: small ones come in larger micro-batches, for the same work."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "size_px", as_size(self.size_px))
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

    @property
    def images(self) -> int:
        """Images seen in this stage."""
        return self.steps * self.batch_size

    @property
    def flops(self) -> float:
        """Training FLOPs of this stage."""
        return self.images * self.flops_per_image

    @property
    def lanes(self) -> int:
        """Decoded images that one step shows, fresh or replayed; each fills views × masks rows of the batch."""
        return self.batch_size // self.rows_per_image

    def decoded_before(self, step: int) -> int:
        """Images decoded in the first `step` steps of the stage.

        Lane q takes a fresh image where (step + q) is a multiple of `replay`; and all do at step 0, whose buffer is
        empty.
        """
        if step == 0:
            return 0
        rounds, rest = divmod(step - 1, self.replay)  # every round of `replay` steps renews each lane once
        return self.lanes * (1 + rounds) + sum(-((i - self.lanes) // self.replay) for i in self._renewed(rest))

    def _renewed(self, steps: int) -> Iterable[int]:
        """First lane that is renewed at step 1, 2, ... of a round; the others follow at a distance of `replay`."""
        return (-step % self.replay for step in range(1, steps + 1))


def check_views(prefix: str, crop_scale: tuple[float, float], augment: int) -> None:
    """ValueError unless the areas of a random crop and the magnitude of RandAugment (0 to 30) are possible."""
    low, high = crop_scale
    if not 0 < low <= high <= 1:
        raise ValueError(f"{prefix}crop_scale must be two areas 0 < low <= high <= 1, got {low} {high}")
    if not 0 <= augment <= 30:
        raise ValueError(f"{prefix}augment must be a RandAugment magnitude from 0 (off) to 30, got {augment}")


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
        if self.replay is not None and self.replay < 1:
            raise ValueError(f"stages: replay must be 1 (off) or more, got {self.replay}")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"stages: batch_size must be positive, got {self.batch_size}")
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
        return self._before(step, lambda stage: stage.batch_size * stage.flops_per_image)

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


def plan_stages(
    rows: Sequence[StageRow],
    *,
    epochs: float,
    num_images: int,
    batch_size: int,
    full_size_px: SizePx = 224,
    patch_px: int = 16,
    mask_ratio: float = 0.75,
    predict_ratio: float = 1.0,
    share_of: str = "compute",
    allocation: str = "area",
    crop_scale: tuple[float, float] = (0.2, 1.0),
    augment: int = 0,
    replay: bool = False,
    views_per_image: int = 1,
    masks_per_image: int = 1,
    early_large_batch: bool = False,
    max_batch_size: int | None = None,
    lr_scaling: str = "sqrt",
    devices: int = 1,
    flops_per_image: Callable[[Stage], float] | None = None,
) -> Curriculum:
    """Turn rows into a :class:`Curriculum` of whole steps.

    epochs: T "equivalent epochs", the compute of T epochs at full size (`share_of="compute"`), or epochs of images
        (`share_of="epochs"`). A stage with compute share c makes T·c·F(full)/F(stage) passes (ET++, Sec. 5.2), with F
        proportional to the image area (`allocation="area"`, as published) or exact (`"flops"`).
    num_images: images in the data set. batch_size: images per step over all devices.
    replay: replay as ET++ does (REPLAY) where a row doesn't say otherwise.
    early_large_batch: a stage of cheaper images takes more of them per step, so that a step's work stays that of full
        size (ET++, Sec. 5.3): as many on each of `devices`, at most `max_batch_size` in all. Its learning rate grows by
        `lr_scaling` (a key of LR_SCALINGS) of the ratio. Rows that state their batch keep it.
    flops_per_image: training FLOPs of one image at a stage; default: its number of patches, good enough for ratios.

    Raises ValueError if shares don't add to 1, a size is not divisible by the patch, or a stage sees none or all of its
    patches.
    """
    _choice("share_of", share_of, SHARES_OF)
    _choice("allocation", allocation, ALLOCATIONS)
    _choice("lr_scaling", lr_scaling, LR_SCALINGS)
    if not rows:
        raise ValueError("stages: a curriculum needs at least one stage")
    for name, value in (("epochs", epochs), ("batch size", batch_size), ("number of images", num_images)):
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    if any(row.share <= 0 for row in rows) or not math.isclose(sum(row.share for row in rows), 1.0, abs_tol=1e-6):
        raise ValueError(
            f"stages: shares must be positive and add to 1; {' + '.join(f'{row.share:g}' for row in rows)} = "
            f"{sum(row.share for row in rows):g}"
        )
    flops = flops_per_image or (lambda stage: float(math.prod(grid_of(stage.size_px, patch_px))))

    def unplanned(row: StageRow) -> Stage:
        visible, predicted = patch_counts(row, patch_px, mask_ratio, predict_ratio)
        stage = Stage(
            size_px=row.size_px,
            num_visible=visible,
            num_predicted=predicted,
            batch_size=row.batch_size or batch_size,
            crop_scale=row.crop_scale or crop_scale,
            augment=augment if row.augment is None else row.augment,
            lr_scale=row.lr_scale,
            replay=row.replay or (published_replay(row.size_px, full_size_px, patch_px) if replay else 1),
            views_per_image=views_per_image,
            masks_per_image=masks_per_image,
        )
        return replace(stage, flops_per_image=flops(stage))

    full = unplanned(StageRow(full_size_px, 1.0))

    def sized(row: StageRow) -> Stage:
        stage = unplanned(row)
        ratio = max(1.0, full.flops_per_image / stage.flops_per_image)
        stage = replace(stage, micro_scale=ratio)
        if not early_large_batch or row.batch_size:
            return stage
        most = min(stage.batch_size * ratio, max_batch_size or math.inf)
        whole = devices * stage.rows_per_image
        batch = max(stage.batch_size, int(most) // whole * whole)
        factor = LR_SCALINGS[lr_scaling](batch / stage.batch_size)
        return replace(stage, batch_size=batch, lr_scale=stage.lr_scale * factor)

    def passes(row: StageRow, stage: Stage) -> float:
        if share_of == "epochs":
            return epochs * row.share
        if allocation == "area":
            return epochs * row.share * math.prod(full.height_width) / math.prod(stage.height_width)
        return epochs * row.share * full.flops_per_image / stage.flops_per_image

    stages, wanted, planned = [], 0.0, 0
    for row in rows:
        stage = sized(row)
        wanted += passes(row, stage) * num_images
        # What one stage's rounding leaves over goes to the next, so the total is off by at most half a batch.
        # To six digits first: the same shares, added up in another way, must not be rounded in another way.
        stage = replace(stage, steps=max(1, round(round((wanted - planned) / stage.batch_size, 6))))
        planned += stage.images
        stages.append(stage)
    return Curriculum(tuple(stages), num_images, remainder_images=wanted - planned)


def scheduled(name: str, *, full_size_px: SizePx = 224, patch_px: int = 16, **plan) -> Curriculum:
    """A published schedule (a key of SCHEDULES) scaled to `full_size_px`; `plan` as in :func:`plan_stages`."""
    share_of, rows = SCHEDULES[_choice("curriculum", name, SCHEDULES)]
    scaled = [StageRow(scale_size(size, full_size_px, patch_px), share) for size, share in rows]
    return plan_stages(scaled, full_size_px=full_size_px, patch_px=patch_px, share_of=share_of, **plan)


def vanilla(**plan) -> Curriculum:
    """Plain MAE: full size for everything. Arguments as in :func:`plan_stages`."""
    return scheduled("vanilla", **plan)


def efficient_train(**plan) -> Curriculum:
    """ET: 160/192/224 px at 60/20/20 % of the epochs (at a full size of 224). Arguments as in :func:`plan_stages`."""
    return scheduled("et", **plan)


def efficient_train_pp(**plan) -> Curriculum:
    """ET++: 96/160/224 px at 20/40/40 % of the compute (at a full size of 224). Arguments as in :func:`plan_stages`."""
    return scheduled("et_pp", **plan)


def scale_size(size_at_224: int, full_size_px: SizePx, patch_px: int) -> SizePx:
    """A published size at another full size: the same share of the grid, rounded up to whole patches.

    32 px with patch 4 gives 16/24/32 for 96/160/224; 64 px with patch 8 gives 32/48/64.
    """
    rows, columns = grid_of(full_size_px, patch_px)
    # In integers: ceil(14 * 96 / 224) must be 6, not 7 by floating point.
    return as_size(tuple(-(-side * size_at_224 // 224) * patch_px for side in (rows, columns)))


def published_replay(size_px: SizePx, full_size_px: SizePx, patch_px: int) -> int:
    """How many steps ET++ uses a decoded sample in at a stage's size: REPLAY, scaled to `full_size_px`."""
    for size_at_224, replay in REPLAY:
        if math.prod(height_width(size_px)) <= math.prod(height_width(scale_size(size_at_224, full_size_px, patch_px))):
            return replay
    return 1


def patch_counts(row: StageRow, patch_px: int, mask_ratio: float, predict_ratio: float) -> tuple[int, int]:
    """(visible, predicted) patches of a row, as integers: `round`, since int(100 * (1 - 0.9)) is 9."""
    patches = math.prod(grid_of(row.size_px, patch_px))
    visible = row.num_visible
    if visible is None:
        visible = round(patches * (1 - (mask_ratio if row.mask_ratio is None else row.mask_ratio)))
    if not 0 < visible < patches:
        raise ValueError(
            f"mask_ratio: a stage of {show_size(row.size_px)} px has {patches} patches, of which {visible} would be "
            f"visible; at least 1 and at most {patches - 1} must be"
        )
    predicted = row.num_predicted
    if predicted is None:
        ratio = predict_ratio if row.predict_ratio is None else row.predict_ratio
        predicted = round((patches - visible) * ratio)
    if not 0 < predicted <= patches - visible:
        raise ValueError(
            f"predict_ratio: a stage of {show_size(row.size_px)} px has {patches - visible} masked patches, of which "
            f"{predicted} would be predicted; at least 1 and at most all of them must be"
        )
    return visible, predicted


def _running_sum(numbers: Iterable[int]) -> Iterable[int]:
    total = 0
    for number in numbers:
        total += number
        yield total


def _choice(name: str, value: str, legal: Iterable[str]) -> str:
    if value not in legal:
        raise ValueError(f"unknown {name} {value!r}; choose from {', '.join(legal)}")
    return value


def show_size(size_px: SizePx) -> str:
    """224 or 224×160."""
    return str(size_px) if isinstance(size_px, int) else "×".join(map(str, size_px))


def _near(size_px: SizePx, patch_px: int) -> str:
    def nearest(side: int) -> int:
        return max(patch_px, round(side / patch_px) * patch_px)

    return f"{show_size(as_size(tuple(nearest(side) for side in height_width(size_px))))} px would be"
