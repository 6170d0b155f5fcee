"""Labelled images for fine-tuning and probes: training crops augmented by sample number, and centre crops."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from .corruptions import CommonCorruption
from .decode import center_crop, train_crops
from .loader import Corruption, CorruptLog, assembled, counted, first_readable, load_chunks
from .pixels import CorruptImage, ValueRange
from .sources import Item, Source, open_source, subset, why_unlabelled
from .stream import Sample, SampleStream, derive_seed
from .workers import Loading, ahead

CORRUPT = -2
"""Label of an image that can't be read."""


@dataclass(frozen=True)
class Augmentation:
    """How a training crop is drawn, and changes to it beside flipping, by default none."""

    crop_scale: tuple[float, float]
    """Bounds of its area as a share of the image."""
    policy: str = ""
    """timm's RandAugment or AutoAugment policy; "" is off."""
    color_jitter: float | None = None
    """Without a policy: strength of colour jitter."""
    reprob: float = 0.0
    """Probability of random erasing."""
    remode: str = "pixel"
    """pixel, rand or const."""
    recount: int = 1
    """Most erased boxes."""


def open_labelled(data_path: str, split: str, num_images: int | None, seed: int, holdout: int = 0) -> Source:
    """A split with labels, or `num_images` of it. ValueError if there are no labels.

    num_images: of "train" equally many of each class, of "val", which is to stand for the whole, the same share.

    holdout: as :func:`open_source` has it.
    """
    source = open_source(data_path, split, holdout)
    if source.labels is None or source.classes is None:
        reason = why_unlabelled(source)
        raise ValueError(
            f"--data_path {data_path} ({split}) has no labels: fine-tuning and probes need a sub-folder per class, or "
            f"a data set that comes with labels{f'; {reason}' if reason else ''}"
        )
    if num_images is None:
        return source
    if num_images > len(source):
        flag = "--train_images" if split == "train" else "--eval_images"
        raise ValueError(f"{flag} {num_images}: {data_path} ({split}) has {len(source)}")
    return subset(source, num_images, derive_seed(seed, "subset", split), proportional=split != "train")


class TrainCrops(Dataset):
    """Samples -> normalised float32 crops [C, H, W] and labels; all randomness is a function of (seed, sample number).

    A damaged image is replaced by another one, label included, the same each time.
    """

    def __init__(
        self,
        source: Source,
        size_px: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        augmentation: Augmentation,
        seed: int,
        value_range: ValueRange | None = None,
    ) -> None:
        self.value_range = value_range
        self.source, self.size_px, self.in_chans, self.seed = source, size_px, len(mean), seed
        a = augmentation
        common = {
            "input_size": size_px,
            "is_training": True,
            "separate": True,
            "interpolation": "bicubic",
            "color_jitter": None,
        }
        self.crop_scale = a.crop_scale
        fill = tuple(mean) * (3 if self.in_chans == 1 else 1)
        colours = common | {"color_jitter": a.color_jitter, "auto_augment": a.policy or None, "mean": fill}
        self.colours = create_transform(**colours)[1] if a.policy or a.color_jitter else None
        if a.policy:
            _keep_a_bit(self.colours.transforms[0])
        erasing = {"re_prob": a.reprob, "re_mode": a.remode, "re_count": a.recount}
        self.finish = create_transform(**common, **erasing, mean=tuple(mean), std=tuple(std))[2]
        self.image_bytes = 4 * self.in_chans * math.prod(size_px)

    def __getitem__(self, sample: Sample) -> tuple[Tensor, int, list[Corruption]]:
        seed = derive_seed(self.seed, "augment", sample.number)
        (crop, label), damaged = first_readable(
            self.source, sample.index, lambda item, label, objections: (self._crop(item, seed, objections), label)
        )
        return crop, label, damaged

    def _crop(self, item: Item, seed: int, objections: list[str]) -> Tensor:
        size_px = self.size_px
        (crop,) = train_crops(
            item, size_px, size_px, "fourier", self.crop_scale, 0, [seed], self.in_chans, self.value_range, objections
        )
        with seeded(derive_seed(seed, "colours")):
            if self.colours is not None:  # policies are for RGB; grey stays grey on the way there and back
                picture = self.colours(to_pil_image(crop).convert("RGB"))
                crop = pil_to_tensor(picture if self.in_chans == 3 else picture.convert("L"))
            return self.finish(crop.float() / 255)


