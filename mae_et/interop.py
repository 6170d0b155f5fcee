"""Weights to and from timm, facebookresearch/mae and Hugging Face transformers: dict -> dict, strict, both ways.

D encoder width · E decoder width · L patches at full size. "Ours" is `MaskedAutoencoder.state_dict()`: the encoder
under `encoder.` with timm's names, the decoder beside it with facebookresearch/mae's. An encoder without a decoder is
legal everywhere. Every adapter names each key it expects: a dict with a key too few or too many is refused.

Two facts make the difference between the layouts: transformers splits query, key and value, which ours, timm and
facebookresearch/mae fuse; and theirs store the decoder's fixed position table, which ours computes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from .layouts import FACEBOOK, HF_NAMINGS, OURS, OURS_CROSS, TIMM, Layout, State, huggingface
from .model import same_table, sincos_table
from .plan.shapes import KNOWN_HEADS, NORM_EPS, SizePx, as_size, choice, grid_of, height_width, num_patches, target_dim

METADATA_KEY = "mae_et"
"""Where exports for timm (metadata, as JSON) and facebookresearch/mae (beside `model`) hold their shape."""
DECODER_HEADS = 16  # MAE, Appendix A.1
TABLE_TOLERANCE = 1e-5
#: Argument of `create_mae` -> name in config.json and its default there: what equals it may be left out.
HF_ENCODER_CONFIG = {
    "img_size": ("image_size", 224),
    "patch_size": ("patch_size", 16),
    "in_chans": ("num_channels", 3),
    "embed_dim": ("hidden_size", 768),
    "depth": ("num_hidden_layers", 12),
    "num_heads": ("num_attention_heads", 12),
}
HF_DECODER_CONFIG = {
    "decoder_embed_dim": ("decoder_hidden_size", 512),
    "decoder_depth": ("decoder_num_hidden_layers", 8),
    "decoder_num_heads": ("decoder_num_attention_heads", 16),
}


def from_huggingface(state: State, img_size: SizePx | None = None) -> dict[str, Tensor]:
    """ViTMAEForPreTraining or ViTMAEModel (encoder only) -> ours, in any of the three spellings of HF_NAMINGS.

    img_size: pixels, needed only where the grid cannot be told from the position table (learned and not square).
    Raises ValueError that names the first missing and the first unexpected key, or if the stored position table of the
    decoder is not MAE's sin-cos table.
    """
    prefix = "vit." if any(key.startswith("vit.") for key in state) else ""
    layouts = [huggingface(*naming, prefix) for naming in HF_NAMINGS.values()]
    # The spelling with the fewest strangers, so that an error speaks of the keys in the spelling of the file.
    return _read(state, min(layouts, key=lambda layout: len(set(state) ^ _their_keys(state, layout))), img_size)


def to_huggingface(state: State, img_size: SizePx | None = None, naming: str = "hub") -> dict[str, Tensor]:
    """Ours -> ViTMAEForPreTraining, or ViTMAEModel if `state` is an encoder only.

    naming: "hub", which `from_pretrained` of transformers 4 and 5 reads, or another key of HF_NAMINGS. img_size and
    errors as in :func:`from_huggingface`.
    """
    choice("naming", naming, HF_NAMINGS)
    prefix = "vit." if has_decoder(state) else ""
    return _write(state, huggingface(*HF_NAMINGS[naming], prefix), img_size)


def to_huggingface_classifier(state: State, head: State) -> dict[str, Tensor]:
    """Our encoder and a linear `head` on its class token -> transformers' ViTForImageClassification."""
    layout = huggingface(*HF_NAMINGS["hub"], "vit.")
    return _write(state, layout) | {key.replace("head.", "classifier."): tensor for key, tensor in head.items()}


def from_facebook(state: State, img_size: SizePx | None = None) -> dict[str, Tensor]:
    """facebookresearch/mae -> ours: a pretraining dict, an encoder-only dict, or a fine-tuned one.

    A fine-tuned dict gives an encoder; its `head` is dropped, and where it has `fc_norm` instead of `norm` (global
    pooling), that takes its place. img_size and errors as in :func:`from_huggingface`.
    """
    return _read(state if FACEBOOK.has_decoder(state) else _without_head(state), FACEBOOK, img_size)


def to_facebook(state: State, img_size: SizePx | None = None) -> dict[str, Tensor]:
    """Ours -> facebookresearch/mae. img_size and errors as in :func:`from_huggingface`."""
    return _write(state, FACEBOOK, img_size)


