"""From a configuration to the shape of its model and the whole steps of its curriculum."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace

from .config import PretrainConfig
from .cost import flops_per_image, input_flops_per_image, muon_flops
from .curriculum import Curriculum, Stage
from .schedules import plan_stages, scheduled
from .shapes import ModelShape, fits_in, grid_of, height_width, model_shape, show_size, target_dim


def shape_of(config: PretrainConfig) -> ModelShape:
    """The named model, and what the configuration changes about it."""
    named = model_shape(config.model)
    changes = {name: getattr(config, name) for name in ModelShape.__dataclass_fields__ if hasattr(config, name)}
    arguments = named | {name: value for name, value in changes.items() if value is not None}
    grid_of(config.input_size, arguments["patch_size"], "--input_size")
    target = target_dim(config.target, arguments["patch_size"], config.in_chans)
    return ModelShape(**arguments, img_size=config.input_size, target_dim=target)


def build_curriculum(config: PretrainConfig, num_images: int, devices: int = 1) -> Curriculum:
    """The stages of a configuration in whole steps, for a data set of `num_images` on so many devices."""
    shape, batch_size = shape_of(config), config.total_batch(devices)

    def flops(stage: Stage) -> float:
        return flops_per_image(shape, stage) + input_flops_per_image(
            config.input_size, stage, config.in_chans, config.lowfreq
        )

    # Flags that plan_stages knows by the same name. --batch_size is a micro-batch; a schedule brings its own share_of.
    arguments = {
        name: getattr(config, name) for name in inspect.signature(plan_stages).parameters if hasattr(config, name)
    }
    del arguments["share_of"]
    arguments |= {
        "num_images": num_images,
        "batch_size": batch_size,
        "full_size_px": config.input_size,
        "patch_px": shape.patch_size,
        "devices": devices,
        "flops_per_image": flops,
        "update_flops": muon_flops(shape) if config.opt == "muon" else 0,
    }
    if config.norm_pix_loss and shape.target_dim == 1:
        raise ValueError("--norm_pix_loss: a patch of one value has no variance; leave it out, or take larger patches")
    if config.curriculum == "custom":
        for row in config.stages:
            grid_of(row.size_px, shape.patch_size, "stages: size_px")
            if not fits_in(row.size_px, config.input_size):
                raise ValueError(f"stages: size {row.size_px} px is larger than --input_size {config.input_size}")
        curriculum = plan_stages(config.stages, share_of=config.share_of, **arguments)
    else:
        curriculum = scheduled(config.curriculum, **arguments)
    _check_batches(config, curriculum, devices)
    return replace(curriculum, stages=tuple(_with_buffer(stage, config) for stage in curriculum.stages))


def as_vanilla(config: PretrainConfig) -> PretrainConfig:
    """The same configuration as vanilla MAE."""
    return replace(config, curriculum="vanilla", stages=(), share_of="compute")


def _check_batches(config: PretrainConfig, curriculum: Curriculum, devices: int) -> None:
    total = config.total_batch(devices)
    if (most := config.max_batch_size) and most < total:
        raise ValueError(
            f"--max_batch_size {most} is below the total batch of {total}, so --early_large_batch would do nothing; "
            "raise it, or drop both"
        )
    smallest = min(stage.batch_size for stage in curriculum.stages)
    if smallest < devices:
        raise ValueError(
            f"--total_batch_size: a stage's batch of {smallest} is smaller than the number of devices, {devices}"
        )
    views = config.views_per_image * config.masks_per_image
    sizes: list[tuple[str, float]] = [("--batch_size", config.batch_size)]
    sizes += [
        (f"total batch / devices of the stage of {show_size(stage.size_px)} px,", stage.batch_size / devices)
        for stage in curriculum.stages
    ]
    for name, size in sizes:
        if views > 1 and size % views:  # without views, ranks may have uneven shares
            raise ValueError(
                f"{name} {size:g} must be a multiple of {views}, the --views_per_image × --masks_per_image of an image"
            )


def _with_buffer(stage: Stage, config: PretrainConfig) -> Stage:
    """The stage with a replay buffer as deep as --replay_gib allows, if it replays."""
    if stage.replay == 1:
        return stage
    step_bytes = stage.batch_size // config.masks_per_image * config.in_chans * math.prod(height_width(stage.loader_px))
    depth = min(int(config.replay_gib * 2**30) // step_bytes, -(-stage.steps // stage.replay))
    if depth < 1:
        raise ValueError(
            f"--replay_gib {config.replay_gib:g} is less than one step of the stage of {show_size(stage.size_px)} px, "
            f"{step_bytes / 2**30:.2g} GiB; raise it, or don't replay"
        )
    return replace(stage, replay_depth=depth, replay_bytes=depth * step_bytes)
