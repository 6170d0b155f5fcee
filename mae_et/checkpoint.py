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

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from . import hub, interop
from . import record as records
from .engine import run_folder, sharded
from .engine.resume import FORMAT
from .engine.storage import local_file, read, save, save_safetensors
from .export import DECODER, PREDICTS_KEY, Exported, write_facebook, write_huggingface, write_timm
from .files import CheckpointError, CorruptCheckpoint, kept, load_intact, load_newest
from .interop import METADATA_KEY
from .plan.shapes import ModelShape, choice, of_file, target_dim
from .plan.shared import default_statistics
from .record import RECORD_KEY, WeightsRecord
from .wrappers import unwrap

__all__ = [
    "FORMAT",
    "CheckpointError",
    "Pretrained",
    "load",
    "read_pretrained",
    "save",
    "save_safetensors",
    "write_export",
]

log = logging.getLogger(__name__)

EXPORT_FORMATS = ("timm", "facebook", "huggingface")
ACCEPTED = (
    "a run folder, a checkpoint .pt, a .safetensors or .pth encoder of timm, a .pth of facebookresearch/mae, "
    "a folder of transformers' ViTMAE or ViT, an https:// address of such a file, the name of a timm model, "
    "hf-hub:ORG/NAME or local-dir:FOLDER"
)

load = sharded.load_full


HUB_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
HF_NORM_EPS = 1e-12
"""Default of transformers, where a config.json doesn't say."""


@dataclass(frozen=True)
class Pretrained:
    """Weights in our layout, and all that belongs to them."""

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
    record: WeightsRecord = field(default_factory=WeightsRecord)
    """How images must look for them, and what their outputs mean."""
    head: dict[str, Tensor] = field(default_factory=dict)
    """Classifier of a fine-tuned model in timm's names: `head.*`, and `fc_norm.*` where it pools patches."""
    ours: bool = False
    """Whether this package wrote what belongs to them: a range of values that is missing there was not used."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """What the run's checkpoint says beside its weights (see `resume.identity`); empty for foreign weights."""

    @property
    def unfinished(self) -> str:
        """The step of weights before the end of their run: step 48 of 18,000; empty for others."""
        step, stages = self.training.get("step"), self.training.get("stages")
        steps = self.training.get("steps") or sum(stage["steps"] for stage in stages or ())
        return f"step {step:,} of {steps:,}" if step is not None and step < steps else ""

    def warn_if_unfinished(self) -> None:
        if self.unfinished:
            log.warning("%s is of %s, before the end of that run", self.origin, self.unfinished)


def read_pretrained(source: str | Path, encoder_only: bool = False, num_heads: int | None = None) -> Pretrained:
    """Weights from a run folder, a file or a timm model name (`ACCEPTED`), in our layout.

    encoder_only: leave out the decoder before anything is checked, for use without it. num_heads: of the encoder, for
    files that don't say; default: the usual number for its width, else width/64, with a warning.
    Raises FileNotFoundError, CheckpointError, or ValueError if the weights are not those of a plain ViT or an MAE.
    """
    path = hub.local_folder(source) or local_file(source) or Path(source)
    if path.is_dir() and path.suffix != sharded.SUFFIX:
        return _read_folder(path, encoder_only, num_heads)
    if path.exists() or kept(path):
        return load_newest(path, lambda file: _read_file(file, encoder_only, num_heads))[0]
    if timm.is_model(str(source)):
        return _download(str(source))
    raise FileNotFoundError(f"{source}: no such file or timm model; accepted are {ACCEPTED}")


def _read_folder(folder: Path, encoder_only: bool, num_heads: int | None) -> Pretrained:
    """A run folder, or one of transformers or timm."""
    checkpoint, encoder = run_folder.checkpoint_in(folder), folder / run_folder.ENCODER
    candidates = [checkpoint, *kept(checkpoint)] if checkpoint else []
    if encoder.exists():  # of the end of the run, which kept checkpoints are not, but without a decoder
        candidates.insert(1 if encoder_only else len(candidates), encoder)
    if candidates:
        return load_intact(candidates, lambda file: _read_file(file, encoder_only, num_heads))[0]
    if (folder / "config.json").exists():
        if "pretrained_cfg" in _read_json(folder / "config.json"):
            weights = next((f for name in HUB_WEIGHTS if (f := folder / name).is_file()), folder / HUB_WEIGHTS[0])
            encoder = _read_file(weights, encoder_only, num_heads)
            has_decoder = not encoder_only and (folder / DECODER).is_file()
            return _with_decoder(encoder, folder / DECODER) if has_decoder else encoder
        return _read_huggingface(folder, encoder_only)
    raise FileNotFoundError(
        f"{folder}: holds neither checkpoint.pt or encoder.safetensors (a run folder) nor config.json (a folder of "
        "transformers' ViTMAE)"
    )


