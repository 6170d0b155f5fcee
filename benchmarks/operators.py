"""How far an operator's small image is from the photograph reduced with its surroundings: at the border, and inside.

    python benchmarks/operators.py [--picture docs/pictures/operators.png]

Windows of the embedded photographs are made small, and compared with the same place of a window three times as wide
that was made small by the same spectral crop (Lanczos: by `dct`), sampled at the same points. Root mean square over all
windows, in standard deviations of the pixels: of the outermost pixels, and of those eight further in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor

from mae_et.cli import explain
from mae_et.data.photos import CLASSES, photograph
from mae_et.plan.shapes import SPECTRAL, spectral_operator
from mae_et.spectral import low_frequency_crop

OPERATORS = (*SPECTRAL, "lanczos")
AMPLIFIED = 4


@dataclass(frozen=True)
class OperatorsConfig:
    """Errors of the operators on photographs."""

    sizes: tuple[tuple[int, int], ...] = ((64, 32), (64, 48), (112, 48), (112, 80))
    """Full and small sizes; 112 to 48 and 80 is 224 to 96 and 160 of photographs that are too small for it."""
    picture: Path | None = None
    """PNG to draw: one photograph's crop by each operator, and the difference from the reference."""
    drawn: str = "coffee"
    """The photograph to draw."""


def windows(full: int) -> Iterator[Tensor]:
    """[C, 3·full, 3·full] windows of the photographs, side by side where they fit."""
    for name in CLASSES:
        pixels = torch.from_numpy(np.array(photograph(name))).double()
        image = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
        height, width = image.shape[-2:]
        for top in range(0, height - 3 * full + 1, full):
            for left in range(0, width - 3 * full + 1, full):
                yield image[:, top : top + 3 * full, left : left + 3 * full]


def small_and_reference(window: Tensor, small: int, operator: str) -> tuple[Tensor, Tensor]:
    """The middle third of a window made small, and that place of the window made small as a whole: [C, s, s] each."""
    full = window.shape[-1] // 3
    middle = window[:, full : 2 * full, full : 2 * full]
    reference = low_frequency_crop(window, 3 * small, spectral_operator(operator))[
        :, small : 2 * small, small : 2 * small
    ]
    if operator == "lanczos":
        planes = [Image.fromarray(plane.float().numpy()) for plane in middle]
        resized = [np.array(plane.resize((small, small), Image.Resampling.LANCZOS)) for plane in planes]
        return torch.from_numpy(np.stack(resized)).double(), reference
    return low_frequency_crop(middle, small, operator), reference


def ring(squares: Tensor, depth: int) -> float:
    """Mean over the pixels that are `depth` away from the border of a square [s, s]."""
    inner = squares[depth : len(squares) - depth, depth : len(squares) - depth]
    hole = inner[1:-1, 1:-1]
    return ((inner.sum() - hole.sum()) / (inner.numel() - hole.numel())).item()


def errors(full: int, small: int, operator: str) -> tuple[float, float, int]:
    """(at the border, eight pixels in, number of windows)."""
    border, inside = [], []
    for window in windows(full):
        found, reference = small_and_reference(window, small, operator)
        squares = ((found - reference) / window.std()).square().mean(0)
        border.append(ring(squares, 0))
        inside.append(ring(squares, 8))
    return np.mean(border) ** 0.5, np.mean(inside) ** 0.5, len(border)


def draw(path: Path, name: str) -> None:
    """One row: the reference, then each operator's crop and its amplified difference from the reference around grey."""
    full, small, zoom = 112, 48, 4
    image = torch.from_numpy(np.array(photograph(name))).double().permute(2, 0, 1)
    window = image[:, -3 * full :, : 3 * full]
    tiles = []
    for operator in OPERATORS:
        found, reference = small_and_reference(window, small, operator)
        tiles += [found, 127.5 + AMPLIFIED * (found - reference)]
    tiles = [small_and_reference(window, small, "dct")[1], *tiles]
    row = torch.cat([torch.nn.functional.pad(tile, (1, 1, 1, 1), value=255.0) for tile in tiles], -1)
    pixels = row.clamp(0, 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    sheet = Image.fromarray(pixels)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.resize((sheet.width * zoom, sheet.height * zoom), Image.Resampling.NEAREST).save(path, optimize=True)


def main(config: OperatorsConfig) -> None:
    print("| full → small | operator | border | eight pixels in | windows |\n|---|---|---|---|---|")
    for full, small in config.sizes:
        for operator in OPERATORS:
            border, inside, count = errors(full, small, operator)
            print(f"| {full} → {small} | {operator} | {border:.3f} | {inside:.3f} | {count} |")
    if config.picture:
        draw(config.picture, config.drawn)


if __name__ == "__main__":
    explain("operators.py", lambda: main(tyro.cli(OperatorsConfig, use_underscores=True)))
