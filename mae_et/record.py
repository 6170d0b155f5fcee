"""What belongs to weights and is no tensor: one record that travels with them through every door. No torch.

Each door has its own words for it: timm's `pretrained_cfg`, transformers' `preprocessor_config.json`, the `args` of
facebookresearch/mae. Heads and the eps of norms belong to `ModelShape`, which travels beside it; what a decoder
predicts, to `Pretrained`.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from .plan.shapes import SIZES, ModelShape, SizePx, height_width

log = logging.getLogger(__name__)

RECORD_KEY = "mae_et_record"
"""Where safetensors (metadata, as JSON) and exports for facebookresearch/mae hold a record."""
INTERPOLATION = "bicubic"
"""How this package resizes in evaluation, as MAE does."""
#: Pillow's numbers, which transformers uses, by timm's names.
RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}


@dataclass(frozen=True)
class WeightsRecord:
    """How images must look for the weights, and what their outputs mean. None: not known."""

    mean: tuple[float, ...] | None = None
    """Per channel, of pixels in [0, 1]."""
    std: tuple[float, ...] | None = None
    value_range: tuple[float, float] | None = None
    """Pixel values that become 0 and 1; None: all that their type can hold."""
    crop_pct: float | None = None
    """Share of the resized image's side that the centre crop keeps in evaluation."""
    interpolation: str | None = None
    """Of that resize: bicubic, bilinear, lanczos or nearest."""
    classes: tuple[str, ...] | None = None
    """Names of a classifier's outputs, in order."""
    pooled: bool | None = None
    """Whether a classifier takes the mean of the patch tokens, rather than the class token."""
    source: str = field(default="", compare=False)
    """Where the facts come from, for people."""

    @classmethod
    def of(cls, facts: Mapping[str, Any], source: str = "") -> WeightsRecord:
        """From plain values, as :meth:`to_dict` writes them; what else is there is left alone."""
        names = [f.name for f in dataclasses.fields(cls) if f.name != "source"]
        known = {name: facts[name] for name in names if facts.get(name) is not None}
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in known.items()}, source=source)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON and safe checkpoints, of what is known."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "source"}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if v is not None}

    def completed_by(self, other: WeightsRecord) -> WeightsRecord:
        """This record, with what it doesn't know taken from another."""
        return WeightsRecord.of(other.to_dict() | self.to_dict(), self.source or other.source)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_list_of(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(map(holds, value))


#: What a fact must be, where another program may have meant something else by its name.
PLAUSIBLE: dict[str, Callable[[Any], bool]] = {
    "mean": lambda value: _is_list_of(value, lambda one: _is_number(one) and 0 <= one <= 1),
    "std": lambda value: _is_list_of(value, lambda one: _is_number(one) and one > 0),
    "crop_pct": lambda value: _is_number(value) and 0 < value <= 1,
    "interpolation": lambda value: value in RESAMPLE,
    "classes": lambda value: _is_list_of(value, lambda one: isinstance(one, str)),
    "pooled": lambda value: isinstance(value, bool),
}


def _plausible(facts: Mapping[str, Any], source: str) -> WeightsRecord:
    """What another program says, as far as it can be what we mean; the rest is named and left out."""
    said = {name: value for name, value in facts.items() if value is not None}
    odd = {name: value for name, value in said.items() if not PLAUSIBLE[name](value)}
    for name, value in odd.items():
        log.warning("%s %s, from %s, is left out: it can't be what is called so here", name, value, source)
    kept = {name: tuple(v) if isinstance(v, list) else v for name, v in said.items() if name not in odd}
    return WeightsRecord.of(kept, source)


def default_crop_pct(size_px: SizePx) -> float:
    """0.875 from 96 to 224 px, as MAE has it at 224; 1 for other sizes."""
    return 0.875 if 96 <= max(height_width(size_px)) <= 224 else 1.0


# ── timm ──


def from_timm(cfg: Mapping[str, Any], source: str) -> WeightsRecord:
    """From a `pretrained_cfg`."""
    crop_pct, interpolation = cfg.get("crop_pct"), cfg.get("interpolation")
    facts = {name: cfg.get(name) for name in ("mean", "std")} | {"classes": cfg.get("label_names") or None}
    facts |= {"crop_pct": None if _is_number(crop_pct) and crop_pct > 1 else crop_pct}  # others pad there
    facts |= {"interpolation": interpolation if interpolation in RESAMPLE else None}  # "random" is for training
    return _plausible(facts, source)


def to_timm(record: WeightsRecord, shape: ModelShape, num_classes: int) -> dict[str, Any]:
    """A `pretrained_cfg`. num_classes: outputs of the classifier, which may have no names."""
    height, width = height_width(shape.img_size)
    cfg = {
        "input_size": [shape.in_chans, height, width],
        "fixed_input_size": True,
        "mean": record.mean,
        "std": record.std,
        "crop_pct": record.crop_pct or default_crop_pct(shape.img_size),
        "interpolation": record.interpolation or INTERPOLATION,
        "num_classes": num_classes,
        "classifier": "head",
    }
    if shape.in_chans == 3:  # older versions of timm would "adapt" other weights that fit, and fail
        cfg["first_conv"] = "patch_embed.proj"
    cfg |= {"label_names": list(record.classes)} if record.classes else {}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in cfg.items() if v is not None}


