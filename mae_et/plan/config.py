"""Configuration of pretraining. Each flag says its range and its role.

Flags that facebookresearch/mae has keep their name and meaning. Bases are given last first: that is the order in which
dataclasses take over their fields.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from .curriculum import StageRow, check_views
from .flags import (
    BATCH,
    COMPUTE,
    CURRICULUM,
    EPOCHS,
    LENGTH,
    MODEL,
    NOT_NEGATIVE,
    PLANNED,
    POSITIVE,
    RUN,
    SHARE,
    SHARE_ABOVE_0,
    SHARE_BELOW_1,
    TASK,
    OneOf,
)
from .schedules import ALLOCATIONS, LR_SCALINGS, SCHEDULES, SHARES_OF
from .shapes import DECODERS, OPERATORS, TARGETS, SizePx, as_size
from .shared import DataFlags, LauncherFlags, RunFlags, check_shared, check_statistics, default_statistics

CURRICULA = (*SCHEDULES, "custom")
CUDA_GRAPHS = ("auto", "on", "off")
OPTIMIZERS = ("adamw", "muon")


@dataclass(frozen=True)
class RecipeFlags:
    group: ClassVar[str] = "recipe"

    recipe: Annotated[str, RUN] = ""
    """Name of a shipped recipe, or a YAML file, that gives the defaults; flags override it."""


@dataclass(frozen=True)
class ModelFlags:
    group: ClassVar[str] = "model"

    model: Annotated[str, MODEL] = "mae_vit_large_patch16"
    """mae_vit_{tiny,small,base,large}_patch16 or mae_vit_huge_patch14."""
    input_size: Annotated[SizePx, MODEL] = 224
    """Full size of the input in pixels: one number, or height and width."""
    patch_size: Annotated[int | None, MODEL, POSITIVE] = None
    """Side of a patch in pixels; default: the model's."""
    in_chans: Annotated[int, MODEL, POSITIVE] = 3
    """Channels of the images."""
    embed_dim: Annotated[int | None, MODEL, POSITIVE] = None
    """Encoder width; default: the model's."""
    depth: Annotated[int | None, MODEL, POSITIVE] = None
    """Encoder blocks; default: the model's."""
    num_heads: Annotated[int | None, MODEL, POSITIVE] = None
    """Encoder heads; default: the model's."""
    decoder_embed_dim: Annotated[int, TASK, POSITIVE] = 512
    """Decoder width."""
    decoder_depth: Annotated[int, TASK, POSITIVE] = 8
    """Decoder blocks."""
    decoder_num_heads: Annotated[int, TASK, POSITIVE] = 16
    """Decoder heads."""
    decoder: Annotated[str, TASK, OneOf(tuple(DECODERS))] = "self"
    """self (MAE's), or cross: predicted patches attend to the visible ones only (CrossMAE), which is cheaper."""
    own_positions: Annotated[bool, TASK] = False
    """Number the patches of a small stage from zero, instead of in coordinates of the full grid."""


@dataclass(frozen=True)
class TaskFlags:
    group: ClassVar[str] = "task"

    mask_ratio: Annotated[float, TASK, SHARE_BELOW_1] = 0.75
    """Share of the patches that is masked."""
    predict_ratio: Annotated[float, TASK, SHARE_ABOVE_0] = 1.0
    """Share of the masked patches that is predicted."""
    target: Annotated[str, TASK, OneOf(TARGETS)] = "pixel"
    """What is predicted: pixel, or hog (MaskFeat)."""
    norm_pix_loss: Annotated[bool, TASK] = False
    """Normalise the target pixels of each patch by their mean and variance."""


@dataclass(frozen=True)
class CurriculumFlags:
    group: ClassVar[str] = "curriculum"

    curriculum: Annotated[str, CURRICULUM, OneOf(CURRICULA)] = "vanilla"
    """vanilla, et (EfficientTrain), et_pp (EfficientTrain++), et_pp_192, or custom (the recipe's `stages`)."""
    stages: Annotated[tuple[StageRow, ...], CURRICULUM, tyro.conf.Suppress] = ()
    """Rows of a custom curriculum; written in a recipe."""
    share_of: Annotated[str, CURRICULUM, OneOf(SHARES_OF)] = "compute"
    """Unit of a custom stage's share: compute or epochs."""
    allocation: Annotated[str, TASK, OneOf(ALLOCATIONS)] = "area"
    """How a share of compute becomes passes: area (as published) or flops (exact)."""
    lowfreq: Annotated[str, TASK, OneOf(tuple(OPERATORS))] = "fourier"
    """How inputs become small: fourier or dct (exact, on the device), lanczos, bilinear or scaled (in the loader)."""
    crop_scale: Annotated[tuple[float, float], TASK] = (0.2, 1.0)
    """Area range of the random resized crop."""
    augment: Annotated[int, TASK] = 0
    """RandAugment magnitude; 0 is off."""


