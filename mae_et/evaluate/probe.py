"""Probes of frozen features: kNN and linear classifiers. The backbone is in evaluation mode and never changes.

N images · L patches · D width · K classes. Sources: MAE, arXiv 2111.06377, Appendix A.1 (linear probe); DINO,
arXiv 2104.14294, Appendix (kNN).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from timm.optim import Lars
from torch import Tensor, nn

from ..console import logging_to_console
from ..data.labelled import Augmentation, EvalCrops, TrainCrops, eval_batches, labelled_batches, open_labelled
from ..data.loader import CorruptLog
from ..data.sources import Source
from ..data.stream import SampleStream, derive_seed, micro_batches
from ..engine import runtime
from ..engine.optim import learning_rate, set_learning_rate
from ..engine.runtime import Runtime
from ..plan.curriculum import Curriculum, Stage
from ..plan.shapes import height_width
from .accuracy import Accuracy, Normalize, check_classes, eval_crops, write_result
from .config import MICRO_BATCH, FinetuneConfig
from .encoder import PretrainedEncoder, build_classifier, load_encoder

log = logging.getLogger(__name__)

FeatureLayer = tuple[int, str]
"""Where features come from: block, counted from 1, and pooling, "cls" or "mean"."""
Features = dict[FeatureLayer, Tensor]
"""[N, D] float32 per place."""

BN_EPS, HEAD_STD, MOMENTUM = 1e-6, 0.01, 0.9  # MAE, as in facebookresearch/mae's linear probe
CHUNK = 65536
"""Rows per matrix product of the full-batch solver."""


def probe(config: FinetuneConfig) -> dict[str, Any]:
    """Run --knn or --linear_probe and write eval-<protocol>.json; returns what is in it.

    Raises ValueError, OSError or CheckpointError, with one line, for whatever the user can mend.
    """
    with runtime.start(config.device, config.precision, config.dist_url) as rt, logging_to_console(rt.is_main):
        began = time.perf_counter()
        start = load_encoder(config)
        sources = [open_labelled(start.data_path, s, n, config.seed, config.holdout) for s, n in _splits(config)]
        classes = check_classes(config, start.data_path, *sources)
        if config.knn and config.k > len(sources[0]):
            raise ValueError(f"--k {config.k} neighbours, but there are {len(sources[0])} training images")
        model = build_classifier(start, 0, pooled=False).to(rt.device).requires_grad_(False).eval()
        places = _places(config, start)
        log.info("%s of %s on %s", config.protocol, start.origin, rt.describe())

        augmented = config.linear_probe and config.features == "augmented"
        held_out = extract(model, eval_crops(config, start, sources[1]), places, start, config, rt)
        if augmented:
            scores, images_seen = _train_augmented(
                config, start, rt, model, sources[0], places, len(classes), held_out[0]
            )
        else:
            train = extract(model, eval_crops(config, start, sources[0]), places, start, config, rt)
            scores, images_seen = _score(config, rt, train, held_out[0], len(classes)), len(sources[0])

        tallies = {}
        for place in places:
            tallies[place] = Accuracy(len(classes), rt.device)
            tallies[place].add(scores[place], held_out[1].to(rt.device))
        headline = tallies[places[-1] if len(places) == 1 else _default_place(config, places)]
        rows = [{"layer": layer, "pooling": pooling, **t.result()} for (layer, pooling), t in tallies.items()]
        result = headline.result() | {"num_classes": len(classes), "train_images": len(sources[0]), "places": rows}
        if config.report:
            result |= headline.details(classes)
        if rt.is_main:
            for row in rows:
                log.info("block %d, %s: top-1 %.2f %%", row["layer"], row["pooling"], row["top1"])
            flops = start.flops_per_image * (images_seen + len(sources[1]))
            for path in write_result(config, start, rt, result, began, flops):
                log.info("written: %s", path)
        rt.barrier()
        return result


@torch.no_grad()
def extract(
    model: VisionTransformer,
    crops: EvalCrops,
    places: list[FeatureLayer],
    start: PretrainedEncoder,
    config: FinetuneConfig,
    rt: Runtime,
) -> tuple[Features, Tensor]:
    """Features of all centre crops at each place, and their labels [N], in order, on every rank.

    In the host's memory: of a million images, one place's take gigabytes.
    """
    normalize, parts, labels = Normalize(start.mean, start.std, rt), {place: [] for place in places}, []
    pin = config.pin_mem and rt.device.type == "cuda"
    for images, some in eval_batches(crops, rt.rank, rt.world_size, config.num_workers, pin):
        for place, features in features_of(model, normalize(images), places, rt).items():
            parts[place].append(features.cpu())
        labels.append(some)
    first = len(crops) * rt.rank // rt.world_size

    def whole(some: list[Tensor]) -> Tensor:  # [N, …] from every rank's rows
        rows = torch.cat(some)
        if rt.world_size == 1:
            return rows
        everything = rows.new_zeros(len(crops), *rows.shape[1:])
        everything[first : first + len(rows)] = rows
        return rt.sum(everything.to(rt.device)).cpu()

    return {place: whole(some) for place, some in parts.items()}, whole(labels)


@torch.no_grad()
def features_of(model: VisionTransformer, images: Tensor, places: list[FeatureLayer], rt: Runtime) -> Features:
    """Class token or mean patch token after the encoder's final norm, [B, D] float32, of the chosen blocks."""
    blocks = sorted({layer for layer, _ in places})
    with rt.autocast():
        tokens = model.forward_intermediates(
            images,
            indices=[block - 1 for block in blocks],
            return_prefix_tokens=True,
            norm=True,
            output_fmt="NLC",
            intermediates_only=True,
        )  # per block ([B, L, D], [B, 1, D])
    by_block = dict(zip(blocks, tokens, strict=True))
    return {
        (b, p): (by_block[b][1][:, 0] if p == "cls" else by_block[b][0].float().mean(dim=1)).float() for b, p in places
    }


