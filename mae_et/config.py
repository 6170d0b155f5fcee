"""Configuration: a frozen dataclass, its YAML recipes, and the command line generated from it.

A recipe gives the defaults, flags override it. Unknown keys and wrong types are refused, naming the legal ones.
Flags that facebookresearch/mae has keep their name and meaning.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import math
import types
import typing
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
import yaml

from .curriculum import ALLOCATIONS, LR_SCALINGS, SCHEDULES, SHARES_OF, StageRow, as_size, check_views
from .decoder import DECODERS
from .spectral import OPERATORS
from .targets import TARGETS

Config = TypeVar("Config")

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CURRICULA = (*SCHEDULES, "custom")
PRECISIONS = ("auto", "bf16", "fp32")
POSITIVE = (
    *("batch_size", "accum_iter", "total_batch_size", "in_chans", "epochs", "print_steps", "num_images", "clip_grad"),
    *("patch_size", "embed_dim", "depth", "num_heads", "decoder_embed_dim", "decoder_depth", "decoder_num_heads"),
    *("world_size", "save_minutes", "views_per_image", "masks_per_image", "keep_checkpoints", "max_batch_size"),
)


@dataclass(frozen=True)
class PretrainConfig:
    """Pretrain a masked autoencoder, with vanilla MAE or with a low-frequency curriculum on the same engine.

    With neither --recipe nor --data_path, recipe `demo` runs on photographs that ship with scikit-image. With
    --data_path but no --recipe, the defaults are facebookresearch/mae's and the curriculum is vanilla. Shown
    below are the defaults that the rest of the command line leads to.
    """

    recipe: str = ""
    """Name of a shipped recipe, or a YAML file, that gives the defaults; flags override it."""

    # ── model ──
    model: str = "mae_vit_large_patch16"
    """mae_vit_{tiny,small,base,large}_patch16 or mae_vit_huge_patch14."""
    input_size: int | tuple[int, int] = 224
    """Full size of the input in pixels: one number, or height and width."""
    patch_size: int | None = None
    """Side of a patch in pixels; default: the model's."""
    in_chans: int = 3
    """Channels of the images."""
    embed_dim: int | None = None
    """Encoder width; default: the model's."""
    depth: int | None = None
    """Encoder blocks; default: the model's."""
    num_heads: int | None = None
    """Encoder heads; default: the model's."""
    decoder_embed_dim: int = 512
    """Decoder width."""
    decoder_depth: int = 8
    """Decoder blocks."""
    decoder_num_heads: int = 16
    """Decoder heads."""
    decoder: str = "self"
    """self (MAE's), or cross: predicted patches attend to the visible ones only (CrossMAE), which is cheaper."""
    own_positions: bool = False
    """Number the patches of a small stage from zero, instead of in coordinates of the full grid."""

    # ── task ──
    mask_ratio: float = 0.75
    """Share of the patches that is masked."""
    predict_ratio: float = 1.0
    """Share of the masked patches that is predicted."""
    target: str = "pixel"
    """What is predicted: pixel, or hog (MaskFeat)."""
    norm_pix_loss: bool = False
    """Normalise the target pixels of each patch by their mean and variance."""

    # ── curriculum ──
    curriculum: str = "vanilla"
    """vanilla, et (EfficientTrain), et_pp (EfficientTrain++), et_pp_192, or custom (the recipe's `stages`)."""
    stages: Annotated[tuple[StageRow, ...], tyro.conf.Suppress] = ()
    """Rows of a custom curriculum; written in a recipe."""
    share_of: str = "compute"
    """What the shares of custom stages are shares of: compute or epochs."""
    allocation: str = "area"
    """How a share of compute becomes passes: area (as published) or flops (exact)."""
    lowfreq: str = "fourier"
    """How inputs become small: fourier (exact, on the device), lanczos, bilinear or scaled (in the loader)."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Area range of the random resized crop."""
    augment: int = 0
    """RandAugment magnitude; 0 is off."""

    # ── optimisation ──
    batch_size: int = 64
    """Images per device and full-size micro-batch; the total batch is batch_size × accum_iter × devices."""
    accum_iter: int | None = None
    """Micro-batches per step; default 1, or as many as total_batch_size needs."""
    total_batch_size: int | None = None
    """Images per optimiser step over all devices; micro-batches of batch_size are accumulated up to it."""
    early_large_batch: bool = False
    """Let the total batch of small stages grow until a step's work is that of full size, for many devices (ET++)."""
    max_batch_size: int | None = None
    """Largest total batch of a stage under --early_large_batch; default: no limit."""
    lr_scaling: str = "sqrt"
    """How the learning rate follows a grown batch: sqrt, linear or none."""
    epochs: float = 400
    """Epochs; for compute-shared curricula, equivalent epochs: the compute of so many at full size."""
    lr: float | None = None
    """Peak learning rate; default: blr × total batch / 256."""
    blr: float = 1e-3
    """Base learning rate, for a total batch of 256."""
    min_lr: float = 0.0
    """Learning rate at the end of the half-cosine."""
    warmup_epochs: float = 40
    """Warm-up: warmup_epochs / epochs of the compute."""
    hold_epochs: float = 0
    """After the warm-up, the peak is held for hold_epochs / epochs of the compute before the half-cosine begins."""
    weight_decay: float = 0.05
    """Weight decay of matrices."""
    clip_grad: float | None = None
    """Largest norm of the gradient; default: no clipping."""

    # ── data ──
    data_path: str = "photos"
    """Folder of images (or with train/), of IDX files or of `mae_et prepare`; wds/…, a timm dataset name, or photos."""
    num_images: int | None = None
    """Images in the data set, for `plan` where the data are not; training counts them."""
    holdout: int = 0
    """Training images that are kept out, always the same ones, for main_finetune.py --holdout to choose settings by."""
    num_workers: int | None = None
    """Loader processes per device; default: the cores there are, at most 10."""
    pin_mem: bool = True
    """Page-locked batches, for faster copies to a CUDA device."""
    mean: tuple[float, ...] | None = None
    """Mean per channel in [0, 1]; default: ImageNet's for 3 channels, else 0.5."""
    std: tuple[float, ...] | None = None
    """Standard deviation per channel; default: ImageNet's for 3 channels, else 0.25."""
    damaged_limit: float = 0.01
    """Share of damaged images at which the run stops; below it they are skipped, counted and named."""

    replay: bool = False
    """Show a decoded sample in 4 steps up to 96 px, in 2 up to 160 (at full size 224), as EfficientTrain++ does."""
    replay_gib: float = 4.0
    """Most memory of the replay buffer, in GiB over all devices."""
    views_per_image: int = 1
    """Crops from one decoded image, in the same step."""
    masks_per_image: int = 1
    """Masks on one crop, in the same step."""
    cache_gib: float = 0.0
    """Memory for encoded images, in GiB per device, read once before training; 0: none."""

    # ── run ──
    output_dir: str = "./output_dir"
    """Run folder."""
    log_dir: str | None = None
    """TensorBoard folder; default: the run folder."""
    resume: str = ""
    """Go on from: auto (output_dir, if it holds a checkpoint), a run folder, or a checkpoint."""
    branch: str = ""
    """Begin where a run ended whose stages are this one's first: its folder or checkpoint. --resume comes first."""
    overwrite: bool = False
    """Replace the run that output_dir holds."""
    start_epoch: float = 0
    """Skip the first part of the schedule."""
    seed: int = 0
    """Data order, augmentation, masks and initial weights are functions of it."""
    device: str = "auto"
    """auto, cuda, cuda:N or cpu."""
    precision: str = "auto"
    """auto (bf16 where the device is fast at it), bf16 or fp32."""
    compile: bool = False
    """torch.compile the transformer blocks; every stage is compiled before its clock starts."""
    fsdp: bool = False
    """Share parameters, gradients and optimiser state out over ranks (FSDP2), for models too large for a device."""
    activation_checkpointing: bool = False
    """Compute the activations inside each block again in the backward pass instead of keeping them."""
    print_steps: int = 20
    """Steps between lines of the log and of metrics.jsonl."""
    save_steps: int = 0
    """Steps between checkpoints; 0: by time only."""
    save_minutes: float = 10
    """Minutes between checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints that are kept: checkpoint.pt, and before it checkpoint.prev1.pt and so on."""
    picture_steps: int = 0
    """Steps between reconstruction pictures; 0: only one at the end."""
    print_config: bool = False
    """Print the configuration as a recipe and stop."""

    # ── launchers, as facebookresearch/mae has them; torchrun sets what is needed ──
    world_size: int = 1
    """Devices that `plan` plans for; in training torchrun decides."""
    local_rank: int = -1
    """Accepted; torchrun decides."""
    dist_on_itp: bool = False
    """Accepted; torchrun decides."""
    dist_url: str = "env://"
    """Where ranks meet."""
    job_dir: str = ""
    """As submitit_pretrain.py: the run folder."""
    nodes: int | None = None
    """As submitit_pretrain.py; launch with torchrun --nnodes instead."""
    ngpus: int | None = None
    """As submitit_pretrain.py; launch with torchrun --nproc_per_node instead."""
    use_volta32: bool = False
    """As submitit_pretrain.py; your launcher decides."""

    def __post_init__(self) -> None:
        choice("--curriculum", self.curriculum, CURRICULA)
        choice("--target", self.target, TARGETS)
        choice("--decoder", self.decoder, DECODERS)
        choice("--lowfreq", self.lowfreq, OPERATORS)
        choice("--share_of", self.share_of, SHARES_OF)
        choice("--allocation", self.allocation, ALLOCATIONS)
        choice("--lr_scaling", self.lr_scaling, LR_SCALINGS)
        choice("--precision", self.precision, PRECISIONS)
        object.__setattr__(self, "input_size", as_size(self.input_size))
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"--{name} must be positive and finite, got {value}")
        for name in (
            "weight_decay",
            "lr",
            "blr",
            "min_lr",
            "warmup_epochs",
            "hold_epochs",
            "holdout",
            "num_workers",
            "save_steps",
            "picture_steps",
            "replay_gib",
            "cache_gib",
        ):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"--{name} must not be negative, got {value}")
        for name in ("mask_ratio", "damaged_limit"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name} must be in [0, 1), got {getattr(self, name)}")
        check_views("--", self.crop_scale, self.augment)
        if self.in_chans not in (1, 3) and any(
            augment for augment in (self.augment, *(s.augment for s in self.stages))
        ):
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
        if self.max_batch_size and not self.early_large_batch:
            raise ValueError("--max_batch_size limits --early_large_batch; add it, or drop --max_batch_size")
        for name in ("mean", "std"):
            value = getattr(self, name)
            if value is not None and len(value) != self.in_chans:
                raise ValueError(f"--{name} has {len(value)} numbers for --in_chans {self.in_chans}")
        if min(self.pixel_std) <= 0:
            raise ValueError(f"--std must be positive, got {min(self.pixel_std)}")
        self._check_folders()
        if self.resume and self.overwrite:
            raise ValueError("--resume goes on with a run and --overwrite replaces it; give one of them")
        if self.branch and self.start_epoch:
            raise ValueError("--branch begins where that run ended and contradicts --start_epoch; drop one of them")
        if self.job_dir:
            object.__setattr__(self, "output_dir", self.job_dir)
            object.__setattr__(self, "job_dir", "")  # or it would overrule --output_dir where this is a recipe

    def _check_folders(self) -> None:
        if not self.data_path:
            raise ValueError("--data_path is empty; give a folder, a timm dataset name, or photos")
        data, out = Path(self.data_path).resolve(), Path(self.output_dir).resolve()
        if data.is_dir() and (out == data or data in out.parents):
            raise ValueError(f"--output_dir {self.output_dir} is inside --data_path: its pictures would become data")

    @property
    def pixel_mean(self) -> tuple[float, ...]:
        """Mean per channel that images are normalised with."""
        return self.mean or (IMAGENET_MEAN if self.in_chans == 3 else (0.5,) * self.in_chans)

    @property
    def pixel_std(self) -> tuple[float, ...]:
        """Standard deviation per channel that images are normalised with."""
        return self.std or (IMAGENET_STD if self.in_chans == 3 else (0.25,) * self.in_chans)