def from_timm(state: State) -> dict[str, Tensor]:
    """A plain timm VisionTransformer (class token, biases, nothing else) -> ours, encoder only.

    `head` and `fc_norm` as in :func:`from_facebook`. Raises ValueError on anything that is not a plain ViT.
    """
    return _read(_without_head(state), TIMM)


def to_timm(state: State) -> dict[str, Tensor]:
    """Ours -> a plain timm VisionTransformer. The decoder is left out: timm takes a `mask_token` for DINOv2's."""
    _check_ours(state)
    return {key.removeprefix("encoder."): tensor for key, tensor in state.items() if key.startswith("encoder.")}


def encoder_only(state: State) -> dict[str, Tensor]:
    """Ours -> ours without the decoder."""
    return {key: tensor for key, tensor in state.items() if key.startswith("encoder.")}


def has_decoder(state: State) -> bool:
    """Whether a dict in our layout holds a decoder."""
    return OURS.has_decoder(state)


def has_cross_decoder(state: State) -> bool:
    """Whether a dict in our layout holds a decoder of cross-attention blocks, which no other project has."""
    return any(key.startswith(f"{OURS.decoder_blocks}0.attn.kv.") for key in state)


def infer_shape(
    state: State, num_heads: int | None = None, decoder_num_heads: int | None = None, img_size: SizePx | None = None
) -> dict:
    """Arguments of `create_mae` that fit a dict in our layout; without a decoder, those of the decoder are left out.

    Heads can't be read from weights. Default: 3, 6, 12, 16, 16 for widths 192, 384, 768, 1024, 1280, else width/64; for
    the decoder 16 where that divides its width, else width/64. img_size: read from the position table by default.

    Raises ValueError if a key is missing or unexpected, or a default doesn't exist.
    """
    _check_ours(state)
    width, channels, patch, patch_width = state["encoder.patch_embed.proj.weight"].shape
    if patch != patch_width:
        raise ValueError(f"patches of {patch}×{patch_width} pixels: only square ones can be used")
    rows, columns = _grid(state, img_size)
    shape = {
        "img_size": as_size((rows * patch, columns * patch)),
        "patch_size": patch,
        "in_chans": channels,
        "embed_dim": width,
        "depth": _depth(state, OURS.encoder_blocks),
        "num_heads": num_heads or KNOWN_HEADS.get(width) or _heads_of_64(width, "num_heads"),
        "mlp_ratio": state["encoder.blocks.0.mlp.fc1.weight"].shape[0] / width,
    }
    if has_decoder(state):
        target, width = state["decoder_pred.weight"].shape
        heads = decoder_num_heads or (0 if width % DECODER_HEADS else DECODER_HEADS)
        shape |= {
            "decoder_embed_dim": width,
            "decoder_depth": _depth(state, OURS.decoder_blocks),
            "decoder_num_heads": heads or _heads_of_64(width, "decoder_num_heads"),
            "target_dim": target,
        }
        shape |= {"decoder": "cross"} if has_cross_decoder(state) else {}
    return shape


def huggingface_config(shape: Mapping, norm_pix_loss: bool | None = None, mask_ratio: float = 0.75) -> dict:
    """config.json of a transformers ViTMAE for arguments of `create_mae`; without `decoder_embed_dim`: encoder only.

    Raises ValueError on a decoder that transformers can't build: one that doesn't predict pixels, or whose number of
    patches is not a square.
    """
    mlp_ratio = shape.get("mlp_ratio", 4.0)
    config = {"architectures": ["ViTMAEModel"], "model_type": "vit_mae", "hidden_act": "gelu", "qkv_bias": True}
    config |= {"layer_norm_eps": shape.get("norm_eps", NORM_EPS), "mask_ratio": mask_ratio}
    config |= {theirs: shape[ours] for ours, (theirs, _) in HF_ENCODER_CONFIG.items()}
    config |= {"intermediate_size": int(shape["embed_dim"] * mlp_ratio)}
    if "decoder_embed_dim" in shape:
        if shape.get("decoder", "self") != "self":
            raise ValueError("transformers' ViTMAE has no cross-attention decoder: export with --encoder_only")
        pixels = target_dim("pixel", shape["patch_size"], shape["in_chans"])
        if (shape.get("target_dim") or pixels) != pixels:
            raise ValueError(
                f"transformers' ViTMAE predicts the {pixels} pixel values of a patch, this decoder "
                f"{shape['target_dim']} values of another target: give --encoder_only"
            )
        patches = num_patches(shape["img_size"], shape["patch_size"])
        if math.isqrt(patches) ** 2 != patches:
            raise ValueError(
                f"transformers can't build a ViTMAE decoder for {patches} patches, which is not a square number: "
                "give --encoder_only"
            )
        config |= {theirs: shape[ours] for ours, (theirs, _) in HF_DECODER_CONFIG.items()}
        config |= {"architectures": ["ViTMAEForPreTraining"], "norm_pix_loss": bool(norm_pix_loss)}
        config |= {"decoder_intermediate_size": int(shape["decoder_embed_dim"] * mlp_ratio)}
    return config