@dataclass(frozen=True)
class OptimisationFlags:
    group: ClassVar[str] = "optimisation"

    batch_size: Annotated[int, BATCH, POSITIVE] = 64
    """Images per device and full-size micro-batch; the total batch is batch_size × accum_iter × devices."""
    accum_iter: Annotated[int | None, BATCH, POSITIVE] = None
    """Micro-batches per step; default 1, or as many as total_batch_size needs."""
    total_batch_size: Annotated[int | None, BATCH, POSITIVE] = None
    """Images per optimiser step over all devices; micro-batches of batch_size are accumulated up to it."""
    early_large_batch: Annotated[bool, TASK] = False
    """Let the total batch of small stages grow until a step's work is that of full size, for many devices (ET++)."""
    max_batch_size: Annotated[int | None, TASK, POSITIVE] = None
    """Largest total batch of a stage under --early_large_batch; default: no limit."""
    lr_scaling: Annotated[str, TASK, OneOf(tuple(LR_SCALINGS))] = "sqrt"
    """How the learning rate follows a grown batch: sqrt, linear or none."""
    epochs: Annotated[float, LENGTH, EPOCHS] = 400
    """Epochs; for compute-shared curricula, equivalent epochs: the compute of so many at full size."""
    lr: Annotated[float | None, TASK, NOT_NEGATIVE] = None
    """Peak learning rate; default: blr × total batch / 256."""
    blr: Annotated[float, TASK, NOT_NEGATIVE] = 1e-3
    """Base learning rate, for a total batch of 256."""
    min_lr: Annotated[float, TASK, NOT_NEGATIVE] = 0.0
    """Learning rate at the end of the half-cosine."""
    warmup_epochs: Annotated[float, LENGTH, NOT_NEGATIVE] = 40
    """Warm-up: warmup_epochs / epochs of the compute."""
    hold_epochs: Annotated[float, LENGTH, NOT_NEGATIVE] = 0
    """After the warm-up, the peak is held for hold_epochs / epochs of the compute before the half-cosine begins."""
    opt: Annotated[str, TASK, OneOf(OPTIMIZERS)] = "adamw"
    """adamw (MAE's), or muon: orthogonal updates of the matrices in blocks, which cost FLOPs of their own."""
    weight_decay: Annotated[float, TASK, NOT_NEGATIVE] = 0.05
    """Weight decay of matrices."""
    clip_grad: Annotated[float | None, TASK, POSITIVE] = None
    """Largest norm of the gradient; default: no clipping."""


@dataclass(frozen=True)
class PretrainDataFlags(DataFlags):
    group: ClassVar[str] = "data"

    num_images: Annotated[int | None, RUN, POSITIVE] = None
    """Images in the data set, for `plan` where the data are not; training counts them."""
    replay: Annotated[bool, PLANNED] = False
    """Show a decoded sample in 4 steps up to 96 px, in 2 up to 160 (at full size 224), as EfficientTrain++ does."""
    replay_gib: Annotated[float, PLANNED, NOT_NEGATIVE] = 4.0
    """Most memory of the replay buffer, in GiB over all devices."""
    views_per_image: Annotated[int, PLANNED, POSITIVE] = 1
    """Crops from one decoded image, in the same step: repeated augmentation."""
    masks_per_image: Annotated[int, PLANNED, POSITIVE] = 1
    """Masks on one crop, in the same step."""
    cache_gib: Annotated[float, RUN, NOT_NEGATIVE] = 0.0
    """Memory for encoded images, in GiB per device, read once before training; 0: none."""


@dataclass(frozen=True)
class PretrainRunFlags(RunFlags):
    group: ClassVar[str] = "run"

    branch: Annotated[str, RUN] = ""
    """Begin where a run ended whose stages are this one's first: its folder or checkpoint. --resume comes first."""
    compile: Annotated[bool, COMPUTE] = False
    """torch.compile the transformer blocks; every stage is compiled before its clock starts."""
    attention: Annotated[str, COMPUTE, OneOf(("auto", "flash", "cudnn", "efficient", "math"))] = "auto"
    """Kernel of attention on CUDA: auto (per stage the fastest, timed), flash, cudnn, efficient or math."""
    bf16_residual: Annotated[bool, COMPUTE] = False
    """Keep what blocks add to in bf16, not in float32: less memory and traffic, more rounding. For --precision bf16."""
    cuda_graphs: Annotated[str, COMPUTE, OneOf(CUDA_GRAPHS)] = "auto"
    """Launch a micro-batch's kernels as one CUDA graph: auto (on CUDA, without --fsdp), on or off."""
    fsdp: Annotated[bool, COMPUTE] = False
    """Share parameters, gradients and optimiser state out over ranks (FSDP2), for models too large for a device."""
    ddp_comm_hook: Annotated[str, COMPUTE, OneOf(("none", "bf16"))] = "none"
    """bf16: ranks send gradients rounded to it, half the bytes (DDP's bf16_compress_hook), or none."""
    activation_checkpointing: Annotated[bool, COMPUTE] = False
    """Compute the activations inside each block again in the backward pass instead of keeping them."""
    deterministic: Annotated[bool, COMPUTE] = False
    """Only kernels that give the same bits each time, as on a CPU: for a GPU, at some speed."""
    print_steps: Annotated[int, RUN, POSITIVE] = 20
    """Steps between lines of the log and of metrics.jsonl."""
    picture_steps: Annotated[int, RUN, NOT_NEGATIVE] = 0
    """Steps between reconstruction pictures; 0: only one at the end."""
    probe_every: Annotated[float, RUN, SHARE] = 0.0
    """Share of the compute between looks at the features of the --holdout images (kNN, RankMe); 0: none."""
    print_config: Annotated[bool, RUN] = False
    """Print the configuration as a recipe and stop."""


