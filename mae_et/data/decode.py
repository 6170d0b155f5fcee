"""From what a source holds (file bytes, a Pillow image, an array) to a uint8 tensor at the size of the stage.

Four ways down to a small stage, all with the same crop for the same seed (METHOD: low-frequency crop):

- ``fourier``  bicubic crop at full size; the exact low-frequency crop happens later, on the device
- ``lanczos``  bicubic crop at full size, then Lanczos to the stage's size (the pipeline EfficientTrain++ published)
- ``bilinear`` the same with antialiased bilinear: blurrier, for comparison
- ``scaled``   a JPEG is decoded at 1/2, 1/4 or 1/8 where the crop allows it, then one Lanczos resize of the crop

JPEGs are the common case and take a short way: simplejpeg, where it is installed, and torch's resize of uint8.

Colour profiles are ignored, as torchvision and timm do. Channels are handled one by one outside grey and RGB.
"""

from __future__ import annotations

import contextlib
import io
import math
import struct
import tokenize
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tifffile
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.transforms import RandomResizedCrop, v2

try:
    import simplejpeg
except ImportError:  # Pillow does the same, slower
    simplejpeg = None

OPERATORS = ("fourier", "lanczos", "bilinear", "scaled")


def _torch_has_lanczos() -> bool:
    try:
        torch.nn.functional.interpolate(
            torch.zeros(1, 3, 4, 4, dtype=torch.uint8), (2, 2), mode="lanczos", antialias=True
        )
    except (ValueError, NotImplementedError):
        return False
    return True


_RESIZED_CROP = {"lanczos": Image.Resampling.LANCZOS, "bilinear": Image.Resampling.BILINEAR}
CROP_RATIO = (3 / 4, 4 / 3)  # width / height of a random crop; MAE, section A.1, through torchvision's default

MAX_PIXELS = 89_478_485
"""Larger images are refused as damaged: Pillow's own limit against decompression bombs, here an error."""

#: Antialiased resizes of uint8 in this version of torch, by Pillow's name in lower case.
_TORCH_FILTERS = ("bilinear", "bicubic", "lanczos") if _torch_has_lanczos() else ("bilinear", "bicubic")

