"""The strip of a run's progress: a column for each of its pictures, a row for each image, cut out of the pictures."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from . import run_folder
from .picture import FAINT, GAP, INK, MARGIN, PLACES, load_font, resized, write_smallest

MAX_MOMENTS, MAX_IMAGES = 7, 3
LINE_PX = 18

Column = tuple[str, str, list[Image.Image]]
"""Two lines above, and an image for each row."""


def write_progress(folder: Path, title: str, steps: int) -> None:
    """Write progress.png from the pictures of --picture_steps in a run folder, and the one after all its `steps`.

    At most MAX_MOMENTS of them, evenly spread with the first and the last. Nothing is written without any.
    """
    numbered = ((file.stem.removeprefix("reconstruction-"), file) for file in folder.glob("reconstruction-*.png"))
    pictures = {int(step): file for step, file in numbered if step.isdecimal() and _blocks(file)}
    if not pictures:
        return
    pictures[steps] = folder / run_folder.PICTURE
    moments = sorted(pictures)
    last = len(moments) - 1
    chosen = [moments[i] for i in sorted({round(i * last / (MAX_MOMENTS - 1)) for i in range(MAX_MOMENTS)})]
    columns = [(f"step {step:,}", *_cut(pictures[step], "predictions")) for step in chosen]
    columns.insert(0, ("input", "", _cut(pictures[steps], "inputs")[1]))
    write_smallest(folder / run_folder.PROGRESS, partial(_strip, title, columns))


def _blocks(picture: Path) -> list[dict[str, Any]]:
    """Where the panels of a picture lie, block by block; none in one of an older version."""
    with Image.open(picture) as sheet:
        return json.loads(sheet.info.get(PLACES, "[]"))


def _cut(picture: Path, what: str) -> tuple[str, list[Image.Image]]:
    """Size in words and the panels of the first images, from a picture's last block."""
    block = _blocks(picture)[-1]
    width, height = block["panel"]
    corners = block[what][:MAX_IMAGES]
    with Image.open(picture) as sheet:
        rgb = sheet.convert("RGB")
    panels = [rgb.crop((x, y, x + width, y + height)) for x, y in corners]
    return block["caption"].partition("  ")[0], panels


def _strip(title: str, columns: list[Column], side_px: int) -> Image.Image:
    """Columns side by side, panels with a longer side of `side_px`."""
    first = columns[0][2][0].size
    panel = tuple(round(side_px * side / max(first)) for side in first)
    title_font, font, small = load_font(17), load_font(13), load_font(12)
    words = max(font.getlength(head) for head, *_ in columns), max(small.getlength(size) for _, size, _ in columns)
    cell = max(panel[0], *(int(width) + GAP for width in words))
    top = MARGIN + 30 + 2 * LINE_PX + GAP
    width = max(2 * MARGIN + len(columns) * (cell + GAP), 2 * MARGIN + int(title_font.getlength(title)))
    strip = Image.new("RGB", (width, top + len(columns[0][2]) * (panel[1] + GAP) + MARGIN), "white")
    draw = ImageDraw.Draw(strip)
    draw.text((MARGIN, MARGIN), title, INK, title_font)
    for number, (head, size, images) in enumerate(columns):
        left = MARGIN + number * (cell + GAP)
        draw.text((left, MARGIN + 30), head, INK, font)
        draw.text((left, MARGIN + 30 + LINE_PX), size, FAINT, small)
        for row, image in enumerate(images):
            strip.paste(resized(image, panel), (left, top + row * (panel[1] + GAP)))
    return strip
