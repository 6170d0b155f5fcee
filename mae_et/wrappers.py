"""The weights in a checkpoint of any project: found among what lies beside them, and freed of their wrappers' prefixes.

Projects differ in where they put a state dict (`WEIGHTS`), in what wraps the model (`module.`, `backbone.` …, in any
order) and in which of several models they mean (`PREFERRED`). All keys of a plain ViT stand beside its patch embedding,
so the prefix is what stands before that, whatever it is called. What was chosen, stripped or left out is always said.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .files import CheckpointError
from .interop import mismatch
from .layouts import OURS

#: Where state dicts are kept, from the first choice on. Averaged weights come before raw ones, as timm's
#: `load_state_dict` has it; of DINO the teacher, of I-JEPA and MSN the target encoder, as their evaluations have it.
WEIGHTS = (
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "ema",
    "state_dict",
    "model",
    "model_state_dict",
    "model_state",
    "module",
    "teacher",
    "target_encoder",
    "student",
    "net",
    "network",
    "backbone",
    "encoder",
    "weights",
    "params",
    "checkpoint",
    "shadow",
)
#: Of several models in one state dict, by a part of their prefix (EMA, DINO, MoCo, BYOL, I-JEPA); first choice first.
PREFERRED = (
    "model_ema",
    "ema_model",
    "ema",
    "teacher",
    "base_encoder",
    "encoder_q",
    "online_network",
    "target_encoder",
    "student",
    "encoder",
    "backbone",
    "model",
)
#: What torch.compile, FSDP and activation checkpointing put anywhere into a name.
INNER_WRAPPER = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
#: The patch embedding of timm, facebookresearch and ours, and of transformers, where `vit.` belongs to the name.
PATCH_EMBED = re.compile(
    r"(?P<prefix>(.+?\.)??)(patch_embed\.proj|(vit\.)?embeddings\.patch_embeddings\.projection)\.weight"
)
#: Heads of self-supervision (DINO, iBOT, MoCo v3) and of linear probes with a batch norm, and iBOT's mask token.
NO_CLASSIFIER = re.compile(r"(dino_|ibot_)head\.|head\.(?!(weight|bias)$)|masked_embed$")

_BLOCK = r"(^|\.)blocks\.\d+\.(\d+\.)?"
#: (What it is, how that is told, names that are all there), the particular before the general.
OTHERS = (
    ("Swin", "windows", (r"(layers\.0\.blocks|features\.1)\.0\.attn.*\.(relative_position_bias_table|logit_scale)$",)),
    ("SimMIM", "a decoder of one convolution", (r"(^|\.)decoder\.0\.weight$", r"(^|\.)encoder\.mask_token$")),
    ("VideoMAE", "encoder_to_decoder", (r"(^|\.)encoder_to_decoder\.weight$",)),
    ("LoRA adapter", "lora_A", (r"\.lora_A\.",)),
    ("DINOv3", "rotary positions and storage tokens", (r"(^|\.)rope_embed\.", r"(^|\.)storage_tokens$")),
    ("DINOv2", "layer scale and a mask token", (_BLOCK + r"ls1\.gamma$", r"(^|\.)mask_token$")),
    ("DINOv2 or DINOv3 of transformers", "layer scale", (r"layers?\.\d+\.layer_scale1\.lambda1$",)),
    ("ViT with registers, as of DINOv2 or DINOv3", "register tokens", (r"(^|\.)(reg_token|register_tokens)$",)),
    ("distilled DeiT", "a distillation token", (r"(^|\.)(dist_token|distillation_token)$",)),
    ("EVA-02", "SwiGLU", (_BLOCK + r"mlp\.(w1|fc1_g)\.weight$", _BLOCK + r"attn\.q_proj\.weight$")),
    ("BEiT", "relative positions", (_BLOCK + r"attn\.relative_position_bias_table$",)),
    ("BEiT", "relative positions", (r"(^|\.)rel_pos_bias\.relative_position_bias_table$",)),
    ("BEiT", "layer scale and separate biases", (_BLOCK + r"gamma_1$", _BLOCK + r"attn\.q_bias$")),
    ("BEiT or Data2Vec of transformers", "layer scale", (r"layers?\.\d+\.lambda_1$",)),
    ("EVA or VideoMAE", "separate biases of query and value", (_BLOCK + r"attn\.q_bias$",)),
    ("CaiT", "blocks_token_only", (r"(^|\.)blocks_token_only\.0\.",)),
    ("ViT with layer scale, as of DINOv2 or DeiT III", "layer scale", (_BLOCK + r"(ls1\.gamma|gamma_?1)$",)),
    ("SAM, ViTDet or MViT", "decomposed relative positions", (_BLOCK + r"attn\.rel_pos_h$",)),
    ("CLIP", "a norm before the blocks", (_BLOCK + r"norm1\.weight$", r"(^|\.)norm_pre\.weight$")),
    ("CLIP", "class_embedding", (r"(^|\.)class_embedding$",)),
    ("CLIP with a ResNet", "attnpool", (r"(^|\.)attnpool\.q_proj\.weight$",)),
    ("SigLIP", "embeddings.patch_embedding", (r"(^|\.)embeddings\.patch_embedding\.weight$",)),
    ("ViT of torchvision", "conv_proj and class_token", (r"(^|\.)conv_proj\.weight$", r"(^|\.)class_token$")),
    ("ViT of mmpretrain", "layers.0.ln1", (r"(^|\.)layers\.0\.ln1\.weight$",)),
    ("Hiera or MViT", "positions in space and time", (r"(^|\.)pos_embed_spatial$",)),
    ("Hiera or MViT", "blocks that change the width", (_BLOCK + r"proj\.weight$",)),
    ("ConvMAE or PVT", "a pyramid of patches", (r"(^|\.)patch_embed1\.proj\.weight$",)),
    ("ConvNeXt V2", "global response normalisation", (r"(^|\.)stages\.0\.(blocks\.)?0\.(mlp\.)?grn\.",)),
    ("ConvNeXt", "depthwise convolutions", (r"(^|\.)stages\.0\.(blocks\.|layers\.)?0\.(conv_dw|dwconv)\.weight$",)),
    ("ResNet", "stages of convolutions", (r"(^|\.)(encoder\.stages\.|layer)\d\.(layers\.)?0\.(conv1|layer\.0)\.",)),
    ("convolutional network", "batch normalisation", (r"(^|\.)(bn1|blocks|features|stages|stem)\b.*\.running_mean$",)),
    ("pyramid such as Swin or PVT", "patches merged between blocks", (r"(^|\.)(stages|layers)\.\d\.downsample\.",)),
    ("ViT with normalised queries", "q_norm", (_BLOCK + r"attn\.q_norm\.",)),
)


@dataclass(frozen=True)
class Unwrapped:
    """The weights of a checkpoint, and what is known besides."""

    state: dict[str, Tensor]
    """Weights without wrapper and prefix, in the layout of their project; `encoder.*` of ours stays."""
    beside: Mapping[str, Any]
    """What else the file says, such as args or epoch, from the outermost level."""
    notes: tuple[str, ...]
    """What was chosen, stripped or left out, one line each, for the log."""


def unwrap(content: Mapping[str, Any], path: Path) -> Unwrapped:
    """Find the weights of one plain ViT or MAE in what `storage.load` returned; a classifier's `head` stays with it.

    path: named in errors. Raises CheckpointError if there are no weights; ValueError if there are several models, or if
    the weights are known to be of something else, which is then named.
    """
    found = _find(content, path)
    if found is None:
        held = ", ".join(map(str, list(content)[:8])) or "nothing"
        raise CheckpointError(f"{path}: holds no weights of a model, only {held}")
    wrapped, beside, notes = found
    state = {INNER_WRAPPER.sub("", key): tensor for key, tensor in wrapped.items()}
    if inner := {match[0] for key in wrapped for match in INNER_WRAPPER.finditer(key)}:
        notes.append(f"stripped {', '.join(sorted(inner))} from the names of the weights")
    prefix, others = _prefix(state, path)
    branch = {key: state[key] for key in state if key.startswith(prefix) and not key.startswith(others)}
    _refuse_others(state if f".{prefix}".endswith(".encoder.") else branch, path)
    if prefix:
        notes.append(f"stripped {prefix} from the names of the weights")
    if left := state.keys() - branch.keys():
        notes.append(f"left out {_counted(left, max(1, prefix.count('.')))}")
    ours = {key.removeprefix(prefix): tensor for key, tensor in branch.items()}
    if heads := {key for key in ours if NO_CLASSIFIER.match(key)}:
        notes.append(f"left out {_counted(heads, 1)}: no linear classifier")
    return Unwrapped({key: ours[key] for key in ours if key not in heads}, beside, tuple(notes))


def _find(content: Mapping[str, Any], path: Path) -> tuple[dict[str, Tensor], dict[str, Any], list[str]] | None:
    """(weights, what is beside them, notes), from any depth of `WEIGHTS`, or else of the only state dict there is."""
    named = {key: content[key] for key in WEIGHTS if isinstance(content.get(key), Mapping)}
    held = {key: found for key, value in named.items() if (found := _find(value, path))}
    if not held and _is_state_dict(content):
        tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
        return tensors, {key: value for key, value in content.items() if key not in tensors}, []
    if not held:
        unknown = [key for key, value in content.items() if isinstance(value, Mapping) and _is_state_dict(value)]
        if len(unknown) > 1:
            raise ValueError(f"{path}: holds several models, {', '.join(unknown)}: save one of them alone")
        held = {key: found for key in unknown if (found := _find(content[key], path))}
    if not held:
        return None
    key, *others = held
    tensors, beside, notes = held[key]
    if others:
        notes = [f"took the weights of {key}, not of {', '.join(others)}", *notes]
    return tensors, beside | {name: value for name, value in content.items() if name != key}, notes


def _is_state_dict(content: Mapping) -> bool:
    """Whether there is a matrix of some module: optimisers and random states have none with such a name."""
    return any(isinstance(k, str) and "." in k and isinstance(v, Tensor) and v.ndim > 1 for k, v in content.items())


def _prefix(state: Mapping[str, Tensor], path: Path) -> tuple[str, tuple[str, ...]]:
    """What stands before the names of the model that is meant, and before those of others inside it."""
    prefixes = [match["prefix"] for key in state if (match := PATCH_EMBED.fullmatch(key))]
    if not prefixes:
        return "", ()
    prefix = "" if "" in prefixes else _preferred(prefixes, path)
    others = tuple(other for other in prefixes if other != prefix and other.startswith(prefix))
    if f".{prefix}".endswith(".encoder."):  # also the name of a part of ours, which stays
        outer = prefix.removesuffix("encoder.")
        beside = {key.removeprefix(outer) for key in state if key.startswith(outer) and not key.startswith(prefix)}
        inside = {key.removeprefix(outer) for key in state if key.startswith(prefix)}
        ours = all(key in OURS.encoder.values() or key.startswith(OURS.encoder_blocks) for key in inside)
        if OURS.has_decoder(beside) or (ours and not beside):
            return outer, others
    return prefix, others


def _preferred(prefixes: list[str], path: Path) -> str:
    """The model that is meant, of several."""
    if len(prefixes) == 1:
        return prefixes[0]
    for name in PREFERRED:
        fitting = [prefix for prefix in prefixes if name in prefix.split(".")]
        if len(fitting) == 1:
            return fitting[0]
    raise ValueError(f"{path}: holds several models, {', '.join(prefixes)}: save one of them alone")


def _refuse_others(state: Mapping[str, Tensor], path: Path) -> None:
    """ValueError that says what weights are if they are known not to be of a plain ViT or an MAE."""
    names = "\n".join(state)
    found = [(what, sign) for what, sign, parts in OTHERS if all(re.search(p, names, re.MULTILINE) for p in parts)]
    patches = [key for key in state if PATCH_EMBED.fullmatch(key)]
    if any(state[key].ndim > 4 for key in patches):
        found.append(("model of videos", "patches in time"))
    blocks = any(re.search(r"(^|\.)(blocks|layers?)\.0\.", key) for key in state)
    if patches and blocks and not any(key.endswith("cls_token") for key in state):
        found.append(("ViT without a class token, as of I-JEPA or SigLIP", "no cls_token"))
    for what, sign in found[:1]:
        article = "an" if what[0] in "AEIOU" else "a"
        raise ValueError(
            f"{path}: this is {article} {what} ({sign}); only a plain ViT or an MAE can be read: {mismatch(state)}"
        )


def _counted(keys: Iterable[str], depth: int) -> str:
    """Names by their first parts, with the number of tensors."""
    counts = Counter(".".join(key.split(".")[:depth]) for key in keys)
    return ", ".join(f"{name} ({number})" for name, number in sorted(counts.items()))
