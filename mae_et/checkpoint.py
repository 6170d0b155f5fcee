"""Weights from wherever they come, in our layout, and in the layouts of others.

Everything is read by `storage`, without running code. What can be read as pretrained weights is listed in `ACCEPTED`.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from . import interop
from .engine import run_folder, sharded
from .engine.resume import FORMAT
from .engine.storage import save, save_safetensors
from .files import CheckpointError, make_folder, write
from .interop import METADATA_KEY
from .plan.shapes import KNOWN_HEADS, ModelShape, choice, target_dim

__all__ = ["CheckpointError", "Pretrained", "load", "read_pretrained", "write_export"]

log = logging.getLogger(__name__)

EXPORT_FORMATS = ("timm", "facebook", "huggingface")
ACCEPTED = (
    "a run folder, a checkpoint .pt, a .safetensors or .pth encoder of timm, a .pth of facebookresearch/mae, "
    "a folder of transformers' ViTMAE, or the name of a timm model"
)

load = sharded.load_full


@dataclass(frozen=True)
class Pretrained:
    """Weights in our layout and what is known about them."""

    state: dict[str, Tensor]
    """As `MaskedAutoencoder.state_dict()`; without a decoder only `encoder.*`."""
    shape: ModelShape
    """All that fixes the weights, so that no name is needed; of a decoder only if there is one."""
    has_decoder: bool
    """Whether `state` holds a decoder."""
    origin: str
    """Where the weights come from, for people."""
    norm_pix_loss: bool | None = None
    """Whether the decoder was trained on normalised pixels; None: not known."""
    target: str | None = None
    """"pixel" or "hog"; None: not known, or no decoder."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """What the run's checkpoint says beside its weights (see `resume.identity`); empty for foreign weights."""


def read_pretrained(source: str | Path, encoder_only: bool = False, num_heads: int | None = None) -> Pretrained:
    """Weights from a run folder, a file or a timm model name (`ACCEPTED`), in our layout.

    encoder_only: leave out the decoder before anything is checked, for use without it. num_heads: of the encoder, for
    files that don't say; default: the usual number for its width, else width/64, with a warning.
    Raises FileNotFoundError, CheckpointError, or ValueError if the weights are not those of a plain ViT or an MAE.
    """
    path = Path(source)
    if path.is_dir() and path.suffix != sharded.SUFFIX:
        return _read_folder(path, encoder_only, num_heads)
    if path.exists():
        pretrained = _read_file(path, encoder_only, num_heads)
        beside = run_folder.run_of(path)
        if path.suffix == ".safetensors" and beside and (checkpoint := run_folder.checkpoint_in(beside)):
            return replace(pretrained, record=_record(load(checkpoint)))  # of the same run
        return pretrained
    if timm.is_model(str(source)):
        return _download(str(source))
    raise FileNotFoundError(f"{source}: no such file or timm model; accepted are {ACCEPTED}")


def _read_folder(folder: Path, encoder_only: bool, num_heads: int | None) -> Pretrained:
    """A run folder, or one of transformers' ViTMAE."""
    checkpoint = run_folder.checkpoint_in(folder)
    for file in (checkpoint, folder / run_folder.ENCODER):
        if file is not None and file.exists():
            return _read_file(file, encoder_only, num_heads)
    if (folder / "config.json").exists():
        return _read_huggingface(folder, encoder_only)
    raise FileNotFoundError(
        f"{folder}: holds neither checkpoint.pt or encoder.safetensors (a run folder) nor config.json (a folder of "
        "transformers' ViTMAE)"
    )


