"""From a schedule to whole steps: published lists of (size, share), and the planner that makes them a curriculum.

Sources: EfficientTrain (ET), arXiv 2211.09703, Sec. 4; EfficientTrain++ (ET++), arXiv 2405.08768, Sec. 5.
Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from .curriculum import Curriculum, Stage, StageRow
from .shapes import OPERATORS, SPECTRAL, SizePx, area_px, as_size, choice, grid_of, num_patches, show_size

#: (size at a full size of 224 px, share) per stage, and what the shares are shares of.
SCHEDULES: dict[str, tuple[str, tuple[tuple[int, float], ...]]] = {
    "vanilla": ("compute", ((224, 1.0),)),
    "et": ("epochs", ((160, 0.6), (192, 0.2), (224, 0.2))),  # ET, Table 5
    "et_pp": ("compute", ((96, 0.2), (160, 0.4), (224, 0.4))),  # ET++, Table 6
    "et_pp_192": ("compute", ((96, 0.2), (160, 0.4), (192, 0.2), (224, 0.2))),  # ET++ reference code, DeiT
}
#: (size at a full size of 224 px, times a decoded sample is used) of ET++'s replay buffer; larger stages don't replay.
REPLAY: tuple[tuple[int, int], ...] = ((96, 4), (160, 2))  # ET++ reference code
#: A batch grows by whole parts of so many, which does not depend on the devices where they share a part out evenly.
BATCH_PARTS = 64
SHARES_OF = ("compute", "epochs")
ALLOCATIONS = ("area", "flops")
#: Factor on the learning rate for a batch that is so many times larger.
LR_SCALINGS: dict[str, Callable[[float], float]] = {"sqrt": math.sqrt, "linear": float, "none": lambda _: 1.0}


def plan_stages(
    rows: Sequence[StageRow],
    *,
    epochs: float,
    num_images: int,
    batch_size: int,
    full_size_px: SizePx = 224,
    patch_px: int = 16,
    lowfreq: str = "fourier",
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
    update_flops: float = 0.0,
) -> Curriculum:
    """Turn rows into a :class:`Curriculum` of whole steps.

    epochs: T "equivalent epochs", the compute of T epochs at full size (`share_of="compute"`), or epochs of images
        (`share_of="epochs"`). A stage with compute share c makes T·c·F(full)/F(stage) passes (ET++, Sec. 5.2), with F
        proportional to the image area (`allocation="area"`, as published) or exact (`"flops"`).
    num_images: images in the data set. batch_size: images per step over all devices.
    lowfreq: operator, a key of OPERATORS; images of a SPECTRAL one leave the loader at full size.
    replay: replay as ET++ does (REPLAY) where a row doesn't say otherwise.
    early_large_batch: a stage of cheaper images takes more of them per step, so that a step's work stays that of full
        size (ET++, Sec. 5.3): as many on each of `devices` (see BATCH_PARTS), at most `max_batch_size` in all. Its
        learning rate grows by `lr_scaling` (a key of LR_SCALINGS) of the ratio. Rows that state their batch keep it.
    flops_per_image: training FLOPs of one image at a stage; default: its number of patches, good enough for ratios.
    update_flops: of a step's update, whatever the stage.

    Raises ValueError if shares don't add to 1, a size is not divisible by the patch, or a stage sees none or all of its
    patches.
    """
    choice("share_of", share_of, SHARES_OF)
    choice("allocation", allocation, ALLOCATIONS)
    choice("lr_scaling", lr_scaling, LR_SCALINGS)
    choice("lowfreq", lowfreq, OPERATORS)
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
    flops = flops_per_image or (lambda stage: float(stage.patches))

    def unsized(row: StageRow) -> Stage:
        """The row's stage with the run's batch and no steps yet."""
        visible, predicted = patch_counts(row, patch_px, mask_ratio, predict_ratio)
        stage = Stage(
            size_px=row.size_px,
            num_visible=visible,
            num_predicted=predicted,
            batch_size=row.batch_size or batch_size,
            cutoff_px=row.cutoff_px,
            crop_scale=row.crop_scale or crop_scale,
            augment=augment if row.augment is None else row.augment,
            lr_scale=row.lr_scale,
            replay=row.replay or (published_replay(row.size_px, full_size_px, patch_px) if replay else 1),
            views_per_image=views_per_image,
            masks_per_image=masks_per_image,
            update_flops=update_flops,
            patches=num_patches(row.size_px, patch_px),
            loader_px=full_size_px if lowfreq in SPECTRAL else row.size_px,
        )
        return replace(stage, flops_per_image=flops(stage))

    def with_update(stage: Stage) -> float:
        """FLOPs of an image and its part of the update."""
        return stage.flops_per_image + stage.update_flops / stage.batch_size

    full = unsized(StageRow(full_size_px, 1.0))

    def sized(row: StageRow) -> Stage:
        """With micro-batches, and perhaps a batch, as large as its cheaper images allow."""
        stage = unsized(row)
        ratio = max(1.0, full.flops_per_image / stage.flops_per_image)
        stage = replace(stage, micro_scale=ratio)
        if not early_large_batch or row.batch_size:
            return stage
        largest = min(stage.batch_size * ratio, max_batch_size or math.inf)
        whole, part = devices * stage.rows_per_image, max(1, stage.batch_size // BATCH_PARTS)
        multiple = whole if part % whole else part
        batch = max(stage.batch_size, int(largest) // multiple * multiple)
        factor = LR_SCALINGS[lr_scaling](batch / stage.batch_size)
        return replace(stage, batch_size=batch, lr_scale=stage.lr_scale * factor)

    def passes(row: StageRow, stage: Stage) -> float:
        if share_of == "epochs":
            return epochs * row.share
        if allocation == "area":
            return epochs * row.share * area_px(full.size_px) / area_px(stage.size_px)
        return epochs * row.share * with_update(full) / with_update(stage)

    stages, asked_images, planned_images = [], 0.0, 0
    for row in rows:
        stage = sized(row)
        asked_images += passes(row, stage) * num_images
        # Carry the rounding error to the next stage, so the total is off by at most half a batch. Round to 6 digits
        # first, so that the order of float summation cannot change the step count.
        steps = round(round((asked_images - planned_images) / stage.batch_size, 6))
        stage = replace(stage, steps=max(1, steps))
        planned_images += stage.images
        stages.append(stage)
    return Curriculum(tuple(stages), num_images, remainder_images=asked_images - planned_images)


def scheduled(name: str, *, full_size_px: SizePx = 224, patch_px: int = 16, **plan: Any) -> Curriculum:
    """A published schedule (a key of SCHEDULES) scaled to `full_size_px`; `plan` as in :func:`plan_stages`."""
    share_of, rows = SCHEDULES[choice("curriculum", name, SCHEDULES)]
    scaled = [StageRow(scale_size(size, full_size_px, patch_px), share) for size, share in rows]
    return plan_stages(scaled, full_size_px=full_size_px, patch_px=patch_px, share_of=share_of, **plan)


def vanilla(**plan: Any) -> Curriculum:
    """Plain MAE: full size for everything. Arguments as in :func:`plan_stages`."""
    return scheduled("vanilla", **plan)


def efficient_train(**plan: Any) -> Curriculum:
    """ET: 160/192/224 px at 60/20/20 % of the epochs (at a full size of 224). Arguments as in :func:`plan_stages`."""
    return scheduled("et", **plan)


def efficient_train_pp(**plan: Any) -> Curriculum:
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
    """How many steps ET++ uses a decoded sample in at a stage's size: REPLAY, scaled to `full_size_px`; there 1."""
    area = area_px(size_px)
    for size_at_224, replay in REPLAY:
        if area <= area_px(scale_size(size_at_224, full_size_px, patch_px)) and area < area_px(full_size_px):
            return replay
    return 1


