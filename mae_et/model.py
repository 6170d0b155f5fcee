"""Masked autoencoder: a timm ViT on the visible patches, a light decoder on visible and predicted ones.

B batch · L patches of the image's grid · V visible · P predicted · D encoder width · E decoder width · T values/patch.
The model returns predictions, never a loss. Source: MAE, arXiv 2111.06377.
"""

from __future__ import annotations

import difflib
import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .curriculum import SizePx, grid_of, height_width
from .decoder import DECODERS, CrossBlock
from .targets import take_patches

NORM_EPS = 1e-6  # MAE, as in ViT

#: Encoder width, depth, heads and patch of each size (MAE, Sec. 4; tiny and small as in DeiT, arXiv 2012.12877).
SIZES = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3, "patch_size": 16},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6, "patch_size": 16},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12, "patch_size": 16},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16, "patch_size": 16},
    "huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16, "patch_size": 14},
}
MODELS = tuple(f"mae_vit_{size}_patch{shape['patch_size']}" for size, shape in SIZES.items())


class Output(NamedTuple):
    """What a masked forward pass returns."""

    pred: Tensor
    """[B, P, T] predictions of the predicted patches."""
    predicted_ids: Tensor
    """[B, P] their places in the L patches."""
    mask: Tensor
    """[B, L], 1 = removed from the encoder's input, 0 = visible."""


