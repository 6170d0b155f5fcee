"""Encoded images in memory, for data sets that fit and file systems that are slow."""

from __future__ import annotations

import logging

import numpy as np
from PIL import Image

from .sources import Source

log = logging.getLogger(__name__)


class CachedSource:
    """Another source whose first images, up to `most_bytes` of encoded files, are read once and kept.

    They lie in one array, which forked workers share: nothing in it is ever written again, reference counts included.
    What can't be read now is tried again, and named, when its turn comes.
    """

    def __init__(self, source: Source, most_bytes: int) -> None:
        self.classes, self.labels = source.classes, source.labels
        self._source = source
        data, ends = bytearray(), [0]
        for index in range(len(source)):
            try:
                item = source.read(index)[0]
            except OSError:
                item = b""
            if not isinstance(item, bytes) or len(data) + len(item) > most_bytes:
                break
            data += item
            ends.append(len(data))
        self._data, self._ends = np.frombuffer(data, dtype=np.uint8), np.array(ends, dtype=np.int64)
        log.info("%d of %d images in memory, %.2f GiB", len(ends) - 1, len(source), len(data) / 2**30)

    def __len__(self) -> int:
        return len(self._source)

    def read(self, index: int) -> tuple[bytes | Image.Image | np.ndarray, int | None]:
        if index + 1 >= len(self._ends) or self._ends[index] == self._ends[index + 1]:
            return self._source.read(index)
        data = self._data[self._ends[index] : self._ends[index + 1]].tobytes()
        return data, None if self.labels is None else int(self.labels[index])

    def name(self, index: int) -> str:
        return self._source.name(index)