def choice(name: str, value: str, legal: typing.Iterable[str]) -> str:
    """`value`, if it is one of `legal`; else a ValueError that lists them and guesses what was meant."""
    legal = list(legal)
    if value not in legal:
        close = difflib.get_close_matches(value, legal, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f"unknown {name} {value!r}{hint}; choose from {', '.join(legal)}")
    return value


def parse(config_type: type[Config], argv: list[str], default_recipe: str = "", prog: str | None = None) -> Config:
    """Command line -> config. `--recipe` gives the defaults; without it and `--data_path`, `default_recipe` does.

    Prints help and exits where it is asked for. Raises ValueError, with one line, for what it can't understand.
    """
    recipe = _flag(argv, "recipe") or ("" if _flag(argv, "data_path") else default_recipe)
    defaults = {"default": from_recipe(config_type, recipe)} if recipe else {}
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(config_type, args=argv, prog=prog, use_underscores=True, **defaults)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        # tyro draws a box of several lines; its first paragraph is the message.
        lines = [line.strip("│ ").strip() for line in box.getvalue().splitlines()[1:]]
        end = next((i for i, line in enumerate(lines) if line.startswith("───")), len(lines))
        hint = next((lines[i + 1] for i, line in enumerate(lines[:-1]) if line.startswith("Perhaps you meant")), "")
        message = " ".join(lines[:end]).removeprefix(f"Error parsing {config_type.__name__}: ")
        message += f"; perhaps you meant {hint}" if hint else "; see --help"
        raise ValueError(message) from None


