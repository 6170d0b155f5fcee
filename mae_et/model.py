"""Masked autoencoder: a timm ViT on the visible patches, a light decoder on visible and predicted ones.

B batch · L patches of the image's grid · V visible · P predicted · D encoder width · E decoder width · T values/patch.
The model returns predictions, never a loss. Source: MAE, arXiv 2111.06377.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import Mlp, resample_abs_pos_embed, use_fused_attn
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .plan.shapes import ModelShape, grid_of, height_width, model_shape
from .targets import take_patches

HALF_ROUNDING = 4e-3
"""Twice what rounding to bfloat16 changes in sines and cosines."""


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

    Arguments and errors as of :class:`ModelShape`, which has an attribute for each; so has the model.
    """

    residual_dtype: torch.dtype | None = None
    """What blocks add to: the parameters' precision, or bfloat16 under autocast to it."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.shape = shape = ModelShape(**arguments)
        for field in dataclasses.fields(shape):
            setattr(self, field.name, getattr(shape, field.name))
        self.grid = self.shape.grid

        norm = functools.partial(LayerNorm, eps=shape.norm_eps)
        self.encoder = VisionTransformer(
            img_size=height_width(shape.img_size),
            patch_size=shape.patch_size,
            in_chans=shape.in_chans,
            num_classes=0,
            embed_dim=shape.embed_dim,
            depth=shape.depth,
            num_heads=shape.num_heads,
            mlp_ratio=shape.mlp_ratio,
            norm_layer=norm,
            weight_init="skip",  # initialised below
        )
        self.encoder.pos_embed.requires_grad_(False)

        width = shape.decoder_embed_dim
        self.decoder_embed = nn.Linear(shape.embed_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        block = width, shape.decoder_num_heads, shape.mlp_ratio
        if shape.decoder == "cross":
            self.decoder_blocks = nn.ModuleList(CrossBlock(*block, norm_layer=norm) for _ in range(shape.decoder_depth))
        else:
            blocks = (Block(*block, qkv_bias=True, norm_layer=norm) for _ in range(shape.decoder_depth))
            self.decoder_blocks = nn.Sequential(*blocks)
        self.decoder_norm = norm(width)
        self.decoder_pred = nn.Linear(width, shape.target_dim)
        self._tables: dict[tuple, tuple[Tensor, Tensor]] = {}
        self.register_load_state_dict_post_hook(_forget_tables)
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
        torch._dynamo.config.optimize_ddp = False  # it would cut each block where one of DDP's buckets is full
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
        return self.shape.num_patches

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
        x = self._residual(torch.cat([cls.to(x.dtype), x], dim=1))  # [B, 1+V, D]
        return self.encoder.norm(self.encoder.blocks(x))

    def _decode(self, latent: Tensor, grid: tuple[int, int], visible_ids: Tensor, predicted_ids: Tensor) -> Tensor:
        # Attention doesn't care about order and every token carries its position, so nothing is unshuffled.
        # Under autocast too, what blocks add to begins in the parameters' precision, as in the encoder and in MAE.
        table = self.positions(grid)[1][0].to(self.mask_token.dtype)  # [L, E]
        x = self.decoder_embed(latent).to(table.dtype)  # [B, 1+V, E]
        cls, visible = x[:, :1], x[:, 1:] + F.embedding(visible_ids, table)
        queries = self.mask_token + F.embedding(predicted_ids, table)  # [B, P, E]
        queries, context = self._residual(queries), self._residual(torch.cat([cls, visible], dim=1))  # [B, 1+V, E]
        if self.decoder == "cross":
            for block in self.decoder_blocks:
                queries = block(queries, context)
        else:
            x = torch.cat([context, queries], dim=1)  # [B, 1+V+P, E]
            queries = self.decoder_blocks(x)[:, context.shape[1] :]
        return self.decoder_pred(self.decoder_norm(queries))

    def _residual(self, x: Tensor) -> Tensor:
        return x if self.residual_dtype is None else x.to(self.residual_dtype)

    def _grid_of(self, images: Tensor) -> tuple[int, int]:
        return grid_of(tuple(images.shape[-2:]), self.patch_size)

    def positions(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Position tables of a grid: encoder [1, 1+L, D], class token first, and decoder [1, L, E].

        The encoder's is `encoder.pos_embed`. On other grids that is MAE's formula again; a learned table, which foreign
        weights may bring, is interpolated.
        """
        stored = self.encoder.pos_embed
        key = (grid, stored.device, stored.dtype)
        if key not in self._tables:
            self._tables[key] = self._tables_on(grid)
        return self._tables[key]

    def _tables_on(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        stored, coordinates = self.encoder.pos_embed, grid if self.own_positions else self.grid
        decoder = sincos_table(self.decoder_embed_dim, grid, coordinates)[None].to(stored.device)
        if grid == self.grid:
            return stored, decoder
        if self._has_sincos_positions():
            table = sincos_table(self.embed_dim, grid, coordinates)[None].to(stored)
            return torch.cat([stored.detach()[:, :1], table], dim=1), decoder
        return resample_abs_pos_embed(stored.detach(), list(grid), list(self.grid), num_prefix_tokens=1), decoder

    def _has_sincos_positions(self) -> bool:
        stored = self.encoder.pos_embed
        if stored.is_meta:
            return True
        return same_table(stored[0, 1:], sincos_table(self.embed_dim, self.grid, self.grid))


def _forget_tables(model: MaskedAutoencoder, _: Any) -> None:
    """Of other weights. Not a lambda, with which a model couldn't be pickled."""
    model._tables.clear()


def same_table(stored: Tensor, table: Tensor, tolerance: float = HALF_ROUNDING) -> bool:
    """Whether a position table is MAE's fixed one, perhaps rounded to half precision."""
    return bool((stored.cpu().double() - table.cpu().double()).abs().max() <= tolerance)


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


def create_mae(name: str = "mae_vit_base_patch16", **overrides: Any) -> MaskedAutoencoder:
    """A :class:`MaskedAutoencoder` by name, with any of its arguments overridden (None = keep)."""
    return MaskedAutoencoder(**model_shape(name) | {k: v for k, v in overrides.items() if v is not None})


class LayerNorm(nn.LayerNorm):
    """Layer norm in the precision of what it is given; its parameters may have another one, or autocast be on.

    torch sums in float32 inside. On CPUs it takes no float32 input with bf16 parameters, and autocast would turn a bf16
    residual stream into float32 on GPUs.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32 == self.weight.dtype:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


# ── cross-attention decoder ──
#
# CrossMAE, arXiv 2401.14391, Sec. 3.2: each masked patch is predicted from the visible ones alone. So the cost falls
# with the number of predicted patches, and a prediction doesn't depend on which others are asked for. Here the queries
# read the encoder's last layer; CrossMAE's weighted sum over all layers (Sec. 3.3) is left out.


class CrossAttention(nn.Module):
    """Multi-head attention of queries [B, P, E] to a context [B, N, E] -> [B, P, E]."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.fused = bool(use_fused_attn())
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        q = rearrange(self.q(queries), "b p (h d) -> b h p d", h=self.num_heads)
        k, v = rearrange(self.kv(context), "b n (two h d) -> two b h n d", two=2, h=self.num_heads)
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            x = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1) @ v
        return self.proj(rearrange(x, "b h p d -> b p (h d)"))


class CrossBlock(nn.Module):
    """Pre-norm cross-attention and MLP, each with a residual connection around it."""

    def __init__(
        self, width: int, num_heads: int, mlp_ratio: float, norm_layer: Callable[[int], nn.Module] = LayerNorm
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(width)
        self.norm_context = norm_layer(width)
        self.attn = CrossAttention(width, num_heads)
        self.norm2 = norm_layer(width)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        """queries [B, P, E], context [B, N, E] -> [B, P, E]."""
        queries = queries + self.attn(self.norm1(queries), self.norm_context(context))
        return queries + self.mlp(self.norm2(queries))
