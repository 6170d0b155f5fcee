"""Published data sets: IDX files (the MNIST family), and those that timm reads."""

from __future__ import annotations

import gzip
import logging
import math
import os
import re
import struct
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .folders import TRAIN_NAMES, VAL_NAMES

log = logging.getLogger(__name__)

_IDX_NAME = re.compile(r"(?P<set>.*-)?(?P<split>train|t10k|test)-(?P<kind>images|labels)[-.]idx[13]-ubyte(\.gz)?$")


def has_idx_files(folder: Path) -> bool:
    """Whether this is a folder of the MNIST family."""
    return any(_IDX_NAME.match(name) for name in os.listdir(folder))


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
            problem = f"found several: {', '.join(sets)}" if sets else "found none"
            raise FileNotFoundError(f"--data_path {root}: one {wanted}(.gz) is needed for {split}; {problem}")
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


# ── through timm ──

_TORCH_DOWNLOADABLE = ("mnist", "fashion_mnist", "kmnist", "qmnist", "cifar10", "cifar100")
_TORCH_NAMES = (*_TORCH_DOWNLOADABLE, "imagenet", "places365", "inaturalist", "image_folder")


class TimmSource:
    """Map-style data sets of `timm.data.create_dataset`: torch/NAME[:ROOT] and hfds/NAME[:CACHE]."""

    def __init__(self, data_path: str, split: str) -> None:
        self._data_path, self._split = data_path, split
        kind = data_path.partition("/")[0].lower()
        self._dataset = (_create_hfds if kind == "hfds" else _create_torch)(data_path, split)
        # timm's own readers hand out open files; through the data set it would replace unreadable ones by neighbours
        self._reader = getattr(self._dataset, "reader", None)
        self.classes = _class_names(self._dataset, self._reader)
        self.labels: np.ndarray | None = None
        if self.classes is not None:
            targets = getattr(self._reader or self._dataset, "targets", None)
            if targets is None:
                targets = [self.read(index)[1] for index in range(len(self))]
            self.labels = np.asarray(targets, dtype=np.int64)
            if self.labels.min(initial=0) < 0:  # -1, as the hub has it for test images whose labels are kept back
                self.labels = self.classes = None

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


def _create_torch(data_path: str, split: str) -> Any:
    from timm.data import create_dataset  # seconds to import, and only needed here

    name, _, root = data_path.partition(":")
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


# What columns are called in data sets on the Hugging Face hub, the usual name first.
_IMAGE_COLUMNS = ("image", "img", "images", "picture", "photo", "pixel_values")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "category", "target")


def _create_hfds(data_path: str, split: str) -> Any:
    from timm.data import create_dataset

    name, _, cache = data_path.partition(":")

    def create(hub_split: str, **columns: str) -> Any:
        dataset = create_dataset(name, root=cache or None, split=hub_split, **columns)
        dataset.reader[0]
        return dataset

    try:
        return create("train" if split == "train" else "validation")
    except ImportError as error:
        raise ValueError(f"--data_path {data_path} needs the package datasets: pip install datasets") from error
    except (
        KeyError,
        TypeError,
        ValueError,
        OSError,
    ) as error:
        usual = error  # other columns, no such split, unknown name, no network
    try:
        hub_split, columns = _hub_layout(data_path, name.partition("/")[2], cache or None, split)
        return create(hub_split, **columns)
    except ImportError:
        if isinstance(usual, KeyError):
            message = f"--data_path {data_path}: no column {usual}; timm reads image and label"
            raise ValueError(message) from usual
        raise FileNotFoundError(f"--data_path {data_path} ({split}): {_one_line(usual)}") from usual


def _hub_layout(data_path: str, repository: str, cache: str | None, split: str) -> tuple[str, dict[str, str]]:
    """Split and columns of a Hugging Face data set that are meant, where they aren't called as timm expects."""
    import datasets

    try:
        splits = datasets.get_dataset_split_names(repository)
        wanted = TRAIN_NAMES if split == "train" else VAL_NAMES
        hub_split = next((own for name in wanted for own in splits if own.lower() == name), None)
        if hub_split is None:
            raise FileNotFoundError(f"--data_path {data_path} ({split}): its splits are {', '.join(splits)}")
        features = datasets.load_dataset(repository, split=hub_split, cache_dir=cache).features
    except (OSError, ValueError) as error:  # unknown name, no network
        if str(error).startswith("--data_path"):
            raise
        raise FileNotFoundError(f"--data_path {data_path} ({split}): {_one_line(error)}") from error
    image = _column(features, "Image", _IMAGE_COLUMNS)
    if image is None:
        raise ValueError(f"--data_path {data_path}: none of its columns {', '.join(features)} holds images")
    label = _column(features, "ClassLabel", _LABEL_COLUMNS)
    log.info("--data_path %s: split %s, images in %s, labels in %s", data_path, hub_split, image, label or "none")
    return hub_split, {"input_key": image, "target_key": label or image}  # without labels timm's target isn't looked at


def _column(features: Mapping[str, Any], kind: str, usual_names: Sequence[str]) -> str | None:
    """The column of a kind of feature, by a usual name or else the first one."""
    columns = [name for name, feature in features.items() if type(feature).__name__ == kind]
    return next((name for name in usual_names if name in columns), columns[0] if columns else None)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _class_names(dataset: Any, reader: Any) -> list[str] | None:
    """Class names in the order of the labels: a list in torchvision, a dict in timm's readers; None without labels."""
    for holder in (dataset, reader):
        names = getattr(holder, "classes", None)
        if names:  # ImageNet's names are tuples of synonyms, of which two classes may share the first
            first = [name if isinstance(name, str) else name[0] for name in names]
            times = Counter(first)
            return [name if times[name] == 1 else f"{name} ({i})" for i, name in enumerate(first)]
        numbers = getattr(holder, "class_to_idx", None)
        if numbers:
            return sorted(numbers, key=numbers.get)
    return None