def knn_scores(train: Tensor, labels: Tensor, queries: Tensor, num_classes: int, k: int, temperature: float) -> Tensor:
    """Votes [Q, K]: of the k nearest by cosine, each weighs exp(cosine / temperature).

    train: [N, D]. labels: [N]. queries: [Q, D].
    """
    train, votes = F.normalize(train, dim=1), []
    for some in F.normalize(queries, dim=1).split(max(1, 2**28 // len(train))):  # at most 1 GiB of similarities
        cosine, nearest = (some @ train.T).topk(k, dim=1)  # [q, k]
        weights = (cosine / temperature).exp()
        votes.append(weights.new_zeros(len(some), num_classes).scatter_add_(1, labels[nearest], weights))
    return torch.cat(votes)


def standardize(train: Tensor, *others: Tensor) -> list[Tensor]:
    """BatchNorm without affine, with the statistics of all training features; [N, D] each."""
    variance, mean = torch.var_mean(train, dim=0, correction=0)
    return [(features - mean) / (variance + BN_EPS).sqrt() for features in (train, *others)]


def solve_linear(features: Tensor, labels: Tensor, num_classes: int, l2: float, tolerance: float = 1e-6) -> nn.Linear:
    """The linear classifier that minimises mean cross-entropy + l2/2 · ‖W‖² (biases are free), by full-batch L-BFGS.

    features: [N, D], standardised. With l2 = 1/(C·N) it is scikit-learn's LogisticRegression. Warns if it hasn't
    converged: without l2 there is no minimum where the classes can be separated.
    """
    head = nn.Linear(features.shape[1], num_classes, device=features.device, dtype=torch.float64)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    solver = torch.optim.LBFGS(
        head.parameters(),
        max_iter=2000,
        history_size=20,
        tolerance_grad=tolerance,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        solver.zero_grad()
        total = l2 / 2 * head.weight.square().sum()
        total.backward()
        for x, y in zip(features.split(CHUNK), labels.split(CHUNK), strict=True):
            part = F.cross_entropy(head(x.double()), y, reduction="sum") / len(features)
            part.backward()
            total = total.detach() + part.detach()
        return total

    solver.step(objective)
    objective()
    slope = max(p.grad.abs().max().item() for p in head.parameters())
    if slope > 100 * tolerance:
        log.warning("the linear probe has not converged: its gradient is still %.1e; raise --l2", slope)
    return head.requires_grad_(False)


def probe_heads(places: list[FeatureLayer], width: int, num_classes: int) -> dict[FeatureLayer, nn.Sequential]:
    """The paper's head at each place: BatchNorm without affine, then a linear layer with N(0, 0.01) weights."""
    heads = {}
    for place in places:
        linear = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(linear.weight, std=HEAD_STD)
        nn.init.zeros_(linear.bias)
        heads[place] = nn.Sequential(nn.BatchNorm1d(width, affine=False, eps=BN_EPS), linear)
    return heads


def lars(heads: Mapping[FeatureLayer, nn.Module], weight_decay: float) -> Lars:
    """LARS as MAE uses it: the trust ratio for matrices only, whether there is weight decay or not."""
    parameters = [p for head in heads.values() for p in head.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "always_adapt": True, "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "always_adapt": False, "weight_decay": 0.0},
    ]
    return Lars(groups, lr=0.0, momentum=MOMENTUM)


def _score(
    config: FinetuneConfig, rt: Runtime, train: tuple[Features, Tensor], held_out: Features, num_classes: int
) -> Features:
    """Scores [Q, K] of the held-out images at each place, by kNN or by a converged linear classifier."""
    features, scores = train[0], {}
    labels = train[1].to(rt.device)
    for place in features:
        known, queries = features[place].to(rt.device), held_out[place].to(rt.device)
        if config.knn:
            scores[place] = knn_scores(known, labels, queries, num_classes, config.k, config.temperature)
        else:
            known, queries = standardize(known, queries)
            scores[place] = solve_linear(known, labels, num_classes, config.l2)(queries.double())
    return scores


def _train_augmented(
    config: FinetuneConfig,
    start: PretrainedEncoder,
    rt: Runtime,
    model: VisionTransformer,
    source: Source,
    places: list[FeatureLayer],
    num_classes: int,
    held_out: Features,
) -> tuple[Features, int]:
    """The paper's linear probe: LARS on random crops. Returns held-out scores and the number of images seen.

    Only the heads have gradients, so a step's features are gathered from micro-batches and normalised as one batch.
    """
    batch = config.total_batch(len(source), rt.world_size)
    steps = max(1, round(config.epochs * len(source) / batch))
    size = height_width(start.input_size)
    plan = Curriculum((Stage(size, start.num_patches, 0, batch, steps, start.flops_per_image),), len(source))
    crops = TrainCrops(source, size, start.mean, start.std, Augmentation(), config.seed)
    micro = config.batch_size or MICRO_BATCH
    batches = labelled_batches(
        crops,
        SampleStream(plan, config.seed, micro, 0, rt.rank, rt.world_size),
        CorruptLog(len(source), config.damaged_limit),
        config.num_workers,
        config.pin_mem and rt.device.type == "cuda",
    )
    torch.manual_seed(derive_seed(config.seed, "head"))
    heads = {place: head.to(rt.device) for place, head in probe_heads(places, model.embed_dim, num_classes).items()}
    optimizer, peak = lars(heads, config.weight_decay), config.peak_lr(batch)
    for step in range(steps):
        parts, labels = {place: [] for place in places}, []
        for _ in micro_batches(batch, micro, rt.rank, rt.world_size):
            images, some = next(batches)
            for place, features in features_of(model, rt.to_device(images), places, rt).items():
                parts[place].append(features)
            labels.append(some.to(rt.device, non_blocking=True))
        target = torch.cat(labels)
        loss = sum(F.cross_entropy(heads[p](torch.cat(parts[p])), target, reduction="sum") for p in places) / batch
        optimizer.zero_grad()
        loss.backward()
        for parameter in (p for head in heads.values() for p in head.parameters()):
            rt.sum(parameter.grad)
        warmup = config.warmup_epochs / config.epochs
        set_learning_rate(optimizer, learning_rate(step / steps, peak=peak, floor=config.min_lr, warmup=warmup))
        optimizer.step()
        if (step + 1) % max(1, steps // 20) == 0:
            log.info("step %d/%d · loss %.4f", step + 1, steps, loss.item() / len(places) * rt.world_size)
    scores = {place: head.eval()(held_out[place].to(rt.device)) for place, head in heads.items()}
    return scores, plan.total_images


def _splits(config: FinetuneConfig) -> tuple[tuple[str, int | None], ...]:
    return ("train", config.train_images), ("val", config.eval_images)


def _places(config: FinetuneConfig, start: PretrainedEncoder) -> list[FeatureLayer]:
    """The last block with the configured pooling, or the --layers with both."""
    depth = start.shape["depth"]
    if not config.layers:
        return [(depth, "mean" if config.pooled else "cls")]
    if wrong := [layer for layer in config.layers if not 1 <= layer <= depth]:
        raise ValueError(f"--layers {wrong[0]}: this encoder has blocks 1 to {depth}")
    return [(layer, pooling) for layer in sorted(set(config.layers)) for pooling in ("cls", "mean")]


def _default_place(config: FinetuneConfig, places: list[FeatureLayer]) -> FeatureLayer:
    """The one that counts as the result among several: the last block, not the best, which would be selection."""
    return places[-1][0], "mean" if config.pooled else "cls"