def shape_from_huggingface_config(config: Mapping) -> dict:
    """Arguments of `create_mae` for the config.json of a transformers ViTMAE. Raises ValueError on another model."""
    if config.get("model_type") != "vit_mae":
        raise ValueError(f"config.json describes model_type {config.get('model_type')!r}; only 'vit_mae' can be read")
    names = HF_ENCODER_CONFIG | HF_DECODER_CONFIG
    shape = {ours: config.get(theirs, default) for ours, (theirs, default) in names.items()}
    shape |= {"img_size": as_size(shape["img_size"]), "patch_size": as_size(shape["patch_size"])}
    shape["mlp_ratio"] = config.get("intermediate_size", 3072) / shape["embed_dim"]
    decoder_mlp_ratio = shape["mlp_ratio"]
    if config.keys() & {"decoder_intermediate_size", "decoder_hidden_size"}:  # not of an encoder alone
        decoder_mlp_ratio = config.get("decoder_intermediate_size", 2048) / shape["decoder_embed_dim"]
    for name, value, legal in (
        ("hidden_act", config.get("hidden_act", "gelu"), "gelu"),
        ("decoder_intermediate_size / decoder_hidden_size", decoder_mlp_ratio, shape["mlp_ratio"]),
        ("patch_size", shape["patch_size"], height_width(shape["patch_size"])[0]),
    ):
        if value != legal:
            raise ValueError(f"config.json: {name} must be {legal}, got {value}")
    return shape | {"target_dim": target_dim("pixel", shape["patch_size"], shape["in_chans"])}


def _read(state: State, layout: Layout, img_size: SizePx | None = None) -> dict[str, Tensor]:
    """Theirs -> ours."""
    _check(state, _their_keys(state, layout), layout)
    decoder_depth = _depth(state, layout.decoder_blocks) if layout.has_decoder(state) else None
    ours = {}
    for key, theirs in layout.pairs(_depth(state, layout.encoder_blocks), decoder_depth):
        ours[key] = state[theirs[0]] if len(theirs) == 1 else torch.cat([state[name] for name in theirs])
    if decoder_depth is not None and layout.decoder_table:
        # Ours is computed: one that differs would be lost without a word.
        stored, table = state[layout.decoder_table], _decoder_table(ours, img_size)
        if stored.shape != table.shape or not _close(stored, table):
            raise ValueError(
                f"{layout.decoder_table} {tuple(stored.shape)} is not MAE's fixed sin-cos table {tuple(table.shape)}; "
                "learned or other positions can't be read (without the decoder's keys, the encoder can)"
            )
    return ours


def _write(state: State, layout: Layout, img_size: SizePx | None = None) -> dict[str, Tensor]:
    """Ours -> theirs."""
    _check_ours(state)
    if has_cross_decoder(state):
        raise ValueError(f"a cross-attention decoder has no place in {layout.who}: export with --encoder_only")
    decoder_depth = _depth(state, OURS.decoder_blocks) if has_decoder(state) else None
    written: dict[str, Tensor] = {}
    for key, theirs in layout.pairs(_depth(state, OURS.encoder_blocks), decoder_depth):
        # Cloned, since files refuse tensors that share their memory.
        parts = [state[key]] if len(theirs) == 1 else [part.clone() for part in state[key].chunk(len(theirs))]
        written.update(zip(theirs, parts, strict=True))
    if decoder_depth is not None and layout.decoder_table:
        written[layout.decoder_table] = _decoder_table(state, img_size)
    return written


def _their_keys(state: State, layout: Layout) -> set[str]:
    """All keys of a complete dict as deep as `state`."""
    decoder = layout.has_decoder(state)
    depths = _depth(state, layout.encoder_blocks), _depth(state, layout.decoder_blocks) if decoder else None
    keys = {name for _, theirs in layout.pairs(*depths) for name in theirs}
    return keys | {layout.decoder_table} if decoder and layout.decoder_table else keys


