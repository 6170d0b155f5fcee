"""A decoder whose queries attend to the visible patches only: cross-attention, no self-attention among the queries.

B batch · P queries (predicted patches) · N context tokens (class token and visible patches) · E decoder width.
Source: CrossMAE, arXiv 2401.14391, Sec. 3.2: each masked patch is predicted from the visible ones alone, so that the
cost falls with the number of predicted patches, and a prediction doesn't depend on which others are asked for. Here the
queries read the encoder's last layer; CrossMAE's weighted sum over all layers (Sec. 3.3) is left out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from einops import rearrange
from timm.layers import Mlp, use_fused_attn
from torch import Tensor, nn

#: How the decoder's queries see the rest.
DECODERS = {
    "self": "queries and visible patches attend to each other, as in MAE",
    "cross": "queries attend to the visible patches only, as in CrossMAE: cheaper",
}


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
        self, width: int, num_heads: int, mlp_ratio: float, norm_layer: Callable[[int], nn.Module] = nn.LayerNorm
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
