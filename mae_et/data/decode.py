"""Crops: from what a source holds (file bytes, a Pillow image, an array) to a uint8 tensor at the size of the stage.

Four ways down to a small stage, all with the same crop for the same seed (METHOD: low-frequency crop):

- ``fourier``  bicubic crop at full size; the exact low-frequency crop happens later, on the device
- ``lanczos``  bicubic crop at full size, then Lanczos to the stage's size (the pipeline EfficientTrain++ published)
- ``bilinear`` the same with antialiased bilinear: blurrier, for comparison
- ``scaled``   a JPEG is decoded at 1/2, 1/4 or 1/8 where the crop allows it, then one Lanczos resize of the crop

JPEGs are the common case and take a short way: simplejpeg and cykooz_resizer, where they are installed, and torch's
resize of uint8. Everything else is decoded in `pixels`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from ..plan.shapes import OPERATORS, choice
from .pixels import (
    MODES,
    CorruptImage,
    ValueRange,
    check_size,
    convert,
    corrupt_image_errors,
    open_header,
    orientation_of,
    to_image,
    upright,
)
from .sources import Item, Source
from .views import draw_view, with_generator

try:
    import simplejpeg
except ImportError:  # Pillow does the same, slower
    simplejpeg = None
try:
    import cykooz_resizer
except ImportError:  # Pillow does the same, to a third of a level of 255, slower
    cykooz_resizer = None


def _torch_has_lanczos() -> bool:
    try:
        torch.nn.functional.interpolate(
            torch.zeros(1, 3, 4, 4, dtype=torch.uint8), (2, 2), mode="lanczos", antialias=True
        )
    except (ValueError, NotImplementedError):
        return False
    return True


_LANCZOS = cykooz_resizer and cykooz_resizer.ResizeAlg.convolution(cykooz_resizer.FilterType.lanczos3)
_RESIZED_CROP = {"lanczos": Image.Resampling.LANCZOS, "bilinear": Image.Resampling.BILINEAR}

#: Antialiased resizes of uint8 in this version of torch, by Pillow's name in lower case.
_TORCH_FILTERS = ("bilinear", "bicubic", "lanczos") if _torch_has_lanczos() else ("bilinear", "bicubic")


def train_crop(
    item: Item,
    size_px: tuple[int, int],
    full_px: tuple[int, int],
    operator: str,
    crop_scale: tuple[float, float],
    augment: int,
    seed: int,
    in_chans: int,
    value_range: ValueRange | None = None,
) -> torch.Tensor:
    """MAE's augmentation of one sample: random resized crop, flip, and RandAugment where `augment` > 0.

    `size_px` and `full_px` are (height, width); `crop_scale` bounds the area of the crop as a share of the image;
    `augment` is RandAugment's magnitude, 0..30; `value_range` is that of :func:`to_image`. Returns uint8 [C, *full_px]
    for a SPECTRAL operator and [C, *size_px] otherwise. A function of its arguments alone: the geometry depends only
    on `seed`, `crop_scale` and the size of the image, and torch's global generator is left as it was.

    Raises CorruptImage if no image can be made of `item`, ValueError for arguments that do not fit together.
    """
    return train_crops(item, size_px, full_px, operator, crop_scale, augment, [seed], in_chans, value_range)[0]


def train_crops(
    item: Item,
    size_px: tuple[int, int],
    full_px: tuple[int, int],
    operator: str,
    crop_scale: tuple[float, float],
    augment: int,
    seeds: Sequence[int],
    in_chans: int,
    value_range: ValueRange | None = None,
    objections: list[str] | None = None,
) -> list[torch.Tensor]:
    """As :func:`train_crop`, one crop for each seed, of an image that is decoded once.

    objections: takes what the strict JPEG decoder objects to in an image that Pillow decodes all the same.
    """
    choice("operator", operator, OPERATORS)
    if not 0 <= augment <= 30:
        raise ValueError(f"augment is {augment}; a RandAugment magnitude lies in 0..30")
    if augment and in_chans not in MODES:
        raise ValueError(
            f"augment is {augment}, but RandAugment needs --in_chans 1 or 3, not {in_chans}; set augment 0"
        )

    is_scaled = operator == "scaled"
    # A JPEG's luminance is not quite what Pillow makes of its colours, so grey takes the short way only scaled.
    jpeg = _open_jpeg(item) if in_chans == 3 or (is_scaled and in_chans == 1) else None
    image = to_image(item, in_chans, value_range) if jpeg is None else None
    upright_px = _size_px(image) if jpeg is None else jpeg.upright_px
    views = [draw_view(seed, upright_px, crop_scale) for seed in seeds]
    divisor = 1
    if jpeg is not None:
        if is_scaled:
            finest = min(_reduction(view.box, size_px) for view in views)
            divisor = next((d for d in (8, 4, 2) if d <= finest), 1)
        image = _decode_jpeg(jpeg, in_chans, divisor, objections)

    crops = []
    for view in views:
        if jpeg is not None:
            crop = _jpeg_crop(jpeg, image, divisor, view.box, size_px if is_scaled else full_px, is_scaled)
        elif is_scaled:
            crop = _resize(image, size_px, Image.Resampling.LANCZOS, view.box)
        else:
            # cut first, then resize, as torchvision does: the filter must not see pixels outside the crop
            crop = _resize(_cut(image, view.box), full_px, Image.Resampling.BICUBIC)
        if view.flip:
            crop = _mirror(crop)
        if augment:
            with with_generator(view.generator):
                randaugment = v2.RandAugment(2, augment, interpolation=v2.InterpolationMode.BILINEAR)
                crop = randaugment(v2.functional.to_pil_image(crop) if isinstance(crop, np.ndarray) else crop)
        if operator in _RESIZED_CROP and size_px != full_px:
            quick = jpeg is not None and not augment and operator in _TORCH_FILTERS
            crop = _torch_resize(crop, size_px, operator) if quick else _resize(crop, size_px, _RESIZED_CROP[operator])
        crops.append(_to_tensor(crop))
    return crops


def center_crop(
    item: Item,
    size_px: tuple[int, int],
    in_chans: int,
    crop_pct: float = 1.0,
    value_range: ValueRange | None = None,
    interpolation: str = "bicubic",
) -> torch.Tensor:
    """The view used in evaluation: resize until `size_px` / `crop_pct` is covered, then the centre.

    `size_px` is (height, width), `crop_pct` lies in (0, 1]; MAE evaluates 224 with 224/256.
    Returns uint8 [C, *size_px]. Raises CorruptImage if no such image can be made of `item`, ValueError for `crop_pct`.
    """
    if not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct is {crop_pct}; it must lie in (0, 1]")
    image = to_image(item, in_chans, value_range)
    height, width = _size_px(image)
    cover_height, cover_width = int(size_px[0] / crop_pct), int(size_px[1] / crop_pct)
    if cover_height * width >= cover_width * height:  # the height decides; integers, so that no rounding loses a pixel
        resized_px = cover_height, max(cover_width, cover_height * width // height)
    else:
        resized_px = max(cover_height, cover_width * height // width), cover_width
    check_size(*resized_px[::-1], "resized for its centre crop, ")  # a long, thin image would take gigabytes
    image = _resize(image, resized_px, Image.Resampling[interpolation.upper()])
    top, left = (round((resized - size) / 2) for resized, size in zip(resized_px, size_px, strict=True))
    return _to_tensor(_cut(image, (left, top, left + size_px[1], top + size_px[0])))


def center_crops(
    source: Source,
    count: int,
    size_px: tuple[int, int],
    in_chans: int,
    value_range: ValueRange | None = None,
) -> tuple[torch.Tensor, list[str]]:
    """Centre crops of up to `count` images, spread evenly over a source, to look at: uint8 [B, C, *size_px].

    Images that can't be read are left out; the second result names each with the reason.
    """
    crops, skipped = [], []
    count = min(count, len(source))
    for index in (place * len(source) // count for place in range(count)):
        try:
            crops.append(center_crop(source.read(index)[0], size_px, in_chans, value_range=value_range))
        except (CorruptImage, OSError) as error:
            skipped.append(f"{source.name(index)}: {error}")
    return torch.stack(crops) if crops else torch.empty(0, in_chans, *size_px, dtype=torch.uint8), skipped


# ── crops of decoded images ──


def _size_px(image: Image.Image | np.ndarray) -> tuple[int, int]:
    return image.shape[:2] if isinstance(image, np.ndarray) else (image.height, image.width)


def _cut(image: Image.Image | np.ndarray, box: tuple[int, int, int, int]) -> Image.Image | np.ndarray:
    left, top, right, bottom = box
    return image[top:bottom, left:right] if isinstance(image, np.ndarray) else image.crop(box)


def _mirror(image: Image.Image | np.ndarray) -> Image.Image | np.ndarray:
    return image[:, ::-1] if isinstance(image, np.ndarray) else image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def _resize(
    image: Image.Image | np.ndarray,
    size_px: tuple[int, int],
    resampling: Image.Resampling,
    box: tuple[float, float, float, float] | None = None,
) -> Image.Image | np.ndarray:
    """Resize (the box of) an image to (height, width), antialiased; arrays [H, W, C] channel by channel."""
    if isinstance(image, np.ndarray):
        channels = (Image.fromarray(np.ascontiguousarray(image[..., c])) for c in range(image.shape[2]))
        return np.stack([np.asarray(_resize(channel, size_px, resampling, box)) for channel in channels], axis=2)
    return image.resize((size_px[1], size_px[0]), resampling, box=box)


def _torch_resize(pixels: np.ndarray, size_px: tuple[int, int], resampling: str) -> np.ndarray:
    """uint8 [H, W, C] -> [*size_px, C]. Three times as fast as Pillow; on average they differ by 0.2 of 255 levels."""
    image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    image = image.contiguous(memory_format=torch.channels_last)  # for other layouts torch fails at 1×1 results
    resized = torch.nn.functional.interpolate(image, size_px, mode=resampling, antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def _lanczos(pixels: np.ndarray, size_px: tuple[int, int], box: tuple[float, float, float, float]) -> np.ndarray:
    """Lanczos resize of a box that may begin within a pixel: uint8 [h, w, C] -> [*size_px, C], 1 or 3 channels."""
    if cykooz_resizer is None:
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        return np.asarray(_resize(image, size_px, Image.Resampling.LANCZOS, box)).reshape(*size_px, -1)
    left, top, right, bottom = box
    # Pixels are copied on the way in, so only those that the filter sees: 3 lobes to each side, of the coarser grid.
    reach = 2 + math.ceil(3 * max(1, (bottom - top) / size_px[0], (right - left) / size_px[1]))
    first_row, first_column = max(0, int(top) - reach), max(0, int(left) - reach)
    pixels = pixels[first_row : math.ceil(bottom) + reach, first_column : math.ceil(right) + reach]
    kind = cykooz_resizer.PixelType.U8x3 if pixels.shape[2] == 3 else cykooz_resizer.PixelType.U8
    resized = cykooz_resizer.ImageData(size_px[1], size_px[0], kind)
    cykooz_resizer.Resizer().resize(
        cykooz_resizer.ImageData(pixels.shape[1], pixels.shape[0], kind, pixels.tobytes()),
        resized,
        cykooz_resizer.ResizeOptions(
            resize_alg=_LANCZOS,
            crop_box=cykooz_resizer.CropBox(left - first_column, top - first_row, right - left, bottom - top),
        ),
    )
    return np.frombuffer(resized.get_buffer(), np.uint8).reshape(*size_px, -1)


def _to_tensor(image: Image.Image | np.ndarray) -> torch.Tensor:
    pixels = np.asarray(image)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    # H W C -> C H W, and always a copy: what Pillow and the resizer lend is read-only
    return torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))


# ── JPEG, quickly ──

_SIMPLE_MODES = {"Gray": "L", "YCbCr": "RGB", "RGB": "RGB"}  # simplejpeg's names -> Pillow's
_APP1, _START_OF_SCAN = 0xE1, 0xDA  # APP1 holds EXIF and XMP, and so the orientation


class _Jpeg(NamedTuple):
    """A JPEG of which only the header is read.

    Turned ones take the short way, too: for a phone's 4032×3024 it takes 55 ms of one core where Pillow's takes 115,
    and 27 instead of 120 with `scaled`.
    """

    data: bytes
    mode: str
    """Pillow's name for its channels."""
    orientation: int
    stored_px: tuple[int, int]
    """(width, height) as it is stored."""

    @property
    def upright_px(self) -> tuple[int, int]:
        """(height, width)."""
        width, height = self.stored_px
        return (width, height) if self.orientation >= 5 else (height, width)


