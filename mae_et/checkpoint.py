"""Weights from wherever they come, in our layout, and in the layouts of others.

Everything is read by `storage`, without running code. What can be read as pretrained weights is listed in `ACCEPTED`.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import safetensors
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from . import interop
from .engine import sharded, storage
from .engine.storage import save, save_safetensors
from .files import CheckpointError, make_folder, write
from .plan.shapes import as_size, target_dim

__all__ = [
    "CheckpointError",
    "Pretrained",
    "load",
    "load_newest",
    "read_pretrained",
    "save",
    "save_safetensors",
    "write_export",
]

log = logging.getLogger(__name__)

FORMAT = "mae_et/1"
"""Value of the key `format` in the checkpoints of this package."""
METADATA_KEY = "mae_et"
"""Where exports for timm (metadata, as JSON) and facebookresearch/mae (beside `model`) hold their shape."""
EXPORT_FORMATS = ("timm", "facebook", "huggingface")
ACCEPTED = (
    "a run folder, a checkpoint .pt, a .safetensors or .pth encoder of timm, a .pth of facebookresearch/mae, "
    "a folder of transformers' ViTMAE, or the name of a timm model"
)


@dataclass(frozen=True)
class Pretrained:
    """Weights in our layout and what is known about them."""

    state: dict[str, Tensor]
    """As `MaskedAutoencoder.state_dict()`; without a decoder only `encoder.*`."""
    shape: dict
    """Arguments of `create_mae`: all that fix the weights, so that no name is needed."""
    has_decoder: bool
    """Whether `state` holds a decoder."""
    origin: str
    """Where the weights come from, for people."""
    norm_pix_loss: bool | None = None
    """Whether the decoder was trained on normalised pixels; None: not known."""
    target: str | None = None
    """"pixel" or "hog"; None: not known, or no decoder."""


def load(path: str | Path) -> dict:
    """Read a file of `torch.save` or a folder of shards, whole, without running code. Raises as `storage.load` does."""
    path = Path(path)
    if path.suffix == sharded.SUFFIX:
        return sharded.whole(sharded.load(path), path)
    return storage.load(path)


def load_newest(path: Path) -> tuple[dict, Path]:
    """As `storage.load_newest`, for `sharded.restore`: sharded tensors are still in the shards."""
    return storage.load_newest(path, sharded.load if path.suffix == sharded.SUFFIX else storage.load)


def read_pretrained(source: str | Path, encoder_only: bool = False, num_heads: int | None = None) -> Pretrained:
    """Weights from a run folder, a file or a timm model name (`ACCEPTED`), in our layout.

    encoder_only: leave out the decoder before anything is checked, for use without it. num_heads: of the encoder, for
    files that don't say; default: the usual number for its width, else width/64, with a warning.
    Raises FileNotFoundError, CheckpointError, or ValueError if the weights are not those of a plain ViT or an MAE.
    """
    path = Path(source)
    if path.is_dir() and path.suffix != sharded.SUFFIX:
        for name, read in (
            ("checkpoint.dcp", _read_file),
            ("checkpoint.pt", _read_file),
            ("encoder.safetensors", _read_file),
            ("config.json", lambda file, encoder_only, _: _read_huggingface(file.parent, encoder_only)),
        ):
            if (path / name).exists():
                return read(path / name, encoder_only, num_heads)
        raise FileNotFoundError(
            f"{path}: holds neither checkpoint.pt or encoder.safetensors (a run folder) nor config.json (a folder of "
            "transformers' ViTMAE)"
        )
    if path.exists():
        return _read_file(path, encoder_only, num_heads)
    if timm.is_model(str(source)):
        return _download(str(source))
    raise FileNotFoundError(f"{source}: no such file or timm model; accepted are {ACCEPTED}")


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
    if format not in EXPORT_FORMATS:
        raise ValueError(f"unknown export format {format!r}; choose from {', '.join(EXPORT_FORMATS)}")
    if isinstance(source, Pretrained):
        norm_pix_loss = source.norm_pix_loss if norm_pix_loss is None else norm_pix_loss
        source = source.state
    state, out = interop.encoder_only(source) if encoder_only else dict(source), Path(out)
    shape = _complete(shape, state)
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
        if not interop.has_decoder(state):
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
    if stored_shape:
        stored_shape["img_size"] = as_size(stored_shape["img_size"])
    state = _without_decoder(state) if encoder_only else state
    with _naming(path):
        ours = state if "encoder.cls_token" in state else interop.from_facebook(state)
        shape = stored_shape or interop.infer_shape(ours, num_heads)
    if not (stored_shape or num_heads or shape["embed_dim"] in interop.KNOWN_HEADS):
        heads = shape["num_heads"]
        log.warning("%s doesn't say how many heads it has: taken to be %d, of 64 each; see --num_heads", path, heads)
    decoder = interop.has_decoder(ours)
    if stored_shape:
        origin = f"mae_et {'model' if decoder else 'encoder'} {path}"
    elif decoder or args:
        origin = f"facebookresearch/mae checkpoint {path}"
    else:
        origin = f"encoder of timm or facebookresearch/mae {path}"
    pixels = target_dim("pixel", shape["patch_size"], shape["in_chans"])
    target = "pixel" if decoder and shape["target_dim"] == pixels else None
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
    with _naming(path):
        shape = _complete(content["shape"], state)
    return Pretrained(state, shape, decoder, f"mae_et checkpoint {path}", norm_pix_loss, target)


def _read_huggingface(folder: Path, encoder_only: bool) -> Pretrained:
    """A folder of transformers' ViTMAE: config.json and the weights."""
    weights = next((folder / n for n in ("model.safetensors", "pytorch_model.bin") if (folder / n).is_file()), None)
    if weights is None:
        raise FileNotFoundError(f"{folder}: holds config.json but neither model.safetensors nor pytorch_model.bin")
    with _naming(folder / "config.json"):
        config = json.loads((folder / "config.json").read_text())
        shape = interop.shape_from_huggingface_config(config)
    state = _load_safetensors(weights)[0] if weights.suffix == ".safetensors" else load(weights)
    with _naming(weights):
        ours = interop.from_huggingface(_without_decoder(state) if encoder_only else state, shape["img_size"])
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
    with _naming(f"timm model {name}"):
        interop.from_timm(model.state_dict())
    try:
        weights = timm.create_model(name, pretrained=True, num_classes=0).state_dict()
    except (OSError, RuntimeError) as error:  # huggingface_hub's errors are OSErrors
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"timm model {name}: its weights can't be had: {reason}") from error
    state = interop.from_timm(weights)
    heads, img_size = model.blocks[0].attn.num_heads, model.patch_embed.img_size
    return Pretrained(state, interop.infer_shape(state, heads, img_size=img_size), False, f"timm model {name}")


def _complete(shape: Mapping, state: Mapping[str, Tensor]) -> dict:
    """A shape that leaves out what equals a default of `MaskedAutoencoder`, with what the weights say about it."""
    told = interop.infer_shape(state, shape.get("num_heads"), shape.get("decoder_num_heads"), shape.get("img_size"))
    return told | dict(shape)


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
def _naming(what: Path | str) -> Iterator[None]:
    """Put the file before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
