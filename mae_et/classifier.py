"""What fine-tuning and probes share: the encoder as a timm classifier, accuracy counted exactly, and the result file.

B batch · C channels · K classes · L patches · D width.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from . import checkpoint, interop, run_folder
from .config import PretrainConfig, to_dict
from .cost import encoder_flops_per_image
from .curriculum import SizePx, grid_of, height_width
from .data.labelled import EvalCrops, eval_batches
from .data.sources import Source
from .finetune_config import FinetuneConfig
from .model import NORM_EPS, MaskedAutoencoder, model_shape, sincos_table
from .runtime import Runtime

HEAD_STD = 2e-5  # MAE, as in facebookresearch/mae's fine-tuning
SHAPE_FLAGS = ("patch_size", "in_chans", "embed_dim", "depth", "num_heads")


@dataclass(frozen=True)
class Start:
    """Where a classifier starts: an encoder, and what its pretraining says about the data."""

    shape: dict
    """Arguments of `create_mae` that the encoder needs."""
    state: dict[str, Tensor]
    """`encoder.*` of `MaskedAutoencoder.state_dict()`."""
    origin: str
    """Where the weights come from, for people."""
    input_size: SizePx
    """Full size of what is classified; `shape["img_size"]` is what the encoder was made for."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    data_path: str
    folder: Path | None = None
    """Run folder of the checkpoint."""

    @property
    def num_patches(self) -> int:
        return math.prod(grid_of(self.input_size, self.shape["patch_size"]))

    @property
    def flops_per_image(self) -> int:
        """Forward FLOPs of the encoder on one image."""
        with torch.device("meta"):
            return encoder_flops_per_image(MaskedAutoencoder(**self.shape), self.num_patches)


def find_start(config: FinetuneConfig) -> Start:
    """Weights, or from scratch the architecture, that a configuration starts from.

    Raises FileNotFoundError, CheckpointError, or ValueError if flags contradict the checkpoint or don't fit together.
    """
    source = config.finetune or config.like
    if source:
        pretrained = checkpoint.read_pretrained(source, encoder_only=True)
        shape = {k: v for k, v in pretrained.shape.items() if not k.startswith("decoder_") and k != "target_dim"}
        _check_architecture(config, shape, pretrained.origin)
    elif config.model:
        given = {name: getattr(config, name) for name in SHAPE_FLAGS if getattr(config, name) is not None}
        shape = dict(in_chans=3, img_size=config.input_size or 224) | model_shape(config.model) | given
    else:
        raise ValueError("from scratch (without --finetune), --model or --like must say what to train")
    if config.finetune:
        state, origin = pretrained.state, pretrained.origin
    else:  # as an encoder is before pretraining, so that only pretraining makes the difference
        state, origin = interop.encoder_only(MaskedAutoencoder(**shape).state_dict()), "scratch"
    record = training_record(source)
    channels = PretrainConfig(in_chans=shape["in_chans"])
    mean = tuple(config.mean or record.get("mean") or channels.pixel_mean)
    std = tuple(config.std or record.get("std") or channels.pixel_std)
    for name, value in (("mean", mean), ("std", std)):
        if len(value) != shape["in_chans"]:
            raise ValueError(f"--{name} has {len(value)} numbers for {shape['in_chans']} channels")
    data_path = config.data_path or record.get("config", {}).get("data_path", "")
    if not data_path:
        raise ValueError("--data_path is needed: the checkpoint doesn't say what it was trained on")
    size = shape["img_size"] if config.input_size is None else config.input_size
    grid_of(size, shape["patch_size"])  # refuses sizes that don't divide
    folder = run_folder_of(config.finetune) if config.finetune else None
    return Start(shape, state, origin, size, mean, std, data_path, folder)


def run_folder_of(source: str) -> Path | None:
    """The run folder that a checkpoint lies in; None for a plain file, a foreign folder or a model name."""
    path = Path(source)
    folder = path if path.is_dir() else path.parent
    held = (folder / run_folder.CONFIG).is_file() and path.exists()
    return folder if held else None


