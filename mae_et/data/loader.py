"""The loader, one for all stages: workers turn samples into uint8 images; nothing restarts when a stage switches."""

from __future__ import annotations

import functools
import itertools
import logging
import multiprocessing.util
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from ..plan.curriculum import Curriculum
from ..plan.shapes import SizePx, height_width
from .decode import train_crops
from .pixels import CorruptImage, ValueRange
from .replay import MissingSamples, replayed
from .sources import Item, Source
from .stream import Sample, Samples, SampleStream, derive_seed

log = logging.getLogger(__name__)

MAX_NAMED = 20  # decoded all the same; after these only every doubling of their number is named
MAX_CORRUPT_IN_A_ROW = 100
Made = TypeVar("Made")


class Corruption(NamedTuple):
    """An image that could not be used, or not as it was meant."""

    index: int
    name: str
    reason: str
    decoded: bool = False
    """It was used: Pillow decodes what the strict decoder objects to."""


def first_readable(
    source: Source, index: int, make: Callable[[Item, int | None, list[str]], Made]
) -> tuple[Made, list[Corruption]]:
    """`make(item, label, objections)` of image `index`, or of the next one of which it can be made, always the same.

    Also returns the images that were passed over, and the one used if the decoder has objections.
    ValueError if MAX_CORRUPT_IN_A_ROW can't be used.
    """
    damaged: list[Corruption] = []
    for offset in range(min(MAX_CORRUPT_IN_A_ROW, len(source))):
        place = (index + offset) % len(source)
        objections: list[str] = []
        try:
            made = make(*source.read(place), objections)
        except (CorruptImage, OSError) as error:
            damaged.append(Corruption(place, source.name(place), str(error)))
            continue
        damaged += [Corruption(place, source.name(place), reason, decoded=True) for reason in objections]
        return made, damaged
    raise ValueError(f"--data_path: {len(damaged)} damaged images in a row, from {damaged[0][1]}: {damaged[0][2]}")