def _flag(argv: list[str], name: str) -> str:
    """Value of the last --name in a command line, before it is parsed; "" if it is not there."""
    found = ""
    for i, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if flag.replace("-", "_") == f"__{name}":
            found = value if equals else (argv[i + 1] if i + 1 < len(argv) else "")
    return found


def recipes() -> dict[str, Path]:
    """Shipped recipes by name."""
    folder = Path(str(resources.files(__package__))) / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def from_recipe(config_type: type[Config], recipe: str) -> Config:
    """A shipped recipe by name, or a YAML file. ValueError lists the shipped ones."""
    shipped = recipes()
    path = Path(recipe)
    if recipe in shipped:
        path = shipped[recipe]
    elif not path.is_file():
        if path.suffix in (".yaml", ".yml"):
            raise FileNotFoundError(f"--recipe: no file {recipe}")
        choice("--recipe", recipe, shipped)
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--recipe {path} is not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--recipe {path} must be a mapping of configuration keys, see --print_config")
    return from_dict(config_type, values | {"recipe": recipe}, where=f"recipe {recipe}")


def from_dict(config_type: type[Config], values: dict[str, Any], where: str) -> Config:
    """A plain mapping -> config, with each value checked against its field's type."""
    hints = typing.get_type_hints(config_type)
    unknown = [key for key in values if key not in hints]
    if unknown:
        close = difflib.get_close_matches(str(unknown[0]), hints, n=1)
        hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(hints)}"
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; {hint}")
    missing = [
        f.name
        for f in dataclasses.fields(config_type)
        if f.name not in values and f.default is f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{where}: {missing[0]} is missing")
    return config_type(**{key: _typed(value, hints[key], f"{where}: {key}") for key, value in values.items()})


def to_dict(config: Any) -> dict[str, Any]:
    """Config -> plain values that YAML and safe checkpoints can hold; rows of a curriculum without their blanks."""

    def plain(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        if isinstance(value, StageRow):
            return {k: plain(v) for k, v in dataclasses.asdict(value).items() if v is not None}
        return value

    return {f.name: plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def to_yaml(config: Any) -> str:
    """Config as the text of a recipe."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, default_flow_style=None, width=120)


def _typed(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type of a field, or a ValueError that names where. Only the kinds our configs have."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        sequence = isinstance(value, (list, tuple))
        for kind in arguments:
            if kind is not type(None) and (typing.get_origin(kind) is tuple) == sequence:
                return _typed(value, kind, where)
    elif origin is tuple and isinstance(value, (list, tuple)):
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) == len(value):
            return tuple(_typed(item, kind, where) for item, kind in zip(value, kinds, strict=True))
    elif origin is Literal and value in arguments:
        return value
    elif dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        if isinstance(value, dict):
            return from_dict(hint, value, where)
    elif hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            return float(value)  # YAML 1.1 reads 1e-3, without a point, as text
    elif isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise ValueError(f"{where} should be {_name(hint)}, got {value!r}")


def _name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
