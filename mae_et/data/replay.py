"""Samples that are shown more than once are decoded once: a buffer of uint8 crops between the loader and the trainer.

After the replay buffer of EfficientTrain++ (arXiv 2405.08768). Which sample a step shows is settled in `stream`,
without the buffer; here only those are decoded that the buffer doesn't hold. So a buffer changes the time of a run but
not its data: a resumed run starts with an empty one and decodes again what it needs, on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from ..plan.curriculum import Stage
from .stream import Sample, SampleStream, rank_rows


class Slots:
    """Which samples a rank's buffer holds. Emptied when a stage begins."""

    def __init__(self, stages: tuple[Stage, ...], rank: int, world_size: int) -> None:
        self.stages, self.rank, self.world_size = stages, rank, world_size
        self.stage = -1

    def start_stage(self, stage: int) -> bool:
        """Begin a stage, if it isn't the current one."""
        if stage == self.stage:
            return False
        now = self.stages[stage]
        rows = rank_rows(now.batch_size, self.rank, self.world_size)
        depth, masks = now.replay_depth, now.masks_per_image
        self.stage, self.first = stage, rows.start // masks * depth
        self.numbers = np.full(-(-len(rows) // masks) * depth, -1, dtype=np.int64)
        return True

    def insert(self, samples: list[Sample]) -> list[Sample]:
        """The samples of a micro-batch that are missing, each once; from here on they are held."""
        missing = []
        for sample in samples:
            if self.numbers[sample.slot - self.first] != sample.number:
                self.numbers[sample.slot - self.first] = sample.number
                missing.append(sample)
        return missing


class MissingSamples(Sampler[list[Sample]]):
    """The micro-batches of a stream without what the buffer will hold by then. They may be empty."""

    def __init__(self, stream: SampleStream) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[list[Sample]]:
        slots = slots_of(self.stream)
        for samples in self.stream:
            slots.start_stage(samples[0].stage)
            yield slots.insert(samples)


def replayed(stream: SampleStream, decoded: Iterator[Tensor], pin_memory: bool) -> Iterator[Tensor]:
    """The micro-batches of `stream`, uint8 [b, C, h, w], from those of its MissingSamples [f, C, h, w], f <= b."""
    slots = slots_of(stream)
    buffer = torch.empty(0)
    for samples, images in zip(stream, decoded, strict=True):
        if slots.start_stage(samples[0].stage):
            buffer = torch.empty(0)  # frees the old one first
            buffer = torch.empty(len(slots.numbers), *images.shape[1:], dtype=torch.uint8)
        if missing := slots.insert(samples):
            buffer[[sample.slot - slots.first for sample in missing]] = images
        batch = torch.empty(len(samples), *buffer.shape[1:], dtype=torch.uint8, pin_memory=pin_memory)
        yield torch.index_select(buffer, 0, torch.tensor([s.slot - slots.first for s in samples]), out=batch)


def slots_of(stream: SampleStream) -> Slots:
    return Slots(stream.curriculum.stages, stream.rank, stream.world_size)
