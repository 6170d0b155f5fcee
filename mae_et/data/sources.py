"""Which images there are: every kind of `--data_path` opens as a `Source` of encoded or decoded images and labels.

Forked workers copy every page on which a reference count changes, so sources keep paths and labels in arrays, not in a
million Python objects. Sources that hold pixels in memory reopen themselves when they are pickled.
"""

from __future__ import annotations

import gzip
import math
import os
import re
import struct
import zlib
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from .names import EXTENSIONS, VAL_NAMES
from .photos import PhotoTiles
from .shards import INDEX, ShardSource
from .webdataset import open_webdataset

KINDS = (
    "a folder of images, a folder with train/ and val/, a .tar, photos, wds/FOLDER, torch/NAME[:ROOT] or "
    "hfds/NAME[:CACHE]"
)


class Source(Protocol):
    """Random access to images, still undecoded where possible."""

    classes: list[str] | None  # None: unlabelled
    labels: np.ndarray | None  # [N] int64, what `read` returns as labels; None: unlabelled

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[bytes | Image.Image | np.ndarray, int | None]:
        """Image and label. The image is file bytes, a Pillow image, or a uint8/uint16 array [H, W] or [H, W, C]."""
        ...

    def name(self, index: int) -> str:
        """What messages call this image: its path, or a place such as photos[12]."""
        ...


HOLDOUT_SEED = 0  # which images are kept out never changes, so that runs can be compared


def open_source(data_path: str | os.PathLike[str], split: str = "train", holdout: int = 0) -> Source:
    """Open the "train" or "val" split of `data_path`, which is, decided in this order:

    1. `photos`: tiles of the photographs inside scikit-image and scikit-learn
    2. `torch/NAME[:ROOT]`: a torchvision data set through timm, under ROOT (else $MAE_ET_DATA, else ./data), downloaded
       if it is not there; `hfds/NAME[:CACHE]`: a Hugging Face data set through timm; `FILE.tar`: images in a tar,
       class = folder, whose split "val" is the val.tar beside it; `wds/FOLDER` or `wds/PATTERN`: WebDataset shards
    3. a folder of IDX files (the MNIST family, gzipped or not)
    4. a folder that `python -m mae_et prepare` has written
    5. a folder with train/ and val/ (or validation/, test/): sub-folders are classes, images directly inside have none
    6. any other folder of images, nested or not: unlabelled, and without a split "val"

    holdout: so many training images, equally many of each class, are "val" instead, and not in "train".

    Raises FileNotFoundError for what is missing and ValueError for what cannot be used, in one line.
    """
    if holdout:
        kept_out, rest = split_off(open_source(data_path), holdout, data_path)
        return rest if split == "train" else kept_out
    if split not in ("train", "val"):
        raise ValueError(f"split is {split!r}; choose train or val")
    data_path = os.path.expanduser(os.fspath(data_path))
    if data_path == "photos":
        return PhotoTiles(split)
    prefix = data_path.partition("/")[0].lower()
    if prefix == "wds":
        return open_webdataset(data_path, split)
    if prefix in ("tfds", "hfids"):
        raise ValueError(f"--data_path {data_path}: {prefix}/ only streams, and steps need random access; give {KINDS}")
    if prefix in ("torch", "hfds"):
        return TimmSource(data_path, split)
    root = Path(data_path)
    if not root.exists():
        raise FileNotFoundError(f"--data_path {data_path} does not exist; give {KINDS}")
    if root.suffix == ".tar":
        return TimmSource(str(root if split == "train" else _val_sibling(root, ".tar", data_path)), split)
    if not root.is_dir():
        raise ValueError(f"--data_path {data_path} is a file; give {KINDS}")
    if any(_IDX_NAME.match(name) for name in os.listdir(root)):
        return IdxSource(root, split)
    if is_prepared(root):
        return ShardSource(root / "train" if split == "train" else _val_sibling(root / "train", "", data_path))
    return _open_folder(root, split)


def is_jpeg_source(source: Source) -> bool:
    """Whether the first image is a JPEG file."""
    try:
        item = source.read(0)[0]
    except OSError:
        return False
    return isinstance(item, bytes) and item.startswith(b"\xff\xd8")