def _open_jpeg(item: Item) -> _Jpeg | None:
    """A JPEG of which only the header is read, or None for everything else."""
    if not (isinstance(item, bytes) and item.startswith(b"\xff\xd8")):
        return None
    if simplejpeg is not None and not _may_be_turned(item):
        with contextlib.suppress(ValueError):  # Pillow decides what is damage
            height, width, colours, _ = simplejpeg.decode_jpeg_header(item)
            if colours in _SIMPLE_MODES:
                check_size(width, height)
                return _Jpeg(item, _SIMPLE_MODES[colours], 1, (width, height))
    image = open_header(item)
    if image.format not in ("JPEG", "MPO"):  # MPO: a JPEG with further pictures behind it
        return None
    return _Jpeg(item, image.mode, orientation_of(image), image.size)


def jpeg_objection(item: Item) -> str:
    """What a strict decoder objects to in a JPEG, such as a hole in its data; "" for nothing, and for other images."""
    if simplejpeg is None or not isinstance(item, bytes) or not item.startswith(b"\xff\xd8"):
        return ""
    try:
        if simplejpeg.decode_jpeg_header(item)[2] in _SIMPLE_MODES:
            simplejpeg.decode_jpeg(item, "GRAY", min_height=1, min_width=1, min_factor=1)  # at an eighth
    except ValueError as error:
        return str(error)
    return ""


