"""Weights in the files of others, with all that belongs to them: timm, facebookresearch/mae, transformers."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from . import interop, record
from .card import OURS, model_card
from .engine.storage import save, save_safetensors
from .files import make_folder, remove, write_text
from .interop import METADATA_KEY
from .plan.shapes import NORM_EPS, ModelShape
from .record import RECORD_KEY, WeightsRecord

log = logging.getLogger(__name__)

DECODER, CARD = "decoder/model.safetensors", "README.md"
"""In a folder for timm. Some versions of timm refuse a folder that holds two .safetensors files itself."""
PREDICTS_KEY = "mae_et_predicts"
"""Where the metadata of a decoder's file hold its target and norm_pix_loss, as JSON."""


def metadata_of(shape: Mapping, facts: WeightsRecord) -> dict[str, str]:
    """Metadata of a safetensors file: the shape and the record, as JSON."""
    values = {METADATA_KEY: shape, RECORD_KEY: facts.to_dict()}
    return {key: json.dumps(dict(value), sort_keys=True) for key, value in values.items()}


@dataclass(frozen=True)
class Exported:
    """What is exported: weights in our layout, and what belongs to them."""

    state: dict[str, Tensor]
    head: dict[str, Tensor]
    """Classifier of a fine-tuned model, see `interop.head_of`."""
    shape: ModelShape
    record: WeightsRecord
    norm_pix_loss: bool | None = None
    target: str | None = None
    run: Path | None = None
    """Run folder that the weights come from."""
    license: str = ""
    step: int | None = None
    """Of the run that the weights are of."""
    unfinished: str = ""
    """The same for people, if it is not the run's last."""
    name: str = ""
    """What timm loads the folder by, once it is on the hub."""

    @property
    def num_classes(self) -> int:
        """Outputs of the classifier; 0 without one."""
        return len(self.head["head.weight"]) if self.head else 0

    @property
    def stored_shape(self) -> dict[str, Any]:
        """The shape as files hold it: without a decoder, without its arguments."""
        return self.shape.to_dict(decoder=interop.has_decoder(self.state))


def write_timm(weights: Exported, out: Path) -> None:
    """The encoder, and a classifier if there is one.

    out: a .safetensors file, beside which its `pretrained_cfg` is written as .json; or a folder, for
    `timm.create_model("local-dir:FOLDER", pretrained=True)`, with a model card and, beside the encoder, the decoder in
    our layout. Warns where timm would build other norms.
    """
    if weights.shape.norm_eps != NORM_EPS:
        eps = weights.shape.norm_eps
        log.warning("these weights want norms with eps %g, timm builds %g: its features will differ", eps, NORM_EPS)
    tensors = interop.with_head(interop.to_timm(weights.state), weights.head)
    config = json.dumps(record.timm_config(weights.record, weights.shape, weights.num_classes), indent=2) + "\n"
    is_file = out.suffix == ".safetensors"
    make_folder(out.parent if is_file else out, "--out")
    file, beside = (out, out.with_suffix(".json")) if is_file else (out / "model.safetensors", out / "config.json")
    save_safetensors(tensors, file, metadata_of(weights.stored_shape, weights.record))
    write_text(beside, config)
    if not is_file:
        _write_decoder(weights, out / DECODER)
        name, has_decoder = weights.name or f"local-dir:{out.resolve().name}", interop.has_decoder(weights.state)
        about = (
            weights.shape,
            weights.record,
            weights.num_classes,
            has_decoder,
            weights.run,
            weights.license,
            weights.step,
            weights.unfinished,
        )
        card = out / CARD
        if card.exists() and OURS not in card.read_text():
            log.warning("%s is not of this export, or was changed: it is left as it is", card)
        else:
            write_text(card, model_card(name, *about))


def _write_decoder(weights: Exported, file: Path) -> None:
    """What the encoder lacks; of an export before this one, nothing is left."""
    remove(file)
    decoder = {key: tensor for key, tensor in weights.state.items() if not key.startswith("encoder.")}
    if decoder:
        predicts = {"norm_pix_loss": weights.norm_pix_loss, "target": weights.target}
        make_folder(file.parent)
        metadata = metadata_of(weights.stored_shape, weights.record) | {PREDICTS_KEY: json.dumps(predicts)}
        save_safetensors(decoder, file, metadata)


def write_facebook(weights: Exported, out: Path) -> None:
    """A .pth as its scripts load it: they read `model` alone."""
    tensors = interop.with_head(interop.to_facebook(weights.state, weights.shape.img_size), weights.head)
    make_folder(out.parent, "--out")
    args = record.to_facebook(weights.record, weights.shape, weights.num_classes)
    args |= {name: value for name in ("norm_pix_loss", "target") if (value := getattr(weights, name)) is not None}
    beside = {METADATA_KEY: weights.stored_shape, RECORD_KEY: weights.record.to_dict()}
    save({"model": tensors, "args": args, **beside}, out)


def write_huggingface(weights: Exported, out: Path) -> None:
    """A folder for `from_pretrained` and `AutoImageProcessor`: ViTMAE, or ViTForImageClassification with a classifier.

    Raises ValueError on what transformers can't build, before anything is written.
    """
    shape, facts, head = weights.shape, weights.record, weights.head
    if head:
        if facts.pooled:
            raise ValueError(
                "transformers' ViTForImageClassification classifies the class token, this classifier the mean of the "
                "patches: fine-tune with --cls_token, export for timm, or give --encoder_only"
            )
        config = interop.huggingface_config(shape.to_dict(decoder=False))
        config |= {"architectures": ["ViTForImageClassification"], "model_type": "vit"}
        del config["mask_ratio"]
        names = facts.classes or tuple(f"LABEL_{i}" for i in range(len(head["head.weight"])))
        config |= {"id2label": {str(i): name for i, name in enumerate(names)}}
        config |= {"label2id": {name: i for i, name in enumerate(names)}}
        tensors = interop.to_huggingface_classifier(interop.encoder_only(weights.state), head)
    else:
        config = interop.huggingface_config(weights.stored_shape, weights.norm_pix_loss)
        tensors = interop.to_huggingface(weights.state, shape.img_size)
    make_folder(out, "--out")
    unsaid = json.dumps(WeightsRecord(value_range=facts.value_range).to_dict())  # transformers has no word for it
    save_safetensors(tensors, out / "model.safetensors", {RECORD_KEY: unsaid})
    write_text(out / "config.json", json.dumps(config, indent=2))
    write_text(out / "preprocessor_config.json", json.dumps(record.to_preprocessor(facts, shape), indent=2))
