"""Online quality: while a run trains, what the features of held-out training images are worth.

N images · D width.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.labelled import EvalCrops
from ..data.sources import open_source, subset
from ..model import MaskedAutoencoder
from ..plan.cost import encoder_flops_per_image
from ..plan.curriculum import Curriculum
from ..plan.shapes import height_width
from ..record import default_crop_pct
from .features import gather_features, knn_scores, rank_me
from .meters import reset_peak_memory
from .run import PretrainRun
from .runtime import Runtime

MAX_IMAGES = 10_000
"""Of more held-out images so many are looked at, equally many of each class."""
NEIGHBOURS, TEMPERATURE = 20, 0.07  # as main_finetune.py --knn


def is_due(curriculum: Curriculum, step: int, every: float) -> bool:
    """Whether `step` steps reach another multiple of the share `every` of the compute, or its end. every 0: never."""
    if not every:
        return False
    reached, before = (int(curriculum.position(s) / every + 1e-9) for s in (step, step - 1))
    return reached > before or step == curriculum.total_steps


class OnlineProbe:
    """Measures a run on always the same held-out training images, without an effect on its training."""

    def __init__(self, run: PretrainRun) -> None:
        """ValueError where the run holds out too few images, or too many of them can't be read."""
        config = run.config
        source = open_source(config.data_path, "val", config.holdout)
        if len(source) < max(2, run.rt.world_size):
            raise ValueError(f"--probe_every: --holdout {config.holdout} is too few images; give a hundred or more")
        source = subset(source, min(len(source), MAX_IMAGES), seed=0, proportional=True)
        size_px = height_width(config.input_size)
        pixels = config.in_chans, default_crop_pct(size_px), run.value_range
        self.crops = EvalCrops(source, size_px, *pixels, damaged_limit=config.damaged_limit)
        if run.rt.is_main:
            self.crops.look()  # before training
        self.flops = len(source) * encoder_flops_per_image(run.model.shape, run.model.num_patches)
        """Of one measurement."""

    def measure(self, run: PretrainRun, index: int) -> dict[str, float]:
        """Quality of the run's features, by name; the cost is booked under stage number `index`. All ranks call it.

        Features are those of the full-size image, after the encoder's norm: the class token (`_cls`) and the mean of
        the patch tokens (`_mean`). `knn_*`: leave-one-out top-1 in per cent, where images have labels. `rankme_*`: the
        effective rank of the features. Ranks but the first return nothing.
        """
        began, config, rt, model = time.perf_counter(), run.config, run.rt, run.full_model()
        if run.is_sharded:  # rank 0 alone has the whole model
            rt = dataclasses.replace(rt, world_size=1)
        quality = {}
        if rt.is_main or not run.is_sharded:
            with torch.compiler.set_stance("force_eager"):  # not compiled anew
                features, labels = gather_features(
                    lambda images: _features_of(model, run, images),
                    *(self.crops, rt, config.num_workers, config.pin_mem),
                    whose="--probe_every: the encoder",
                    batch_size=min(256, config.batch_size),  # needs less memory than training does
                )
            quality = _judge(features, labels, self.crops.source.classes, rt) if rt.is_main else {}
        run.rt.barrier()
        reset_peak_memory(rt.device)  # this was not the stage's
        cost = run.ledger.stages[index]
        cost.probe_seconds += time.perf_counter() - began
        cost.probe_flops += self.flops
        return quality


def quality_words(record: Mapping[str, Any]) -> str:
    """What the progress line says of the latest quality; "" before there is one."""
    if "knn_mean" in record:
        return f" · kNN {record['knn_mean']:.1f} %"
    return f" · RankMe {record['rankme_mean']:.1f}" if "rankme_mean" in record else ""


def _features_of(model: MaskedAutoencoder, run: PretrainRun, images: Tensor) -> dict[str, Tensor]:
    """uint8 [B, C, H, W] -> float32 [B, D] per pooling."""
    with run.rt.autocast():
        tokens = model.encode(run.normalize(images)).float()  # [B, 1+L, D]
    return {"cls": tokens[:, 0], "mean": tokens[:, 1:].mean(dim=1)}


def _judge(
    features: Mapping[str, Tensor], labels: Tensor, classes: Sequence[str] | None, rt: Runtime
) -> dict[str, float]:
    """features: [N, D] per pooling. labels: [N]."""
    quality = {}
    for pooling, x in features.items():
        if classes:
            where, neighbours = (x.to(rt.device), labels.to(rt.device)), min(NEIGHBOURS, len(x) - 1)
            votes = knn_scores(*where, None, len(classes), neighbours, TEMPERATURE)
            quality[f"knn_{pooling}"] = 100 * (votes.argmax(dim=1).cpu() == labels).double().mean().item()
        quality[f"rankme_{pooling}"] = rank_me(x)
    return quality
