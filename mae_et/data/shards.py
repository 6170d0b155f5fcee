"""Image folders packed once into tar shards with an index of byte offsets: `python -m mae_et prepare` writes them.

    OUT/train/00000.tar   key.jpg and, with labels, key.cls (a class number) per image, as WebDataset has them
    OUT/train/index.json  for each shard its file, bytes and sha256, and for each image key, offset, size and label
    OUT/val/              the same

Nothing is ever extracted: an image is the bytes at an offset, so that any image can be read in any order, and member
names have no power. Few large files also spare file systems the opening of a million small ones.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

INDEX = "index.json"
FORMAT = "mae_et shards 1"
MAX_OPEN_FILES = 256  # per process; systems commonly allow 1024


class Members:
    """Source of the bytes at `offsets` [N] of `files`: image n lies in files[shard[n]] and has sizes[n] bytes."""

    def __init__(
        self,
        files: list[Path],
        shard: np.ndarray,
        offsets: np.ndarray,
        sizes: np.ndarray,
        labels: np.ndarray | None,
        classes: list[str] | None,
    ) -> None:
        self.labels, self.classes = labels, classes
        self._files, self._shard, self._offsets, self._sizes = files, shard, offsets, sizes
        # shard -> file descriptor; pread has no position that forked workers could move
        self._open: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._sizes)

    def read(self, index: int) -> tuple[bytes, int | None]:
        shard, size = int(self._shard[index]), int(self._sizes[index])
        if shard not in self._open:
            if len(self._open) >= MAX_OPEN_FILES:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[shard] = os.open(self._files[shard], os.O_RDONLY)
        data = os.pread(self._open[shard], size, int(self._offsets[index]))
        if len(data) != size:
            raise OSError(f"{self.name(index)} ends after {len(data)} of {size} bytes")
        return data, None if self.labels is None else int(self.labels[index])

    def name(self, index: int) -> str:
        raise NotImplementedError

    def __del__(self) -> None:
        for file in getattr(self, "_open", {}).values():
            os.close(file)


class ShardSource(Members):
    """Source of the JPEG bytes in the shards of one folder, by the offsets in its index."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        index = read_index(folder)
        numbers = ("keys", "offsets", "sizes", *(["labels"] if index["classes"] is not None else []))
        for shard in index["shards"]:
            check_shard(folder, shard, numbers)
        columns = {
            name: np.concatenate([np.array(shard[name], dtype=np.int64) for shard in index["shards"]])
            for name in numbers
        }
        self._keys, labels = columns["keys"], columns.get("labels")
        if labels is not None and not 0 <= labels.min() <= labels.max() < len(index["classes"]):
            raise ValueError(f"--data_path: {folder / INDEX} has labels beyond its {len(index['classes'])} classes")
        super().__init__(
            files=[folder / shard["file"] for shard in index["shards"]],
            shard=shard_numbers(index["shards"]),
            offsets=columns["offsets"],
            sizes=columns["sizes"],
            labels=labels,
            classes=index["classes"],
        )

    def __reduce__(self) -> tuple:
        return ShardSource, (self._folder,)

    def name(self, index: int) -> str:
        return f"{self._files[self._shard[index]]}[{self._keys[index]:08}.jpg]"


def shard_numbers(shards: list[dict]) -> np.ndarray:
    """The shard of each image, int32 [N], in the order of the shards."""
    return np.repeat(np.arange(len(shards), dtype=np.int32), [len(shard["sizes"]) for shard in shards])


def read_index(folder: Path) -> dict:
    """index.json as `prepare` wrote it. ValueError if it is anything else."""
    try:
        index = json.loads((folder / INDEX).read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"--data_path: {folder / INDEX} is not JSON ({error})") from error
    shards = index.get("shards") if isinstance(index, dict) and "classes" in index else None
    if not shards or not isinstance(shards, list) or index.get("format") != FORMAT or not _names(index["classes"]):
        raise ValueError(f"--data_path: {folder / INDEX} is no index of {FORMAT!r}; write it with mae_et prepare")
    return index


def _names(classes: Any) -> bool:
    return classes is None or (isinstance(classes, list) and all(isinstance(name, str) for name in classes))


def check_shard(folder: Path, shard: dict, numbers: Sequence[str] = ("offsets", "sizes")) -> None:
    """ValueError unless the shard lies in `folder`, has its size, and its images lie inside of it.

    numbers: the columns that hold whole numbers.
    """
    if not _is_entry(shard, numbers):
        raise ValueError(f"--data_path: {folder / INDEX} has broken entries; write it with mae_et prepare")
    file = folder / shard["file"]
    if Path(shard["file"]).name != shard["file"]:
        raise ValueError(f"--data_path: {folder / INDEX} names a shard outside of it, {shard['file']!r}")
    if not file.is_file() or file.stat().st_size != shard["bytes"]:
        found = f"has {file.stat().st_size} bytes" if file.is_file() else "is missing"
        raise ValueError(f"--data_path: {file} {found}, should have {shard['bytes']}; run mae_et prepare again")
    offsets, sizes = (np.array(shard[name], dtype=np.int64) for name in ("offsets", "sizes"))
    lengths = {len(shard[name]) for name in ("keys", "offsets", "sizes", "labels") if shard[name] is not None}
    if len(lengths) != 1 or offsets.min(initial=0) < 0 or sizes.min(initial=0) < 0:
        raise ValueError(f"--data_path: {folder / INDEX} has broken entries for {shard['file']}")
    if (offsets + sizes).max(initial=0) > shard["bytes"]:
        raise ValueError(f"--data_path: {folder / INDEX} has images beyond the end of {shard['file']}")


def _is_entry(shard: Any, numbers: Sequence[str]) -> bool:
    """Whether it has all that an index says of a shard."""
    if not isinstance(shard, dict) or {"keys", "offsets", "sizes", "labels"} - shard.keys():
        return False
    return (
        (isinstance(shard.get("file"), str) and isinstance(shard.get("bytes"), int))
        and all(isinstance(shard[name], list) for name in ("keys", *numbers))
        and all(type(number) is int and abs(number) < 2**62 for name in numbers for number in shard[name])
    )