def _with_decoder(encoder: Pretrained, file: Path) -> Pretrained:
    """An encoder from a folder for timm, with the decoder that `export` wrote beside it."""
    decoder, metadata = read(file)
    if not metadata.keys() >= {METADATA_KEY, PREDICTS_KEY}:
        raise CheckpointError(f"{file}: doesn't say what it decodes: export the run again, or give --encoder_only")
    state, predicts = encoder.state | decoder, json.loads(metadata[PREDICTS_KEY])
    with prefix_errors(file):
        shape = _complete(json.loads(metadata[METADATA_KEY]), state)
    return replace(encoder, state=state, shape=shape, has_decoder=True, **predicts)


def write_export(
    source: Pretrained | Mapping[str, Tensor],
    shape: Mapping,
    format: str,
    out: Path,
    norm_pix_loss: bool | None = None,
    encoder_only: bool = False,
    **about: Any,
) -> None:
    """Write weights in our layout for others, with what belongs to them, see `export`.

    format: "timm" a .safetensors file or a folder, "facebook" a .pth, "huggingface" a folder. shape: arguments of
    `create_mae`. norm_pix_loss: default: what `source` knows. encoder_only: leave out the decoder (a file for timm
    always does) and the classifier of a fine-tuned model. about: run, license and name for the model card.
    Raises ValueError on an unknown format, weights that are no model of this package, or a decoder or classifier that
    the format can't hold; CheckpointError if the file can't be written.
    """
    choice("--format", format, EXPORT_FORMATS)
    if not isinstance(source, Pretrained):
        source = Pretrained(dict(source), shape, interop.has_decoder(source), "")
    state = interop.encoder_only(source.state) if encoder_only else source.state
    head = {} if encoder_only else source.head
    facts = source.record if head else replace(source.record, classes=None, pooled=None)
    shape = _complete(shape, state)
    facts = facts.completed_by(WeightsRecord(*default_statistics(shape.in_chans)))
    decoder = interop.has_decoder(state)
    norm_pix_loss = source.norm_pix_loss if norm_pix_loss is None else norm_pix_loss
    weights = Exported(
        state,
        head,
        shape,
        facts,
        *((norm_pix_loss, source.target) if decoder else (None, None)),
        step=source.training.get("step"),
        unfinished=source.unfinished,
        **about,
    )
    source.warn_if_unfinished()
    {"timm": write_timm, "facebook": write_facebook, "huggingface": write_huggingface}[format](weights, Path(out))


# ── readers ──


def _read_file(path: Path, encoder_only: bool, num_heads: int | None) -> Pretrained:
    """A single file, or a sharded checkpoint; an encoder of a run with what the run's checkpoint knows beside it."""
    pretrained = _read_weights(path, encoder_only, num_heads)
    beside = run_folder.run_of(path)
    if path.suffix != ".safetensors" or not beside or not (newest := run_folder.checkpoint_in(beside)):
        return pretrained
    try:
        content, intact = sharded.load_newest(newest)
    except (CorruptCheckpoint, FileNotFoundError) as error:
        log.warning("%s; only what %s says of itself is known", error, path)
        return pretrained
    of_the_run = _read_own(content, intact, encoder_only=True)
    facts = pretrained.record.completed_by(replace(of_the_run.record, classes=None, pooled=None))
    return replace(pretrained, record=facts, training=of_the_run.training)


