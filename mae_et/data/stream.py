"""The order of samples: pure functions of (seed, step), so that data and masks do not depend on the number of ranks
or workers, and a run resumes exactly, mid-epoch, even on another number of devices.

Decoded images are counted through training: image d is place d % N of the permutation of epoch d // N. Its crops have
the sample numbers d·views + 0, 1, ..., which key their augmentation. Mask noise of a row is a function of (seed, step,
row): a counter-based generator begins anywhere, so each rank draws its own rows only.

Replay is index arithmetic too. The rows of a batch form groups, one per decoded image that the batch shows. Group q
takes a fresh image every `replay` steps (groups take turns, so every step has batch/replay fresh ones) and in between
shows its own earlier images again, evenly spaced over its last `replay_depth` ones. Groups never exchange images, so
ranks don't either, and the samples of a step follow from its number alone.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from ..plan.curriculum import Curriculum, Stage, micro_batch_count

PHILOX_BLOCK = 8
"""Numbers of 32 bits that one step of Philox's counter gives."""


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


@dataclass(frozen=True)
class Samples:
    """Samples of one stage, a column for each field of :class:`Sample`: what the process that trains does for an image
    must cost next to nothing.
    """

    index: np.ndarray  # [b] int64, and so are the others
    number: np.ndarray
    stage: int
    slot: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: slice | np.ndarray) -> Samples:
        """Some of the samples: a slice, or a mask [b]."""
        return Samples(self.index[rows], self.number[rows], self.stage, self.slot[rows])

    def __iter__(self) -> Iterator[Sample]:
        for index, number, slot in zip(self.index.tolist(), self.number.tolist(), self.slot.tolist(), strict=True):
            yield Sample(index, number, self.stage, slot)


def derive_seed(seed: int, *purpose: int | str) -> int:
    """A 63-bit seed for one purpose, e.g. ("augment", sample number); independent of any other."""
    digest = hashlib.blake2b(repr((seed, *purpose)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@functools.lru_cache(maxsize=2)  # a batch may span two epochs
def _permutation(seed: int, epoch: int, num_images: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    return torch.randperm(num_images, generator=generator).numpy()


def image_index(seed: int, number: np.ndarray, num_images: int) -> np.ndarray:
    """The images that are samples `number` [b]: every image once per epoch, in a new order each epoch."""
    epochs, index = np.divmod(number, num_images)
    for epoch in np.unique(epochs):
        now = epochs == epoch
        index[now] = _permutation(seed, int(epoch), num_images)[index[now]]
    return index


def rank_rows(batch_size: int, rank: int, world_size: int) -> range:
    """Rows of the global batch that a rank works on; sizes differ by at most one."""
    return range(batch_size * rank // world_size, batch_size * (rank + 1) // world_size)


def micro_batches(batch_size: int, micro_size: int, rank: int, world_size: int, group_size: int = 1) -> list[range]:
    """Split a rank's rows into micro-batches of at most `micro_size` rows: of one size where one divides them, else
    as even as possible (see `micro_batch_count`).

    group_size: neighbouring rows that stay in one micro-batch, since they show one decoded image.
    """
    rows = rank_rows(batch_size, rank, world_size)
    groups = -(-len(rows) // group_size)
    count = micro_batch_count(len(rows), micro_size, group_size, batch_size % (world_size * group_size) == 0)
    return [rows[groups * i // count * group_size : groups * (i + 1) // count * group_size] for i in range(count)]


def mask_noise(seed: int, step: int, rows: range, patches: int) -> Tensor:
    """Uniform noise [b, L] of these rows of a step's batch: the patches with the lowest noise stay visible."""
    blocks, skipped = divmod(rows.start * patches, PHILOX_BLOCK)
    generator = np.random.Philox(key=derive_seed(seed, "mask", step)).advance(blocks)
    noise = np.random.Generator(generator).random(skipped + len(rows) * patches, dtype=np.float32)
    return torch.from_numpy(noise[skipped:]).view(len(rows), patches)


@functools.lru_cache(maxsize=1)
def mask_noise_of_batch(seed: int, step: int, batch_size: int, patches: int) -> Tensor:
    """Noise [batch, L] as runs begun before 0.2 draw it, and a search's judge: the whole batch, by Mersenne Twister."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "mask", step))
    return torch.rand(batch_size, patches, generator=generator)


def samples_at(curriculum: Curriculum, seed: int, step: int, rows: range) -> Samples:
    """The samples in these rows of a step's batch."""
    number = curriculum.index(step)
    stage, start = curriculum.stages[number], curriculum.start(number)
    group, view = np.divmod(np.arange(rows.start, rows.stop) // stage.masks_per_image, stage.views_per_image)
    turns = [_turn(stage, step - start, phase) for phase in range(stage.replay)]
    cycle, first, share = np.array(turns)[group % stage.replay].T  # [b] each
    image = curriculum.decoded_before(start) + first + group // share
    slot = (group * stage.views_per_image + view) * stage.replay_depth + cycle % stage.replay_depth
    index = image_index(seed, image, curriculum.num_images)
    return Samples(index, image * stage.views_per_image + view, number, slot)


def _turn(stage: Stage, step: int, phase: int) -> tuple[int, int, int]:
    """What the groups q with q % replay = phase show at a step of the stage: their `cycle`-th image, decoded together
    with those of other groups as images `first` + q // share of the stage.
    """
    replay, depth = stage.replay, stage.replay_depth
    # Turn 0 shows the latest image fresh, the others show an earlier one of the group.
    cycle, turn = divmod(step + phase, replay)
    if turn:
        cycle -= turn * (depth - 1) // (replay - 1) % (cycle + 1)
    fresh_at = max(0, cycle * replay - phase)
    # At step 0 all groups are fresh, later every `replay`-th.
    return cycle, stage.decoded_before(fresh_at), replay if fresh_at else 1


class SampleStream(Sampler[Samples]):
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

    @property
    def largest(self) -> int:
        """Most samples of a micro-batch."""
        return max(stage.micro_size(self.micro_size) for stage in self.curriculum.stages)

    def __iter__(self) -> Iterator[Samples]:
        for step in range(self.first_step, self.curriculum.total_steps):
            stage = self.curriculum.at(step)
            micro_size = stage.micro_size(self.micro_size)
            group_size = stage.rows_per_image
            for rows in micro_batches(stage.batch_size, micro_size, self.rank, self.world_size, group_size):
                yield samples_at(self.curriculum, self.seed, step, rows)
