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
from pathlib import Path

import numpy as np

INDEX = "index.json"
FORMAT = "mae_et shards 1"


class ShardSource:
    """Source of the JPEG bytes in the shards of one folder, by the offsets in its index."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        index = read_index(folder)
        self._shards = [shard["file"] for shard in index["shards"]]
        for shard in index["shards"]:
            check_shard(folder, shard)
        counts = [len(shard["keys"]) for shard in index["shards"]]
        self._shard = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        columns = {
            name: np.concatenate([np.array(shard[name], dtype=np.int64) for shard in index["shards"]])
            for name in ("keys", "offsets", "sizes")
        }
        self._keys, self._offsets, self._sizes = columns["keys"], columns["offsets"], columns["sizes"]
        self.classes: list[str] | None = index["classes"]
        self.labels: np.ndarray | None = None
        if self.classes is not None:
            self.labels = np.concatenate([np.array(shard["labels"], dtype=np.int64) for shard in index["shards"]])
            if not 0 <= self.labels.min() <= self.labels.max() < len(self.classes):
                raise ValueError(f"--data_path: {folder / INDEX} has labels beyond its {len(self.classes)} classes")
        self._files: dict[
            int, int
        ] = {}  # shard -> file descriptor; pread has no position that forked workers could move

    def __reduce__(self) -> tuple:
        return ShardSource, (self._folder,)

    def __len__(self) -> int:
        return len(self._keys)

    def read(self, index: int) -> tuple[bytes, int | None]:
        shard, size = int(self._shard[index]), int(self._sizes[index])
        if shard not in self._files:
            self._files[shard] = os.open(self._folder / self._shards[shard], os.O_RDONLY)
        data = os.pread(self._files[shard], size, int(self._offsets[index]))
        if len(data) != size:
            raise OSError(f"{self.name(index)} ends after {len(data)} of {size} bytes")
        return data, None if self.labels is None else int(self.labels[index])

    def name(self, index: int) -> str:
        return f"{self._folder / self._shards[self._shard[index]]}[{self._keys[index]:08}.jpg]"

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            os.close(file)


def read_index(folder: Path) -> dict:
    """index.json as `prepare` wrote it. ValueError if it is anything else."""
    try:
        index = json.loads((folder / INDEX).read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"--data_path: {folder / INDEX} is not JSON ({error})") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT or not index.get("shards"):
        raise ValueError(f"--data_path: {folder / INDEX} is no index of {FORMAT!r}; write it with mae_et prepare")
    return index


def check_shard(folder: Path, shard: dict) -> None:
    """ValueError unless the shard lies in `folder`, has its size, and its images lie inside of it."""
    file = folder / shard["file"]
    if Path(shard["file"]).name != shard["file"]:
        raise ValueError(f"--data_path: {folder / INDEX} names a shard outside of it, {shard['file']!r}")
    if not file.is_file() or file.stat().st_size != shard["bytes"]:
        found = f"has {file.stat().st_size} bytes" if file.is_file() else "is missing"
        raise ValueError(f"--data_path: {file} {found}, should have {shard['bytes']}; run mae_et prepare again")
    offsets, sizes = (np.array(shard[name], dtype=np.int64) for name in ("offsets", "sizes"))
    lengths = {len(shard[name]) for name in ("keys", "offsets", "sizes", "labels") if shard[name] is not None}
    if len(lengths) != 1 or offsets.min(initial=0) < 0 or sizes.min(initial=1) < 1:
        raise ValueError(f"--data_path: {folder / INDEX} has broken entries for {shard['file']}")
    if (offsets + sizes).max(initial=0) > shard["bytes"]:
        raise ValueError(f"--data_path: {folder / INDEX} has images beyond the end of {shard['file']}")
