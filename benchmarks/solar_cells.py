"""Build a data set of one user's own images: photographs of solar cells, sound and defective, from a Python package.

    pip download --no-deps elpv-dataset && python benchmarks/solar_cells.py elpv_dataset-*.whl /data/solar_cells

2,624 grey 300×300 electroluminescence images of cells of 44 modules, each with the probability that it is defective, 0,
1/3, 2/3 or 1, which experts gave. A quarter of every kind (probability, mono- or polycrystalline) is held out, as many
as in Deitsch et al., Solar Energy 2019 (arXiv 1807.02894): 88.4 % by a VGG-19 pretrained on ImageNet, 82.4 % by an SVM
on hand-crafted features. Which cells they held out is not known.

    OUT/{train,val}/{sound,defective}/cellNNNN.pgm      defective: a probability above one half

The images are CC BY-NC-SA 4.0, for measuring on one's own machine. OUT/LICENCE.txt says where they are from.
"""

from __future__ import annotations

import io
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import tyro
from PIL import Image

from mae_et.cli import explain

FOLDER = "elpv_dataset/data"
VAL_EVERY = 4  # every fourth image of a kind is held out
LICENCE = """\
Images of the Python package elpv-dataset (https://github.com/zae-bayern/elpv-dataset), CC BY-NC-SA 4.0: Buerhop-Lutz et
al., EU PVSEC 2018; Deitsch et al., Solar Energy 2019. Not part of mae_et; keep them out of its repository.
"""


@dataclass(frozen=True)
class SolarCellsConfig:
    """Build OUT/train and OUT/val."""

    wheel: tyro.conf.Positional[Path]
    """Wheel of elpv-dataset, as `pip download` leaves it."""
    out: tyro.conf.Positional[Path]
    """Folder to make."""


def build(config: SolarCellsConfig) -> None:
    if config.out.exists():
        raise ValueError(f"{config.out} exists; choose another folder or delete it")
    seen: Counter[tuple[str, str]] = Counter()
    counts: Counter[str] = Counter()
    with zipfile.ZipFile(config.wheel) as wheel:
        for line in wheel.read(f"{FOLDER}/labels.csv").decode().splitlines():
            path, probability, kind = line.split()
            seen[probability, kind] += 1
            split = "val" if seen[probability, kind] % VAL_EVERY == 0 else "train"
            label = "defective" if float(probability) > 0.5 else "sound"
            file = config.out / split / label / f"{Path(path).stem}.pgm"  # uncompressed, as benchmarks time training
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.open(io.BytesIO(wheel.read(f"{FOLDER}/{path}"))).convert("L").save(file)
            counts[f"{split}/{label}"] += 1
    (config.out / "LICENCE.txt").write_text(LICENCE)
    print(", ".join(f"{name}: {count}" for name, count in sorted(counts.items())))


if __name__ == "__main__":
    explain("solar_cells.py", lambda: build(tyro.cli(SolarCellsConfig, use_underscores=True)))
