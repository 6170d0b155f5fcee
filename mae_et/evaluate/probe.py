"""Probes of frozen features: kNN and linear classifiers. The backbone is in evaluation mode and never changes.

N images · L patches · D width · K classes. Source: MAE, arXiv 2111.06377, Appendix A.1 (linear probe).
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from timm.optim import Lars
from torch import Tensor, nn

from ..console import logging_to_console
from ..data.corruptions import CORRUPTIONS, CommonCorruption
from ..data.labelled import Augmentation, EvalCrops, TrainCrops, labelled_batches, open_labelled
from ..data.loader import CorruptLog
from ..data.sources import Source
from ..data.stream import SampleStream, derive_seed, micro_batches
from ..engine import runtime
from ..engine.features import gather_features, knn_scores
from ..engine.optim import learning_rate, set_learning_rate
from ..engine.runtime import Normalize, Runtime
from ..plan.curriculum import Curriculum, Stage
from ..plan.shapes import height_width
from .accuracy import Accuracy, check_result_folders, eval_crops, make_folders, under_corruptions, write_result
from .classes import classes_of, with_classes
from .config import FinetuneConfig
from .encoder import PretrainedEncoder, build_classifier, load_encoder

log = logging.getLogger(__name__)

FeatureLayer = tuple[int, str]
"""Block, counted from 1, and pooling, "cls" or "mean"."""
Features = dict[FeatureLayer, Tensor]
"""[N, D] float32 per layer."""
Classify = Callable[[Features], Features]
"""Features of held-out images -> scores [N, K] per layer."""

BN_EPS, HEAD_STD, MOMENTUM = 1e-6, 0.01, 0.9  # MAE, as in facebookresearch/mae's linear probe
CHUNK = 65536
"""Rows per matrix product of the full-batch solver."""


def probe(config: FinetuneConfig) -> dict[str, dict[str, Any]]:
    """Run --knn, --linear_probe or both on the same features; write eval-<protocol>.json each.

    Returns what is in them, by protocol. Raises ValueError, OSError or CheckpointError, with one line, for whatever the
    user can mend.
    """
    runtime.check_launcher(config.world_size)
    with runtime.start(config.device, config.precision, config.dist_url) as rt, logging_to_console(rt.is_main):
        began = time.perf_counter()
        if rt.device.type == "mps" and any(p.linear_probe and p.features == "cached" for p in config.probes):
            raise ValueError("--linear_probe is solved in float64, which mps hasn't; use --device cpu")
        encoder = load_encoder(config)
        check_result_folders(config, encoder)
        with encoder.explained(config):
            train, val = (
                open_labelled(encoder.data_path, s, n, config.seed, config.holdout) for s, n in _splits(config)
            )
        encoder = encoder.with_value_range(train, rt)
        classes = classes_of(config, train, encoder.data_path)
        val = with_classes(val, classes, encoder.data_path, "the training images")
        if config.knn and config.k > len(train):
            raise ValueError(f"--k {config.k} neighbours, but there are {len(train)} training images; lower --k")
        if config.linear_probe and config.features == "augmented":
            batch = config.total_batch(len(train), rt.world_size)
            if batch < 2 * rt.world_size:
                raise ValueError(
                    f"a batch of {batch}: --features augmented normalises features over those of a device; give a "
                    f"--total_batch_size of {2 * rt.world_size} or more"
                )
        model = build_classifier(encoder, 0, pooled=False).to(rt.device).requires_grad_(False).eval()
        layers = _layers(config, encoder)
        encoder.log_record()
        crops = eval_crops(config, encoder, val)
        make_folders(config, encoder)
        held_out, labels = extract(model, crops, layers, encoder, config, rt)
        images, known, results = len(val) * (1 + len(CORRUPTIONS) * config.corruptions), None, {}

        @functools.cache  # of one layer, 25 times as many as the held-out images have
        def corrupted(corruption: CommonCorruption) -> tuple[Features, Tensor]:
            return extract(model, crops.corrupted(corruption), [_headline(config, layers)], encoder, config, rt)

        for protocol in config.probes:
            log.info("%s of %s on %s", protocol.protocol, encoder.origin, rt.describe())
            if protocol.linear_probe and protocol.features == "augmented":
                classify, seen = _train_augmented(protocol, encoder, rt, model, train, layers, len(classes))
                images += seen
            else:
                if known is None:
                    known = extract(model, eval_crops(config, encoder, train), layers, encoder, config, rt)
                    images += len(train)
                    if config.knn and config.k > len(known[1]):
                        raise ValueError(
                            f"--k {config.k} neighbours, but {len(known[1])} training images can be read; lower --k"
                        )
                classify = _fit(protocol, rt, known, len(classes))
            result = _result(protocol, classify(held_out), labels, classes, len(known[1]) if known else len(train))
            if config.corruptions:
                judge = functools.partial(_corrupted_accuracy, classify, corrupted, len(classes))
                result |= under_corruptions(judge)
            results[protocol.protocol] = result
            if rt.is_main:
                for row in result["places"]:
                    log.info("block %d, %s: top-1 %.2f %%", row["layer"], row["pooling"], row["top1"])
                # Of several protocols each states what it added; the first one pays for the features.
                cost = time.perf_counter() - began, encoder.flops_per_image * images
                for path in write_result(protocol, encoder, rt, result, *cost):
                    log.info("written: %s", path)
            began, images = time.perf_counter(), 0
        rt.barrier()
        return results


def _result(
    config: FinetuneConfig, scores: Features, labels: Tensor, classes: Sequence[str], train_images: int
) -> dict[str, Any]:
    """Accuracy at each layer; the headline is that of the default layer."""
    accuracies = {layer: _accuracy(values, labels, len(classes)) for layer, values in scores.items()}
    headline = accuracies[_headline(config, list(scores))]
    rows = [{"layer": block, "pooling": pooling, **a.result()} for (block, pooling), a in accuracies.items()]
    result = headline.result() | {"num_classes": len(classes), "train_images": train_images, "places": rows}
    return result | (headline.details(classes) if config.report else {})


def _corrupted_accuracy(
    classify: Classify,
    corrupted: Callable[[CommonCorruption], tuple[Features, Tensor]],
    num_classes: int,
    corruption: CommonCorruption,
) -> Accuracy:
    """Of the only layer that `corrupted` gives features of."""
    features, labels = corrupted(corruption)
    (scores,) = classify(features).values()
    return _accuracy(scores, labels, num_classes)


def _accuracy(scores: Tensor, labels: Tensor, num_classes: int) -> Accuracy:
    accuracy = Accuracy(num_classes, scores.device)
    accuracy.add(scores, labels.to(scores.device))
    accuracy.check("the probe's classifier (is --lr, --blr or --l2 too high?)")
    return accuracy


def extract(
    model: VisionTransformer,
    crops: EvalCrops,
    layers: list[FeatureLayer],
    encoder: PretrainedEncoder,
    config: FinetuneConfig,
    rt: Runtime,
) -> tuple[Features, Tensor]:
    """Features of all centre crops at each layer, and their labels [N], as :func:`gather_features` has them."""
    normalize = Normalize(encoder.mean, encoder.std, rt)
    how = crops, rt, config.num_workers, config.pin_mem, encoder.origin
    return gather_features(lambda images: features_of(model, normalize(images), layers, rt), *how)


@torch.no_grad()
def features_of(model: VisionTransformer, images: Tensor, layers: list[FeatureLayer], rt: Runtime) -> Features:
    """Class token or mean patch token after the encoder's final norm, [B, D] float32, of the chosen blocks."""
    blocks = sorted({layer for layer, _ in layers})
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
        (b, p): (by_block[b][1][:, 0] if p == "cls" else by_block[b][0].float().mean(dim=1)).float() for b, p in layers
    }


