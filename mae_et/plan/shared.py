"""Flags that pretraining and fine-tuning share, and what they check alike: data, run, launcher.

Flags that facebookresearch/mae has keep their name and meaning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Protocol

from .flags import (
    COMPUTE,
    DATA,
    FINITE,
    IMAGES,
    NOT_NEGATIVE,
    PLANNED,
    POSITIVE,
    RUN,
    SEED,
    SHARE_BELOW_1,
    OneOf,
    check,
)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PRECISIONS = ("auto", "bf16", "fp32")
SINKS = ("tensorboard", "wandb", "trackio", "mlflow")
"""Names of libraries, and of the extras that install them."""


@dataclass(frozen=True)
class DataFlags:
    group: ClassVar[str] = "data"

    data_path: Annotated[str, IMAGES] = "photos"
    """Folder of images (or with train/), of IDX files or of `mae_et prepare`; wds/…, a timm dataset name, or photos."""
    holdout: Annotated[int, DATA, NOT_NEGATIVE] = 0
    """Training images that are kept out, always the same ones, for main_finetune.py --holdout to choose settings by."""
    mean: Annotated[tuple[float, ...] | None, DATA] = None
    """Mean per channel in [0, 1]; default: ImageNet's for 3 channels, else 0.5."""
    std: Annotated[tuple[float, ...] | None, DATA] = None
    """Standard deviation per channel; default: ImageNet's for 3 channels, else 0.25."""
    value_range: Annotated[tuple[float, float] | None, DATA, FINITE] = None
    """Pixel values that become black and white, of images with more than 8 bits; default: measured if they use few."""
    num_workers: Annotated[int | None, RUN, NOT_NEGATIVE] = None
    """Loader processes per device; default: its share of the cores, beside a GPU less one, else at most 10."""
    pin_mem: Annotated[bool, RUN] = True
    """Page-locked batches, for faster copies to a CUDA device."""
    damaged_limit: Annotated[float, RUN, SHARE_BELOW_1] = 0.01
    """Share of damaged images, training or held-out, at which the run stops; below it they are skipped and named."""


@dataclass(frozen=True)
class RunFlags:
    group: ClassVar[str] = "run"

    output_dir: Annotated[str, RUN] = "./output_dir"
    """Run folder."""
    log_dir: Annotated[str | None, RUN] = None
    """TensorBoard folder; default: the run folder."""
    log_to: Annotated[tuple[str, ...], RUN, OneOf(SINKS)] = ("tensorboard",)
    """Where metrics go beside metrics.jsonl: tensorboard, wandb, trackio, mlflow, several or none."""
    resume: Annotated[str, RUN] = ""
    """Go on from: auto (output_dir, if it holds a checkpoint), a run folder, or a checkpoint."""
    overwrite: Annotated[bool, RUN] = False
    """Replace the run that output_dir holds."""
    start_epoch: Annotated[float, PLANNED, NOT_NEGATIVE] = 0
    """Skip the first part of the schedule."""
    seed: Annotated[int, SEED] = 0
    """Data order, augmentation, masks and initial weights are functions of it."""
    device: Annotated[str, RUN] = "auto"
    """auto (cuda, or without one cpu), cuda, cuda:N, cpu, or another accelerator that torch knows: mps, xpu."""
    precision: Annotated[str, COMPUTE, OneOf(PRECISIONS)] = "auto"
    """auto (bf16 where the device is fast at it), bf16 or fp32."""
    save_steps: Annotated[int, RUN, NOT_NEGATIVE] = 0
    """Steps between checkpoints; 0: by time only."""
    save_minutes: Annotated[float, RUN, POSITIVE] = 10
    """Minutes between checkpoints."""
    keep_checkpoints: Annotated[int, RUN, POSITIVE] = 2
    """Checkpoints that are kept: checkpoint.pt, and before it checkpoint.prev1.pt and so on."""


@dataclass(frozen=True)
class LauncherFlags:
    """As facebookresearch/mae has them; torchrun sets what is needed."""

    group: ClassVar[str] = "launcher"

    world_size: Annotated[int, RUN, POSITIVE] = 1
    """Devices that `plan` plans for; in training torchrun decides."""
    local_rank: Annotated[int, RUN] = -1
    """Accepted; torchrun decides."""
    dist_on_itp: Annotated[bool, RUN] = False
    """Accepted; torchrun decides."""
    dist_url: Annotated[str, RUN] = "env://"
    """Where ranks meet."""
    job_dir: Annotated[str, RUN] = ""
    """As submitit_*.py: the run folder."""
    nodes: Annotated[int | None, RUN, POSITIVE] = None
    """As submitit_*.py; launch with torchrun --nnodes instead."""
    ngpus: Annotated[int | None, RUN, POSITIVE] = None
    """As submitit_*.py; launch with torchrun --nproc_per_node instead."""
    use_volta32: Annotated[bool, RUN] = False
    """As submitit_*.py; your launcher decides."""


class LearningRateFlags(Protocol):
    @property
    def lr(self) -> float | None: ...

    @property
    def blr(self) -> float | None: ...


def peak_lr(config: LearningRateFlags, total_batch: int) -> float:
    """--lr, or --blr for this many images per step (MAE, Appendix A.1: linear scaling, base 256)."""
    if config.lr is not None:
        return config.lr
    assert config.blr is not None
    return config.blr * total_batch / 256


def check_shared(config: Any) -> None:
    """Range of every flag, and what pretraining and fine-tuning refuse alike.

    config: has `DataFlags`, `RunFlags` and `LauncherFlags`.
    """
    if config.log_to == ("none",):
        object.__setattr__(config, "log_to", ())
    check(config)
    if config.resume and config.overwrite:
        raise ValueError("--resume goes on with a run and --overwrite replaces it; give one of them")
    for name in ("mean", "std"):
        if (values := getattr(config, name)) is not None and max(values) > 1:
            raise ValueError(f"--{name} {' '.join(f'{v:g}' for v in values)}: pixels are in [0, 1] here; divide by 255")
    if config.value_range is not None and not config.value_range[0] < config.value_range[1]:
        low, high = config.value_range
        raise ValueError(f"--value_range must be LOW HIGH with LOW < HIGH, got {low:g} {high:g}")
    if config.job_dir:
        object.__setattr__(config, "output_dir", config.job_dir)
        object.__setattr__(config, "job_dir", "")  # or it would overrule --output_dir where this is a recipe


def default_statistics(in_chans: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel where nothing says otherwise: ImageNet's, or of images around grey."""
    return (IMAGENET_MEAN, IMAGENET_STD) if in_chans == 3 else ((0.5,) * in_chans, (0.25,) * in_chans)


def check_statistics(mean: tuple[float, ...] | None, std: tuple[float, ...] | None, in_chans: int, of: str) -> None:
    """ValueError unless there is a number per channel, and positive ones to divide by. of: whose channels they are."""
    for name, values, legal in (("mean", mean, FINITE), ("std", std, POSITIVE)):
        if values is not None and len(values) != in_chans:
            raise ValueError(f"--{name} has {len(values)} numbers for {of}")
        if values is not None and not all(map(legal.holds, values)):
            raise ValueError(f"--{name} must {legal.text}, got {' '.join(f'{v:g}' for v in values)}")