def _may_be_turned(data: bytes) -> bool:
    """False if a JPEG has no APP1 segment before its pixels; Pillow needs a tenth of a decode to open a file."""
    place = 2
    while len(head := data[place : place + 4]) == 4 and head[0] == 0xFF:
        if head[1] in (_APP1, _START_OF_SCAN):
            return head[1] == _APP1
        place += 2 + int.from_bytes(head[2:], "big")
    return True


def _reduction(box: tuple[int, int, int, int], size_px: tuple[int, int]) -> float:
    """How many times smaller the image may be for the box still to cover `size_px`."""
    left, top, right, bottom = box
    return min((bottom - top) / size_px[0], (right - left) / size_px[1])


def _decode_jpeg(jpeg: _Jpeg, in_chans: int, divisor: int, objections: list[str] | None) -> np.ndarray:
    """Pixels [h, w, C] as they are stored, at 1/divisor of their size, rounded up; `objections` of simplejpeg.

    simplejpeg refuses what libjpeg warns of, such as a hole in the data; Pillow decides what can't be used. Only 1/2,
    1/4 and 1/8 are used: libjpeg has fast code for these, while its 5/8 to 7/8 are slower than decoding everything.
    """
    width, height = jpeg.stored_px
    objection = None
    # In pictures of a few pixels several scales round to the same size, so that simplejpeg could take the wrong one.
    if simplejpeg is not None and jpeg.mode in ("L", "RGB") and min(width, height) >= 16:
        try:
            return simplejpeg.decode_jpeg(
                jpeg.data,
                "RGB" if in_chans == 3 else "GRAY",
                min_height=-(-height // divisor),
                min_width=-(-width // divisor),
                min_factor=1,
            )
        except ValueError as error:
            objection = str(error)
    with corrupt_image_errors():
        # Pillow takes the smallest of its scales 1/8, 1/4, 1/2, 1 that keeps both sides at least this large
        image = open_header(jpeg.data)
        image.draft(MODES[in_chans], (width // divisor, height // divisor))
        image.load()
        pixels = np.array(convert(image, in_chans))
    if objection and objections is not None:
        objections.append(objection)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _jpeg_crop(
    jpeg: _Jpeg,
    pixels: np.ndarray,
    divisor: int,
    box: tuple[int, int, int, int],
    size_px: tuple[int, int],
    is_scaled: bool,
) -> np.ndarray:
    """Resize the crop `box`, (left, top, right, bottom) in upright full-resolution pixels, of what was decoded.

    `pixels` [h, w, C] are those of :func:`_decode_jpeg`; unless `is_scaled`, of full size. Returns uint8 [*size_px, C],
    upright.
    """
    orientation, (stored_width, stored_height) = jpeg.orientation, jpeg.stored_px
    left, top, right, bottom = box
    if orientation >= 5:  # stored on its side
        size_px = size_px[1], size_px[0]
        left, top, right, bottom = top, left, bottom, right
    if orientation in (2, 3, 7, 8):
        left, right = stored_width - right, stored_width - left
    if orientation in (3, 4, 6, 7):
        top, bottom = stored_height - bottom, stored_height - top
    if is_scaled:
        # Block n of the file starts at pixel 8n/divisor of the reduced picture, so corners scale by exactly 1/divisor
        # even where the reduced width is rounded up.
        crop = _lanczos(pixels, size_px, (left / divisor, top / divisor, right / divisor, bottom / divisor))
    else:
        crop = _torch_resize(pixels[top:bottom, left:right], size_px, "bicubic")
    return upright(crop, orientation)
