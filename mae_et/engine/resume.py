"""Going on with a run: what a checkpoint says about the run it is of, and whether that is the run that is asked for."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .. import checkpoint
from ..data.pixels import CorruptImage, corrupt_image_errors
from ..data.sources import Source
from ..plan.config import PretrainConfig
from ..plan.curriculum import Curriculum, Stage
from ..plan.flags import to_dict
from ..plan.report import model_kwargs
from . import run_folder, storage

log = logging.getLogger(__name__)

#: Fields that may change when a run is resumed: they change neither data nor masks nor the mathematics of a step.
#: Batch, replay and views are compared through the planned stages: other devices may share them out otherwise.
FREE_ON_RESUME = frozenset(
    """
    recipe data_path num_images num_workers pin_mem damaged_limit cache_gib output_dir log_dir resume branch overwrite
    start_epoch device precision compile fsdp activation_checkpointing print_config
    print_steps save_steps save_minutes keep_checkpoints picture_steps
    batch_size accum_iter total_batch_size replay replay_gib views_per_image masks_per_image
    world_size local_rank dist_on_itp dist_url job_dir nodes ngpus use_volta32
    """.split()
)


#: What a branch may have otherwise than the run it begins with: how long it is, and what comes later.
SCHEDULE = frozenset("curriculum stages share_of epochs warmup_epochs hold_epochs".split())


def identity(config: PretrainConfig, curriculum: Curriculum) -> dict[str, Any]:
    """What a checkpoint says about itself: enough to use its weights, and to refuse to resume another run."""
    return {
        "format": checkpoint.FORMAT,
        "config": to_dict(config),
        "shape": model_kwargs(config),
        "target": config.target,
        "norm_pix_loss": config.norm_pix_loss,
        "stages": [dataclasses.asdict(stage) for stage in curriculum.stages],
        "num_images": curriculum.num_images,
        "mean": list(config.pixel_mean),
        "std": list(config.pixel_std),
    }


def fingerprint(source: Source, samples: int = 16) -> dict[str, str]:
    """Digests of some images, evenly spread, by index: tell a data set from another of its size, wherever it lies.

    An image that can't be read has none: the next time it may be there again.
    """
    digests = {}
    for index in range(0, len(source), max(1, len(source) // samples)):
        try:
            item = source.read(index)[0]
            with corrupt_image_errors():
                content = item if isinstance(item, bytes) else np.asarray(item).tobytes()
        except (CorruptImage, OSError):
            continue
        digests[str(index)] = hashlib.sha256(content).hexdigest()[:15]  # 60 bits: ranks compare them as integers
    return digests


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


def check_same_run(
    state: dict[str, Any], config: PretrainConfig, curriculum: Curriculum, images: Mapping[str, str], path: Path
) -> None:
    """ValueError that names the first difference if a checkpoint is of another run than the configuration's.

    images: `fingerprint` of what --data_path holds.
    """
    _check_beginning(f"--resume {path}", state, config, curriculum, FREE_ON_RESUME)
    check_images(f"--resume {config.resume}", path, state, images, config.data_path)


def check_branch(
    state: dict[str, Any], config: PretrainConfig, curriculum: Curriculum, images: Mapping[str, str], path: Path
) -> None:
    """ValueError if a checkpoint is not of a finished run whose stages are the first of the configuration's."""
    what = f"--branch {path}"
    _check_beginning(what, state, config, curriculum, FREE_ON_RESUME | SCHEDULE)
    check_images(f"--branch {config.branch}", path, state, images, config.data_path)
    done, stages = state["step"], len(state["stages"])
    if stages >= len(curriculum.stages):
        raise ValueError(f"{what} has {stages} stages and this run {len(curriculum.stages)}: nothing is left to train")
    if done != curriculum.start(stages):
        raise ValueError(f"{what} stopped at step {done} of {curriculum.start(stages)}; finish it with --resume auto")


def _check_beginning(
    what: str, state: dict[str, Any], config: PretrainConfig, curriculum: Curriculum, free: frozenset[str]
) -> None:
    """ValueError that names the first difference, in what is not free to differ, to the run of a checkpoint."""
    if state.get("format") != checkpoint.FORMAT or "optimizer" not in state:
        raise ValueError(f"{what} is not a pretraining checkpoint of mae_et; to fine-tune it, use main_finetune.py")
    mine, defaults = identity(config, curriculum), to_dict(PretrainConfig())
    for name, ours in mine["config"].items():
        theirs = state["config"].get(name, defaults[name])  # a run from before there was this choice
        if name not in free and theirs != ours:
            raise ValueError(f"{what} is of another configuration: {name} was {theirs}, is {ours}")
    if state["num_images"] != mine["num_images"]:
        was, now = state["num_images"], mine["num_images"]
        raise ValueError(f"{what} was trained on {was} images, --data_path {config.data_path} has {now}")
    for theirs, ours in zip(state["stages"], mine["stages"], strict=False):  # a branch has more
        # Sizes written one way; what is newer than the checkpoint was as it is by default; micro-batches may change.
        theirs = dataclasses.asdict(Stage(**theirs | {"micro_scale": ours["micro_scale"]}))
        for name in ours:
            if theirs[name] != ours[name]:
                remedy = "; set --total_batch_size to keep the batch on another number of devices"
                raise ValueError(
                    f"{what}: stage of {ours['size_px']} px had {name} {theirs[name]}, now {ours[name]}"
                    + (remedy if name == "batch_size" else "")
                )


def resume_path(config: PretrainConfig) -> Path | None:
    """The checkpoint to go on from, or None to start."""
    if not config.resume:
        return None
    if config.resume != "auto":
        return find_checkpoint("--resume", config.resume)
    path = run_folder.checkpoint_of(Path(config.output_dir))
    return path if path.exists() or storage.kept(path) else None


def find_checkpoint(flag: str, where: str) -> Path:
    """The checkpoint of a run folder, or a checkpoint's own path."""
    path = run_folder.checkpoint_of(Path(where))
    if not (path.exists() or storage.kept(path)):
        legal = "a run folder, a checkpoint or auto" if flag == "--resume" else "a run folder or a checkpoint"
        raise FileNotFoundError(f"{flag} {where}: no checkpoint there; give {legal}")
    return path
