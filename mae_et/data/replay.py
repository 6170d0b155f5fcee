"""Replay buffer of uint8 crops between the loader and the trainer, so that a sample shown again isn't decoded again.

After the replay buffer of EfficientTrain++ (arXiv 2405.08768). `stream` decides which sample a step shows, without
looking at the buffer; only samples that the buffer doesn't hold are decoded. So a buffer changes the time of a run but
not its data: a resumed run starts with an empty one and decodes again what it needs, on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from ..plan.curriculum import Stage
from .stream import Samples, SampleStream, rank_rows


class Slots:
    """Sample numbers that a rank's buffer holds, by slot. Emptied when a stage begins."""

    def __init__(self, stages: tuple[Stage, ...], rank: int, world_size: int) -> None:
        self.stages, self.rank, self.world_size = stages, rank, world_size
        self.stage = -1

    def start_stage(self, index: int) -> bool:
        """Begin a stage and return True, unless it is the current one."""
        if index == self.stage:
            return False
        stage = self.stages[index]
        rows = rank_rows(stage.batch_size, self.rank, self.world_size)
        depth, masks = stage.replay_depth, stage.masks_per_image
        self.stage, self.first = index, rows.start // masks * depth
        self.numbers = np.full(-(-len(rows) // masks) * depth, -1, dtype=np.int64)
        return True

    def insert(self, samples: Samples) -> Samples:
        """Insert a micro-batch; returns the samples that were missing, each once."""
        places = samples.slot - self.first
        # Rows that show one sample, with a mask each, are neighbours.
        missing = samples[(np.diff(places, prepend=-1) != 0) & (self.numbers[places] != samples.number)]
        self.numbers[missing.slot - self.first] = missing.number
        return missing


class MissingSamples(Sampler[Samples]):
    """The micro-batches of a stream, without the samples that the buffer holds by then. They may be empty."""

    def __init__(self, stream: SampleStream) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[Samples]:
        slots = slots_of(self.stream)
        for samples in self.stream:
            slots.start_stage(samples.stage)
            yield slots.insert(samples)


def replayed(
    stream: SampleStream, chunks: Iterator[Sequence[Tensor]], pin_memory: bool
) -> Generator[tuple[Tensor], None, None]:
    """The micro-batches of `stream`, uint8 [b, C, h, w], from the chunks of its MissingSamples, uint8 [c, C, h, w]."""
    slots = slots_of(stream)
    buffer = np.empty(0)
    for samples in stream:
        new_stage, missing = slots.start_stage(samples.stage), slots.insert(samples)
        done = 0
        while done < len(missing):
            (images,) = next(chunks)
            if new_stage:
                buffer = np.empty(0)  # free the old one first
                buffer = np.empty((len(slots.numbers), *images.shape[1:]), np.uint8)
                new_stage = False
            first, done = done, done + len(images)
            buffer[missing.slot[first:done] - slots.first] = images.numpy()
        batch = torch.empty(len(samples), *buffer.shape[1:], dtype=torch.uint8, pin_memory=pin_memory)
        np.take(buffer, samples.slot - slots.first, axis=0, out=batch.numpy(), mode="clip")  # "raise" makes a copy
        yield (batch,)


def slots_of(stream: SampleStream) -> Slots:
    return Slots(stream.curriculum.stages, stream.rank, stream.world_size)