def _check(state: State, expected: set[str], layout: Layout) -> None:
    if differences := _differences(state, expected):
        raise ValueError(f"not the weights of {layout.who}: {differences}")


def _differences(state: State, expected: set[str]) -> str:
    """Keys too few and too many, counted, with the first of each; "" if there are none."""
    missing = sorted(expected - set(state), key=_natural)
    unexpected = sorted(set(state) - expected, key=_natural)
    kinds = (("missing", missing), ("unexpected", unexpected))
    counts = [f"{len(keys)} {kind} (first: {keys[0]})" for kind, keys in kinds if keys]
    return f"keys {' and '.join(counts)}" if counts else ""


def mismatch(state: State) -> str:
    """How the keys of weights differ from those of a plain ViT of their depth; "" if they don't."""
    return _differences(_without_head(state), _their_keys(state, TIMM))


def _check_ours(state: State) -> None:
    layout = OURS_CROSS if has_cross_decoder(state) else OURS
    _check(state, _their_keys(state, layout), layout)


def _natural(key: str) -> list:
    """Sort key by which block 2 comes before block 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", key)]


def _depth(state: State, blocks: str) -> int:
    """Number of blocks; at least 1, so that a dict without any is a dict with missing keys."""
    numbers = (key[len(blocks) :].split(".")[0] for key in state if key.startswith(blocks))
    return 1 + max((int(number) for number in numbers if number.isdecimal()), default=0)


def head_of(state: State) -> dict[str, Tensor]:
    """Classifier of a plain timm or facebookresearch/mae model: `head.*`, and `fc_norm.*` where it pools patches."""
    return {key: tensor for key, tensor in state.items() if key.startswith(("head.", "fc_norm."))}


def with_head(state: State, head: State) -> dict[str, Tensor]:
    """An encoder in timm's or facebookresearch/mae's layout, and a classifier as :func:`head_of` gives it."""
    pooled = "fc_norm.weight" in head
    return {key: tensor for key, tensor in state.items() if not (pooled and key.startswith("norm."))} | dict(head)


def _without_head(state: State) -> dict[str, Tensor]:
    """A classifier's encoder. Models that pool the patch tokens carry `fc_norm` instead of `norm`."""
    kept = {key: tensor for key, tensor in state.items() if not key.startswith("head.")}
    if "norm.weight" not in kept:
        kept = {re.sub(r"^fc_norm\.", "norm.", key): tensor for key, tensor in kept.items()}
    return kept


def _decoder_table(ours: State, img_size: SizePx | None) -> Tensor:
    """The decoder's position table, [1, 1+L, E], zeros for the class token, like the mask token in dtype and device."""
    grid, token = _grid(ours, img_size), ours["mask_token"]
    table = F.pad(sincos_table(token.shape[-1], grid, grid), (0, 0, 1, 0))
    return table[None].to(token)


def _close(stored: Tensor, table: Tensor) -> bool:
    rounding = 2 * torch.finfo(stored.dtype).eps  # of tables stored in half precision
    return same_table(stored, table, max(TABLE_TOLERANCE, rounding))


def _grid(state: State, img_size: SizePx | None) -> tuple[int, int]:
    """(rows, columns) at full size, from `img_size` or else the encoder's position table, [1, 1+L, D]."""
    table = state["encoder.pos_embed"][0, 1:]
    patch = state["encoder.patch_embed.proj.weight"].shape[-1]
    patches, width = table.shape
    if img_size is not None:
        grid = grid_of(img_size, patch)
        if math.prod(grid) != patches:
            raise ValueError(f"img_size {height_width(img_size)} has {math.prod(grid)} patches, the weights {patches}")
        return grid
    side = math.isqrt(patches)
    square = [(side, side)] if side**2 == patches else []
    # A sin-cos table tells its grid even when it is not square.
    factors = [(rows, patches // rows) for rows in range(1, patches + 1) if not patches % rows]
    tables = (grid for grid in square + factors if not width % 4 and _close(table, sincos_table(width, grid, grid)))
    if found := next(tables, square[0] if square else None):
        return found
    raise ValueError(
        f"the grid of {patches} patches can't be told from encoder.pos_embed, which is neither square nor MAE's "
        "sin-cos table: pass img_size"
    )


def _heads_of_64(width: int, argument: str) -> int:
    if width % 64:
        raise ValueError(f"{argument} of width {width} can't be told from weights: pass {argument} (--{argument})")
    return width // 64
