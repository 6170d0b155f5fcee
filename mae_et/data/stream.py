"""Which sample at which step: pure functions of (seed, step), so that data and masks do not depend on the number of
ranks or workers, and a run resumes exactly, mid-epoch, even on another number of devices.

A global sample number g counts through training: it is place g % N of the permutation of epoch g // N. Augmentation is
keyed by the sample number; mask noise is drawn for the whole batch from (seed, step), and each rank takes its rows.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler

from ..curriculum import Curriculum


class Sample(NamedTuple):
    """What a worker needs to make one input. The stage, and so the size, travels with it."""

    index: int
    """Image in the source."""
    number: int
    """Global sample number: the key of its augmentation."""
    stage: int
    """Number of the stage."""


def derive_seed(seed: int, *purpose: int | str) -> int:
    """A 63-bit seed for one purpose, e.g. ("augment", sample number); independent of any other."""
    digest = hashlib.blake2b(repr((seed, *purpose)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@functools.lru_cache(maxsize=2)  # a batch may span two epochs
def _permutation(seed: int, epoch: int, num_images: int) -> Tensor:
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    return torch.randperm(num_images, generator=generator)


def image_index(seed: int, number: int, num_images: int) -> int:
    """The image that is sample `number`: every image once per epoch, in a new order each epoch."""
    epoch, place = divmod(number, num_images)
    return int(_permutation(seed, epoch, num_images)[place])


def rank_rows(batch_size: int, rank: int, world_size: int) -> range:
    """Rows of the global batch that a rank works on; sizes differ by at most one."""
    return range(batch_size * rank // world_size, batch_size * (rank + 1) // world_size)


def micro_batches(batch_size: int, micro_size: int, rank: int, world_size: int) -> list[range]:
    """A rank's rows in pieces of at most `micro_size`, as even as they can be, which are accumulated into one step."""
    rows = rank_rows(batch_size, rank, world_size)
    pieces = -(-len(rows) // micro_size)
    return [rows[len(rows) * i // pieces : len(rows) * (i + 1) // pieces] for i in range(pieces)]


def mask_noise(seed: int, step: int, batch_size: int, patches: int) -> Tensor:
    """Uniform noise [batch, L] of a whole step, on the CPU: the patches with the lowest noise stay visible."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "mask", step))
    return torch.rand(batch_size, patches, generator=generator)


class SampleStream(Sampler[list[Sample]]):
    """Micro-batches of samples, from `first_step` to the end of the curriculum, for one rank."""

    def __init__(
        self,
        curriculum: Curriculum,
        seed: int,
        micro_size: int,
        first_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.curriculum, self.seed, self.micro_size = curriculum, seed, micro_size
        self.first_step, self.rank, self.world_size = first_step, rank, world_size

    def __iter__(self) -> Iterator[list[Sample]]:
        for step in range(self.first_step, self.curriculum.total_steps):
            stage = self.curriculum.index(step)
            first = self.curriculum.images_before(step)
            batch_size = self.curriculum.stages[stage].batch_size
            micro_size = self.curriculum.stages[stage].micro_size(self.micro_size)
            for rows in micro_batches(batch_size, micro_size, self.rank, self.world_size):
                numbers = (first + row for row in rows)
                yield [Sample(image_index(self.seed, g, self.curriculum.num_images), g, stage) for g in numbers]