def patch_counts(row: StageRow, patch_px: int, mask_ratio: float, predict_ratio: float) -> tuple[int, int]:
    """(visible, predicted) patches of a row, as integers: `round`, since int(100 * (1 - 0.9)) is 9."""
    patches = num_patches(row.size_px, patch_px)
    visible = row.num_visible
    if visible is None:
        visible = round(patches * (1 - (mask_ratio if row.mask_ratio is None else row.mask_ratio)))
    if patches == 1:
        raise ValueError(f"a stage of {show_size(row.size_px)} px is one patch of {patch_px} px; give two or more")
    if not 0 < visible < patches:
        raise ValueError(
            f"{_given(row, 'num_visible', 'mask_ratio', mask_ratio)}: a stage of {show_size(row.size_px)} px has "
            f"{patches} patches, of which {visible} would be visible; at least 1 and at most {patches - 1} must be"
        )
    predicted = row.num_predicted
    if predicted is None:
        ratio = predict_ratio if row.predict_ratio is None else row.predict_ratio
        predicted = round((patches - visible) * ratio)
    if not 0 < predicted <= patches - visible:
        raise ValueError(
            f"{_given(row, 'num_predicted', 'predict_ratio', predict_ratio)}: a stage of {show_size(row.size_px)} px "
            f"has {patches - visible} masked patches, of which {predicted} would be predicted; at least 1 and at most "
            "all of them must be"
        )
    return visible, predicted


def _given(row: StageRow, count: str, ratio: str, flag: float) -> str:
    """Where a count of patches comes from, as a user wrote it: the row's count, its ratio, or the run's."""
    for name in (count, ratio):
        if (value := getattr(row, name)) is not None:
            return f"stages: {name} {value:g}"
    return f"--{ratio} {flag:g}"
