"""Features of all images of a source, over ranks, and what they are worth with nothing trained: kNN and RankMe.

B batch · C channels · N images · D width · K classes. Sources: DINO, arXiv 2104.14294, Appendix (kNN); RankMe,
arXiv 2210.02885.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.labelled import CORRUPT, EvalCrops, eval_batches
from .runtime import Runtime

Layer = TypeVar("Layer")
RANK_EPS = 1e-7  # RankMe, equation 1


@torch.no_grad()
def gather_features(
    features_of: Callable[[Tensor], Mapping[Layer, Tensor]],
    crops: EvalCrops,
    rt: Runtime,
    num_workers: int | None,
    pin_mem: bool,
    whose: str,
    batch_size: int = 256,
) -> tuple[dict[Layer, Tensor], Tensor]:
    """Features [N, D] of all centre crops at each layer, and their labels [N], in order, on every rank.

    features_of: uint8 [B, C, H, W] -> [B, D] per layer. Results are in the host's memory: of a million images, one
    layer's take gigabytes. Images that can't be read are left out. whose: names the encoder in the FloatingPointError
    for features that are not finite, which have no neighbours.
    """
    parts, labels, loading = {}, [], rt.loading(num_workers, pin_mem)
    for images, batch_labels in eval_batches(crops, rt.rank, rt.world_size, loading, batch_size, keep_places=True):
        for layer, features in features_of(images).items():
            parts.setdefault(layer, []).append(features.cpu())
        labels.append(batch_labels)
    first = len(crops) * rt.rank // rt.world_size

    def gather(batches: list[Tensor]) -> Tensor:  # [N, …] from every rank's rows
        rows = torch.cat(batches)
        if rt.world_size == 1:
            return rows
        everything = rows.new_zeros(len(crops), *rows.shape[1:])
        everything[first : first + len(rows)] = rows
        return rt.sum(everything.to(rt.device)).cpu()

    gathered = gather(labels)
    readable = gathered != CORRUPT
    crops.corrupt.check(int((~readable).sum()))  # over all ranks; each one has checked its own
    features = {layer: gather(batches)[readable] for layer, batches in parts.items()}
    if not all(rows.isfinite().all() for rows in features.values()):
        raise FloatingPointError(f"{whose} gives features that are not finite; try --precision fp32, or other weights")
    return features, gathered[readable]


def knn_scores(
    train: Tensor, labels: Tensor, queries: Tensor | None, num_classes: int, k: int, temperature: float
) -> Tensor:
    """Votes [Q, K]: of the k nearest by cosine, each weighs exp(cosine / temperature), relative to the nearest one.

    train: [N, D]. labels: [N]. queries: [Q, D]; None: the training images, each without its own vote (leave-one-out).
    """
    train, votes, first = F.normalize(train, dim=1), [], 0
    asked = train if queries is None else F.normalize(queries, dim=1)
    for chunk in asked.split(max(1, 2**28 // len(train))):  # at most 1 GiB of similarities
        similarity = chunk @ train.T  # [q, N]
        if queries is None:
            similarity.diagonal(first).fill_(-torch.inf)
            first += len(chunk)
        cosine, nearest = similarity.topk(k, dim=1)  # [q, k]
        weights = ((cosine - cosine[:, :1]) / temperature).exp()  # at most 1: no temperature overflows
        votes.append(weights.new_zeros(len(chunk), num_classes).scatter_add_(1, labels[nearest], weights))
    return torch.cat(votes)


def rank_me(features: Tensor) -> float:
    """Effective rank of features [N, D], from 1 to min(N, D): exp of the entropy of the normalised singular values."""
    x = features.double()
    # The smaller product's eigenvalues are their squares, known to 1e-8 of the largest, far below RANK_EPS.
    values = torch.linalg.eigvalsh(x.T @ x if len(x) > x.shape[1] else x @ x.T).clamp(min=0).sqrt()
    shares = values / values.sum() + RANK_EPS
    return torch.exp(-(shares * shares.log()).sum()).item()