def standardize(features: Tensor, variance: Tensor, mean: Tensor) -> Tensor:
    """BatchNorm without affine, with the statistics [D] of all training features; features: [N, D]."""
    return (features - mean) / (variance + BN_EPS).sqrt()


def solve_linear(features: Tensor, labels: Tensor, num_classes: int, l2: float, tolerance: float = 1e-6) -> nn.Linear:
    """The linear classifier that minimises mean cross-entropy + l2/2 · ‖W‖² (biases are free), by full-batch L-BFGS.

    features: [N, D], standardised. With l2 = 1/(C·N) it is scikit-learn's LogisticRegression. Warns if it hasn't
    converged: without l2 there is no minimum where the classes can be separated.
    """
    # Features are correlated; in whitened coordinates x·T the same minimum takes less than half as many steps.
    covariance = sum(x.double().T @ x.double() for x in features.split(CHUNK)) / len(features)
    values, vectors = torch.linalg.eigh(covariance)
    whiten = vectors * (values.clamp_min(0) + 1).rsqrt()
    rotated = nn.Parameter(features.new_zeros(num_classes, features.shape[1], dtype=torch.float64))
    bias = nn.Parameter(features.new_zeros(num_classes, dtype=torch.float64))
    solver = torch.optim.LBFGS(
        [rotated, bias],
        max_iter=2000,
        history_size=20,
        tolerance_grad=tolerance,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        solver.zero_grad()
        total = l2 / 2 * (rotated @ whiten.T).square().sum()
        total.backward()
        for x, y in zip(features.split(CHUNK), labels.split(CHUNK), strict=True):
            part = F.cross_entropy(x.double() @ (rotated @ whiten.T).T + bias, y, reduction="sum") / len(features)
            part.backward()
            total = total.detach() + part.detach()
        return total

    solver.step(objective)
    objective()
    slope = max(p.grad.abs().max().item() for p in (rotated, bias))
    if slope > 100 * tolerance:
        log.warning("the linear probe has not converged: its gradient is still %.1e; raise --l2", slope)
    head = nn.Linear(features.shape[1], num_classes, device=features.device, dtype=torch.float64)
    head.weight.data, head.bias.data = rotated.detach() @ whiten.T, bias.detach()
    return head.requires_grad_(False)


def probe_heads(layers: list[FeatureLayer], width: int, num_classes: int) -> dict[FeatureLayer, nn.Sequential]:
    """The paper's head at each layer: BatchNorm without affine, then a linear layer with N(0, 0.01) weights."""
    heads = {}
    for layer in layers:
        linear = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(linear.weight, std=HEAD_STD)
        nn.init.zeros_(linear.bias)
        heads[layer] = nn.Sequential(nn.BatchNorm1d(width, affine=False, eps=BN_EPS), linear)
    return heads


def lars(heads: Mapping[FeatureLayer, nn.Module], weight_decay: float) -> Lars:
    """LARS as MAE uses it: the trust ratio for matrices only, whether there is weight decay or not."""
    parameters = [p for head in heads.values() for p in head.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "always_adapt": True, "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "always_adapt": False, "weight_decay": 0.0},
    ]
    return Lars(groups, lr=0.0, momentum=MOMENTUM)


def _fit(config: FinetuneConfig, rt: Runtime, train: tuple[Features, Tensor], num_classes: int) -> Classify:
    """kNN, or a converged linear classifier, at each layer."""
    features, labels = train[0], train[1].to(rt.device)
    if config.knn:

        def vote(queries: Features) -> Features:
            how = num_classes, config.k, config.temperature
            return {p: knn_scores(features[p].to(rt.device), labels, q.to(rt.device), *how) for p, q in queries.items()}

        return vote
    statistics, heads = {}, {}
    for layer, each in features.items():
        known = each.to(rt.device)
        statistics[layer] = torch.var_mean(known, dim=0, correction=0)
        heads[layer] = solve_linear(standardize(known, *statistics[layer]), labels, num_classes, config.l2)
    return lambda queries: {
        p: heads[p](standardize(q.to(rt.device), *statistics[p]).double()) for p, q in queries.items()
    }


def _train_augmented(
    config: FinetuneConfig,
    encoder: PretrainedEncoder,
    rt: Runtime,
    model: VisionTransformer,
    source: Source,
    layers: list[FeatureLayer],
    num_classes: int,
) -> tuple[Classify, int]:
    """The paper's linear probe: LARS on random crops. Returns the classifier and the number of images seen.

    Only the heads have gradients, so a step's features are gathered from micro-batches and normalised as one batch.
    """
    batch = config.total_batch(len(source), rt.world_size)
    steps = max(1, round(config.epochs * len(source) / batch))
    size = height_width(encoder.input_size)
    curriculum = Curriculum((Stage(size, encoder.num_patches, 0, batch, steps, encoder.flops_per_image),), len(source))
    crops = TrainCrops(
        source,
        size,
        encoder.mean,
        encoder.std,
        Augmentation(config.crop_scale),
        config.seed,
        encoder.record.value_range,
    )
    micro = config.micro_batch
    batches = labelled_batches(
        crops,
        SampleStream(curriculum, config.seed, micro, 0, rt.rank, rt.world_size),
        CorruptLog(len(source), config.damaged_limit),
        rt.loading(config.num_workers, config.pin_mem),
    )
    torch.manual_seed(derive_seed(config.seed, "head"))
    heads = {layer: head.to(rt.device) for layer, head in probe_heads(layers, model.embed_dim, num_classes).items()}
    optimizer, peak = lars(heads, config.weight_decay), config.peak_lr(batch)
    for step in range(steps):
        parts, labels = {layer: [] for layer in layers}, []
        for _ in micro_batches(batch, micro, rt.rank, rt.world_size):
            images, batch_labels = next(batches)
            for layer, features in features_of(model, rt.to_device(images), layers, rt).items():
                parts[layer].append(features)
            labels.append(batch_labels.to(rt.device, non_blocking=True))
        target = torch.cat(labels)
        loss = sum(F.cross_entropy(heads[p](torch.cat(parts[p])), target, reduction="sum") for p in layers) / batch
        optimizer.zero_grad()
        loss.backward()
        for parameter in (p for head in heads.values() for p in head.parameters()):
            rt.sum(parameter.grad)
        warmup = config.warmup_epochs / config.epochs
        set_learning_rate(optimizer, learning_rate(step / steps, peak=peak, floor=config.min_lr, warmup=warmup))
        optimizer.step()
        if (step + 1) % max(1, steps // 20) == 0:
            log.info("step %d/%d · loss %.4f", step + 1, steps, loss.item() / len(layers) * rt.world_size)
    return (
        lambda queries: {layer: heads[layer].eval()(features.to(rt.device)) for layer, features in queries.items()},
        curriculum.total_images,
    )


def _splits(config: FinetuneConfig) -> tuple[tuple[str, int | None], ...]:
    return ("train", config.train_images), ("val", config.eval_images)


def _layers(config: FinetuneConfig, encoder: PretrainedEncoder) -> list[FeatureLayer]:
    """The last block with the configured pooling, or the --layers with both."""
    depth = encoder.shape.depth
    if not config.layers:
        return [(depth, "mean" if config.pooled else "cls")]
    if wrong := [block for block in config.layers if not 1 <= block <= depth]:
        raise ValueError(f"--layers {wrong[0]}: this encoder has blocks 1 to {depth}")
    return [(block, pooling) for block in sorted(set(config.layers)) for pooling in ("cls", "mean")]


def _headline(config: FinetuneConfig, layers: list[FeatureLayer]) -> FeatureLayer:
    """The layer that counts as the result: of several the last block, not the best, which would be selection."""
    return layers[0] if len(layers) == 1 else (layers[-1][0], "mean" if config.pooled else "cls")