def training_record(source: str) -> Mapping[str, Any]:
    """What a run's own checkpoint says beside its weights; empty for foreign ones."""
    path = Path(source)
    file = path / run_folder.CHECKPOINT if path.is_dir() else path
    if file.suffix == ".safetensors":  # holds no record; the checkpoint beside it does
        file = file.with_name(run_folder.CHECKPOINT)
    if not source or not file.is_file():
        return {}
    content = checkpoint.load(file)
    return content if content.get("format") == checkpoint.FORMAT else {}


def build_classifier(
    start: Start, num_classes: int, pooled: bool, drop_path: float = 0.0, head: Mapping[str, Tensor] | None = None
) -> VisionTransformer:
    """A timm ViT with the start's encoder, strictly loaded, its position table adapted to the input size.

    pooled: mean of the patch tokens, then a new `fc_norm`; else the class token after the encoder's norm. head: weights
    of a fine-tuned `head` (and `fc_norm`); default: N(0, 2e-5) and zeros. num_classes 0: no head.
    """
    shape = start.shape
    vit = VisionTransformer(
        img_size=height_width(start.input_size),
        patch_size=shape["patch_size"],
        in_chans=shape["in_chans"],
        num_classes=num_classes,
        global_pool="avg" if pooled else "token",
        embed_dim=shape["embed_dim"],
        depth=shape["depth"],
        num_heads=shape["num_heads"],
        mlp_ratio=shape.get("mlp_ratio", 4.0),
        drop_path_rate=drop_path,
        norm_layer=partial(nn.LayerNorm, eps=NORM_EPS),
    )
    state = {key.removeprefix("encoder."): tensor for key, tensor in start.state.items()}
    grids = (grid_of(size, shape["patch_size"]) for size in (shape["img_size"], start.input_size))
    state["pos_embed"] = adapt_positions(state["pos_embed"], *grids)
    if pooled:
        del state["norm.weight"], state["norm.bias"]
        state |= {key: tensor for key, tensor in vit.state_dict().items() if key.startswith("fc_norm.")}
    if num_classes:
        nn.init.trunc_normal_(vit.head.weight, std=HEAD_STD)
        nn.init.zeros_(vit.head.bias)
        state |= {f"head.{key}": tensor for key, tensor in vit.head.state_dict().items()}
    vit.load_state_dict(state | dict(head or {}))
    return vit


def adapt_positions(table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Position table [1, 1+L, D] for another grid. MAE's fixed table is evaluated there; a learned one is resampled."""
    if old_grid == new_grid:
        return table
    width = table.shape[-1]
    if width % 4 == 0:
        fixed = sincos_table(width, old_grid, old_grid).to(table.device)
        if (table[0, 1:].float() - fixed).abs().max() <= max(interop.TABLE_TOLERANCE, 2 * torch.finfo(table.dtype).eps):
            moved = sincos_table(width, new_grid, old_grid)[None].to(table)
            return torch.cat([table[:, :1], moved], dim=1)
    return resample_abs_pos_embed(table, list(new_grid), list(old_grid), num_prefix_tokens=1)


def check_classes(config: FinetuneConfig, data_path: str, train: Source | None, val: Source | None) -> list[str]:
    """Names of the classes. ValueError if the splits, or --nb_classes, disagree."""
    if train is not None and val is not None and len(train.classes) != len(val.classes):
        raise ValueError(f"--data_path {data_path}: train has {len(train.classes)} classes, val {len(val.classes)}")
    classes = (train or val).classes
    if config.nb_classes not in (None, len(classes)):
        raise ValueError(f"--nb_classes {config.nb_classes}, but {data_path} has {len(classes)} classes")
    return classes


def eval_crops(config: FinetuneConfig, start: Start, source: Source) -> EvalCrops:
    """Centre crops as the protocol wants them."""
    size = height_width(start.input_size)
    crop_pct = config.crop_pct or (0.875 if 96 <= max(size) <= 224 else 1.0)
    return EvalCrops(source, size, start.shape["in_chans"], crop_pct)


class Normalize:
    """uint8 [B, C, H, W] -> normalised float32 on the device."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], here: Runtime) -> None:
        self.here = here
        self.mean, self.std = (255 * torch.tensor(v, device=here.device).view(-1, 1, 1) for v in (mean, std))

    def __call__(self, images: Tensor) -> Tensor:
        return (images.to(self.here.device, non_blocking=True).float() - self.mean) / self.std


class Tally:
    """Counts of what was classified how; everything that is reported follows from them. Stays on the device."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)  # [true, predicted]
        self.in_top5 = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, scores: Tensor, labels: Tensor) -> None:
        """scores: [B, K]. labels: [B]."""
        classes = len(self.confusion)
        top = scores.topk(min(5, classes), dim=1).indices
        self.confusion += torch.bincount(labels * classes + top[:, 0], minlength=classes**2).view(classes, classes)
        self.in_top5 += (top == labels[:, None]).sum()

    def over(self, here: Runtime) -> Tally:
        """Summed over the ranks."""
        here.sum(self.confusion)
        here.sum(self.in_top5)
        return self

    @property
    def top1(self) -> float:
        """Per cent."""
        return 100 * self.confusion.diagonal().sum().item() / max(1, self.confusion.sum().item())

    def result(self) -> dict[str, Any]:
        """top1 and top5 in per cent (top5 from 5 classes on) and the number of images."""
        count = self.confusion.sum().item()
        top5 = {"top5": 100 * self.in_top5.item() / count} if len(self.confusion) >= 5 else {}
        return {"top1": self.top1, **top5, "num_images": count}

    def details(self, classes: Sequence[str]) -> dict[str, Any]:
        """Per-class accuracy in per cent (None without images) and the confusion matrix, rows true, columns predicted."""
        rows = self.confusion.tolist()
        accuracy = {
            c: 100 * row[i] / sum(row) if sum(row) else None
            for i, (c, row) in enumerate(zip(classes, rows, strict=True))
        }
        return {"per_class_accuracy": accuracy, "confusion": rows}


