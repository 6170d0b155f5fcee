"""Configuration of fine-tuning, linear probe and kNN: one command, four protocols."""

from __future__ import annotations

from dataclasses import dataclass

from ..plan.config import PRECISIONS
from ..plan.shapes import SizePx, as_size, choice

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
class FinetuneConfig:
    """Fine-tune a pretrained encoder, or judge its features with --linear_probe or --knn.

    Given only --finetune, the protocol is facebookresearch/mae's FINETUNE.md for ViT-B, on the data of the checkpoint.
    """

    finetune: str = ""
    """Run folder, checkpoint.pt, encoder.safetensors, facebookresearch/mae .pth, ViTMAE folder, or timm model name."""

    # ── protocol; without one of these: fine-tuning ──
    linear_probe: bool = False
    """Train a linear classifier on frozen features."""
    knn: bool = False
    """Classify by the nearest training images; nothing is trained."""
    eval: bool = False
    """Only evaluate a fine-tuned model: --finetune or --resume."""
    features: str = "cached"
    """Linear probe: cached (features of centre crops, solved to convergence) or augmented (the paper's training)."""
    layers: tuple[int, ...] = ()
    """Probes: blocks to take features from, counted from 1, each with both poolings; default: the last."""
    k: int = 20
    """kNN: neighbours."""
    temperature: float = 0.07
    """kNN: a neighbour's vote weighs exp(cosine / temperature)."""
    l2: float = 1e-4
    """Cached linear probe: half of this times the squared weights is added to the mean loss."""

    # ── model ──
    model: str | None = None
    """mae_vit_base_patch16, vit_base_patch16, …; default: the checkpoint's."""
    like: str = ""
    """Train from scratch with the architecture of this run or checkpoint, none of its weights."""
    input_size: SizePx | None = None
    """Input in pixels: one number, or height and width; default: the checkpoint's. Position tables adapt."""
    patch_size: int | None = None
    """Side of a patch in pixels; default: the model's."""
    in_chans: int | None = None
    """Channels of the images; default: the checkpoint's, else 3."""
    embed_dim: int | None = None
    """Width; default: the model's."""
    depth: int | None = None
    """Blocks; default: the model's."""
    num_heads: int | None = None
    """Heads; default: the model's."""
    drop_path: float = 0.1
    """Stochastic depth of the last block; it grows linearly from 0."""
    global_pool: bool = False
    """Classify the mean of the patch tokens: what fine-tuning does by default."""
    cls_token: bool = False
    """Classify the class token: what the probes do by default."""
    nb_classes: int | None = None
    """Classes; default: the data's."""

    # ── optimisation ──
    batch_size: int | None = None
    """Images per device and micro-batch; default: 64, up to the protocol's total (fine-tuning 1024, linear 16384)."""
    accum_iter: int | None = None
    """Micro-batches per step; default: 1, or as many as the total needs."""
    total_batch_size: int | None = None
    """Images per step over all devices, whatever their number."""
    epochs: float | None = None
    """Epochs; default: fine-tuning 100, linear probe 90."""
    lr: float | None = None
    """Peak learning rate; default: blr × total batch / 256."""
    blr: float | None = None
    """Base learning rate for a total batch of 256; default: fine-tuning 5e-4, linear probe 0.1."""
    min_lr: float | None = None
    """Learning rate at the end; default: fine-tuning 1e-6, linear probe 0."""
    warmup_epochs: float | None = None
    """Warm-up; default: fine-tuning 5, linear probe 10, and at most a fifth of the epochs."""
    weight_decay: float | None = None
    """Weight decay of matrices; default: fine-tuning 0.05, linear probe 0."""
    layer_decay: float | None = None
    """Each block learns at this times the rate of the next one; default: 0.65."""
    clip_grad: float | None = None
    """Largest norm of the gradient; default: no clipping."""
    model_ema: bool = False
    """Keep a moving average of the weights too, and evaluate both."""
    model_ema_decay: float = 0.9999
    """Decay of the average per step."""

    # ── augmentation of fine-tuning ──
    color_jitter: float | None = None
    """Strength of colour jitter; has effect only with --aa none, as in timm."""
    aa: str | None = None
    """timm's RandAugment or AutoAugment policy, or none; default: rand-m9-mstd0.5-inc1 for 1 and 3 channels."""
    smoothing: float = 0.1
    """Label smoothing."""
    reprob: float = 0.25
    """Probability of random erasing."""
    remode: str = "pixel"
    """Random erasing fills with: pixel (noise), rand (one colour) or const (the mean)."""
    recount: int = 1
    """Most erased boxes per image."""
    resplit: bool = False
    """Accepted; without effect, as in facebookresearch/mae, which has no split augmentation either."""
    mixup: float = 0.8
    """Mixup alpha; 0 is off."""
    cutmix: float = 1.0
    """CutMix alpha; 0 is off."""
    cutmix_minmax: tuple[float, float] | None = None
    """Range of the CutMix box's share of each side; turns CutMix on, instead of alpha."""
    mixup_prob: float = 1.0
    """Probability that a batch is mixed."""
    mixup_switch_prob: float = 0.5
    """Probability of CutMix where both are on."""
    mixup_mode: str = "batch"
    """Draw the mixing per batch, pair or elem."""

    # ── data ──
    data_path: str = ""
    """Folder with train/ and val/, of IDX files, wds/…, a timm dataset name, or photos; default: pretraining's."""
    train_images: int | None = None
    """Use only so many labelled images, equally many of each class, the same ones for the same seed."""
    eval_images: int | None = None
    """Evaluate on only so many images, chosen likewise."""
    holdout: int = 0
    """Evaluate on so many training images, always the same ones, which are not trained on, instead of the test images;
    pretrain with the same --holdout."""
    crop_pct: float | None = None
    """Centre crop in evaluation; default: 0.875 from 96 to 224 px, as MAE has it at 224; 1 for other sizes."""
    mean: tuple[float, ...] | None = None
    """Mean per channel in [0, 1]; default: the pretraining's, else ImageNet's."""
    std: tuple[float, ...] | None = None
    """Standard deviation per channel; default: as mean."""
    num_workers: int | None = None
    """Loader processes per device; default: the cores there are, at most 10."""
    pin_mem: bool = True
    """Page-locked batches, for faster copies to a CUDA device."""
    damaged_limit: float = 0.01
    """Share of damaged training images that ends the run; --knn, cached --linear_probe and evaluation end at any."""

    # ── run ──
    output_dir: str = ""
    """Folder of the fine-tuning run; default: finetune/ in the pretraining run's folder, else ./output_dir."""
    log_dir: str | None = None
    """TensorBoard folder; default: output_dir."""
    resume: str = ""
    """Go on from: auto (output_dir, if it holds a checkpoint), a run folder, or a checkpoint."""
    overwrite: bool = False
    """Replace the run that output_dir holds."""
    start_epoch: float = 0
    """Skip the first part of the schedule."""
    seed: int = 0
    """Data order, augmentation, mixing, drop path and the head are functions of it."""
    device: str = "auto"
    """auto, cuda, cuda:N or cpu."""
    precision: str = "auto"
    """auto (bf16 where the device is fast at it), bf16 or fp32."""
    dist_eval: bool = False
    """Accepted; evaluation is always shared out among the ranks, and exact."""
    eval_epochs: float = 1
    """Epochs between evaluations."""
    save_steps: int = 0
    """Steps between checkpoints; 0: at evaluations and by time only."""
    save_minutes: float = 10
    """Minutes between checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints that are kept: checkpoint.pt, and before it checkpoint.prev1.pt and so on."""
    report: bool = False
    """Add the confusion matrix and the accuracy of each class to the result."""

    # ── launchers, as facebookresearch/mae has them; torchrun sets what is needed ──
    world_size: int = 1
    """Accepted; torchrun decides."""
    local_rank: int = -1
    """Accepted; torchrun decides."""
    dist_on_itp: bool = False
    """Accepted; torchrun decides."""
    dist_url: str = "env://"
    """Where ranks meet."""
    job_dir: str = ""
    """As submitit_finetune.py: the run folder."""
    nodes: int | None = None
    """As submitit_finetune.py; launch with torchrun --nnodes instead."""
    ngpus: int | None = None
    """As submitit_finetune.py; launch with torchrun --nproc_per_node instead."""
    use_volta32: bool = False
    """As submitit_finetune.py; your launcher decides."""

    def __post_init__(self) -> None:
        for name, legal in (("features", FEATURES), ("mixup_mode", MIXUP_MODES), ("precision", PRECISIONS)):
            choice(f"--{name}", getattr(self, name), legal)
        choice("--remode", self.remode, ERASING_MODES)
        self._check_contradictions()
        if self.input_size is not None:
            object.__setattr__(self, "input_size", as_size(self.input_size))
        for name, value in DEFAULTS["linear_probe" if self.linear_probe else "finetune"].items():
            if name not in ("total_batch_size", "warmup_epochs") and getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.warmup_epochs is None:
            object.__setattr__(self, "warmup_epochs", min(self._default("warmup_epochs"), self.epochs / 5))
        if self.job_dir:
            object.__setattr__(self, "output_dir", self.job_dir)
        self._check_ranges()

    def _check_contradictions(self) -> None:
        protocols = [f"--{name}" for name in ("linear_probe", "knn", "eval") if getattr(self, name)]
        if len(protocols) > 1:
            raise ValueError(f"{' and '.join(protocols)} contradict each other; give one of them")
        if protocols and protocols != ["--eval"] and self.layer_decay is not None:
            raise ValueError(
                f"{protocols[0]} keeps the backbone as it is and contradicts --layer_decay; drop one of them"
            )
        if self.is_probe and not self.finetune:
            raise ValueError(f"{protocols[0]} needs --finetune: a run folder, a checkpoint or a timm model name")
        if self.is_probe and self.resume:
            raise ValueError(f"{protocols[0]} takes minutes and can't --resume; leave --resume out")
        if self.layers and not self.is_probe:
            raise ValueError("--layers is for --linear_probe and --knn")
        for one, other in (
            ("global_pool", "cls_token"),
            ("finetune", "like"),
            ("total_batch_size", "accum_iter"),
            ("resume", "overwrite"),
        ):
            if getattr(self, one) and getattr(self, other):
                raise ValueError(f"--{one} and --{other} contradict each other; give one of them")

    def _check_ranges(self) -> None:
        positive = (
            "batch_size accum_iter total_batch_size epochs k temperature patch_size in_chans nb_classes train_images"
        )
        for name in (*positive.split(), "eval_images", "eval_epochs", "keep_checkpoints"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"--{name} must be positive, got {value}")
        for name in ("drop_path", "smoothing", "reprob", "mixup_prob", "mixup_switch_prob", "model_ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("layer_decay", "crop_pct"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"--{name} must be in (0, 1], got {value}")
        for name in ("mixup", "cutmix", "l2", "weight_decay", "holdout"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} can't be negative, got {getattr(self, name)}")
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"--warmup_epochs {self.warmup_epochs:g} is longer than --epochs {self.epochs:g}")
        if not 0 <= self.start_epoch < self.epochs:
            raise ValueError(f"--start_epoch must be in [0, --epochs {self.epochs:g}), got {self.start_epoch:g}")
        if self.cutmix_minmax is not None and not 0 <= self.cutmix_minmax[0] < self.cutmix_minmax[1] <= 1:
            raise ValueError(f"--cutmix_minmax must be two shares 0 <= low < high <= 1, got {self.cutmix_minmax}")

    @property
    def is_probe(self) -> bool:
        return self.linear_probe or self.knn

    @property
    def protocol(self) -> str:
        """Names the result: eval-<protocol>.json. Fewer labels or images are another protocol."""
        name = "knn" if self.knn else "finetuned" if self.eval else "finetune"
        if self.linear_probe:
            name = "linear_probe" if self.features == "cached" else "linear_probe_augmented"
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
        return min(self._default("total_batch_size"), num_images)

    def peak_lr(self, total_batch: int) -> float:
        return self.blr * total_batch / 256 if self.lr is None else self.lr

    def _default(self, name: str) -> float:
        return DEFAULTS["linear_probe" if self.linear_probe else "finetune"][name]
