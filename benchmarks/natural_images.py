"""Build a data set of natural images from photographs that a Debian package and two Python packages ship.

    apt-get install gcompris-qt-data && python benchmarks/natural_images.py /data/natural

GCompris, a children's learning suite, ships photographs of animals, fish, monuments, tools and sources of energy, with
the licence and author of each in its own documents; scikit-image and scikit-learn ship a few more. Three sets are made:

    OUT/tiles/{train,val}/PHOTOGRAPH/…ppm     96 px tiles of the large photographs. Training tiles come from the left
                                              three quarters, held-out tiles from the right quarter, so no pixel is in
                                              both. The label says which photograph a tile is from.
    OUT/tuning/{train,val}/PHOTOGRAPH/…ppm    training tiles only, to tune on: the last two columns are held out, and
                                              columns that overlap them are left out.
    OUT/categories/{train,val}/CATEGORY/…png  every photograph whole, its longer side at most 320 px: animal, energy,
                                              fish, monument or tool. Photographs of training and held-out ones differ.

The images are for measuring on one's own machine. OUT/LICENCE.txt says where they are from.
"""

from __future__ import annotations

import importlib.util
import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro
from PIL import Image

from mae_et.cli import explain

TILE_PX = 96
LONG_SIDE_PX = 1024
"""The larger photographs are reduced to it, so that a tile shows alike much of each."""
TRAIN_TILES, VAL_TILES = (11, 13), (10, 4)  # rows and columns of each photograph: 143 and 40 tiles
VAL_EVERY = 4  # every fourth photograph of a category is held out