def write_export(
    source: Pretrained | Mapping[str, Tensor],
    shape: Mapping,
    format: str,
    out: Path,
    norm_pix_loss: bool | None = None,
    encoder_only: bool = False,
) -> None:
    """Write weights in our layout for others: "timm" a .safetensors file, "facebook" a .pth, "huggingface" a folder.

    shape: arguments of `create_mae`. norm_pix_loss: default: what `source` knows. encoder_only: leave out the decoder
    ("timm" always does).
    Raises ValueError on an unknown format, weights that are no model of this package, or a decoder that the format
    can't hold; CheckpointError if the file can't be written.
    """
    choice("export format", format, EXPORT_FORMATS)
    if isinstance(source, Pretrained):
        norm_pix_loss = source.norm_pix_loss if norm_pix_loss is None else norm_pix_loss
        source = source.state
    state, out = interop.encoder_only(source) if encoder_only else dict(source), Path(out)
    shape = _complete(shape, state).to_dict()
    if not interop.has_decoder(source):
        shape = {key: value for key, value in shape.items() if not key.startswith("decoder") and key != "target_dim"}
    # Everything is converted before anything is written.
    if format == "timm":
        exported = interop.to_timm(state)
        make_folder(out.parent)
        save_safetensors(exported, out, {METADATA_KEY: json.dumps(shape)})
    elif format == "facebook":
        exported = interop.to_facebook(state, shape["img_size"])
        make_folder(out.parent)
        save({"model": exported, METADATA_KEY: shape}, out)  # others read `model` alone
    else:
        if encoder_only:
            shape = {key: value for key, value in shape.items() if not key.startswith("decoder")}
        config = interop.huggingface_config(shape, norm_pix_loss)
        exported = interop.to_huggingface(state, shape["img_size"])
        make_folder(out)
        save_safetensors(exported, out / "model.safetensors")
        write(out / "config.json", lambda file: file.write(json.dumps(config, indent=2).encode()))


def _read_file(path: Path, encoder_only: bool, num_heads: int | None) -> Pretrained:
    """A single file: who wrote it is told from its keys."""
    content, metadata = _load_safetensors(path) if path.suffix == ".safetensors" else (load(path), {})
    if "format" in content:
        return _read_own(content, path, encoder_only)
    state = next((content[key] for key in ("model", "state_dict") if isinstance(content.get(key), dict)), content)
    if not state or not all(isinstance(key, str) and isinstance(t, Tensor) for key, t in state.items()):
        raise CheckpointError(f"{path}: holds no weights; accepted are {ACCEPTED}")
    if any(key.endswith("embeddings.cls_token") for key in state):
        if (path.parent / "config.json").is_file():
            return _read_huggingface(path.parent, encoder_only)
        raise ValueError(f"{path}: weights of transformers need the config.json beside them")
    args = vars(content["args"]) if isinstance(content.get("args"), argparse.Namespace) else {}
    stored_shape = json.loads(metadata[METADATA_KEY]) if METADATA_KEY in metadata else content.get(METADATA_KEY)
    state = _without_decoder(state) if encoder_only else state
    with prefix_errors(path):
        ours = state if "encoder.cls_token" in state else interop.from_facebook(state)
        shape = ModelShape(**(stored_shape or interop.infer_shape(ours, num_heads)))
    if not (stored_shape or num_heads or shape.embed_dim in KNOWN_HEADS):
        heads = shape.num_heads
        log.warning("%s doesn't say how many heads it has: taken to be %d, of 64 each; see --num_heads", path, heads)
    decoder = interop.has_decoder(ours)
    if stored_shape:
        origin = f"mae_et {'model' if decoder else 'encoder'} {path}"
    elif decoder or args:
        origin = f"facebookresearch/mae checkpoint {path}"
    else:
        origin = f"encoder of timm or facebookresearch/mae {path}"
    pixels = target_dim("pixel", shape.patch_size, shape.in_chans)
    target = "pixel" if decoder and shape.target_dim == pixels else None
    norm_pix_loss = args.get("norm_pix_loss") if decoder else None
    return Pretrained(ours, shape, decoder, origin, norm_pix_loss, target)