_MODES = {1: "L", 3: "RGB"}
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_NPY_MAGIC = b"\x93NUMPY"
_ORIENTATION_TAG = 0x0112  # EXIF
_BITS_TAG, _PLANES_TAG = 258, 284  # TIFF
_UPRIGHT = {  # EXIF orientation -> the transposition that brings the stored pixels upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow's decoders raise on broken files. OSError covers truncation and UnidentifiedImageError; broken PNG chunks
# are SyntaxError or zlib.error; cut headers show up as struct.error, EOFError, IndexError, KeyError, TypeError.
_PILLOW_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
# tifffile checks little: broken tags end in divisions by zero, failed assertions or RuntimeError (of which
# NotImplementedError is one).
_TIFFFILE_ERRORS = (*_PILLOW_ERRORS, ArithmeticError, AssertionError, RuntimeError)


class DamagedImage(ValueError):
    """These bytes are no readable image: truncated, corrupted, of an unknown format, or larger than MAX_PIXELS."""


def to_image(item: bytes | Image.Image | np.ndarray, in_chans: int) -> Image.Image | np.ndarray:
    """Decode, turn upright (EXIF) and bring to `in_chans` channels of 8 bits.

    Returns a Pillow image of mode "L" (1 channel) or "RGB" (3), else a uint8 array [H, W, C]. For 1 and 3 channels
    transparency is composited on white; 4 channels keep alpha as it is stored. Other counts can only come from arrays:
    .npy files, multi-band TIFF, or a source that returns them. 16 bits are scaled by 1/257, never clipped. Of several
    frames the first is taken.

    Raises DamagedImage for unreadable bytes, ValueError if the channels or the pixel type do not fit `in_chans`.
    """
    if isinstance(item, bytes):
        if item.startswith(_NPY_MAGIC):
            item = _read_npy(item)
        elif item.startswith(_TIFF_MAGIC):
            item = _open_tiff(item, in_chans)
        else:
            item = _open(item)
    if isinstance(item, np.ndarray):
        return _array_to_channels(item, in_chans)
    return _pillow_to_channels(item, in_chans)


def train_crop(
    item: bytes | Image.Image | np.ndarray,
    size_px: tuple[int, int],
    full_px: tuple[int, int],
    operator: str,
    crop_scale: tuple[float, float],
    augment: int,
    seed: int,
    in_chans: int,
) -> torch.Tensor:
    """MAE's augmentation of one sample: random resized crop, flip, and RandAugment where `augment` > 0.

    `size_px` and `full_px` are (height, width); `crop_scale` bounds the area of the crop as a share of the image;
    `augment` is RandAugment's magnitude, 0..30. Returns uint8 [C, *full_px] for the operator `fourier` and
    [C, *size_px] otherwise. A function of its arguments alone: the geometry depends only on `seed`, `crop_scale` and
    the size of the image, and torch's global generator is left as it was.

    Raises DamagedImage for unreadable bytes, ValueError for arguments that do not fit together.
    """
    return train_crops(item, size_px, full_px, operator, crop_scale, augment, [seed], in_chans)[0]


def train_crops(
    item: bytes | Image.Image | np.ndarray,
    size_px: tuple[int, int],
    full_px: tuple[int, int],
    operator: str,
    crop_scale: tuple[float, float],
    augment: int,
    seeds: Sequence[int],
    in_chans: int,
) -> list[torch.Tensor]:
    """As :func:`train_crop`, one crop for each seed, of an image that is decoded once."""
    if operator not in OPERATORS:
        raise ValueError(f"operator is {operator!r}; choose one of {', '.join(OPERATORS)}")
    if not 0 <= augment <= 30:
        raise ValueError(f"augment is {augment}; a RandAugment magnitude lies in 0..30")
    if augment and in_chans not in _MODES:
        raise ValueError(
            f"augment is {augment}, but RandAugment needs --in_chans 1 or 3, not {in_chans}; set augment 0"
        )

    is_scaled = operator == "scaled"
    # A JPEG's luminance is not quite what Pillow makes of its colours, so grey takes the short way only scaled.
    jpeg = _open_jpeg(item) if in_chans == 3 or (is_scaled and in_chans == 1) else None
    image = to_image(item, in_chans) if jpeg is None else None
    upright_px = _size_px(image) if jpeg is None else jpeg.upright_px
    views = [_draw_view(seed, upright_px, crop_scale) for seed in seeds]
    divisor = 1
    if jpeg is not None:
        if is_scaled:
            finest = min(_reduction(view.box, size_px) for view in views)
            divisor = next((d for d in (8, 4, 2) if d <= finest), 1)
        image = _decode_jpeg(jpeg, in_chans, divisor)

    crops = []
    for view in views:
        if jpeg is not None:
            out_px, resampling = (size_px, "lanczos") if is_scaled else (full_px, "bicubic")
            crop = _jpeg_crop(jpeg, image, divisor, view.box, out_px, resampling)
        elif is_scaled:
            crop = _resize(image, size_px, Image.Resampling.LANCZOS, view.box)
        else:
            # cut first, then resize, as torchvision does: the filter must not see pixels outside the crop
            crop = _resize(_cut(image, view.box), full_px, Image.Resampling.BICUBIC)
        if view.flip:
            crop = _mirror(crop)
        if augment:
            with _random_state(view.state):
                randaugment = v2.RandAugment(2, augment, interpolation=v2.InterpolationMode.BILINEAR)
                crop = randaugment(_to_pillow(crop))
        if operator in _RESIZED_CROP and size_px != full_px:
            if isinstance(crop, torch.Tensor) and operator in _TORCH_FILTERS:
                crop = _torch_resize(crop, size_px, operator)
            else:
                crop = _resize(_to_pillow(crop), size_px, _RESIZED_CROP[operator])
        crops.append(_to_tensor(crop))
    return crops


def center_crop(
    item: bytes | Image.Image | np.ndarray, size_px: tuple[int, int], in_chans: int, crop_pct: float = 1.0
) -> torch.Tensor:
    """The view used in evaluation: bicubic resize until `size_px` / `crop_pct` is covered, then the centre.

    `size_px` is (height, width), `crop_pct` lies in (0, 1]; MAE evaluates 224 with 224/256.
    Returns uint8 [C, *size_px]. Raises DamagedImage for unreadable bytes, ValueError for other misfits.
    """
    if not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct is {crop_pct}; it must lie in (0, 1]")
    image = to_image(item, in_chans)
    height, width = _size_px(image)
    cover_height, cover_width = int(size_px[0] / crop_pct), int(size_px[1] / crop_pct)
    if cover_height * width >= cover_width * height:  # the height decides; integers, so that no rounding loses a pixel
        resized_px = cover_height, max(cover_width, cover_height * width // height)
    else:
        resized_px = max(cover_height, cover_width * height // width), cover_width
    image = _resize(image, resized_px, Image.Resampling.BICUBIC)
    top, left = (round((resized - size) / 2) for resized, size in zip(resized_px, size_px, strict=True))
    return _to_tensor(_cut(image, (left, top, left + size_px[1], top + size_px[0])))


# ---------------------------------------------------------------------------------------------------------- decoding


@contextlib.contextmanager
def _damage() -> Iterator[None]:
    try:
        yield
    except DamagedImage:
        raise
    except UnidentifiedImageError as error:  # its own message is an address in memory
        raise DamagedImage("not a readable image (of no known format)") from error
    except _PILLOW_ERRORS as error:
        raise DamagedImage(f"not a readable image ({type(error).__name__}: {error})") from error


def _open(data: bytes) -> Image.Image:
    """Read the header only; pixels are decoded on `load`."""
    with _damage():
        image = Image.open(io.BytesIO(data))
        _check_size(image.width, image.height)
    return image


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DamagedImage(f"{width}x{height} pixels are more than the limit of {MAX_PIXELS}")
    if width * height == 0:
        raise DamagedImage("the image has no pixels")


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION_TAG)
    except _PILLOW_ERRORS:
        return 1  # broken metadata does not make the pixels worthless
    return value if value in _UPRIGHT else 1


def _pillow_to_channels(image: Image.Image, in_chans: int) -> Image.Image | np.ndarray:
    if in_chans not in (1, 3, 4):
        raise ValueError(
            f"--in_chans {in_chans} needs arrays with {in_chans} channels (.npy or multi-band TIFF);"
            f" a picture of mode {image.mode} gives 1, 3 or 4"
        )
    with _damage():
        image.load()
        # after `load`, because Pillow turns TIFF upright itself there and then drops the tag
        orientation = _orientation(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_to_uint8(_integer_pixels(image)))
    with _damage():
        image = _convert(image, in_chans)
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
        image.info = {}  # or the tag would turn it once more
    return image if in_chans in _MODES else np.asarray(image)


def _convert(image: Image.Image, in_chans: int) -> Image.Image:
    if in_chans == 4:
        return image.convert("RGBA")
    if image.mode == _MODES[in_chans] and "transparency" not in image.info:
        return image
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(_MODES[in_chans])


def _integer_pixels(image: Image.Image) -> np.ndarray:
    """16-bit pictures, [H, W] uint16. Depending on its version Pillow opens them as "I;16", "I;16B" or "I"."""
    pixels = np.asarray(image)
    if pixels.dtype.kind == "f" or pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError(f"pixels of mode {image.mode} have no known range; save them as 8 or 16 unsigned bits")
    return pixels.astype(np.uint16)


def _to_uint8(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype.kind != "u" or pixels.dtype.itemsize != 2:
        raise ValueError(f"pixels are {pixels.dtype}; only uint8 and uint16 have a known range")
    return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)  # v/257 rounded: 0 -> 0, 65535 -> 255


def _array_to_channels(pixels: np.ndarray, in_chans: int) -> Image.Image | np.ndarray:
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3:
        raise ValueError(f"an image array has shape [H, W] or [H, W, C], not {list(pixels.shape)}")
    _check_size(pixels.shape[1], pixels.shape[0])
    channels = pixels.shape[2]
    if channels != in_chans and {channels, in_chans} != {1, 3}:
        raise ValueError(f"--in_chans is {in_chans}, but an image array of shape {list(pixels.shape)} has {channels}")
    pixels = np.ascontiguousarray(_to_uint8(pixels))
    if in_chans not in _MODES:
        return pixels
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels).convert(_MODES[in_chans])


def _read_npy(data: bytes) -> np.ndarray:
    """[H, W] or [H, W, C] from the bytes of a .npy file, without copying and without unpickling."""
    stream = io.BytesIO(data)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        version = np.lib.format.read_magic(stream)
        shape, is_fortran, dtype = read_header[version](stream)
    except (ValueError, KeyError, SyntaxError, TypeError, tokenize.TokenError) as error:
        raise DamagedImage(f"not a readable .npy file ({error})") from error
    if dtype.kind != "u":
        raise ValueError(f"a .npy image holds {dtype}; only uint8 and uint16 have a known range")
    expected_bytes = math.prod(shape) * dtype.itemsize
    if len(data) - stream.tell() != expected_bytes:
        raise DamagedImage(f".npy of shape {list(shape)} needs {expected_bytes} bytes, has {len(data) - stream.tell()}")
    return np.frombuffer(data, dtype, offset=stream.tell()).reshape(shape, order="F" if is_fortran else "C")


def _open_tiff(data: bytes, in_chans: int) -> Image.Image | np.ndarray:
    if in_chans in _MODES:
        with contextlib.suppress(DamagedImage):  # Pillow knows more compressions, tifffile more layouts of bands
            image = _open(data)
            bits, planes = image.tag_v2.get(_BITS_TAG, (8,)), image.tag_v2.get(_PLANES_TAG, 1)
            if max(bits) <= 8 or planes == 1:  # Pillow takes separate planes of 16 bits for planes of 8
                return image
    return _read_tiff(data)


def _read_tiff(data: bytes) -> np.ndarray:
    """[H, W, C] from a multi-band TIFF, whether its bands are samples, planes or pages."""
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as tiff:
            bands = tiff.series[0]
            axes, shape = bands.axes, bands.shape
            is_image = len(shape) <= 3 and "Y" in axes and "X" in axes
            if is_image:
                _check_size(shape[axes.index("X")], shape[axes.index("Y")])
                pixels = bands.asarray(maxworkers=1)
    except _TIFFFILE_ERRORS as error:
        if "imagecodecs" in str(error):
            raise ValueError(f"a TIFF cannot be read without the package imagecodecs ({error})") from error
        raise DamagedImage(f"not a readable TIFF ({error})") from error
    if not is_image:
        raise ValueError(f"a TIFF with axes {axes} and shape {list(shape)} is no image of bands")
    if pixels.ndim == 2:
        return pixels
    return np.moveaxis(pixels, (axes.index("Y"), axes.index("X")), (0, 1))


# ----------------------------------------------------------------------------------------------- crops of whole images


class _View(NamedTuple):
    """What is drawn for one sample."""

    box: tuple[int, int, int, int]
    """(left, top, right, bottom) of the crop, in pixels of the upright image."""
    flip: bool
    state: torch.Tensor
    """torch's generator afterwards, for RandAugment."""


@contextlib.contextmanager
def _random_state(state: torch.Tensor | int) -> Iterator[None]:
    """torch's default CPU generator starts from a state or a seed inside and is restored outside."""
    with torch.random.fork_rng(devices=[]):
        if isinstance(state, int):
            torch.default_generator.manual_seed(state)  # torch.manual_seed would reach for the accelerators too
        else:
            torch.set_rng_state(state)
        yield


def _draw_view(seed: int, upright_px: tuple[int, int], crop_scale: tuple[float, float]) -> _View:
    """Crop by torchvision's own rule, from a stand-in that has the size (height, width) but no memory; and a flip."""
    with _random_state(seed):
        stand_in = torch.empty(()).expand(1, *upright_px)
        top, left, height, width = RandomResizedCrop.get_params(stand_in, list(crop_scale), list(CROP_RATIO))
        flip = torch.rand(()).item() < 0.5
        return _View((left, top, left + width, top + height), flip, torch.get_rng_state())


def _size_px(image: Image.Image | np.ndarray) -> tuple[int, int]:
    return image.shape[:2] if isinstance(image, np.ndarray) else (image.height, image.width)


def _cut(image: Image.Image | np.ndarray, box: tuple[int, int, int, int]) -> Image.Image | np.ndarray:
    left, top, right, bottom = box
    return image[top:bottom, left:right] if isinstance(image, np.ndarray) else image.crop(box)


def _mirror(image: Image.Image | np.ndarray | torch.Tensor) -> Image.Image | np.ndarray | torch.Tensor:
    if isinstance(image, torch.Tensor):
        return image.flip(-1)
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


def _torch_resize(image: torch.Tensor, size_px: tuple[int, int], resampling: str) -> torch.Tensor:
    """uint8 [C, H, W] -> [C, *size_px]. Three times as fast as Pillow; on average they differ by 0.2 of 255 levels."""
    image = image[None].contiguous(memory_format=torch.channels_last)  # for other layouts torch fails at 1×1 results
    return torch.nn.functional.interpolate(image, size_px, mode=resampling, antialias=True)[0]


def _to_pillow(image: Image.Image | np.ndarray | torch.Tensor) -> Image.Image | np.ndarray:
    return v2.functional.to_pil_image(image) if isinstance(image, torch.Tensor) else image


def _to_tensor(image: Image.Image | np.ndarray | torch.Tensor) -> torch.Tensor:
    if isinstance(image, torch.Tensor):
        return image.contiguous()
    pixels = np.array(image)  # a copy: what Pillow lends is read-only
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))  # H W C -> C H W