class TrainImages(Dataset):
    """Samples -> augmented crops. A damaged image is replaced by the next one that can be read, the same each time."""

    def __init__(
        self,
        source: Source,
        curriculum: Curriculum,
        full_size_px: SizePx,
        operator: str,
        in_chans: int,
        seed: int,
        value_range: ValueRange | None = None,
    ) -> None:
        self.source, self.stages = source, curriculum.stages
        self.full_px, self.operator, self.in_chans, self.seed = height_width(full_size_px), operator, in_chans, seed
        self.value_range = value_range

    def __getitems__(self, samples: Samples) -> list[tuple[list[Tensor], list[Corruption]]]:
        """Crops of a micro-batch, image by image: views of one image are neighbours, and it is decoded once."""
        by_image = itertools.groupby(samples, lambda s: (s.stage, s.number // self.stages[s.stage].views_per_image))
        return [self._crops(list(views)) for _, views in by_image]

    def _crops(self, views: list[Sample]) -> tuple[list[Tensor], list[Corruption]]:
        stage = self.stages[views[0].stage]
        seeds = [derive_seed(self.seed, "augment", sample.number) for sample in views]

        def crops(item: Item, _label: int | None, objections: list[str]) -> list[Tensor]:
            return train_crops(
                item,
                size_px=stage.height_width,
                full_px=self.full_px,
                operator=self.operator,
                crop_scale=stage.crop_scale,
                augment=stage.augment,
                seeds=seeds,
                in_chans=self.in_chans,
                value_range=self.value_range,
                objections=objections,
            )

        return first_readable(self.source, views[0].index, crops)


class CorruptLog:
    """Counts damaged images, names each once, and stops the run above a share of the data set.

    Those that are decoded all the same count apart and never stop it: libjpeg also warns of harmless bytes.
    """

    def __init__(self, num_images: int, limit: float) -> None:
        self.num_images, self.limit = num_images, limit
        self.seen: set[int] = set()
        self.decoded: set[int] = set()

    def add(self, damaged: Iterable[Corruption]) -> None:
        for index, name, reason, decoded in itertools.starmap(Corruption, damaged):
            if index in (self.decoded if decoded else self.seen):
                continue
            if decoded:
                self.decoded.add(index)
                count = len(self.decoded)
                if count <= MAX_NAMED or count.bit_count() == 1:
                    log.warning("damaged image decoded all the same (%d so far): %s: %s", count, name, reason)
                continue
            self.seen.add(index)
            log.warning("damaged image skipped (%d so far): %s: %s", len(self.seen), name, reason)
            self.check(len(self.seen), f"; the last is {name}: {reason}")

    def check(self, damaged: int, more: str = "") -> None:
        """ValueError if so many are too many."""
        if damaged > self.limit * self.num_images:
            raise ValueError(
                f"--data_path: {damaged} of {self.num_images} images are damaged, more than "
                f"--damaged_limit {self.limit:g}{more}"
            )


def train_batches(
    dataset: TrainImages,
    stream: SampleStream,
    damage: CorruptLog,
    num_workers: int | None = None,
    pin_memory: bool = False,
) -> Iterator[Tensor]:
    """Micro-batches, uint8 [b, C, h, w], of the stream, in order, whatever the number of workers."""
    stages = stream.curriculum.stages
    if all(stage.replay == stage.masks_per_image == 1 for stage in stages):
        yield from _decoded(dataset, stream, damage, num_workers, pin_memory)
    else:
        missing = _decoded(dataset, MissingSamples(stream), damage, num_workers, pin_memory=False)
        yield from replayed(stream, missing, pin_memory)


def _decoded(
    dataset: TrainImages,
    sampler: Sampler[Samples],
    damage: CorruptLog,
    num_workers: int | None,
    pin_memory: bool,
) -> Iterator[Tensor]:
    processes = worker_options(num_workers)
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        pin_memory=pin_memory,
        collate_fn=_collate,
        # Small stages eat several times more images a second: a deeper queue rides out the decoder's jitter.
        prefetch_factor=4 if processes["num_workers"] else None,
        **processes,
    )
    for images, damaged in loader:
        damage.add(damaged)
        yield images


def default_workers() -> int:
    """This process's share of the cores that a container leaves it, at most 10 (facebookresearch/mae's number)."""
    return max(1, min(10, _cores()))


def spare_cores(num_workers: int | None) -> int:
    """Cores of this process's share that its workers leave, not counting the one that trains."""
    return _cores() - 1 - (default_workers() if num_workers is None else num_workers)


def _cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _collate(decoded: list[tuple[list[Tensor], list[Corruption]]]) -> tuple[Tensor, list[Corruption]]:
    images = [image for crops, _ in decoded for image in crops]
    # If the replay buffer holds all of a micro-batch, there is nothing to decode.
    stacked = default_collate(images) if images else torch.empty(0, dtype=torch.uint8)
    return stacked, [corruption for _, damaged in decoded for corruption in damaged]


def worker_options(num_workers: int | None) -> dict[str, Any]:
    """Options of a DataLoader whose workers decode: how many, by default `default_workers`, and how they start."""
    _end_workers_at_exit(os.getpid())
    workers = default_workers() if num_workers is None else num_workers
    return {"num_workers": workers, "worker_init_fn": _start_worker}


@functools.cache
def _end_workers_at_exit(_process: int) -> None:
    """Kill the workers before multiprocessing's exit handler: they ignore SIGTERM, so it would wait for ever.

    Registered once for each process: a forked one loses its parent's handlers.
    """

    def kill() -> None:
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises an error for a killed worker
        for process in multiprocessing.active_children():
            if process.daemon:
                process.kill()

    # Unlike atexit's handlers, it also runs in child processes. Pools and queues, which may hold locks, end before it.
    multiprocessing.util.Finalize(None, kill, exitpriority=1)


def _start_worker(worker: int) -> None:
    """In the worker: die with the trainer, leave signals to it, and keep to one core.

    Ctrl-C, `timeout` and Slurm signal the whole process group; the trainer saves and ends its workers itself.
    """
    # If the trainer died before this worker started, torch's parent watchdog watches the wrong process: exit now.
    # (A fork server is the parent of its children.)
    trainer = multiprocessing.parent_process().pid
    if multiprocessing.get_start_method() != "forkserver" and os.getppid() != trainer:
        raise SystemExit
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