class MaskedAutoencoder(nn.Module):
    """MAE around a timm ``VisionTransformer`` (`encoder`), with a decoder of timm blocks.

    img_size: full size in pixels, one number or (height, width); any smaller multiple of the patch may be fed in.
    target_dim: values predicted per patch; default: the patch's pixels.
    own_positions: number the patches of a smaller grid from zero, instead of in coordinates of the full grid.
    decoder: a key of DECODERS: whether the decoder's queries see each other.
    """

    def __init__(
        self,
        img_size: SizePx = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        target_dim: int | None = None,
        own_positions: bool = False,
        decoder: str = "self",
    ) -> None:
        super().__init__()
        self.grid = grid_of(img_size, patch_size)
        for width, heads, flag in ((embed_dim, num_heads, ""), (decoder_embed_dim, decoder_num_heads, "decoder_")):
            if width % heads or width % 4:
                raise ValueError(
                    f"{flag}embed_dim {width} must be divisible by {flag}num_heads {heads}, and by 4 for the 2-D "
                    "sin-cos position table"
                )
        if decoder not in DECODERS:
            raise ValueError(f"unknown decoder {decoder!r}; choose from {', '.join(DECODERS)}")
        self.img_size, self.patch_size, self.in_chans, self.mlp_ratio = img_size, patch_size, in_chans, mlp_ratio
        self.embed_dim, self.depth, self.num_heads = embed_dim, depth, num_heads
        self.decoder_embed_dim, self.decoder_depth = decoder_embed_dim, decoder_depth
        self.decoder_num_heads = decoder_num_heads
        self.target_dim = target_dim or patch_size**2 * in_chans
        self.own_positions, self.decoder = own_positions, decoder

        self.encoder = VisionTransformer(
            img_size=height_width(img_size),
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=0,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            norm_layer=_norm,
            weight_init="skip",  # initialised below
        )
        self.encoder.pos_embed.requires_grad_(False)

        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        shape = decoder_embed_dim, decoder_num_heads, mlp_ratio
        if decoder == "cross":
            self.decoder_blocks = nn.ModuleList(CrossBlock(*shape, norm_layer=_norm) for _ in range(decoder_depth))
        else:
            self.decoder_blocks = nn.Sequential(
                *(Block(*shape, qkv_bias=True, norm_layer=_norm) for _ in range(decoder_depth))
            )
        self.decoder_norm = _norm(decoder_embed_dim)
        self.decoder_pred = nn.Linear(decoder_embed_dim, self.target_dim)
        self._tables: dict[tuple, tuple[Tensor, Tensor]] = {}
        self.register_load_state_dict_post_hook(lambda model, _: model._tables.clear())
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """MAE's initialisation (arXiv 2111.06377, Appendix A.1): xavier-uniform linears, tokens N(0, 0.02)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        projection = self.encoder.patch_embed.proj
        nn.init.xavier_uniform_(projection.weight.view(projection.out_channels, -1))  # like a linear layer
        nn.init.zeros_(projection.bias)
        nn.init.normal_(self.encoder.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        table = sincos_table(self.embed_dim, self.grid, self.grid)
        self.encoder.pos_embed.copy_(F.pad(table, (0, 0, 1, 0))[None])  # zeros for the class token

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks of encoder and decoder."""
        return [*self.encoder.blocks, *self.decoder_blocks]

    def compile_blocks(self) -> None:
        """torch.compile each block for itself: equal ones compile once, and what wraps blocks stays outside, so that
        DDP's all-reduce of one block overlaps the backward pass of the next."""
        torch._dynamo.reset()  # the graphs of earlier runs in this process, as of a search, count towards the limit
        # One graph for each of encoder and decoder and shape of a stage; past the limit torch runs uncompiled.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for block in self.blocks:
            block.forward = torch.compile(block.forward, dynamic=False)

    def recompute_blocks(self) -> None:
        """Keep of a block its input only, and run it again in backward (arXiv 1604.06174): less memory, more time."""
        for block in self.blocks:
            # Blocks draw no random numbers, so no generator's state is kept for the second run.
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)

    @property
    def num_patches(self) -> int:
        """L at full size."""
        return math.prod(self.grid)

    def forward(
        self, images: Tensor, num_visible: int, num_predicted: int | None = None, noise: Tensor | None = None
    ) -> Output:
        """Encode `num_visible` patches and predict `num_predicted` of the others (default: all).

        images: [B, C, H, W]. noise: [B, L]; the patches with the lowest noise stay visible, the next ones are
        predicted. Default: uniform noise. Raises ValueError on sizes or counts that don't fit the grid.
        """
        grid = self._grid_of(images)
        patches = math.prod(grid)
        num_predicted = patches - num_visible if num_predicted is None else num_predicted
        if not (0 < num_visible < patches and 0 < num_predicted <= patches - num_visible):
            raise ValueError(
                f"{num_visible} visible and {num_predicted} predicted patches don't fit a grid of {patches}: at least "
                "one of each, and at most all together"
            )
        if noise is None:
            noise = torch.rand(len(images), patches, device=images.device)
        order = noise.argsort(dim=1, stable=True)  # on every device the same, where two values are equal
        visible_ids = order[:, :num_visible]  # [B, V]
        predicted_ids = order[:, num_visible : num_visible + num_predicted]  # [B, P]

        latent = self._encode(images, grid, visible_ids)  # [B, 1+V, D]
        pred = self._decode(latent, grid, visible_ids, predicted_ids)
        mask = torch.ones_like(noise).scatter_(1, visible_ids, 0)
        return Output(pred, predicted_ids, mask)

    def encode(self, images: Tensor) -> Tensor:
        """Features of the whole image, never masked: [B, C, H, W] -> [B, 1+L, D], class token first."""
        return self._encode(images, self._grid_of(images), None)

    def _encode(self, images: Tensor, grid: tuple[int, int], visible_ids: Tensor | None) -> Tensor:
        # Channel-first patches, so that timm's convolution weight, flattened, is the linear map; gathered before it,
        # so that only visible patches are embedded.
        x = rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch_size, q=self.patch_size)
        table, _ = self.positions(grid)  # [1, 1+L, D]
        position = table[:, 1:]  # [1, L, D]
        if visible_ids is not None:
            x, position = take_patches(x, visible_ids), F.embedding(visible_ids, position[0])
        projection = self.encoder.patch_embed.proj
        x = F.linear(x, projection.weight.flatten(1), projection.bias) + position  # [B, V, D]
        cls = (self.encoder.cls_token + table[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls.to(x.dtype), x], dim=1)  # [B, 1+V, D]
        return self.encoder.norm(self.encoder.blocks(x))

    def _decode(self, latent: Tensor, grid: tuple[int, int], visible_ids: Tensor, predicted_ids: Tensor) -> Tensor:
        # Attention doesn't care about order and every token carries its position, so nothing is unshuffled.
        # What blocks add to stays in the parameters' precision under autocast, as in the encoder and in MAE.
        table = self.positions(grid)[1][0].to(self.mask_token.dtype)  # [L, E]
        x = self.decoder_embed(latent).to(table.dtype)  # [B, 1+V, E]
        cls, visible = x[:, :1], x[:, 1:] + F.embedding(visible_ids, table)
        queries = self.mask_token + F.embedding(predicted_ids, table)  # [B, P, E]
        context = torch.cat([cls, visible], dim=1)  # [B, 1+V, E]
        if self.decoder == "cross":
            for block in self.decoder_blocks:
                queries = block(queries, context)
        else:
            x = torch.cat([context, queries], dim=1)  # [B, 1+V+P, E]
            queries = self.decoder_blocks(x)[:, context.shape[1] :]
        return self.decoder_pred(self.decoder_norm(queries))

    def _grid_of(self, images: Tensor) -> tuple[int, int]:
        return grid_of(tuple(images.shape[-2:]), self.patch_size)

    def positions(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Position tables of a grid: encoder [1, 1+L, D], class token first, and decoder [1, L, E].

        The encoder's is `encoder.pos_embed`. On other grids that is MAE's formula again; a learned table, which foreign
        weights may bring, is interpolated.
        """
        stored = self.encoder.pos_embed
        key = (grid, stored.device)
        if key not in self._tables:
            coordinates = grid if self.own_positions else self.grid
            decoder = sincos_table(self.decoder_embed_dim, grid, coordinates)[None].to(stored.device)
            if grid == self.grid:
                encoder = stored
            elif self._has_sincos_positions():
                table = sincos_table(self.embed_dim, grid, coordinates)[None].to(stored)
                encoder = torch.cat([stored.detach()[:, :1], table], dim=1)
            else:
                encoder = resample_abs_pos_embed(stored.detach(), list(grid), list(self.grid), num_prefix_tokens=1)
            self._tables[key] = encoder, decoder
        return self._tables[key]

    def _has_sincos_positions(self) -> bool:
        stored = self.encoder.pos_embed
        if stored.is_meta:
            return True
        table = sincos_table(self.embed_dim, self.grid, self.grid).to(stored.device)
        return torch.allclose(stored[0, 1:].float(), table, atol=1e-4)


def sincos_table(width: int, grid: tuple[int, int], full_grid: tuple[int, int]) -> Tensor:
    """MAE's fixed 2-D sin-cos table on any grid, [rows·columns, width], float32: x half first, then y.

    Patch i of g sits at (i + ½)·G/g − ½ in coordinates of the full grid G, so that a place in the image keeps its
    code when the grid grows. At g = G it is MAE's own table, bit for bit.
    """
    y, x = ((torch.arange(g, dtype=torch.float64) + 0.5) * G / g - 0.5 for g, G in zip(grid, full_grid, strict=True))
    omega = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))

    def axis(position: Tensor) -> Tensor:
        angle = position[:, None] * omega
        return torch.cat([angle.sin(), angle.cos()], dim=1)  # [n, width/2]

    rows, columns = grid
    table = torch.cat([axis(x).repeat(rows, 1), axis(y).repeat_interleave(columns, 0)], dim=1)
    return table.float()


def model_shape(name: str) -> dict[str, int]:
    """Encoder width, depth, heads and patch of a model name; ValueError lists the legal ones.

    `mae_vit_base_patch16`, `vit_base_patch16` and `mae_vit_base_patch16_dec512d8b` are the same model here.
    """
    short = name.removesuffix("_dec512d8b")
    short = short if short.startswith("mae_") else f"mae_{short}"
    if short not in MODELS:
        close = difflib.get_close_matches(short, MODELS, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f"unknown model {name!r}{hint}; choose from {', '.join(MODELS)}")
    return dict(SIZES[short.split("_")[2]])


def create_mae(name: str = "mae_vit_base_patch16", **overrides) -> MaskedAutoencoder:
    """A :class:`MaskedAutoencoder` by name, with any of its arguments overridden (None = keep)."""
    return MaskedAutoencoder(**model_shape(name) | {k: v for k, v in overrides.items() if v is not None})


def _norm(width: int, **kwargs) -> nn.LayerNorm:
    return nn.LayerNorm(width, **{"eps": NORM_EPS} | kwargs)
