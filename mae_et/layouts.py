"""Where other projects keep what ours keeps: the name of every tensor, in timm, facebookresearch/mae and transformers.

"Ours" is `MaskedAutoencoder.state_dict()`: the encoder under `encoder.` with timm's names, the decoder beside it with
facebookresearch/mae's. Sources of the names: the checkpoints of timm, facebookresearch/mae and transformers 4 and 5.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

State = Mapping[str, Tensor]

BLOCK = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")


@dataclass(frozen=True)
class Layout:
    """Where another project keeps what ours keeps.

    who: named in errors. encoder, decoder: our parameter -> theirs, for everything but the blocks. *_blocks: their
    prefix of the blocks. block: our module of a block -> theirs, three where they split query, key and value.
    decoder_table: the position table of the decoder, if they store it. decoder_block: where it is not `block`.
    """

    who: str
    encoder: dict[str, str]
    encoder_blocks: str
    block: dict[str, tuple[str, ...]]
    decoder: dict[str, str] = field(default_factory=dict)
    decoder_blocks: str = ""
    decoder_table: str = ""
    decoder_block: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def pairs(self, depth: int, decoder_depth: int | None) -> Iterator[tuple[str, tuple[str, ...]]]:
        """(our key, their key or three keys) for every tensor; decoder_depth None: encoder only."""
        yield from ((f"encoder.{ours}", (theirs,)) for ours, theirs in self.encoder.items())
        yield from _blocks("encoder.blocks.", self.encoder_blocks, depth, self.block)
        if decoder_depth is not None:
            yield from ((ours, (theirs,)) for ours, theirs in self.decoder.items())
            block = self.decoder_block or self.block
            yield from _blocks("decoder_blocks.", self.decoder_blocks, decoder_depth, block)

    def has_decoder(self, state: State) -> bool:
        starts = tuple(filter(None, (self.decoder_blocks, self.decoder_table, *self.decoder.values())))
        return any(key.startswith(starts) for key in state)


def _blocks(
    ours: str, theirs: str, depth: int, block: dict[str, tuple[str, ...]]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    for n in range(depth):
        for module, names in block.items():
            yield from zip(
                _parameters(f"{ours}{n}.{module}"),
                zip(*(_parameters(f"{theirs}{n}.{name}") for name in names), strict=True),
                strict=True,
            )


def _parameters(*modules: str) -> list[str]:
    return [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]


_ENCODER = {name: name for name in ("cls_token", "pos_embed", *_parameters("patch_embed.proj", "norm"))}
_DECODER = {name: name for name in ("mask_token", *_parameters("decoder_embed", "decoder_norm", "decoder_pred"))}
_SAME_BLOCK = {module: (module,) for module in BLOCK}

_OUR_ENCODER = {name: f"encoder.{name}" for name in _ENCODER}
OURS = Layout("a mae_et model", _OUR_ENCODER, "encoder.blocks.", _SAME_BLOCK, _DECODER, "decoder_blocks.")
_CROSS_BLOCK = ("norm1", "norm_context", "attn.q", "attn.kv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
OURS_CROSS = replace(OURS, decoder_block={module: (module,) for module in _CROSS_BLOCK})
TIMM = Layout("a plain timm VisionTransformer", _ENCODER, "blocks.", _SAME_BLOCK)
FACEBOOK = Layout(
    "a facebookresearch/mae model", _ENCODER, "blocks.", _SAME_BLOCK, _DECODER, "decoder_blocks.", "decoder_pos_embed"
)


def huggingface(encoder_blocks: str, decoder_blocks: str, block: tuple[tuple[str, ...], ...], prefix: str) -> Layout:
    names = ("cls_token", "position_embeddings", *_parameters("patch_embeddings.projection"))
    encoder = [f"{prefix}embeddings.{name}" for name in names] + _parameters(f"{prefix}layernorm")
    return Layout(
        "a transformers ViTMAE model",
        dict(zip(_ENCODER, encoder, strict=True)),
        f"{prefix}{encoder_blocks}",
        dict(zip(BLOCK, block, strict=True)),
        {name: f"decoder.{name}" for name in _DECODER},
        decoder_blocks,
        "decoder.decoder_pos_embed",
    )


_HF4_BLOCK = (
    ("layernorm_before",),
    ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    ("attention.output.dense",),
    ("layernorm_after",),
    ("intermediate.dense",),
    ("output.dense",),
)
_HF5_BLOCK = (
    ("layernorm_before",),
    ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    ("attention.o_proj",),
    ("layernorm_after",),
    ("mlp.fc1",),
    ("mlp.fc2",),
)
#: Three spellings: of the files on the Hub and of transformers 4; of models in memory since transformers 5; and of the
#: files which transformers 5 writes (it maps names back, and the decoder's blocks land on a new name).
HF_NAMINGS = {
    "hub": ("encoder.layer.", "decoder.decoder_layers.", _HF4_BLOCK),
    "memory": ("layers.", "decoder.decoder_layers.", _HF5_BLOCK),
    "transformers5_file": ("encoder.layer.", "decoder.decoder_encoder.layer.", _HF4_BLOCK),
}