class EvalCrops(Dataset):
    """Index -> uint8 centre crop [C, H, W] and label: -1 if the source has none, CORRUPT for a blank in place of an
    image that can't be read. More of these than the share `damaged_limit` of the source are an error.
    """

    def __init__(
        self,
        source: Source,
        size_px: tuple[int, int],
        in_chans: int,
        crop_pct: float,
        value_range: ValueRange | None = None,
        interpolation: str = "bicubic",
        damaged_limit: float = 0.0,
    ) -> None:
        self.corrupt = CorruptLog(len(source), damaged_limit)
        self.source, self.size_px, self.in_chans, self.crop_pct = source, size_px, in_chans, crop_pct
        self.value_range, self.interpolation = value_range, interpolation
        self.corruption: CommonCorruption | None = None
        self.image_bytes = in_chans * math.prod(size_px)

    def corrupted(self, corruption: CommonCorruption) -> EvalCrops:
        """The same crops, corrupted."""
        crops = copy.copy(self)
        crops.corruption = corruption
        return crops

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            return self._crop(index)
        except (CorruptImage, OSError):  # named by eval_batches, in the process that logs
            return torch.zeros(self.in_chans, *self.size_px, dtype=torch.uint8), CORRUPT

    def _crop(self, index: int) -> tuple[Tensor, int]:
        item, label = self.source.read(index)
        crop = center_crop(item, self.size_px, self.in_chans, self.crop_pct, self.value_range, self.interpolation)
        crop = self.corruption(crop, index) if self.corruption else crop
        return crop, -1 if label is None else label

    def book(self, indices: Iterable[int]) -> None:
        """Count and name images that can't be read. ValueError if there are too many of them."""
        for index in indices:
            try:
                self._crop(index)
                reason = "could not be read before"
            except (CorruptImage, OSError) as error:
                reason = str(error)
            self.corrupt.add([Corruption(index, self.source.name(index), reason)])

    def look(self, samples: int = 256) -> None:
        """Try images spread evenly over the source, before hours of training. ValueError if too many can't be read."""
        samples = min(samples, len(self))
        places = (place * len(self) // samples for place in range(samples))
        self.book([index for index in places if self[index][1] == CORRUPT])


def labelled_batches(
    dataset: TrainCrops, stream: SampleStream, damage: CorruptLog, loading: Loading
) -> Iterator[tuple[Tensor, Tensor]]:
    """Micro-batches of the stream: images float32 [b, C, H, W] and labels int64 [b]."""
    chunks = counted(load_chunks(dataset, stream, stream.largest, loading, _collate), damage)
    yield from ahead(assembled(stream, chunks, loading.pin_memory), loading)


def eval_batches(
    dataset: EvalCrops,
    rank: int,
    world_size: int,
    loading: Loading,
    batch_size: int = 256,
    keep_places: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """A rank's share of the centre crops, each image once: uint8 [b, C, H, W] and labels int64 [b], in order.

    Images that can't be read are named and left out; with `keep_places` they stay as blanks with the label CORRUPT.
    """
    indices = range(len(dataset) * rank // world_size, len(dataset) * (rank + 1) // world_size)
    wanted = [indices[first : first + batch_size] for first in range(0, len(indices), batch_size)]
    if len(wanted) < 2:  # workers cost more than a few images
        loading = loading._replace(num_workers=0)
    chunks = load_chunks(dataset, wanted, batch_size, loading, default_collate)
    first = indices.start
    for images, labels in ahead(assembled(wanted, chunks, loading.pin_memory), loading):
        corrupt = labels == CORRUPT
        if corrupt.any():
            dataset.book(first + place for place in corrupt.nonzero().flatten().tolist())
            if not keep_places:
                images, labels = images[~corrupt], labels[~corrupt]
        first += len(corrupt)
        if len(labels):
            yield images, labels


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of Python, NumPy and torch (CPU) inside the block; restore them afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _keep_a_bit(policy) -> None:
    """Clamp timm's Posterize to 1 bit: at the ends of its range it asks for 0, which Pillow rejects."""
    ops = [op for row in policy.policy for op in row] if hasattr(policy, "policy") else policy.ops
    for op in ops:
        if getattr(op, "name", "").startswith("Posterize"):
            op.aug_fn = functools.partial(_posterize, op.aug_fn)


def _posterize(apply: Callable, image: Image.Image, bits: int, **keywords: object) -> Image.Image:
    return apply(image, max(1, bits), **keywords)


def _collate(batch: list[tuple[Tensor, int, list[Corruption]]]) -> tuple[Tensor, Tensor, list[Corruption]]:
    images, labels, damaged = zip(*batch, strict=True)
    return default_collate(list(images)), torch.tensor(labels), [damage for each in damaged for damage in each]