def _read_weights(path: Path, encoder_only: bool, num_heads: int | None) -> Pretrained:
    """Weights of any layout: who wrote them is told from their keys."""
    content, metadata = (load(path), {}) if path.suffix == sharded.SUFFIX else read(path)
    if "format" in content:
        return _read_own(content, path, encoder_only)
    unwrapped = unwrap(content, path)
    for note in unwrapped.notes:
        log.info("%s: %s", path, note)
    state = unwrapped.state
    if any(key.endswith("embeddings.cls_token") for key in state):
        if (path.parent / "config.json").is_file():
            return _read_huggingface(path.parent, encoder_only, path)
        raise ValueError(f"{path}: weights of transformers need the config.json beside them")
    told = {key: json.loads(value) for key, value in metadata.items() if key in (METADATA_KEY, RECORD_KEY)}
    told |= {key: content[key] for key in (METADATA_KEY, RECORD_KEY) if key in content}
    stored_shape, head, (beside, timm_config) = told.get(METADATA_KEY), interop.head_of(state), _beside(path)
    built = {} if stored_shape else _built_by_timm(timm_config)
    heads = num_heads or built.get("num_heads")
    state = _without_decoder(state) if encoder_only else state
    with prefix_errors(path):
        ours = state if "encoder.cls_token" in state else interop.from_facebook(state)
        shape = of_file(ModelShape, stored_shape or interop.infer_shape(ours, heads), "its shape")
        shape = replace(shape, norm_eps=built.get("norm_eps", shape.norm_eps))
    if not (stored_shape or heads):
        log.warning(
            "%s doesn't say how many heads it has: taken to be %d, of %d each; see --num_heads",
            *(path, shape.num_heads, shape.embed_dim // shape.num_heads),
        )
    if head and "fc_norm.weight" not in head and timm_config.get("global_pool", "token") != "token":
        log.warning("%s: its classifier pools patches in a way that is not read here, and is left out", path)
        head = {}
    decoder, args = interop.has_decoder(ours), _as_dict(unwrapped.beside.get("args"))
    if stored_shape:
        origin = f"mae_et {'model' if decoder else 'encoder'} {path}"
    elif decoder or args:
        origin = f"facebookresearch/mae checkpoint {path}"
    else:
        origin = f"encoder of timm or facebookresearch/mae {path}"
    facts = WeightsRecord.of(told.get(RECORD_KEY, {}), str(path))
    facts = facts.completed_by(records.from_facebook(args, f"args of {path}")).completed_by(beside)
    facts = replace(facts, pooled="fc_norm.weight" in head if head else None)
    pixels = target_dim("pixel", shape.patch_size, shape.in_chans)
    target = args.get("target") or ("pixel" if shape.target_dim == pixels else None)
    predicts = (args.get("norm_pix_loss"), target) if decoder else (None, None)
    return Pretrained(ours, shape, decoder, origin, *predicts, facts, head, RECORD_KEY in told)


def _beside(path: Path) -> tuple[WeightsRecord, dict[str, Any]]:
    """The `pretrained_cfg` of the file that timm, or an export for it, keeps beside weights, and the whole file."""
    for file in (path.with_suffix(".json"), path.with_name("config.json")):
        if file.is_file():
            try:
                content = json.loads(file.read_text())
            except ValueError as error:  # of another kind, or damaged
                log.warning("%s beside the weights says nothing about them: %s", file, error)
                continue
            cfg = content.get("pretrained_cfg") if isinstance(content, dict) else None
            if isinstance(cfg, dict):
                return records.from_timm(cfg, f"pretrained_cfg in {file}"), content
    return WeightsRecord(), {}


def _built_by_timm(config: Mapping[str, Any]) -> dict[str, Any]:
    """Heads and eps of the norms, which weights don't tell, of the model that a config.json of timm is of."""
    name, arguments = config.get("architecture"), config.get("model_args")
    if not (isinstance(name, str) and timm.is_model(name)):
        return {}
    with torch.device("meta"):
        model = timm.create_model(name)
    if not isinstance(model, VisionTransformer):
        return {}
    heads = arguments.get("num_heads") if isinstance(arguments, dict) else None
    return {"num_heads": heads or model.blocks[0].attn.num_heads, "norm_eps": model.blocks[0].norm1.eps}


def _read_json(file: Path) -> dict[str, Any]:
    """A file that holds an object. ValueError names it."""
    with prefix_errors(file):
        content = json.loads(file.read_text())
    if not isinstance(content, dict):
        raise ValueError(f"{file}: holds a {type(content).__name__}, not an object")
    return content


def _as_dict(args: Any) -> dict[str, Any]:
    """The arguments of a script, as facebookresearch/mae and timm keep them."""
    if isinstance(args, argparse.Namespace):
        return vars(args)
    return dict(args) if isinstance(args, Mapping) else {}


def _read_own(content: Mapping, path: Path, encoder_only: bool) -> Pretrained:
    """A checkpoint of this package."""
    if content["format"] != FORMAT:
        raise CheckpointError(f"{path}: format {content['format']!r} is not known here, only {FORMAT!r}")
    state = interop.encoder_only(content["model"]) if encoder_only else dict(content["model"])
    decoder = interop.has_decoder(state)
    with prefix_errors(path):
        shape = _complete(content["shape"], state)
    facts = WeightsRecord.of(content, str(path))
    predicts = (content["norm_pix_loss"], content["target"]) if decoder else (None, None)
    head = interop.head_of(timm_state(content, content["pooled"])) if "head" in content else {}
    training = {name: value for name, value in content.items() if name not in ("model", "optimizer", "ema", "head")}
    return Pretrained(state, shape, decoder, f"mae_et checkpoint {path}", *predicts, facts, head, True, training)


def timm_state(weights: Mapping[str, Mapping[str, Tensor]], pooled: bool) -> dict[str, Tensor]:
    """The encoder and head of a fine-tuning checkpoint -> state of a timm classifier."""
    state = interop.to_timm(weights["model"]) | dict(weights["head"])
    return {f"fc_{key}" if pooled and key.startswith("norm.") else key: tensor for key, tensor in state.items()}


def _read_huggingface(folder: Path, encoder_only: bool, weights: Path | None = None) -> Pretrained:
    """A folder of transformers' ViTMAE or ViT: config.json, perhaps preprocessor_config.json, and the weights."""
    weights = weights or next((folder / name for name in HUB_WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise FileNotFoundError(f"{folder}: holds config.json but neither model.safetensors nor pytorch_model.bin")
    config = _read_json(folder / "config.json")
    with prefix_errors(folder / "config.json"):
        is_vit = config.get("model_type") == "vit"
        shape = interop.shape_from_huggingface_config(config | ({"model_type": "vit_mae"} if is_vit else {}))
        shape = ModelShape(**shape | {"norm_eps": config.get("layer_norm_eps", HF_NORM_EPS)})
    state, metadata = read(weights)
    head = {k.replace("classifier.", "head."): t for k, t in state.items() if k.startswith("classifier.")}
    state = {k: t for k, t in state.items() if not (is_vit and k.startswith(("classifier.", "vit.pooler.", "pooler.")))}
    with prefix_errors(weights):
        ours = interop.from_huggingface(_without_decoder(state) if encoder_only else state, shape.img_size)
    decoder, facts, beside = interop.has_decoder(ours), WeightsRecord(), folder / "preprocessor_config.json"
    if beside.is_file():
        facts = records.from_preprocessor(_read_json(beside), str(beside), shape.in_chans)
    facts = facts.completed_by(WeightsRecord.of(json.loads(metadata.get(RECORD_KEY, "{}")), str(weights)))
    if head:
        facts = replace(facts, classes=records.labels_of_huggingface(config), pooled=False)
    origin = f"transformers {'ViT' if is_vit else 'ViTMAE'} folder {folder}"
    predicts = (config.get("norm_pix_loss", False), "pixel") if decoder else (None, None)
    return Pretrained(ours, shape, decoder, origin, *predicts, facts, head, RECORD_KEY in metadata)


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
    shape = ModelShape(**interop.infer_shape(state, heads, img_size=img_size) | {"norm_eps": model.norm.eps})
    facts = replace(records.from_timm(model.pretrained_cfg, f"timm's pretrained_cfg of {name}"), classes=None)
    return Pretrained(state, shape, False, f"timm model {name}", record=facts)


def _complete(shape: Mapping, state: Mapping[str, Tensor]) -> ModelShape:
    """A shape that leaves out what equals a default of `MaskedAutoencoder`, with what the weights say about it."""
    heads = shape.get("num_heads"), shape.get("decoder_num_heads")
    stated = interop.infer_shape(state, *heads, shape.get("img_size")) | dict(shape)
    return of_file(ModelShape, stated, "its shape")


def _without_decoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Any layout without the keys of its decoder, before it is checked."""
    return {key: tensor for key, tensor in state.items() if not key.startswith(("decoder", "mask_token"))}


@contextmanager
def prefix_errors(what: Path | str) -> Iterator[None]:
    """Put the file before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
