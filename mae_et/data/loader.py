"""One loader for all stages: workers turn samples into uint8 images; nothing restarts when a stage switches."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ..curriculum import Curriculum, SizePx, height_width
from .decode import DamagedImage, train_crop
from .sources import Source
from .stream import Sample, SampleStream, derive_seed

log = logging.getLogger(__name__)

Damage = tuple[int, str, str]  # index, name, reason
MOST_DAMAGED_IN_A_ROW = 100


class TrainImages(Dataset):
    """Samples -> augmented crops. A damaged image is replaced by the next one that can be read, the same each time."""

    def __init__(
        self, source: Source, curriculum: Curriculum, full_size_px: SizePx, operator: str, in_chans: int, seed: int
    ) -> None:
        self.source, self.stages = source, curriculum.stages
        self.full_px, self.operator, self.in_chans, self.seed = height_width(full_size_px), operator, in_chans, seed

    def __getitem__(self, sample: Sample) -> tuple[Tensor, list[Damage]]:
        stage = self.stages[sample.stage]
        damaged: list[Damage] = []
        for offset in range(min(MOST_DAMAGED_IN_A_ROW, len(self.source))):
            index = (sample.index + offset) % len(self.source)
            try:
                image = train_crop(
                    self.source.read(index)[0],
                    size_px=stage.height_width,
                    full_px=self.full_px,
                    operator=self.operator,
                    crop_scale=stage.crop_scale,
                    augment=stage.augment,
                    seed=derive_seed(self.seed, "augment", sample.number),
                    in_chans=self.in_chans,
                )
                return image, damaged
            except (DamagedImage, OSError) as error:
                damaged.append((index, self.source.name(index), str(error)))
        raise ValueError(f"--data_path: {len(damaged)} damaged images in a row, from {damaged[0][1]}: {damaged[0][2]}")


class DamageLog:
    """Counts damaged images, names each once, and stops the run above a share of the data set."""

    def __init__(self, num_images: int, limit: float) -> None:
        self.num_images, self.limit = num_images, limit
        self.seen: set[int] = set()

    def add(self, damaged: list[Damage]) -> None:
        for index, name, reason in damaged:
            if index in self.seen:
                continue
            self.seen.add(index)
            log.warning("damaged image skipped (%d so far): %s: %s", len(self.seen), name, reason)
            if len(self.seen) > self.limit * self.num_images:
                raise ValueError(
                    f"--data_path: {len(self.seen)} of {self.num_images} images are damaged, more than "
                    f"--damaged_limit {self.limit:g}; the last is {name}: {reason}"
                )


def train_batches(
    dataset: TrainImages,
    stream: SampleStream,
    damage: DamageLog,
    num_workers: int | None = None,
    pin_memory: bool = False,
) -> Iterator[Tensor]:
    """Micro-batches, uint8 [b, C, h, w], of the stream, in order, whatever the number of workers."""
    workers = default_workers() if num_workers is None else num_workers
    loader = DataLoader(
        dataset,
        batch_sampler=stream,
        num_workers=workers,
        pin_memory=pin_memory,
        collate_fn=_collate,
        worker_init_fn=_leave_signals_to_the_trainer,
        # Small stages eat several times more images a second: a deeper queue rides out the decoder's jitter.
        prefetch_factor=4 if workers else None,
    )
    for images, damaged in loader:
        damage.add(damaged)
        yield images


def default_workers() -> int:
    """This process's share of the cores that a container leaves it, at most 10 (facebookresearch/mae's number)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(10, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def _collate(batch: list[tuple[Tensor, list[Damage]]]) -> tuple[Tensor, list[Damage]]:
    return default_collate([image for image, _ in batch]), [damage for _, damaged in batch for damage in damaged]


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Ctrl-C, `timeout` and Slurm signal the whole process group; the trainer saves and ends its workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
