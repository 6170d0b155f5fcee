"""Parameter groups, the optimiser, and the learning rate as a function of the position in training."""

from __future__ import annotations

import math

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor

from ..model import MaskedAutoencoder

BETAS = (0.9, 0.95)  # MAE, arXiv 2111.06377, Table 8


def adamw(model: MaskedAutoencoder, weight_decay: float) -> torch.optim.AdamW:
    """Fused AdamW with weight decay on matrices only: not on biases, norms and tokens (MAE, Table 8)."""
    groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=("encoder.cls_token", "mask_token"))
    return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, fused=True)


def learning_rate(p: float, *, peak: float, floor: float, warmup: float, hold: float = 0.0) -> float:
    """Linear warm-up over the first `warmup` of training, `peak` for `hold` of it, then half a cosine down to `floor`.

    p: position in [0, 1]. warmup, hold: shares of the training; together they may be all of it, or more.
    """
    if p < warmup:
        return peak * p / warmup
    if p < warmup + hold:
        return peak
    rest = 1 - warmup - hold
    progress = (p - warmup - hold) / rest if rest > 0 else 1.0
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set lr, times each group's own `lr_scale` (layer decay) where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def guarded_step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Update the weights unless `loss`, any number that must be finite, is not. The host does not wait for it.

    `found_inf` is how torch's own GradScaler tells a fused optimiser to skip; the step counter doesn't move either.
    That other devices' kernels heed it is not known: there the host waits.
    """
    if loss.device.type not in ("cpu", "cuda") and not torch.isfinite(loss):
        return
    optimizer.found_inf = (~torch.isfinite(loss)).float()
    optimizer.step()


def allocate(optimizer: torch.optim.Optimizer) -> None:
    """Make the optimiser's state, as it is before the first step, for a checkpoint to be read into it."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    guarded_step(optimizer, torch.full((), math.inf, device=parameters[0].device))  # a step that is skipped
    optimizer.zero_grad(set_to_none=True)