# ------------------------------------------------------------------------------------------------------- JPEG, quickly


class _Jpeg(NamedTuple):
    data: bytes
    header: Image.Image
    """Not decoded, or decoded at a reduced scale, so that its size may have changed."""
    orientation: int
    stored_px: tuple[int, int]
    """(width, height) as it is stored."""

    @property
    def upright_px(self) -> tuple[int, int]:
        """(height, width)."""
        width, height = self.stored_px
        return (width, height) if self.orientation >= 5 else (height, width)


def _open_jpeg(item: bytes | Image.Image | np.ndarray) -> _Jpeg | None:
    """A JPEG of which only the header is read, or None for everything else."""
    if not (isinstance(item, bytes) and item.startswith(b"\xff\xd8")):
        return None
    image = _open(item)
    if image.format not in ("JPEG", "MPO"):  # MPO: a JPEG with further pictures behind it
        return None
    return _Jpeg(item, image, _orientation(image), image.size)


def _reduction(box: tuple[int, int, int, int], size_px: tuple[int, int]) -> float:
    """How many times smaller the image may be for the box still to cover `size_px`."""
    left, top, right, bottom = box
    return min((bottom - top) / size_px[0], (right - left) / size_px[1])


def _decode_jpeg(jpeg: _Jpeg, in_chans: int, divisor: int) -> np.ndarray:
    """Pixels [h, w, C] as they are stored, at 1/divisor of their size, rounded up.

    Only 1/2, 1/4 and 1/8 are used: libjpeg has fast code for these, while its 5/8 to 7/8 are slower than decoding
    everything.
    """
    width, height = jpeg.stored_px
    # In pictures of a few pixels several scales round to the same size, so that simplejpeg could take the wrong one.
    if simplejpeg is not None and jpeg.header.mode in ("L", "RGB") and min(width, height) >= 16:
        with contextlib.suppress(ValueError):  # Pillow decides what is damage
            return simplejpeg.decode_jpeg(
                jpeg.data,
                "RGB" if in_chans == 3 else "GRAY",
                min_height=-(-height // divisor),
                min_width=-(-width // divisor),
                min_factor=1,
            )
    with _damage():
        # Pillow takes the smallest of its scales 1/8, 1/4, 1/2, 1 that keeps both sides at least this large
        jpeg.header.draft(_MODES[in_chans], (width // divisor, height // divisor))
        jpeg.header.load()
        pixels = np.array(_convert(jpeg.header, in_chans))
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _jpeg_crop(
    jpeg: _Jpeg,
    pixels: np.ndarray,
    divisor: int,
    box: tuple[int, int, int, int],
    size_px: tuple[int, int],
    resampling: str,
) -> torch.Tensor:
    """Resize the crop `box`, (left, top, right, bottom) in upright full-resolution pixels, of what was decoded.

    `pixels` [h, w, C] are those of :func:`_decode_jpeg`. Returns uint8 [C, *size_px], upright.
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
    # Block n of the file starts at pixel 8n/divisor of the reduced picture, so corners scale by exactly 1/divisor even
    # where the reduced width is rounded up.
    if resampling in _TORCH_FILTERS and not any(side % divisor for side in (left, top, right, bottom)):
        left, top, right, bottom = (side // divisor for side in (left, top, right, bottom))
        crop = torch.from_numpy(pixels[top:bottom, left:right]).permute(2, 0, 1)  # H W C -> C H W
        crop = _torch_resize(crop, size_px, resampling)
    else:
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        box = left / divisor, top / divisor, right / divisor, bottom / divisor
        crop = _to_tensor(_resize(image, size_px, Image.Resampling[resampling.upper()], box))
    if orientation >= 5:
        crop = crop.mT
    flips = [axis for axis, turned in ((-1, (2, 3, 6, 7)), (-2, (3, 4, 7, 8))) if orientation in turned]
    return crop.flip(flips) if flips else crop
