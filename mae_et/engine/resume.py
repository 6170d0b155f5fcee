"""Identity of a run: what its checkpoint says about it, and whether that is the run to resume or to branch from."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..plan.build import shape_of
from ..plan.config import PretrainConfig
from ..plan.curriculum import Curriculum, Stage
from ..plan.flags import Role, names, to_dict
from ..plan.shapes import of_file

log = logging.getLogger(__name__)

FORMAT = "mae_et/1"
"""Value of the key `format` in the checkpoints of this package."""


def identity(config: PretrainConfig, curriculum: Curriculum) -> dict[str, Any]:
    """What a checkpoint says about itself: enough to use its weights, and to refuse to resume another run."""
    return {
        "format": FORMAT,
        "config": to_dict(config),
        "shape": shape_of(config).to_dict(),
        "target": config.target,
        "norm_pix_loss": config.norm_pix_loss,
        "stages": [dataclasses.asdict(stage) for stage in curriculum.stages],
        "num_images": curriculum.num_images,
        "mean": list(config.pixel_mean),
        "std": list(config.pixel_std),
    }


def check_images(flag: str, path: Path, state: Mapping[str, Any], images: Mapping[str, str], data_path: str) -> None:
    """Compare the images that a checkpoint is of with those whose `fingerprint` is given. flag: as it was given.

    ValueError for --resume auto if one is another. Who names a checkpoint may know that they have been shrunk, or that
    another library decodes them: a warning.
    """
    before = state.get("sampled_images", {})  # older checkpoints have none
    changed = [index for index in before if images.get(index, before[index]) != before[index]]
    if not changed:
        return
    what = f"{path} was trained on other images than those of --data_path {data_path} (number {changed[0]} differs)"
    if flag == "--resume auto":
        raise ValueError(f"{flag}: {what}; to go on with these all the same, give --resume {path}")
    log.warning("%s: %s", flag, what)


def check_config(what: str, before: Mapping[str, Any], config: Any, fixed: Callable[[Role], bool]) -> None:
    """ValueError that names the first flag with a fixed role whose value is not that of the checkpoint `what`."""
    now, defaults = to_dict(config), to_dict(type(config)())
    for name in names(type(config), fixed):
        was = before.get(name, defaults[name])  # a run from before there was this flag
        if was != now[name]:
            raise ValueError(f"{what} is of another configuration: {name} was {was}, is {now[name]}")


def check_same_run(
    state: dict[str, Any], config: PretrainConfig, curriculum: Curriculum, images: Mapping[str, str], path: Path
) -> None:
    """ValueError that names the first difference if a checkpoint is of another run than the configuration's.

    images: `fingerprint` of what --data_path holds.
    """
    _check_beginning(f"--resume {path}", state, config, curriculum, lambda role: role.resume)
    check_images(f"--resume {config.resume}", path, state, images, config.data_path)


def check_peak_lr(what: str, state: Mapping[str, Any], peak: float) -> None:
    """ValueError unless the peak is the checkpoint's: stages that state their own batches say nothing of --batch_size,
    which --blr is multiplied by."""
    if (before := state.get("peak_lr", peak)) != peak:
        raise ValueError(
            f"{what}: the peak learning rate was {before:g}, is {peak:g}: --blr times the images of a step, over "
            "256; set --total_batch_size or --batch_size as they were"
        )


def check_branch(
    state: dict[str, Any], config: PretrainConfig, curriculum: Curriculum, images: Mapping[str, str], path: Path
) -> None:
    """ValueError if a checkpoint is not of a finished run whose stages are the first of the configuration's."""
    what = f"--branch {path}"
    _check_beginning(what, state, config, curriculum, lambda role: role.branch)
    check_images(f"--branch {config.branch}", path, state, images, config.data_path)
    done, stages = state["step"], len(state["stages"])
    if stages >= len(curriculum.stages):
        raise ValueError(f"{what} has {stages} stages and this run {len(curriculum.stages)}: nothing is left to train")
    if done != curriculum.start(stages):
        raise ValueError(f"{what} stopped at step {done} of {curriculum.start(stages)}; finish it with --resume auto")


def _check_beginning(
    what: str, state: dict[str, Any], config: PretrainConfig, curriculum: Curriculum, fixed: Callable[[Role], bool]
) -> None:
    """ValueError that names the first difference, in what must not differ, to the run of a checkpoint."""
    if "head" in state:
        raise ValueError(f"{what} is a checkpoint of fine-tuning; that goes on with main_finetune.py")
    if state.get("format") != FORMAT or "optimizer" not in state:
        raise ValueError(f"{what} is not a pretraining checkpoint of mae_et; to fine-tune it, use main_finetune.py")
    check_config(what, state["config"], config, fixed)
    if state["num_images"] != curriculum.num_images:
        was, now = state["num_images"], curriculum.num_images
        raise ValueError(f"{what} was trained on {was} images, --data_path {config.data_path} has {now}")
    for before, stage in zip(state["stages"], curriculum.stages, strict=False):  # a branch has more
        # Fields added since the checkpoint are what the plan says. Other devices may need other micro-batches.
        planned = {name: getattr(stage, name) for name in ("micro_scale", "patches", "loader_px")}
        was, now = dataclasses.asdict(of_file(Stage, before | planned, what)), dataclasses.asdict(stage)
        for name in now:
            if was[name] != now[name]:
                remedy = "; set --total_batch_size to keep the batch on another number of devices"
                if config.early_large_batch:  # whose rounding may depend on the devices
                    remedy = "; with --early_large_batch, go on on as many devices as before, at the same total batch"
                raise ValueError(
                    f"{what}: stage of {now['size_px']} px had {name} {was[name]}, now {now[name]}"
                    + (remedy if name == "batch_size" else "")
                )
