"""The order of samples: pure functions of (seed, step), so that data and masks do not depend on the number of ranks
or workers, and a run resumes exactly, mid-epoch, even on another number of devices.

Decoded images are counted through training: image d is place d % N of the permutation of epoch d // N. Its crops have
the sample numbers d·views + 0, 1, ..., which key their augmentation. Mask noise is drawn for the whole batch from
(seed, step), and each rank takes its rows.

Replay is index arithmetic too. The rows of a batch form groups, one per decoded image that the batch shows. Group q
takes a fresh image every `replay` steps (groups take turns, so every step has batch/replay fresh ones) and in between
shows its own earlier images again, evenly spaced over its last `replay_depth` ones. Groups never exchange images, so
ranks don't either, and the samples of a step follow from its number alone.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler

from ..plan.curriculum import Curriculum


class Sample(NamedTuple):
    """One input to make. The stage, and so the size, travels with it."""

    index: int
    """Image in the source."""
    number: int
    """Global sample number: the key of its augmentation."""
    stage: int
    """Number of the stage."""
    slot: int = 0
    """Place in the replay buffer over all ranks. A sample keeps it until it is shown for the last time."""


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


def micro_batches(batch_size: int, micro_size: int, rank: int, world_size: int, group_size: int = 1) -> list[range]:
    """Split a rank's rows into micro-batches of at most `micro_size` rows, as even as possible.

    group_size: neighbouring rows that stay in one micro-batch, since they show one decoded image.
    """
    rows = rank_rows(batch_size, rank, world_size)
    groups = -(-len(rows) // group_size)
    count = -(-groups // max(1, micro_size // group_size))
    return [rows[groups * i // count * group_size : groups * (i + 1) // count * group_size] for i in range(count)]


def mask_noise(seed: int, step: int, batch_size: int, patches: int) -> Tensor:
    """Uniform noise [batch, L] of a whole step, on the CPU: the patches with the lowest noise stay visible."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "mask", step))
    return torch.rand(batch_size, patches, generator=generator)


def samples_at(curriculum: Curriculum, seed: int, step: int, rows: range) -> list[Sample]:
    """The samples in these rows of a step's batch."""
    index = curriculum.index(step)
    stage, start = curriculum.stages[index], curriculum.start(index)
    decoded = curriculum.decoded_before(start)
    views, masks, replay, depth = stage.views_per_image, stage.masks_per_image, stage.replay, stage.replay_depth
    samples = []
    for row in rows:
        group, view = divmod(row // masks, views)
        # The group is at its `cycle`-th image; turn 0 shows it fresh, the others show an earlier image of the group.
        cycle, turn = divmod(step - start + group % replay, replay)
        if turn:
            cycle -= turn * (depth - 1) // (replay - 1) % (cycle + 1)
        fresh_at = max(0, cycle * replay - group % replay)
        # At step 0 all groups are fresh, later every `replay`-th.
        image = decoded + stage.decoded_before(fresh_at) + (group // replay if fresh_at else group)
        slot = (group * views + view) * depth + cycle % depth
        samples.append(Sample(image_index(seed, image, curriculum.num_images), image * views + view, index, slot))
    return samples


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
            stage = self.curriculum.at(step)
            micro_size = stage.micro_size(self.micro_size)
            group_size = stage.rows_per_image
            for rows in micro_batches(stage.batch_size, micro_size, self.rank, self.world_size, group_size):
                yield samples_at(self.curriculum, self.seed, step, rows)
