"""The strip shows what the pictures of a run show, in the order of its steps."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_et.engine import picture
from mae_et.engine.picture import write_sheet
from mae_et.engine.progress import MAX_MOMENTS, write_progress


def write_picture(folder: Path, step: int | None, color: tuple[int, int, int], sizes: tuple[int, ...] = (32,)) -> None:
    """A picture of four images whose inputs are black and whose predictions, in its last block, have a colour."""

    def panels(size: int) -> list[Image.Image]:
        return [Image.new("RGB", (size, size), shade) for shade in ((0, 0, 0), (140, 140, 140), color, (70, 70, 70))]

    blocks = [(f"{size}×{size} px  ·  12 of 16 patches visible", [panels(size)] * 4) for size in sizes]
    name = "reconstruction.png" if step is None else f"reconstruction-{step:07d}.png"
    write_sheet(folder / name, "title", "pixel", blocks)


def colors_of(strip: Path) -> list[tuple[int, ...]]:
    """The colours of the panels in the middle row, from left to right."""
    pixels = np.asarray(Image.open(strip).convert("RGB"))
    middle = pixels[3 * len(pixels) // 5]
    return [color for color, run in groupby(map(tuple, middle.tolist())) if len(list(run)) > 20 and min(color) < 200]


def test_columns_follow_the_steps(tmp_path: Path) -> None:
    colors = [(200, 0, 0), (0, 180, 0), (0, 0, 220), (180, 180, 0)]
    for step, color in zip((50, 100, 1000), colors, strict=False):
        write_picture(tmp_path, step, color, (16 if step < 1000 else 32,))
    write_picture(tmp_path, None, colors[-1], (16, 32))
    write_progress(tmp_path, "title", 1200)
    assert colors_of(tmp_path / "progress.png") == [(0, 0, 0), *colors]
    write_progress(tmp_path, "title", 1000)  # the last picture is that of the end
    assert colors_of(tmp_path / "progress.png") == [(0, 0, 0), *colors[:2], colors[3]]


def test_of_many_pictures_some_are_shown_the_first_and_the_last_always(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picture, "PANELS", ((48, 64),))
    for step in range(1, 12):
        write_picture(tmp_path, step, (10 * step, 0, 150))
    write_picture(tmp_path, None, (200, 0, 150))
    write_progress(tmp_path, "title", 12)
    shown = [red for red, green, blue in colors_of(tmp_path / "progress.png") if blue == 150]
    assert len(shown) == MAX_MOMENTS and shown == sorted(shown) and (shown[0], shown[-1]) == (10, 200)


def test_pictures_of_older_versions_are_left_out(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "reconstruction-0000001.png")
    write_progress(tmp_path, "title", 2)
    assert not (tmp_path / "progress.png").exists()


@pytest.mark.parametrize("name", ["reconstruction-mine", "reconstruction-mine-7"])
def test_pictures_of_other_names_are_left_out(tmp_path: Path, name: str) -> None:
    write_picture(tmp_path, 1, (200, 0, 0))
    (tmp_path / "reconstruction-0000001.png").rename(tmp_path / f"{name}.png")
    write_progress(tmp_path, "title", 2)
    assert not (tmp_path / "progress.png").exists()