@dataclass(frozen=True)
class PretrainConfig(
    LauncherFlags,
    PretrainRunFlags,
    PretrainDataFlags,
    OptimisationFlags,
    CurriculumFlags,
    TaskFlags,
    ModelFlags,
    RecipeFlags,
):
    """Pretrain a masked autoencoder, with vanilla MAE or with a low-frequency curriculum on the same engine.

    With neither --recipe nor --data_path, recipe `demo` runs on photographs that ship with scikit-image. With
    --data_path but no --recipe, the defaults are facebookresearch/mae's and the curriculum is vanilla. Shown
    below are the defaults that the rest of the command line leads to.
    """

    def __post_init__(self) -> None:
        object.__setattr__(self, "input_size", as_size(self.input_size))
        check_shared(self)
        check_views("--", self.crop_scale, self.augment)
        if self.in_chans not in (1, 3) and any((self.augment, *(stage.augment for stage in self.stages))):
            raise ValueError(
                f"--augment (RandAugment) is for 1 or 3 channels, not for --in_chans {self.in_chans}; set it to 0"
            )
        if (self.curriculum == "custom") != bool(self.stages):
            if self.curriculum == "custom":
                raise ValueError("--curriculum custom needs a recipe with `stages`")
            # A recipe's own stages, overruled by the flag: `--recipe demo --curriculum vanilla` is vanilla MAE.
            object.__setattr__(self, "stages", ())
        if self.norm_pix_loss and self.target == "hog":
            raise ValueError("--norm_pix_loss normalises pixels and contradicts --target hog; drop one of them")
        if self.total_batch_size and self.accum_iter:
            raise ValueError("--accum_iter contradicts total_batch_size, which sets it; give one of them")
        if self.deterministic and self.attention in ("cudnn", "efficient"):
            raise ValueError(f"--attention {self.attention} contradicts --deterministic; choose auto, flash or math")
        if self.bf16_residual and self.precision == "fp32":
            raise ValueError("--bf16_residual contradicts --precision fp32; drop one of them")
        if self.fsdp and self.ddp_comm_hook != "none":
            raise ValueError("--ddp_comm_hook is DDP's and contradicts --fsdp, which sums in float32; drop one of them")
        if self.max_batch_size and not self.early_large_batch:
            raise ValueError("--max_batch_size limits --early_large_batch; add it, or drop --max_batch_size")
        check_statistics(self.mean, self.std, self.in_chans, f"--in_chans {self.in_chans}")
        self._check_folders()
        if self.probe_every and not self.holdout:
            raise ValueError("--probe_every looks at training images that are kept out; give --holdout, such as 1000")
        if not 0 <= self.start_epoch < self.epochs:
            raise ValueError(f"--start_epoch must be in [0, --epochs {self.epochs:g}), got {self.start_epoch:g}")
        if self.branch and self.start_epoch:
            raise ValueError("--branch begins where that run ended and contradicts --start_epoch; drop one of them")

    def _check_folders(self) -> None:
        if not self.data_path:
            raise ValueError("--data_path is empty; give a folder, a timm dataset name, or photos")
        if not self.output_dir:
            raise ValueError("--output_dir is empty; give a folder, or . for this one")
        data, out = Path(self.data_path).resolve(), Path(self.output_dir).resolve()
        if data.is_dir() and (out == data or data in out.parents):
            raise ValueError(f"--output_dir {self.output_dir} is inside --data_path: its pictures would become data")

    @property
    def pixel_mean(self) -> tuple[float, ...]:
        """Mean per channel that images are normalised with."""
        return self.mean or default_statistics(self.in_chans)[0]

    @property
    def pixel_std(self) -> tuple[float, ...]:
        """Standard deviation per channel that images are normalised with."""
        return self.std or default_statistics(self.in_chans)[1]

    def total_batch(self, devices: int) -> int:
        """Images per step over all devices, where a stage says nothing else."""
        return self.total_batch_size or self.batch_size * (self.accum_iter or 1) * devices
