"""Parameter groups, the optimiser, and the learning rate as a function of the position in training."""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from timm.optim.muon import zeropower_via_newtonschulz
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..model import MaskedAutoencoder
from ..plan.cost import NEWTON_SCHULZ_STEPS

BETAS = (0.9, 0.95)  # MAE, arXiv 2111.06377, Table 8
MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the Newton–Schulz iteration (Jordan et al. 2024, "Muon", kellerjordan.github.io/posts/muon)."""
NO_WEIGHT_DECAY = ("encoder.cls_token", "mask_token")
STACKED = {"attn.qkv.weight": 3, "attn.kv.weight": 2}
"""Weights of a block that hold several matrices, one above the other."""


def adamw(model: MaskedAutoencoder, weight_decay: float) -> torch.optim.AdamW:
    """Fused AdamW with weight decay on matrices only: not on biases, norms and tokens (MAE, Table 8)."""
    groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=NO_WEIGHT_DECAY)
    return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, fused=True)


def muon(model: MaskedAutoencoder, weight_decay: float, precision: str) -> Muon:
    """Muon for the matrices of the transformer blocks, AdamW as above for all else, at one learning rate."""
    groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=NO_WEIGHT_DECAY)
    stacked: dict[int, list[nn.Parameter]] = {}
    for block in model.blocks:
        for name, parameter in block.named_parameters():
            if parameter.ndim == 2:
                stacked.setdefault(STACKED.get(name, 1), []).append(parameter)
    taken = {parameter for parameters in stacked.values() for parameter in parameters}
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if parameter not in taken]
    groups += [
        {"params": parameters, "weight_decay": weight_decay, "matrices": count} for count, parameters in stacked.items()
    ]
    return Muon(groups, torch.bfloat16 if precision == "bf16" else torch.float32)


class Muon(torch.optim.AdamW):
    """Steps along the nearest orthogonal matrix to the momentum, for groups with `matrices`; the others are AdamW's.

    matrices, of a group: how many a weight holds, each of which is orthogonalised for itself.
    dtype: of that iteration. Its input is Nesterov's momentum (Jordan et al. 2024); the update is scaled to AdamW's
    typical size, 0.2·√max(m, n) for m × n (arXiv 2502.16982, Sec. 2.2), so learning rate and decay mean the same.

    Heeds `found_inf` as fused AdamW does: a step with it changes neither weights nor momentum, and no host waits.
    """

    def __init__(self, groups: list[dict[str, Any]], dtype: torch.dtype) -> None:
        super().__init__([{"matrices": 0} | group for group in groups], lr=0.0, betas=BETAS, fused=True)
        self.dtype = dtype

    def __setstate__(self, state: dict[str, Any]) -> None:
        torch.optim.Optimizer.__setstate__(self, state)  # Adam's looks for its own state of every weight

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        alike: dict[tuple[int, ...], list[tuple[nn.Parameter, dict[str, Any]]]] = {}
        gradients = {}
        for group in self.param_groups:
            for parameter in group["params"] if group["matrices"] else ():
                if parameter.grad is not None:
                    gradients[parameter] = parameter.grad
                    rows, columns = parameter.shape
                    shape = sorted((rows // group["matrices"], columns))
                    alike.setdefault(tuple(shape), []).append((parameter, group))
        for members in alike.values():
            self._update(members)
        for parameter in gradients:
            parameter.grad = None  # AdamW passes over those without
        super().step()
        for parameter, gradient in gradients.items():
            parameter.grad = gradient

    def _update(self, members: list[tuple[nn.Parameter, dict[str, Any]]]) -> None:
        """One iteration for all matrices that have one shape, or its transpose: it is many small products."""
        skip = getattr(self, "found_inf", torch.zeros((), device=members[0][0].device))
        keep, take, skipped = MOMENTUM + (1 - MOMENTUM) * skip, 1 - skip, skip > 0
        directions = []
        for parameter, group in members:
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            momentum, gradient = state["momentum_buffer"], torch.where(skipped, 0.0, parameter.grad)
            momentum.mul_(keep).add_(gradient)
            direction = gradient.add_(momentum, alpha=MOMENTUM)
            direction = direction.full_tensor() if isinstance(direction, DTensor) else direction
            directions.append(_flat(direction.unflatten(0, (group["matrices"], -1))))
        orthogonal = zeropower_via_newtonschulz(
            torch.cat(directions), NEWTON_SCHULZ_STEPS, [COEFFICIENTS], dtype=self.dtype
        )
        parts = orthogonal.split([group["matrices"] for _, group in members])
        for (parameter, group), part in zip(members, parts, strict=True):
            tall = parameter.shape[0] // group["matrices"] > parameter.shape[1]
            update = (part.mT if tall else part).flatten(0, 1).to(parameter.dtype)
            if isinstance(parameter, DTensor):
                update = distribute_tensor(update, parameter.device_mesh, parameter.placements, src_data_rank=None)
            size = 0.2 * max(part.shape[1:]) ** 0.5
            parameter.mul_(1 - group["lr"] * group["weight_decay"] * take)
            parameter.sub_(update.mul_(group["lr"] * size * take))


def _flat(matrices: Tensor) -> Tensor:
    """[k, m, n], transposed if they are taller than wide."""
    return matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices


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
