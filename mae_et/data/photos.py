"""The embedded data set `photos`: tiles of the photographs that ship inside scikit-image and scikit-learn.

For demos and tests without a download. Each photograph is one class. A vertical line splits it: training tiles come
from the left part, held-out tiles from the right part, so that no pixel is in both. Tiles lie on a regular grid with
the same number of rows and columns in every photograph, so the classes are exactly balanced; the tiles of one part
overlap.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image

# 17 photographs that are files of the wheels themselves; skimage.data would download others on access.
_FILES = {
    "astronaut": "skimage/data/astronaut.png",
    "brick": "skimage/data/brick.png",
    "camera": "skimage/data/camera.png",
    "cell": "skimage/data/cell.png",
    "chelsea": "skimage/data/chelsea.png",
    "china": "sklearn/datasets/images/china.jpg",
    "coffee": "skimage/data/coffee.png",
    "coins": "skimage/data/coins.png",
    "flower": "sklearn/datasets/images/flower.jpg",
    "grass": "skimage/data/grass.png",
    "gravel": "skimage/data/gravel.png",
    "hubble_deep_field": "skimage/data/hubble_deep_field.jpg",
    "immunohistochemistry": "skimage/data/ihc.png",
    "moon": "skimage/data/moon.png",
    "motorcycle": "skimage/data/motorcycle_left.png",
    "retina": "skimage/data/retina.jpg",
    "rocket": "skimage/data/rocket.jpg",
}
CLASSES = list(_FILES)

TILE_PX = 96
"""Three times the demo's 32 px: even a crop of a fifth of the area, 43 px a side, is more than the model sees."""

TRAIN_GRID = 16, 12  # rows, columns: 192 tiles of each photograph, 3264 in all
VAL_GRID = 12, 2  # 24 of each, 408 in all

_MIN_VAL_PX = TILE_PX + 32  # wide enough for two columns that differ, in the narrowest photographs (384 px)


class PhotoTiles:
    """Source of uint8 tiles, [96, 96] or [96, 96, 3], labelled by photograph. `split` is "train" or "val"."""

    def __init__(self, split: str) -> None:
        self._split = split
        self._rows, self._columns = TRAIN_GRID if split == "train" else VAL_GRID
        self.classes: list[str] | None = list(CLASSES)
        self.labels: np.ndarray | None = np.repeat(np.arange(len(CLASSES)), self._rows * self._columns)

    def __len__(self) -> int:
        return len(CLASSES) * self._rows * self._columns

    def read(self, index: int) -> tuple[np.ndarray, int]:
        label, left, top = self.position(index)
        return photograph(CLASSES[label])[top : top + TILE_PX, left : left + TILE_PX], label

    def name(self, index: int) -> str:
        label, left, top = self.position(index)
        return f"photos[{index}] ({CLASSES[label]} at x={left} y={top})"

    def position(self, index: int) -> tuple[int, int, int]:
        """(label, left, top) of a tile, in pixels of its photograph."""
        if not 0 <= index < len(self):
            raise IndexError(f"photos has {len(self)} {self._split} tiles, no index {index}")
        label, place = divmod(index, self._rows * self._columns)
        row, column = divmod(place, self._columns)
        height, width = photograph(CLASSES[label]).shape[:2]
        split_x = min(width * 3 // 4, width - _MIN_VAL_PX)
        start, stop = (0, split_x) if self._split == "train" else (split_x, width)
        left = start + (stop - start - TILE_PX) * column // (self._columns - 1)
        top = (height - TILE_PX) * row // (self._rows - 1)
        return label, left, top


@functools.cache
def photograph(name: str) -> np.ndarray:
    """[H, W] or [H, W, 3] uint8, decoded once per process."""
    package, _, inside = _FILES[name].partition("/")
    spec = importlib.util.find_spec(package)  # finds the folder without the seconds of an import
    file = Path(spec.submodule_search_locations[0]) / inside if spec and spec.submodule_search_locations else None
    if file is None or not file.is_file():
        raise FileNotFoundError(
            f"--data_path photos needs {_FILES[name]}, which comes with scikit-image and scikit-learn; install both"
        )
    with Image.open(file) as image:
        return np.asarray(image)