def timm_config(record: WeightsRecord, shape: ModelShape, num_classes: int) -> dict[str, Any]:
    """config.json of a timm model folder, for `timm.create_model("local-dir:FOLDER", pretrained=True)`."""
    height, width = height_width(shape.img_size)
    arguments = {"img_size": [height, width], "patch_size": shape.patch_size, "in_chans": shape.in_chans}
    arguments |= {name: shape[name] for name in ("embed_dim", "depth", "num_heads", "mlp_ratio")}
    arguments |= {"global_pool": "avg" if record.pooled else "token"}
    known = {f"vit_{size}_patch{own['patch_size']}_224": own for size, own in SIZES.items()}
    like = next((name for name, own in known.items() if own.items() <= arguments.items()), "vit_base_patch16_224")
    return {
        "architecture": like,  # the arguments say the rest
        "num_classes": num_classes,
        "num_features": shape.embed_dim,
        "global_pool": "avg" if record.pooled else "token",
        "model_args": arguments,
        "pretrained_cfg": to_timm(record, shape, num_classes),
    }


# ── transformers ──


def from_preprocessor(config: Mapping[str, Any], source: str, in_chans: int = 3) -> WeightsRecord:
    """From a preprocessor_config.json."""
    config = {name: value for name, value in config.items() if value is not None}  # null is transformers' default
    normalizes = config.get("do_normalize", True)
    # Pixels in [0, 255] times this are normalised there, pixels in [0, 1] here.
    factor = 255 * (config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1)

    def per_channel(values: float | Sequence[float] | None) -> tuple[float, ...] | None:
        values = (values,) * in_chans if isinstance(values, (int, float)) else values
        return tuple(value / factor for value in values) if _is_list_of(values, _is_number) else None

    mean = per_channel(config.get("image_mean") if normalizes else 0.0)
    std = per_channel(config.get("image_std") if normalizes else 1.0)
    size, crop = config.get("size"), config.get("crop_size")
    names = {number: name for name, number in RESAMPLE.items()}
    crop_pct = 1.0 if size is not None else None
    if config.get("do_center_crop") and size is not None:
        shortest = size if isinstance(size, int) else size.get("shortest_edge") or size.get("height")
        kept = crop if isinstance(crop, int) else (crop or {}).get("height")
        crop_pct = kept / shortest if kept and shortest and kept <= shortest else None  # others pad
    facts = {"mean": mean, "std": std, "crop_pct": crop_pct, "interpolation": names.get(config.get("resample"))}
    return WeightsRecord.of(facts, source)


def to_preprocessor(record: WeightsRecord, shape: ModelShape) -> dict[str, Any]:
    """preprocessor_config.json: resize, centre crop and normalise as evaluation does."""
    height, width = height_width(shape.img_size)
    crop_pct = record.crop_pct or default_crop_pct(shape.img_size)
    config = {
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": record.mean is not None,
        "image_mean": record.mean and list(record.mean),
        "image_std": record.std and list(record.std),
        "do_resize": True,
        "resample": RESAMPLE[record.interpolation or INTERPOLATION],
    }
    if height == width:  # transformers crops the centre after a resize of the shorter side
        config |= {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": int(height / crop_pct)}}
        config |= {"do_center_crop": True, "crop_size": {"height": height, "width": width}}
    else:
        config |= {"image_processor_type": "ViTImageProcessor", "size": {"height": height, "width": width}}
    return {k: v for k, v in config.items() if v is not None}


def labels_of_huggingface(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Class names in the order of their numbers, from `id2label` of a config.json; None for numbers alone."""
    labels = {int(number): name for number, name in (config.get("id2label") or {}).items()}
    names = tuple(labels[number] for number in sorted(labels))
    return None if not names or names == tuple(f"LABEL_{i}" for i in range(len(names))) else names


# ── facebookresearch/mae ──


def from_facebook(args: Mapping[str, Any], source: str) -> WeightsRecord:
    """From the `args` of a checkpoint. Its code knows no mean but ImageNet's."""
    facts = {name: args.get(name) for name in ("mean", "std", "crop_pct", "classes")}
    facts["pooled"] = args.get("global_pool")
    return _plausible(facts, source)


def to_facebook(record: WeightsRecord, shape: ModelShape, num_classes: int) -> dict[str, Any]:
    """`args` of a checkpoint: its own words where it has some, and ours for the rest."""
    args = {"input_size": shape.img_size, "global_pool": record.pooled}
    args |= {"nb_classes": num_classes or None}
    args |= {name: record.to_dict().get(name) for name in ("mean", "std", "crop_pct", "classes")}
    return {name: value for name, value in args.items() if value is not None}