def _read_own(content: Mapping, path: Path, encoder_only: bool) -> Pretrained:
    """A checkpoint of this package."""
    if content["format"] != FORMAT:
        raise CheckpointError(f"{path}: format {content['format']!r} is not known here, only {FORMAT!r}")
    state = interop.encoder_only(content["model"]) if encoder_only else dict(content["model"])
    decoder = interop.has_decoder(state)
    target = content["target"] if decoder else None
    norm_pix_loss = content["norm_pix_loss"] if decoder else None
    with prefix_errors(path):
        shape = _complete(content["shape"], state)
    origin = f"mae_et checkpoint {path}"
    return Pretrained(state, shape, decoder, origin, norm_pix_loss, target, _record(content))


def _record(content: Mapping) -> dict[str, Any]:
    """What a checkpoint of this package says beside its weights; nothing of another's."""
    if content.get("format") != FORMAT:
        return {}
    return {name: value for name, value in content.items() if name not in ("model", "optimizer", "ema")}


def _read_huggingface(folder: Path, encoder_only: bool) -> Pretrained:
    """A folder of transformers' ViTMAE: config.json and the weights."""
    weights = next((folder / n for n in ("model.safetensors", "pytorch_model.bin") if (folder / n).is_file()), None)
    if weights is None:
        raise FileNotFoundError(f"{folder}: holds config.json but neither model.safetensors nor pytorch_model.bin")
    with prefix_errors(folder / "config.json"):
        config = json.loads((folder / "config.json").read_text())
        shape = ModelShape(**interop.shape_from_huggingface_config(config))
    state = _load_safetensors(weights)[0] if weights.suffix == ".safetensors" else load(weights)
    with prefix_errors(weights):
        ours = interop.from_huggingface(_without_decoder(state) if encoder_only else state, shape.img_size)
    decoder = interop.has_decoder(ours)
    norm_pix_loss = config.get("norm_pix_loss", False) if decoder else None
    origin = f"transformers ViTMAE folder {folder}"
    return Pretrained(ours, shape, decoder, origin, norm_pix_loss, "pixel" if decoder else None)


def _download(name: str) -> Pretrained:
    """Pretrained weights of a timm model, which must be a plain ViT."""
    try:
        with torch.device("meta"):  # to be refused before anything is downloaded
            model = timm.create_model(name, num_classes=0)
    except RuntimeError as error:  # an unknown tag
        raise ValueError(f"timm model {name}: {error}") from error
    plain = isinstance(model, VisionTransformer) and not model.no_embed_class
    if not plain or not isinstance(model.blocks[0].mlp.act, nn.GELU):
        raise ValueError(f"timm model {name}: not a plain ViT (class token with a position, GELU, nothing else)")
    with prefix_errors(f"timm model {name}"):
        interop.from_timm(model.state_dict())
    try:
        weights = timm.create_model(name, pretrained=True, num_classes=0).state_dict()
    except (OSError, RuntimeError) as error:  # huggingface_hub's errors are OSErrors
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"timm model {name}: its weights can't be had: {reason}") from error
    state = interop.from_timm(weights)
    heads, img_size = model.blocks[0].attn.num_heads, model.patch_embed.img_size
    shape = ModelShape(**interop.infer_shape(state, heads, img_size=img_size))
    return Pretrained(state, shape, False, f"timm model {name}")


def _complete(shape: Mapping, state: Mapping[str, Tensor]) -> ModelShape:
    """A shape that leaves out what equals a default of `MaskedAutoencoder`, with what the weights say about it."""
    heads = shape.get("num_heads"), shape.get("decoder_num_heads")
    return ModelShape(**interop.infer_shape(state, *heads, shape.get("img_size")) | dict(shape))


def _without_decoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Any layout without the keys of its decoder, before it is checked."""
    return {key: tensor for key, tensor in state.items() if not key.startswith(("decoder", "mask_token"))}


def _load_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path}: not a safetensors file, or cut short") from error
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror or error}") from error


@contextmanager
def prefix_errors(what: Path | str) -> Iterator[None]:
    """Put the file before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