def is_prepared(data_path: str | os.PathLike[str]) -> bool:
    """Whether this is a folder that `python -m mae_et prepare` has written."""
    return (Path(data_path) / "train" / INDEX).is_file()


def split_off(source: Source, holdout: int, data_path: str | os.PathLike[str]) -> tuple[Source, Source]:
    """(the held-out images, the others), always the same ones. ValueError if none would be left."""
    if not 0 < holdout < len(source):
        raise ValueError(f"--holdout {holdout}: {data_path} has {len(source)} training images, and some must be left")
    kept_out = subset(source, holdout, HOLDOUT_SEED)
    rest = np.setdiff1d(np.arange(len(source)), kept_out.indices)
    return kept_out, Subset(source, rest)


def subset(source: Source, num_images: int, seed: int) -> Subset:
    """`num_images` images of `source`, the same ones for the same seed.

    With labels every class gives equally many (one more or less where it does not divide; classes that run out leave
    their share to the others). A smaller subset with the same seed is contained in a larger one.
    """
    if not 1 <= num_images <= len(source):
        raise ValueError(f"a subset of {num_images} images is asked for; this source has 1..{len(source)} to give")
    order = np.random.default_rng(seed).permutation(len(source))
    if source.labels is not None:
        labels = source.labels[order]
        by_class = np.argsort(labels, kind="stable")
        _, first, counts = np.unique(labels[by_class], return_index=True, return_counts=True)
        turn = np.empty(len(order), dtype=np.int64)  # the how-many-th image of its class each one is
        turn[by_class] = np.arange(len(order)) - np.repeat(first, counts)
        order = order[np.argsort(turn, kind="stable")]  # all first images, then all second ones, ...
    return Subset(source, np.sort(order[:num_images]))


class Subset:
    """The images `indices` of another source, in that order."""

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self.classes = source.classes
        self.labels = None if source.labels is None else source.labels[indices]
        self._source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> tuple[bytes | Image.Image | np.ndarray, int | None]:
        return self._source.read(int(self.indices[index]))

    def name(self, index: int) -> str:
        return self._source.name(int(self.indices[index]))


# ----------------------------------------------------------------------------------------------------------- folders


class FolderSource:
    """Image files under `root`. `paths` are relative to it; `labels` index `classes`, or both are None."""

    def __init__(self, root: Path, paths: list[str], labels: list[int] | None, classes: list[str] | None) -> None:
        self.classes = classes
        self.labels = None if labels is None else np.array(labels, dtype=np.int64)
        self._root = root
        self._paths = np.array([os.fsencode(path) for path in paths])  # bytes of one width, not Python strings

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int) -> tuple[bytes, int | None]:
        with open(self.name(index), "rb") as file:
            return file.read(), None if self.labels is None else int(self.labels[index])

    def name(self, index: int) -> str:
        return os.path.join(self._root, os.fsdecode(self._paths[index]))


def _open_folder(root: Path, split: str) -> FolderSource:
    train = root / "train"
    folder = train if train.is_dir() else root
    if split == "val":
        folder = _val_sibling(train, "", str(root))
    paths = find_images(folder)
    if not paths:
        raise FileNotFoundError(
            f"--data_path {root}: no images in {folder}; looked for {' '.join(e[1:] for e in EXTENSIONS)} in any folder"
            "; tars of a WebDataset are wds/FOLDER"
        )
    if folder is root or not all(os.sep in path for path in paths):
        return FolderSource(folder, paths, labels=None, classes=None)
    # class numbers come from train/, so that both splits agree whatever val/ lacks
    classes = _class_folders(train if train.is_dir() else folder)
    number = {name: index for index, name in enumerate(classes)}
    names = [path.partition(os.sep)[0] for path in paths]
    if unknown := sorted(set(names) - set(number)):
        raise ValueError(f"--data_path {root}: class folders {', '.join(unknown[:5])} of {folder} are not in {train}")
    return FolderSource(folder, paths, [number[name] for name in names], classes)


def _val_sibling(train: Path, suffix: str, data_path: str) -> Path:
    for name in VAL_NAMES:
        if (path := train.with_name(name + suffix)).exists():
            return path
    wanted = " or ".join(name + (suffix or "/") for name in VAL_NAMES)
    raise FileNotFoundError(f"--data_path {data_path} has no held-out images: {wanted} is missing in {train.parent}")


