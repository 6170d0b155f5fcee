"""`python -m mae_et reconstruct RUN`: draw what a trained masked autoencoder makes of images, see `engine.picture`."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from .. import checkpoint
from ..data.decode import center_crops
from ..data.sources import open_held_out
from ..engine import run_folder
from ..engine.picture import draw_reconstruction
from ..engine.runtime import Normalize, Runtime
from ..files import make_folder
from ..model import MaskedAutoencoder
from ..plan.curriculum import Stage, StageRow
from ..plan.schedules import SCHEDULES, patch_counts, scale_size
from ..plan.shapes import TARGETS, ModelShape, height_width, spectral_operator
from ..plan.shared import default_statistics
from ..record import WeightsRecord
from .config import ReconstructConfig
from .encoder import measured_range

log = logging.getLogger(__name__)

FOREIGN_MASK_RATIO = 0.75  # MAE, Sec. 4.1


def reconstruct(config: ReconstructConfig) -> Path:
    """Draw, and return the picture's path.

    Sizes, mask counts, normalisation and images are the run's. Foreign checkpoints don't say: then the sizes of ET++
    with 75 % masked, and the default mean and std of their channels.

    Raises FileNotFoundError, CheckpointError or ValueError, in one line, if the checkpoint can't be read or has no
    decoder, if there are no images, or if a flag contradicts the checkpoint.
    """
    pretrained = checkpoint.read_pretrained(config.run, num_heads=config.num_heads)
    normalized = _check_decoder(config, pretrained)
    make_folder(_path(config).parent, "--out")
    model = MaskedAutoencoder(**pretrained.shape)
    model.load_state_dict(pretrained.state)
    record, name = pretrained.training, Path(config.run).resolve().name
    facts = pretrained.record.completed_by(WeightsRecord(*default_statistics(model.in_chans)))
    mean, std = facts.mean, facts.std
    draw_reconstruction(
        model,
        Normalize(mean, std, Runtime(torch.device("cpu"), "fp32"))(_read_images(config, pretrained)),
        [Stage(**stage) for stage in record["stages"]] if record else _foreign_stages(pretrained.shape),
        target=pretrained.target,
        normalized=normalized,
        mean=mean,
        std=std,
        path=_path(config),
        seed=config.seed,
        operator=spectral_operator(record.get("config", {}).get("lowfreq", "dct")),
        statistics="true" if config.true_statistics else "visible",
        title=name + (f" after {record['step']} steps" if record else ""),
        max_images=config.num_images,
    )
    return _path(config)


def _path(config: ReconstructConfig) -> Path:
    run = Path(config.run)
    beside = run if run.is_dir() else run.parent if run.exists() else Path()  # an address is no place
    return Path(config.out) if config.out else beside / run_folder.PICTURE


def _check_decoder(config: ReconstructConfig, pretrained: checkpoint.Pretrained) -> bool:
    """Whether the decoder predicts normalised pixels. ValueError if there is nothing to draw."""
    run = config.run
    if not pretrained.has_decoder:
        raise ValueError(
            f"{run}: has no decoder, so it can't reconstruct; checkpoint.pt of a run folder has one, and so have full "
            "checkpoints of facebookresearch/mae and transformers' ViTMAEForPreTraining; exported encoders don't"
        )
    if pretrained.target not in TARGETS:
        raise ValueError(f"{run}: its decoder predicts neither {' nor '.join(TARGETS)}, which is what can be drawn")
    normalized = config.norm_pix_loss or bool(pretrained.norm_pix_loss)
    if pretrained.target != "pixel" and normalized:
        raise ValueError(f"--norm_pix_loss: the decoder of {run} predicts {pretrained.target}, not pixels")
    if config.norm_pix_loss and pretrained.training and not pretrained.norm_pix_loss:
        raise ValueError(f"--norm_pix_loss: {run} was trained on pixels as they are; leave it out")
    if config.true_statistics and not normalized:
        raise ValueError(
            f"--true_statistics: the decoder of {run} doesn't predict normalised pixels, so there is nothing to undo "
            "(if it does, say so with --norm_pix_loss)"
        )
    return normalized


def _foreign_stages(shape: ModelShape) -> list[Stage]:
    """The sizes of ET++, scaled to the model's, for checkpoints that were trained elsewhere."""
    stages = []
    for size, _ in SCHEDULES["et_pp"][1]:
        row = StageRow(scale_size(size, shape.img_size, shape.patch_size), 1.0)
        counts = patch_counts(row, shape.patch_size, FOREIGN_MASK_RATIO, 1.0)
        stages.append(Stage(row.size_px, *counts, batch_size=1))
    return stages


def _read_images(config: ReconstructConfig, pretrained: checkpoint.Pretrained) -> torch.Tensor:
    """Centre crops, uint8 [B, C, H, W], of --images or of the run's own images: held-out ones, if there are any."""
    trained_on = pretrained.training.get("config", {})
    data_path = config.images or trained_on.get("data_path")
    if not data_path:
        raise ValueError(f"--images is needed: {config.run} doesn't say what it was trained on")
    holdout = 0 if config.images else trained_on.get("holdout", 0)
    shape = pretrained.shape
    try:
        source = open_held_out(data_path, holdout)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(str(error).replace("--data_path", "--images")) from error  # here called --images
    value_range = pretrained.record.value_range
    if value_range is None:
        value_range = measured_range(source, pretrained.ours, pretrained.origin)
    images, skipped = center_crops(source, config.num_images, height_width(shape.img_size), shape.in_chans, value_range)
    for line in skipped:
        log.warning("skipped %s", line)
    if not len(images):
        raise ValueError(f"--images: none of {len(skipped)} images could be read, the last of them {skipped[-1]}")
    return images
