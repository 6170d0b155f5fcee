"""Common corruptions: five kinds at five strengths, for judging how robust features and classifiers are.

Source: Hendrycks and Dietterich, arXiv 1903.12261, ImageNet-C: its Gaussian noise, Gaussian blur, contrast, JPEG and
pixelation, with its strengths for images of 224 px.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.transforms.v2 import functional as tv

from .stream import derive_seed
from .views import with_generator

STRENGTHS = {
    "noise": (0.08, 0.12, 0.18, 0.26, 0.38),  # standard deviation, where white is 1
    "blur": (1, 2, 3, 4, 6),  # standard deviation in pixels of an image of 224
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),  # share that is left
    "jpeg": (25, 18, 15, 10, 7),  # quality
    "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),  # share of the sides that is left
}
BLUR_SIDE_PX = 224


@dataclass(frozen=True)
class CommonCorruption:
    """One kind at one strength."""

    kind: str
    """Key of STRENGTHS."""
    strength: int
    """1 (weak) to 5."""

    def __call__(self, image: Tensor, number: int) -> Tensor:
        """The corrupted image, uint8 [C, H, W] as `image`. Noise is a function of the image's number."""
        value, (height, width) = STRENGTHS[self.kind][self.strength - 1], image.shape[-2:]
        match self.kind:
            case "noise":
                seed = derive_seed(number, self.kind, self.strength)
                with with_generator(torch.Generator().manual_seed(seed)):
                    noisy = tv.gaussian_noise(image.float() / 255, sigma=value)
                return _rounded(255 * noisy)
            case "blur":
                sigma = value * min(height, width) / BLUR_SIDE_PX
                reach = min(int(4 * sigma + 0.5), min(height, width) - 1)
                return tv.gaussian_blur(image, [2 * reach + 1] * 2, [sigma] * 2) if reach else image
            case "contrast":  # around the mean of each channel, for any number of channels
                mean = image.float().mean(dim=(-2, -1), keepdim=True)
                return _rounded(mean + value * (image - mean))
            case "jpeg":
                return _with_pillow(image, lambda picture: _jpeg(picture, int(value)))
            case _:
                small, box = (max(1, int(width * value)), max(1, int(height * value))), Image.Resampling.BOX
                return _with_pillow(image, lambda picture: picture.resize(small, box).resize((width, height), box))


#: Every kind at every strength.
CORRUPTIONS = tuple(CommonCorruption(kind, n) for kind, values in STRENGTHS.items() for n in range(1, len(values) + 1))


def _rounded(values: Tensor) -> Tensor:
    return values.round().clamp(0, 255).to(torch.uint8)


def _with_pillow(image: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    """Change a picture in colours as such, any other channels one by one."""
    parts = [image] if len(image) == 3 else image.split(1)
    return torch.cat([pil_to_tensor(change(to_pil_image(part))) for part in parts])


def _jpeg(picture: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file)
