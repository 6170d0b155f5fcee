"""Configuration of fine-tuning, linear probe and kNN (one command, four protocols), and of `reconstruct`. No torch."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro

from ..plan.curriculum import check_views
from ..plan.flags import (
    BATCH,
    DATA,
    EPOCHS,
    EVALUATION,
    IMAGES,
    LENGTH,
    MODEL,
    NOT_NEGATIVE,
    POSITIVE,
    RUN,
    SEED,
    SHARE,
    SHARE_ABOVE_0,
    SHARE_BELOW_1,
    TASK,
    UNTRAINED,
    WEIGHTS,
    OneOf,
    check,
)
from ..plan.shapes import SizePx, as_size
from ..plan.shared import DataFlags, LauncherFlags, RunFlags, check_shared, peak_lr

#: What the flags default to where none is given. Fine-tuning: facebookresearch/mae's FINETUNE.md, ViT-B (MAE, Table 9);
#: linear probe on augmented images: the same document (MAE, Table 10). warmup_epochs is at most a fifth of --epochs.
DEFAULTS = {
    "finetune": {
        "epochs": 100,
        "warmup_epochs": 5,
        "blr": 5e-4,
        "min_lr": 1e-6,
        "weight_decay": 0.05,
        "total_batch_size": 1024,
    },
    "linear_probe": {
        "epochs": 90,
        "warmup_epochs": 10,
        "blr": 0.1,
        "min_lr": 0.0,
        "weight_decay": 0.0,
        "total_batch_size": 16384,
    },
}
RAND_AUGMENT = "rand-m9-mstd0.5-inc1"  # MAE, Table 9, as timm writes it
LAYER_DECAY = 0.65  # FINETUNE.md, ViT-B
MICRO_BATCH = 64
FEATURES = ("cached", "augmented")
MIXUP_MODES = ("batch", "pair", "elem")
ERASING_MODES = ("pixel", "rand", "const")


@dataclass(frozen=True)
class ProtocolFlags:
    """Without --linear_probe, --knn or --eval: fine-tuning."""

    group: ClassVar[str] = "protocol"

    finetune: Annotated[str, WEIGHTS] = ""
    """Run folder, checkpoint.pt, encoder.safetensors, facebookresearch/mae .pth, ViTMAE folder, or timm model name."""
    linear_probe: Annotated[bool, TASK] = False
    """Train a linear classifier on frozen features."""
    knn: Annotated[bool, TASK] = False
    """Classify by the nearest training images; nothing is trained."""
    eval: Annotated[bool, EVALUATION] = False
    """Only evaluate a fine-tuned model: --finetune or --resume."""
    features: Annotated[str, TASK, OneOf(FEATURES)] = "cached"
    """Linear probe: cached (features of centre crops, solved to convergence) or augmented (the paper's training)."""
    layers: Annotated[tuple[int, ...], TASK] = ()
    """Probes: blocks to take features from, counted from 1, each with both poolings; default: the last."""
    corruptions: Annotated[bool, EVALUATION] = False
    """Evaluate on corrupted images too: noise, blur, contrast, JPEG and pixelation at ImageNet-C's five strengths."""
    k: Annotated[int, TASK, POSITIVE] = 20
    """kNN: neighbours."""
    temperature: Annotated[float, TASK, POSITIVE] = 0.07
    """kNN: a neighbour's vote weighs exp(cosine / temperature)."""
    l2: Annotated[float, TASK, NOT_NEGATIVE] = 1e-4
    """Cached linear probe: half of this times the squared weights is added to the mean loss."""


@dataclass(frozen=True)
class ClassifierFlags:
    group: ClassVar[str] = "model"

    model: Annotated[str | None, MODEL] = None
    """mae_vit_base_patch16, vit_base_patch16, …; default: the checkpoint's."""
    like: Annotated[str, UNTRAINED] = ""
    """Begin with the architecture of this run or checkpoint, none of its weights: what pretraining is judged by."""
    input_size: Annotated[SizePx | None, MODEL] = None
    """Input in pixels: one number, or height and width; default: the checkpoint's. Position tables adapt."""
    patch_size: Annotated[int | None, MODEL, POSITIVE] = None
    """Side of a patch in pixels; default: the model's."""
    in_chans: Annotated[int | None, MODEL, POSITIVE] = None
    """Channels of the images; default: the checkpoint's, else 3."""
    embed_dim: Annotated[int | None, MODEL, POSITIVE] = None
    """Width; default: the model's."""
    depth: Annotated[int | None, MODEL, POSITIVE] = None
    """Blocks; default: the model's."""
    num_heads: Annotated[int | None, MODEL, POSITIVE] = None
    """Heads; default: the model's."""
    drop_path: Annotated[float, TASK, SHARE_BELOW_1] = 0.1
    """Stochastic depth of the last block; it grows linearly from 0."""
    global_pool: Annotated[bool, TASK] = False
    """Classify the mean of the patch tokens: what fine-tuning does by default."""
    cls_token: Annotated[bool, TASK] = False
    """Classify the class token: what the probes do by default."""
    nb_classes: Annotated[int | None, TASK, POSITIVE] = None
    """Classes; default: the data's."""


@dataclass(frozen=True)
class FinetuneOptimisationFlags:
    group: ClassVar[str] = "optimisation"

    batch_size: Annotated[int | None, BATCH, POSITIVE] = None
    """Images per device and micro-batch; default: 64, up to the protocol's total (fine-tuning 1024, linear 16384)."""
    accum_iter: Annotated[int | None, BATCH, POSITIVE] = None
    """Micro-batches per step; default: 1, or as many as the total needs."""
    total_batch_size: Annotated[int | None, BATCH, POSITIVE] = None
    """Images per step over all devices, whatever their number."""
    epochs: Annotated[float | None, LENGTH, EPOCHS] = None
    """Epochs; default: fine-tuning 100, linear probe 90."""
    lr: Annotated[float | None, TASK, NOT_NEGATIVE] = None
    """Peak learning rate; default: blr × total batch / 256."""
    blr: Annotated[float | None, TASK, NOT_NEGATIVE] = None
    """Base learning rate for a total batch of 256; default: fine-tuning 5e-4, linear probe 0.1."""
    min_lr: Annotated[float | None, TASK, NOT_NEGATIVE] = None
    """Learning rate at the end; default: fine-tuning 1e-6, linear probe 0."""
    warmup_epochs: Annotated[float | None, LENGTH, NOT_NEGATIVE] = None
    """Warm-up; default: fine-tuning 5, linear probe 10, and at most a fifth of the epochs."""
    weight_decay: Annotated[float | None, TASK, NOT_NEGATIVE] = None
    """Weight decay of matrices; default: fine-tuning 0.05, linear probe 0."""
    layer_decay: Annotated[float | None, TASK, SHARE_ABOVE_0] = None
    """Each block learns at this times the rate of the next one; default: 0.65."""
    clip_grad: Annotated[float | None, TASK, POSITIVE] = None
    """Largest norm of the gradient; default: no clipping."""
    model_ema: Annotated[bool, TASK] = False
    """Keep a moving average of the weights too, and evaluate both."""
    model_ema_decay: Annotated[float, TASK, SHARE_BELOW_1] = 0.9999
    """Decay of the average per step."""


@dataclass(frozen=True)
class AugmentationFlags:
    group: ClassVar[str] = "augmentation"

    crop_scale: Annotated[tuple[float, float], TASK] = (0.08, 1.0)
    """Bounds of a training crop's area, as a share of the image, in fine-tuning and the probe on augmented images."""
    color_jitter: Annotated[float | None, TASK, NOT_NEGATIVE] = None
    """Strength of colour jitter; has effect only with --aa none, as in timm."""
    aa: Annotated[str | None, TASK] = None
    """timm's RandAugment or AutoAugment policy, or none; default: rand-m9-mstd0.5-inc1 for 1 and 3 channels."""
    smoothing: Annotated[float, TASK, SHARE_BELOW_1] = 0.1
    """Label smoothing."""
    reprob: Annotated[float, TASK, SHARE] = 0.25
    """Probability of random erasing."""
    remode: Annotated[str, TASK, OneOf(ERASING_MODES)] = "pixel"
    """Random erasing fills with: pixel (noise), rand (one colour) or const (the mean)."""
    recount: Annotated[int, TASK, POSITIVE] = 1
    """Most erased boxes per image."""
    resplit: Annotated[bool, RUN] = False
    """Accepted; without effect, as in facebookresearch/mae, which has no split augmentation either."""
    mixup: Annotated[float, TASK, NOT_NEGATIVE] = 0.8
    """Mixup alpha; 0 is off."""
    cutmix: Annotated[float, TASK, NOT_NEGATIVE] = 1.0
    """CutMix alpha; 0 is off."""
    cutmix_minmax: Annotated[tuple[float, float] | None, TASK] = None
    """Range of the CutMix box's share of each side; turns CutMix on, instead of alpha."""
    mixup_prob: Annotated[float, TASK, SHARE] = 1.0
    """Probability that a batch is mixed."""
    mixup_switch_prob: Annotated[float, TASK, SHARE] = 0.5
    """Probability of CutMix where both are on."""
    mixup_mode: Annotated[str, TASK, OneOf(MIXUP_MODES)] = "batch"
    """Draw the mixing per batch, pair or elem."""


OPTIMISATION = tuple(f.name for f in fields(FinetuneOptimisationFlags))
FINETUNING = ("drop_path", "clip_grad", "model_ema", "model_ema_decay", "start_epoch")
FINETUNING += tuple(f.name for f in fields(AugmentationFlags) if f.name != "crop_scale")
"""Flags that no probe uses."""


@dataclass(frozen=True)
class LabelledDataFlags(DataFlags):
    group: ClassVar[str] = "data"

    data_path: Annotated[str, IMAGES] = ""
    """Folder with train/ and val/, of IDX files, wds/…, a timm dataset name, or photos; default: pretraining's."""
    holdout: Annotated[int, DATA, NOT_NEGATIVE] = 0
    """Evaluate on so many training images, the same share of each class and always the same ones, instead of the test
    images, and don't train on them; pretrain with the same --holdout."""
    mean: Annotated[tuple[float, ...] | None, DATA] = None
    """Mean per channel in [0, 1]; default: the pretraining's, else ImageNet's."""
    std: Annotated[tuple[float, ...] | None, DATA] = None
    """Standard deviation per channel; default: as mean."""
    train_images: Annotated[int | None, DATA, POSITIVE] = None
    """Use only so many labelled images, equally many of each class, the same ones for the same seed."""
    eval_images: Annotated[int | None, EVALUATION, POSITIVE] = None
    """Evaluate on only so many images, the same share of each class, the same ones for the same seed."""
    crop_pct: Annotated[float | None, EVALUATION, SHARE_ABOVE_0] = None
    """Centre crop in evaluation; default: 0.875 from 96 to 224 px, as MAE has it at 224; 1 for other sizes."""


@dataclass(frozen=True)
class FinetuneRunFlags(RunFlags):
    group: ClassVar[str] = "run"

    output_dir: Annotated[str, RUN] = ""
    """Folder of the fine-tuning run; default: finetune/ in the pretraining run's folder, else ./output_dir."""
    seed: Annotated[int, SEED] = 0
    """Data order, augmentation, mixing, drop path, the head and, from scratch, all weights are functions of it."""
    save_steps: Annotated[int, RUN, NOT_NEGATIVE] = 0
    """Steps between checkpoints; 0: at evaluations and by time only."""
    dist_eval: Annotated[bool, RUN] = False
    """Accepted; evaluation is always shared out among the ranks, and exact."""
    eval_epochs: Annotated[float, RUN, EPOCHS] = 1
    """Epochs between evaluations."""
    report: Annotated[bool, RUN] = False
    """Add the confusion matrix and the accuracy of each class to the result."""


@dataclass(frozen=True)
class FinetuneConfig(
    LauncherFlags,
    FinetuneRunFlags,
    LabelledDataFlags,
    AugmentationFlags,
    FinetuneOptimisationFlags,
    ClassifierFlags,
    ProtocolFlags,
):
    """Fine-tune a pretrained encoder, or judge its features with --linear_probe or --knn.

    Given only --finetune, the protocol is facebookresearch/mae's FINETUNE.md for ViT-B, on the data of the checkpoint.
    """

    def __post_init__(self) -> None:
        self._check_contradictions()
        if self.input_size is not None:
            object.__setattr__(self, "input_size", as_size(self.input_size))
        for name, value in self._defaults.items():
            if name not in ("total_batch_size", "warmup_epochs") and getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.warmup_epochs is None:
            object.__setattr__(self, "warmup_epochs", min(self._defaults["warmup_epochs"], self.epochs / 5))
        check_shared(self)
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"--warmup_epochs {self.warmup_epochs:g} is longer than --epochs {self.epochs:g}")
        check_views("--", self.crop_scale)
        if not 0 <= self.start_epoch < self.epochs:
            raise ValueError(f"--start_epoch must be in [0, --epochs {self.epochs:g}), got {self.start_epoch:g}")
        if self.cutmix_minmax is not None and not 0 <= self.cutmix_minmax[0] < self.cutmix_minmax[1] <= 1:
            raise ValueError(f"--cutmix_minmax must be two shares 0 <= low < high <= 1, got {self.cutmix_minmax}")

    def _check_contradictions(self) -> None:
        protocols = [f"--{name}" for name in ("linear_probe", "knn", "eval") if getattr(self, name)]
        if self.eval and len(protocols) > 1:
            raise ValueError(f"{' and '.join(protocols)} contradict each other; give one of them")
        if protocols and protocols != ["--eval"] and self.layer_decay is not None:
            raise ValueError(
                f"{protocols[0]} keeps the backbone as it is and contradicts --layer_decay; drop one of them"
            )
        if self.is_probe and not (self.finetune or self.like):
            raise ValueError(
                f"{protocols[0]} needs --finetune: a run folder, a checkpoint or a timm model name; or, for an "
                "encoder that is not trained, --like"
            )
        if self.is_probe and self.resume:
            raise ValueError(f"{protocols[0]} takes minutes and can't --resume; leave --resume out")
        if self.layers and not self.is_probe:
            raise ValueError("--layers is for --linear_probe and --knn")
        if self.corruptions and not protocols:
            raise ValueError("--corruptions is for --linear_probe, --knn and --eval; fine-tune first, then --eval")
        for one, other in (
            ("global_pool", "cls_token"),
            ("finetune", "like"),
            ("total_batch_size", "accum_iter"),
        ):
            if getattr(self, one) and getattr(self, other):
                raise ValueError(f"--{one} and --{other} contradict each other; give one of them")

    @property
    def is_probe(self) -> bool:
        return self.linear_probe or self.knn

    @property
    def probes(self) -> list[FinetuneConfig]:
        """This configuration for each of the probes that are asked for, with the flags that it uses."""
        found = []
        if self.knn:
            found.append(self._without("linear_probe", "features", "l2", "crop_scale", *OPTIMISATION, *FINETUNING))
        if self.linear_probe and self.features == "cached":
            found.append(self._without("knn", "k", "temperature", "crop_scale", *OPTIMISATION, *FINETUNING))
        elif self.linear_probe:
            found.append(self._without("knn", "k", "temperature", "l2", *FINETUNING))
        return found

    def _without(self, *unused: str) -> FinetuneConfig:
        """Replace flags that are not used by their defaults."""
        return replace(self, **{f.name: f.default for f in fields(self) if f.name in unused})

    @property
    def protocol(self) -> str:
        """Names the result: eval-<protocol>.json. Pooled patches, fewer labels or images make another protocol."""
        name = "knn" if self.knn else "finetuned" if self.eval else "finetune"
        if self.linear_probe:
            name = "linear_probe" if self.features == "cached" else "linear_probe_augmented"
        name += "-mean" if self.is_probe and self.pooled else ""
        name += f"-{self.train_images}" if self.train_images else ""
        name += f"-of-{self.eval_images}" if self.eval_images else ""
        return name + (f"-holdout-{self.holdout}" if self.holdout else "")

    @property
    def pooled(self) -> bool:
        """Whether the mean of the patch tokens is classified, rather than the class token."""
        return self.global_pool or not (self.cls_token or self.is_probe)

    def total_batch(self, num_images: int, devices: int) -> int:
        """Images per step over all devices."""
        if self.total_batch_size:
            return self.total_batch_size
        if self.batch_size or self.accum_iter:
            return (self.batch_size or MICRO_BATCH) * (self.accum_iter or 1) * devices
        return min(self._defaults["total_batch_size"], num_images)

    @property
    def micro_batch(self) -> int:
        """Images per device and micro-batch."""
        return self.batch_size or MICRO_BATCH

    def peak_lr(self, total_batch: int) -> float:
        return peak_lr(self, total_batch)

    @property
    def _defaults(self) -> dict[str, Any]:
        return DEFAULTS["linear_probe" if self.linear_probe else "finetune"]