#: GCompris archive, folder in it and category of its photographs; large ones (1000 px and more) give tiles.
LARGE = {
    "clickgame": ("", None),
    "erase": ("", "animal"),
    "explore_farm_animals": ("animals", "animal"),
    "explore_monuments": ("", "monument"),
    "explore_world_animals": ("animals", "animal"),
    "explore_world_music": ("music", None),
}
SMALL = {"fishes": "fish", "monuments": "monument", "renewable": "energy", "tools": "tool"}  # in `categorization`
#: Colour photographs that are files of the wheels.
WHEELS = (
    *(f"skimage/data/{name}" for name in ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png")),
    *("skimage/data/rocket.jpg", "sklearn/datasets/images/china.jpg", "sklearn/datasets/images/flower.jpg"),
)
LICENCE = """\
Tiles and reductions of photographs made by benchmarks/natural_images.py of mae_et.

From the Debian package gcompris-qt-data (see /usr/share/doc/gcompris-qt-data/copyright and the licence files of the
GCompris activities clickgame, erase, explore_*, categorization: mostly CC BY-SA and public domain, author by author),
scikit-image and scikit-learn (see their data folders). Not part of mae_et; keep them out of its repository.
"""


@dataclass(frozen=True)
class NaturalImagesConfig:
    """Build OUT/tiles, OUT/tuning and OUT/categories."""

    out: tyro.conf.Positional[Path]
    """Folder to make."""
    archives: Path = Path("/usr/share/gcompris-qt/rcc")
    """Where gcompris-qt-data keeps its .rcc files."""


def rcc_files(archive: bytes) -> Iterator[tuple[str, bytes]]:
    """Path and content of each file of a Qt resource archive (big-endian, versions 1 to 3) that isn't compressed.

    Images are not; scripts are, and are left out.
    Raises ValueError for another format.
    """
    magic, version, tree, data, names = struct.unpack_from(">4sIIII", archive)
    if magic != b"qres" or version not in (1, 2, 3):
        raise ValueError("not a Qt resource archive of version 1 to 3")
    node_bytes = 14 if version == 1 else 22  # later versions add a time

    def walk(node: int, folder: str) -> Iterator[tuple[str, bytes]]:
        name_at, flags, first, second = struct.unpack_from(">IHII", archive, tree + node * node_bytes)
        (length,) = struct.unpack_from(">H", archive, names + name_at)
        start = names + name_at + 6  # after the length and a hash
        path = f"{folder}/{archive[start : start + 2 * length].decode('utf-16-be')}" if node else ""
        if flags & 2:  # a folder: number of children, first of them
            for child in range(second, second + first):
                yield from walk(child, path)
        elif flags & ~2 == 0:
            (size,) = struct.unpack_from(">I", archive, data + second)
            yield path, archive[data + second + 4 : data + second + 4 + size]

    yield from walk(0, "")


def photographs(archives: Path) -> Iterator[tuple[str, str | None, bool, Image.Image]]:
    """(name, category, whether it is large, RGB image) of every photograph, in a fixed order."""
    for archive, (folder, category) in LARGE.items():
        for path, content in sorted(rcc_files((archives / f"{archive}.rcc").read_bytes())):
            if not path.endswith(".webp") or (folder and Path(path).parent.name != folder):
                continue
            image = Image.open(io.BytesIO(content))
            if max(image.size) >= 1000:
                yield f"{archive}-{Path(path).parent.name}-{Path(path).stem}", category, True, image.convert("RGB")
    for path, content in sorted(rcc_files((archives / "categorization.rcc").read_bytes())):
        if path.endswith(".webp") and Path(path).parent.name in SMALL:
            kind = Path(path).parent.name
            yield f"{kind}-{Path(path).stem}", SMALL[kind], False, Image.open(io.BytesIO(content)).convert("RGB")
    for file in WHEELS:
        package, _, inside = file.partition("/")
        folder = importlib.util.find_spec(package).submodule_search_locations[0]
        yield Path(file).stem, None, True, Image.open(Path(folder) / inside).convert("RGB")


def tiles(image: Image.Image) -> Iterator[tuple[str, int, Image.Image]]:
    """(set and split, number, 96 px tile) on even grids of the left three quarters (train) and the right one (val).

    A training tile that is of use in tuning comes twice: as "tuning/val" if it is of the last two columns, as
    "tuning/train" if it shares no pixel with those.
    """
    image = image.copy()
    image.thumbnail((LONG_SIDE_PX, LONG_SIDE_PX), Image.Resampling.LANCZOS)
    border = image.width * 3 // 4
    for split, start, stop, (rows, columns) in (
        ("train", 0, border, TRAIN_TILES),
        ("val", border, image.width, VAL_TILES),
    ):
        lefts = [start + (stop - start - TILE_PX) * column // (columns - 1) for column in range(columns)]
        for number in range(rows * columns):
            left, top = lefts[number % columns], (image.height - TILE_PX) * (number // columns) // (rows - 1)
            tile = image.crop((left, top, left + TILE_PX, top + TILE_PX))
            yield f"tiles/{split}", number, tile
            if split == "train" and left >= lefts[-2]:
                yield "tuning/val", number, tile
            elif split == "train" and left + TILE_PX <= lefts[-2]:
                yield "tuning/train", number, tile


def build(config: NaturalImagesConfig) -> None:
    if config.out.exists():
        raise ValueError(f"{config.out} exists; choose another folder or delete it")
    counts: dict[str, int] = {}
    for name, category, large, image in photographs(config.archives):
        if large and min(image.size) >= 2 * TILE_PX and image.width // 4 > TILE_PX:
            for split, number, tile in tiles(image):
                # Uncompressed, so that runs don't spend a tenth of their time on unpacking tiles.
                save(tile, config.out / split / name / f"{number:03d}.ppm")
        if category:
            counts[category] = counts.get(category, 0) + 1
            image.thumbnail((320, 320), Image.Resampling.LANCZOS)
            split = "val" if counts[category] % VAL_EVERY == 0 else "train"
            save(image, config.out / "categories" / split / category / f"{name}.png")
    (config.out / "LICENCE.txt").write_text(LICENCE)
    for folder in sorted(config.out.glob("*/*")):
        classes = sorted(folder.iterdir())
        print(f"{folder}: {len(classes)} classes, {sum(len(list(c.iterdir())) for c in classes)} images")


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


if __name__ == "__main__":
    explain("natural_images.py", lambda: build(tyro.cli(NaturalImagesConfig, use_underscores=True)))
