"""The loader, one for all stages: workers turn samples into uint8 images; nothing restarts when a stage switches.

Beside a GPU, workers make a chunk of a micro-batch at a time, and a thread of the process that trains puts them
together: the thread that launches steps finds its micro-batches made.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Sized
from typing import NamedTuple, Protocol, TypeVar

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from ..plan.curriculum import Curriculum
from ..plan.shapes import SPECTRAL, SizePx, height_width
from .decode import train_crops
from .pixels import CorruptImage, ValueRange
from .replay import MissingSamples, replayed
from .sources import Item, Source
from .stream import Sample, Samples, SampleStream, derive_seed
from .workers import CHUNK_IMAGES, Loading, ahead, in_flight, worker_options

log = logging.getLogger(__name__)

MAX_NAMED = 20  # decoded all the same; after these only every doubling of their number is named
MAX_TRIED = 100  # images, from all over the data set, in place of one
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
    """`make(item, label, objections)` of image `index`, or of another one of which it can be made, always the same.

    Also returns the images that were passed over, and the one used if the decoder has objections.
    ValueError if of MAX_TRIED none can be used.
    """
    damaged: list[Corruption] = []
    for place in _all_over(index, len(source)):
        objections: list[str] = []
        try:
            made = make(*source.read(place), objections)
        except (CorruptImage, OSError) as error:
            damaged.append(Corruption(place, source.name(place), str(error)))
            continue
        damaged += [Corruption(place, source.name(place), reason, decoded=True) for reason in objections]
        return made, damaged
    raise ValueError(
        f"--data_path: {len(damaged)} damaged images from all over it, and none that can be used; the first is "
        f"{damaged[0].name}: {damaged[0].reason}"
    )


def _all_over(index: int, num_images: int) -> Iterator[int]:
    """`index` and others, far apart, since neighbours are often damaged together: a broken folder is soon left."""
    golden = round(0.618 * num_images)
    stride = next(stride for stride in itertools.count(golden) if math.gcd(stride, num_images) == 1)  # so none recurs
    for turn in range(min(MAX_TRIED, num_images)):
        yield (index + turn * stride) % num_images


class TrainImages(Dataset):
    """Samples -> augmented crops. A damaged image is replaced by another one, the same each time."""

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

    @property
    def image_bytes(self) -> int:
        """Of the largest stage's images."""
        sizes = [self.full_px] if self.operator in SPECTRAL else [stage.height_width for stage in self.stages]
        return self.in_chans * max(map(math.prod, sizes))

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


class Images(Protocol):
    """What workers make images of."""

    @property
    def image_bytes(self) -> int:
        """Of the largest one, as it leaves the worker."""
        ...


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


class Chunks(Sampler):
    """Parts of micro-batches, of at most `images` each and of whole groups: neighbours that show one decoded image."""

    def __init__(self, micro_batches: Iterable[Sequence], images: int, group: int = 1) -> None:
        self.micro_batches, self.rows = micro_batches, max(1, images // group) * group

    def __iter__(self) -> Iterator[Sequence]:
        for batch in self.micro_batches:
            for first in range(0, len(batch), self.rows):
                yield batch[first : first + self.rows]


def load_chunks(
    dataset: Images,
    micro_batches: Iterable[Sequence],
    micro_size: int,
    loading: Loading,
    collate: Callable,
    group: int = 1,
) -> Iterator:
    """What `collate` makes of every chunk, in order. Workers start at once: torch watches those of the main thread.

    micro_size: of the largest micro-batch.
    """
    images, chunks = min(CHUNK_IMAGES, micro_size) if loading.on_gpu else micro_size, None
    if loading.num_workers:
        images, chunks = in_flight(loading.num_workers, dataset.image_bytes, images)
    sampler = Chunks(micro_batches, images, group)
    options = worker_options(loading.num_workers) | {"collate_fn": collate, "prefetch_factor": chunks}
    return iter(DataLoader(dataset, batch_sampler=sampler, **options))


def assembled(
    micro_batches: Iterable[Sized], chunks: Iterator[Sequence[Tensor]], pin_memory: bool
) -> Generator[Sequence[Tensor], None, None]:
    """Micro-batches from the tensors of their chunks: [c, …] of each kind become [b, …]."""
    for wanted in micro_batches:
        batch, done = [], 0
        while done < len(wanted):
            parts = next(chunks)
            first, done = done, done + len(parts[0])
            if done - first == len(wanted) and not pin_memory:
                batch = parts  # as it is
                continue
            batch = batch or [part.new_empty(len(wanted), *part.shape[1:], pin_memory=pin_memory) for part in parts]
            for whole, part in zip(batch, parts, strict=True):
                whole.numpy()[first:done] = part.numpy()  # NumPy keeps to this thread, torch would wake others
        yield batch


def train_batches(dataset: TrainImages, stream: SampleStream, damage: CorruptLog, loading: Loading) -> Iterator[Tensor]:
    """Micro-batches, uint8 [b, C, h, w], of the stream, in order, however they are loaded."""
    stages = stream.curriculum.stages
    replays = any(stage.replay > 1 or stage.masks_per_image > 1 for stage in stages)
    wanted, group = MissingSamples(stream) if replays else stream, max(stage.views_per_image for stage in stages)
    chunks = counted(load_chunks(dataset, wanted, stream.largest, loading, _collate, group), damage)
    make = replayed if replays else assembled
    for (images,) in ahead(make(stream, chunks, loading.pin_memory), loading):
        yield images


def counted(chunks: Iterator[Sequence], damage: CorruptLog) -> Iterator[list[Tensor]]:
    """The tensors of chunks (tensor, …, corruptions), whose corruptions are counted."""
    for *tensors, damaged in chunks:
        damage.add(damaged)
        yield tensors


def _collate(decoded: list[tuple[list[Tensor], list[Corruption]]]) -> tuple[Tensor, list[Corruption]]:
    images = default_collate([image for crops, _ in decoded for image in crops])
    return images, [corruption for _, damaged in decoded for corruption in damaged]