def find_images(folder: str | os.PathLike[str]) -> list[str]:
    """Relative paths of all image files under `folder`, sorted folder by folder.

    By extension, in any letter case. Hidden files and __MACOSX are skipped; links are followed, except back up.
    """
    return _find_images(os.fspath(folder), "", ())


def _find_images(folder: str, prefix: str, above: tuple[tuple[int, int], ...]) -> list[str]:
    status = os.stat(folder)
    identity = status.st_dev, status.st_ino
    if identity in above:
        return []
    found = []
    with os.scandir(folder) as entries:
        in_order = sorted(entries, key=lambda entry: entry.name)
    for entry in in_order:
        if _is_skipped(entry.name):
            continue
        if entry.is_dir():
            found += _find_images(entry.path, os.path.join(prefix, entry.name), (*above, identity))
        elif entry.name.lower().endswith(EXTENSIONS) and entry.is_file():  # a broken link is no file
            found.append(os.path.join(prefix, entry.name))
    return found


def _class_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not _is_skipped(entry.name))


def _is_skipped(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


# --------------------------------------------------------------------------------------------------------- IDX files

_IDX_NAME = re.compile(r"(?P<set>.*-)?(?P<split>train|t10k|test)-(?P<kind>images|labels)[-.]idx[13]-ubyte(\.gz)?$")


class IdxSource:
    """The MNIST family as it is published: train-images-idx3-ubyte.gz and its like, all images in memory.

    Classes are named by their numbers, at least "0" to "9". EMNIST stores its images transposed; they stay so.
    """

    def __init__(self, root: Path, split: str) -> None:
        self._root, self._split = root, split
        files: dict[tuple[str, str], Path] = {}
        for name in sorted(os.listdir(root), reverse=True):  # reversed: an unpacked file comes after, and wins
            match = _IDX_NAME.match(name)
            if match and (match["split"] == "train") == (split == "train"):
                files[match["set"] or "", match["kind"]] = root / name
        sets = sorted(set_name for set_name, kind in files if kind == "images")
        if len(sets) != 1:
            wanted = "train-images-idx3-ubyte" if split == "train" else "t10k-images-idx3-ubyte"
            found = f"found several: {', '.join(sets)}" if sets else "found none"
            raise FileNotFoundError(f"--data_path {root}: one {wanted}(.gz) is needed for {split}; {found}")
        self._file = files[sets[0], "images"]
        self._images = _read_idx(self._file, dimensions=3)  # [N, H, W]
        self.labels: np.ndarray | None = None
        self.classes: list[str] | None = None
        if label_file := files.get((sets[0], "labels")):
            self.labels = _read_idx(label_file, dimensions=1).astype(np.int64)
            if len(self.labels) != len(self._images):
                raise ValueError(f"--data_path: {label_file} has {len(self.labels)} labels, not {len(self._images)}")
            self.classes = [str(number) for number in range(max(10, self.labels.max() + 1))]

    def __reduce__(self) -> tuple:
        return IdxSource, (self._root, self._split)

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> tuple[np.ndarray, int | None]:
        return self._images[index], None if self.labels is None else int(self.labels[index])

    def name(self, index: int) -> str:
        return f"{self._file}[{index}]"


def _read_idx(file: Path, dimensions: int) -> np.ndarray:
    data = file.read_bytes()
    if file.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"--data_path: {file} is no complete gzip file ({error})") from error
    header_bytes = 4 + 4 * dimensions
    # magic number: two zeros, 8 = unsigned bytes, the number of dimensions
    if len(data) < header_bytes or data[:4] != bytes((0, 0, 8, dimensions)):
        raise ValueError(f"--data_path: {file} is no IDX file of unsigned bytes in {dimensions} dimensions")
    shape = struct.unpack(f">{dimensions}I", data[4:header_bytes])
    if len(data) - header_bytes != math.prod(shape) or 0 in shape:
        raise ValueError(f"--data_path: {file} announces {shape} bytes, but {len(data) - header_bytes} follow")
    return np.frombuffer(data, np.uint8, offset=header_bytes).reshape(shape)


