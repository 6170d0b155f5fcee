"""Views: random resized crops and flips, drawn as functions of a seed."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

CROP_RATIO = (3 / 4, 4 / 3)  # width / height of a random crop; MAE, section A.1, through torchvision's default
_LOG_RATIO = tuple(map(math.log, CROP_RATIO))


class View(NamedTuple):
    """Crop and flip of one sample."""

    box: tuple[int, int, int, int]
    """(left, top, right, bottom) of the crop, in pixels of the upright image."""
    flip: bool
    generator: torch.Generator
    """Its state after the draws above, for RandAugment."""


def draw_view(seed: int, image_px: tuple[int, int], crop_scale: tuple[float, float]) -> View:
    """Draw crop and flip for an image of (height, width), bit for bit as torchvision does after manual_seed(seed).

    `crop_scale` bounds the area of the crop as a share of the image. A generator of its own takes a third of the time
    of saving, seeding and restoring torch's global one, which is a tenth of the whole cost of a JPEG at 96 px.
    """
    generator = torch.Generator().manual_seed(seed)
    box = _draw_box(generator, *image_px, crop_scale)
    return View(box, torch.rand((), generator=generator).item() < 0.5, generator)


def _draw_box(
    generator: torch.Generator, height: int, width: int, crop_scale: tuple[float, float]
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) by the rule of torchvision's RandomResizedCrop."""
    for _ in range(10):
        area = height * width * torch.empty(1).uniform_(*crop_scale, generator=generator).item()
        ratio = torch.empty(1).uniform_(*_LOG_RATIO, generator=generator).exp_().item()
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = torch.randint(height - crop_height + 1, (1,), generator=generator).item()
            left = torch.randint(width - crop_width + 1, (1,), generator=generator).item()
            return left, top, left + crop_width, top + crop_height
    # The image is too long for any crop drawn: take the largest centred one.
    narrowest, widest = CROP_RATIO
    crop_height = round(width / narrowest) if width / height < narrowest else height
    crop_width = round(height * widest) if width / height > widest else width
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


@contextlib.contextmanager
def with_generator(generator: torch.Generator) -> Iterator[None]:
    """Set torch's default CPU generator to the state of `generator` inside the block; restore it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(generator.get_state())
        yield
