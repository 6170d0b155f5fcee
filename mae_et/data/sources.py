"""Sources: every kind of `--data_path` opens as one, with encoded or decoded images and their labels.

Forked workers copy every page on which a reference count changes, so sources keep paths and labels in arrays, not in a
million Python objects. Sources that hold pixels in memory reopen themselves when they are pickled.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from ..plan.config import PretrainConfig
from .datasets import IdxSource, TimmSource, has_idx_files
from .folders import FolderSource, held_out_sibling, no_held_out_images, open_folder
from .photos import PhotoTiles
from .shards import INDEX, ShardSource
from .tars import TAR, TarSource
from .webdataset import open_webdataset

log = logging.getLogger(__name__)

KINDS = (
    "a folder of images, a folder with train/ and val/, a .tar, photos, wds/FOLDER, torch/NAME[:ROOT] or "
    "hfds/NAME[:CACHE]"
)
Item = bytes | Image.Image | np.ndarray
"""An image as a source holds it: file bytes, a Pillow image, or a uint8/uint16 array [H, W] or [H, W, C]."""

#: Of data paths that are no paths of files.
PREFIXES = ("torch", "hfds", "wds", "tfds", "hfids")


class Source(Protocol):
    """Random access to images, still undecoded where possible."""

    classes: list[str] | None  # None: unlabelled
    labels: np.ndarray | None  # [N] int64, what `read` returns as labels; None: unlabelled

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Item, int | None]:
        """Image and label."""
        ...

    def name(self, index: int) -> str:
        """Name of this image in messages: its path, or a place such as photos[12]."""
        ...


HOLDOUT_SEED = 0  # which images are kept out never changes, so that runs can be compared


def open_source(data_path: str | os.PathLike[str], split: str = "train", holdout: int = 0) -> Source:
    """Open the "train" or "val" split of `data_path`, which is, decided in this order:

    1. `photos`: tiles of the photographs inside scikit-image and scikit-learn
    2. `torch/NAME[:ROOT]`: a torchvision data set through timm, under ROOT (else $MAE_ET_DATA, else ./data), downloaded
       if it is not there; `hfds/NAME[:CACHE]`: a Hugging Face data set through timm; `wds/FOLDER` or `wds/PATTERN`:
       WebDataset shards
    3. `FILE.tar`: images in a tar, class = folder, whose split "val" is the val.tar beside it
    4. a folder of IDX files (the MNIST family, gzipped or not)
    5. a folder that `python -m mae_et prepare` has written
    6. a folder with train/ and val/ (or another name of a split, see `folders`): sub-folders are classes, images
       directly inside have none
    7. any other folder of images, nested or not: unlabelled, and without a split "val"

    Names of 1 and 2 that are also paths are refused: ./photos is the folder, photos: (with a colon) the data set.

    holdout: so many training images, the same share of each class, are "val" instead, and not in "train".

    Raises FileNotFoundError for what is missing and ValueError for what cannot be used, in one line.
    """
    if holdout:
        held_out, others = split_off(open_source(data_path), holdout, data_path)
        return others if split == "train" else held_out
    if split not in ("train", "val"):
        raise ValueError(f"split is {split!r}; choose train or val")
    data_path = os.path.expanduser(os.fspath(data_path))
    prefix, slash, name = data_path.partition("/")
    prefix = prefix.lower() if slash else ""
    if (data_path == "photos" or prefix in PREFIXES) and os.path.exists(data_path):
        data_set = f"wds/{os.path.abspath(name)}" if prefix == "wds" else f"{data_path}:"
        raise ValueError(
            f"--data_path {data_path} is the name of a data set, and there is a path ./{data_path}, too; give "
            f"./{data_path} for that, or {data_set} for the data set"
        )
    if data_path in ("photos", "photos:"):
        return PhotoTiles(split)
    if prefix == "wds":
        return open_webdataset(data_path, split)
    if prefix in ("tfds", "hfids"):
        raise ValueError(f"--data_path {data_path}: {prefix}/ only streams, and steps need random access; give {KINDS}")
    if prefix in ("torch", "hfds"):
        return TimmSource(data_path, split)
    root = Path(data_path)
    if not root.exists():
        raise FileNotFoundError(f"--data_path {data_path} does not exist; give {KINDS}")
    if root.is_file() and TAR.fullmatch(root.name):
        return _open_tar(root, split, data_path)
    if not root.is_dir():
        raise ValueError(f"--data_path {data_path} is a file; give {KINDS}")
    if has_idx_files(root):
        return IdxSource(root, split)
    if is_prepared(root):
        if not (root / split).exists():
            raise FileNotFoundError(no_held_out_images(root, data_path, "/"))
        return ShardSource(root / split)
    return open_folder(root, split)


def _open_tar(file: Path, split: str, data_path: str) -> TarSource:
    if split == "train":
        return TarSource(file)
    val = held_out_sibling(file)
    if val is None:
        raise FileNotFoundError(no_held_out_images(file.parent, data_path, ".tar"))
    log.info("held-out images are those of %s", val)
    return TarSource(val, train=TarSource(file))


def why_unlabelled(source: Source) -> str:
    """The image that keeps folders from being classes, in words; "" if there is no such image."""
    while isinstance(source, Subset | CachedSource):
        source = source.source
    return source.why_unlabelled if isinstance(source, FolderSource | TarSource) else ""


def open_held_out(data_path: str | os.PathLike[str], holdout: int = 0) -> Source:
    """Open images to look at: the split "val" where there is a usable one, else "train". Raises as open_source does."""
    try:
        return open_source(data_path, "val", holdout)
    except (ValueError, OSError):
        return open_source(data_path)


def count_images(config: PretrainConfig) -> int:
    """Training images of a configuration; --num_images less --holdout where the data are not at hand."""
    try:
        return len(open_source(config.data_path, "train", config.holdout))
    except (ValueError, OSError):
        if config.num_images is None:
            raise
        if config.num_images <= config.holdout:
            raise ValueError(f"--holdout {config.holdout} leaves none of --num_images {config.num_images}") from None
        return config.num_images - config.holdout


def is_jpeg_source(source: Source) -> bool:
    """Whether the first image is a JPEG file."""
    try:
        item = source.read(0)[0]
    except OSError:
        return False
    return isinstance(item, bytes) and item.startswith(b"\xff\xd8")


def is_same_path(one: str, other: str) -> bool:
    """Whether two --data_path mean the same, however they are spelled. "" is none."""
    return bool(one and other) and Path(one).resolve() == Path(other).resolve()


def is_prepared(data_path: str | os.PathLike[str]) -> bool:
    """Whether this is a folder that `python -m mae_et prepare` has written."""
    return (Path(data_path) / "train" / INDEX).is_file()


def split_off(source: Source, holdout: int, data_path: str | os.PathLike[str]) -> tuple[Source, Source]:
    """(the held-out images, the others), always the same ones. ValueError if none would be left."""
    if not 0 < holdout < len(source):
        raise ValueError(f"--holdout {holdout}: {data_path} has {len(source)} training images, and some must be left")
    held_out = subset(source, holdout, HOLDOUT_SEED, proportional=True)
    return held_out, Subset(source, np.setdiff1d(np.arange(len(source)), held_out.indices))


def subset(source: Source, num_images: int, seed: int, proportional: bool = False) -> Subset:
    """`num_images` images of `source`, the same ones for the same seed.

    With labels every class gives equally many (one more or less where it does not divide; classes that run out leave
    their share to the others), or `proportional` to what it has. The same where classes are equally large. A smaller
    subset with the same seed is contained in a larger one.
    """
    if not 1 <= num_images <= len(source):
        raise ValueError(f"a subset of {num_images} images is asked for; this source has 1..{len(source)} to give")
    order = np.random.default_rng(seed).permutation(len(source))
    if source.labels is not None:
        labels = source.labels[order]
        by_class = np.argsort(labels, kind="stable")
        _, first, counts = np.unique(labels[by_class], return_index=True, return_counts=True)
        turn = np.empty(len(order))  # the how-many-th image of its class each one is, or after what share of the class
        turn[by_class] = np.arange(len(order)) - np.repeat(first, counts)
        if proportional:
            turn[by_class] = (turn[by_class] + 0.5) / np.repeat(counts, counts)
        order = order[np.argsort(turn, kind="stable")]  # all first images, then all second ones, ...
    return Subset(source, np.sort(order[:num_images]))


class Subset:
    """The images `indices` of another source, in that order."""

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self.classes = source.classes
        self.labels = None if source.labels is None else source.labels[indices]
        self.source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> tuple[Item, int | None]:
        return self.source.read(int(self.indices[index]))

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))


class CachedSource:
    """Another source whose first images, up to `max_bytes` of encoded files, are read once and kept in memory.

    For data sets that fit and file systems that are slow. The bytes lie in one array, which forked workers share:
    nothing in it is ever written again, reference counts included. An image that can't be read now is tried again, and
    named, when its turn comes.
    """

    def __init__(self, source: Source, max_bytes: int) -> None:
        self.classes, self.labels = source.classes, source.labels
        self.source = source
        data, ends = bytearray(), [0]
        for index in range(len(source)):
            try:
                item = source.read(index)[0]
            except OSError:
                item = b""
            if not isinstance(item, bytes) or len(data) + len(item) > max_bytes:
                break
            data += item
            ends.append(len(data))
        self._data, self._ends = np.frombuffer(data, dtype=np.uint8), np.array(ends, dtype=np.int64)
        log.info("%d of %d images in memory, %.2f GiB", len(ends) - 1, len(source), len(data) / 2**30)

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> tuple[Item, int | None]:
        if index + 1 >= len(self._ends) or self._ends[index] == self._ends[index + 1]:
            return self.source.read(index)
        data = self._data[self._ends[index] : self._ends[index + 1]].tobytes()
        return data, None if self.labels is None else int(self.labels[index])

    def name(self, index: int) -> str:
        return self.source.name(index)