# -------------------------------------------------------------------------------------------- data sets through timm

_TORCH_DOWNLOADABLE = ("mnist", "fashion_mnist", "kmnist", "qmnist", "cifar10", "cifar100")
_TORCH_NAMES = (*_TORCH_DOWNLOADABLE, "imagenet", "places365", "inaturalist", "image_folder")


class TimmSource:
    """Map-style data sets of `timm.data.create_dataset`: torch/NAME[:ROOT], hfds/NAME[:CACHE], FILE.tar."""

    def __init__(self, data_path: str, split: str) -> None:
        self._data_path, self._split = data_path, split
        self._dataset = _create_timm_dataset(data_path, split)
        # timm's own readers hand out open files; through the data set it would replace unreadable ones by neighbours
        self._reader = getattr(self._dataset, "reader", None)
        self.classes = _timm_classes(self._dataset, self._reader)
        self.labels: np.ndarray | None = None
        if self.classes is not None:
            targets = getattr(self._reader or self._dataset, "targets", None)
            if targets is None:
                targets = [self.read(index)[1] for index in range(len(self))]
            self.labels = np.asarray(targets, dtype=np.int64)

    def __reduce__(self) -> tuple:
        return TimmSource, (self._data_path, self._split)

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, index: int) -> tuple[bytes | Image.Image, int | None]:
        if self._reader is None:
            image, label = self._dataset[index]
        else:
            file, label = self._reader[index]
            with file:
                image = file.read()
        return image, None if self.classes is None else int(label)

    def name(self, index: int) -> str:
        inside = self._reader.filename(index) if self._reader is not None else None
        return f"{self._data_path}[{inside or index}]"


def _create_timm_dataset(data_path: str, split: str):
    from timm.data import create_dataset  # seconds to import, and only needed here

    prefix = data_path.partition("/")[0].lower()
    if prefix not in ("torch", "hfds"):
        # without cache_tarfiles forked workers do not share (and move) one file offset
        return create_dataset("", root=data_path, load_bytes=True, cache_tarfiles=False)
    name, _, root = data_path.partition(":")
    if prefix == "hfds":
        try:
            dataset = create_dataset(name, root=root or None, split="train" if split == "train" else "validation")
            dataset.reader[0]
            return dataset
        except ImportError as error:
            raise ValueError(f"--data_path {data_path} needs the package datasets: pip install datasets") from error
        except KeyError as error:
            raise ValueError(f"--data_path {data_path}: no column {error}; timm reads image and label") from error
        except (OSError, ValueError) as error:  # unknown name, no network, no such split
            raise FileNotFoundError(f"--data_path {data_path} ({split}): {_one_line(error)}") from error
    torch_name = name.partition("/")[2].lower()
    if torch_name not in _TORCH_NAMES:
        raise ValueError(f"--data_path {data_path}: choose torch/ and one of {', '.join(_TORCH_NAMES)}")
    root = root or os.environ.get("MAE_ET_DATA") or "./data"
    try:
        return create_dataset(name, root=root, split=split)
    except (RuntimeError, OSError) as missing:
        if torch_name not in _TORCH_DOWNLOADABLE:
            raise FileNotFoundError(f"--data_path {data_path}: {_one_line(missing)} (root {root})") from missing
    try:
        return create_dataset(name, root=root, split=split, download=True)
    except (RuntimeError, OSError) as error:
        raise FileNotFoundError(
            f"--data_path {data_path}: not under {root}, and downloading failed ({_one_line(error)});"
            f" give torch/{torch_name}:ROOT or set MAE_ET_DATA"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _timm_classes(dataset, reader) -> list[str] | None:
    """Class names in the order of the labels: a list in torchvision, a dict in timm's readers; None without labels."""
    for holder in (dataset, reader):
        names = getattr(holder, "classes", None)
        if names:  # ImageNet's names are tuples of synonyms
            return [name if isinstance(name, str) else name[0] for name in names]
        numbers = getattr(holder, "class_to_idx", None) or getattr(holder, "class_name_to_idx", None)
        if numbers:
            return sorted(numbers, key=numbers.get)
    return None