@torch.no_grad()
def evaluate(
    model: nn.Module, crops: EvalCrops, normalize: Normalize, config: FinetuneConfig, num_classes: int
) -> Tally:
    """Classify all centre crops, shared out among the ranks, in evaluation mode."""
    here = normalize.here
    tally = Tally(num_classes, here.device)
    model.eval()
    pin = config.pin_mem and here.device.type == "cuda"
    for images, labels in eval_batches(crops, here.rank, here.world_size, config.num_workers, pin):
        with here.autocast():
            logits = model(normalize(images))
        tally.add(logits.float(), labels.to(here.device))
    return tally.over(here)


def write_result(
    config: FinetuneConfig, start: Start, here: Runtime, result: Mapping[str, Any], began: float, flops: float
) -> list[Path]:
    """eval-<protocol>.json in the run folder of the checkpoint, and in --output_dir if given or if there is no such."""
    record = {
        "protocol": config.protocol,
        **result,
        "checkpoint": config.finetune or config.resume or config.like,
        "origin": start.origin,
        "cost": {"seconds": time.perf_counter() - began, "flops": flops},
        "flags": to_dict(config),
        "environment": run_folder.environment(
            device=here.describe(), precision=here.precision, devices=here.world_size
        ),
    }
    folders = [start.folder] if start.folder else []
    if config.output_dir or not folders or config.protocol.startswith("finetune"):
        folders.append(output_folder(config, start))
    paths = [folder / f"eval-{config.protocol}.json" for folder in dict.fromkeys(folders)]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        run_folder.write_json(path, record)
    return paths


def output_folder(config: FinetuneConfig, start: Start) -> Path:
    """Where a fine-tuning run lives."""
    default = start.folder / "finetune" if start.folder else Path("./output_dir")
    return Path(config.output_dir) if config.output_dir else default


def _check_architecture(config: FinetuneConfig, shape: Mapping[str, Any], origin: str) -> None:
    """ValueError that names both if flags ask for another architecture than the checkpoint's."""
    wanted = model_shape(config.model) if config.model else {}
    wanted |= {name: getattr(config, name) for name in SHAPE_FLAGS if getattr(config, name) is not None}
    # A name alone says less than the shape of a run that changed its patch or depth: then give the flags, or no name.
    if any(shape[name] != value for name, value in wanted.items()):
        asked = ", ".join(f"{name} {value}" for name, value in wanted.items())
        held = ", ".join(f"{name} {shape[name]}" for name in wanted)
        raise ValueError(f"--model {config.model or ''} ({asked}) is another architecture than {origin} ({held})")


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the batch, float32. logits, targets: [B, K]."""
    return F.cross_entropy(logits.float(), targets)