@dataclass(frozen=True)
class ReconstructConfig:
    """Draw what a masked autoencoder reconstructs, at every size that it was trained at."""

    run: Annotated[str, WEIGHTS, tyro.conf.Positional]
    """Run folder, or any checkpoint that has a decoder, also at an address."""
    images: Annotated[str, IMAGES] = ""
    """Images to draw, anything that --data_path takes; default: the run's own, held-out ones if there are any."""
    out: Annotated[str, RUN] = ""
    """PNG to write; default: reconstruction.png in the run folder, or beside the checkpoint; for an address, here."""
    true_statistics: Annotated[bool, RUN] = False
    """Undo normalised pixels with the hidden patches' own mean and std: a leak, shows more than the model knows."""
    num_images: Annotated[int, RUN, POSITIVE] = 6
    """Images to draw, spread evenly over the data."""
    norm_pix_loss: Annotated[bool, TASK] = False
    """The decoder predicts normalised pixels; needed for checkpoints that don't say so themselves."""
    num_heads: Annotated[int | None, MODEL, POSITIVE] = None
    """Heads of the encoder, for checkpoints that don't say; default: the usual number for its width."""
    seed: Annotated[int, RUN] = 0
    """Of the masks."""

    def __post_init__(self) -> None:
        check(self)
        if self.out and Path(self.out).suffix.lower() != ".png":
            raise ValueError(f"--out must be a .png file, got {self.out}")
