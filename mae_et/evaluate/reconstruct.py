"""`python -m mae_et reconstruct RUN`: draw what a trained masked autoencoder makes of images, see `picture`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from .. import checkpoint
from ..data.decode import center_crop
from ..data.pixels import CorruptImage
from ..data.sources import Source, open_source
from ..engine import run_folder
from ..engine.picture import draw_reconstruction
from ..model import MaskedAutoencoder
from ..plan.config import PretrainConfig
from ..plan.curriculum import Stage, StageRow
from ..plan.schedules import SCHEDULES, patch_counts, scale_size
from ..plan.shapes import TARGETS, SizePx, height_width

log = logging.getLogger(__name__)

FOREIGN_MASK_RATIO = 0.75  # MAE, Sec. 4.1


@dataclass(frozen=True)
class ReconstructConfig:
    """Draw what a masked autoencoder reconstructs, at every size that it was trained at."""

    run: Annotated[str, tyro.conf.Positional]
    """Run folder, or any checkpoint that has a decoder."""
    images: str = ""
    """Images to draw, anything that --data_path takes; default: the run's own, held-out ones if there are any."""
    out: str = ""
    """PNG to write; default: reconstruction.png in the run folder, or beside the checkpoint."""
    true_statistics: bool = False
    """Undo normalised pixels with the hidden patches' own mean and std: a leak, shows more than the model knows."""
    num_images: int = 6
    """Images to draw, spread evenly over the data."""
    norm_pix_loss: bool = False
    """The decoder predicts normalised pixels; needed for checkpoints that don't say so themselves."""
    seed: int = 0
    """Of the masks."""

    def __post_init__(self) -> None:
        if self.num_images < 1:
            raise ValueError(f"--num_images must be positive, got {self.num_images}")
        if self.out and Path(self.out).suffix.lower() != ".png":
            raise ValueError(f"--out must be a .png file, got {self.out}")


def reconstruct(config: ReconstructConfig) -> Path:
    """Draw, and return the picture's path.

    Sizes, mask counts, normalisation and images are the run's. Foreign checkpoints don't say: then the sizes of ET++
    with 75 % masked, and the default mean and std of their channels.

    Raises FileNotFoundError, CheckpointError or ValueError, in one line, if the checkpoint can't be read or has no
    decoder, if there are no images, or if a flag contradicts the checkpoint.
    """
    run = Path(config.run)
    if not run.exists():
        raise FileNotFoundError(f"{run}: no such run folder or checkpoint")
    pretrained = checkpoint.read_pretrained(run)
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
    if config.true_statistics and not normalized:
        raise ValueError(
            f"--true_statistics: the decoder of {run} doesn't predict normalised pixels, so there is nothing to undo "
            "(if it does, say so with --norm_pix_loss)"
        )
    model = MaskedAutoencoder(**pretrained.shape)
    model.load_state_dict(pretrained.state)
    record = _training_record(run)
    data_path = config.images or record.get("config", {}).get("data_path")
    if not data_path:
        raise ValueError(f"--images is needed: {run} doesn't say what it was trained on")
    defaults = PretrainConfig(in_chans=model.in_chans)
    mean, std = record.get("mean", defaults.pixel_mean), record.get("std", defaults.pixel_std)
    images = _read_images(_open(data_path), config.num_images, model.img_size, model.in_chans)  # [B, C, H, W]
    channels_last = (images.float() / 255).movedim(1, -1)
    out = Path(config.out) if config.out else (run if run.is_dir() else run.parent) / run_folder.PICTURE
    draw_reconstruction(
        model,
        ((channels_last - torch.tensor(mean)) / torch.tensor(std)).movedim(-1, 1),
        [Stage(**stage) for stage in record["stages"]] if record else _foreign_stages(model),
        target=pretrained.target,
        normalized=normalized,
        mean=mean,
        std=std,
        path=out,
        seed=config.seed,
        statistics="true" if config.true_statistics else "visible",
        title=f"{run.resolve().name} after {record['step']} steps" if record else run.resolve().name,
        max_images=config.num_images,
    )
    return out


def _training_record(run: Path) -> Mapping:
    """What a run's own checkpoint says beside its weights; empty for foreign ones."""
    file = run_folder.checkpoint_of(run)
    if not file.exists() or file.suffix == ".safetensors":
        return {}
    content = checkpoint.load(file)
    return content if content.get("format") == checkpoint.FORMAT else {}


def _foreign_stages(model: MaskedAutoencoder) -> list[Stage]:
    """The sizes of ET++, scaled to the model's, for checkpoints that were trained elsewhere."""
    stages = []
    for size, _ in SCHEDULES["et_pp"][1]:
        row = StageRow(scale_size(size, model.img_size, model.patch_size), 1.0)
        counts = patch_counts(row, model.patch_size, FOREIGN_MASK_RATIO, 1.0)
        stages.append(Stage(row.size_px, *counts, batch_size=1))
    return stages


def _open(data_path: str) -> Source:
    """Held-out images where there are any."""
    try:
        try:
            return open_source(data_path, "val")
        except FileNotFoundError:
            return open_source(data_path, "train")
    except (FileNotFoundError, ValueError) as error:
        # Here the same paths are called --images.
        raise ValueError(str(error).replace("--data_path", "--images")) from error


def _read_images(source: Source, num_images: int, size_px: SizePx, in_chans: int) -> Tensor:
    """Up to `num_images` centre crops, evenly spread over the source, of those that can be read: uint8 [B, C, H, W]."""
    count = min(num_images, len(source))
    crops = []
    for index in (i * len(source) // count for i in range(count)):
        try:
            crops.append(center_crop(source.read(index)[0], height_width(size_px), in_chans))
        except (CorruptImage, OSError) as error:
            log.warning("skipped %s: %s", source.name(index), error)
    if not crops:
        raise ValueError(f"--images: none of {count} images could be read, the last of them {source.name(index)}")
    return torch.stack(crops)
