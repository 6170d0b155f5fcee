"""Pixels: from what a source holds (file bytes, a Pillow image, an array) to 8 bits, upright, in some channels.

Colour profiles are ignored, as torchvision and timm do. Channels are handled one by one outside grey and RGB.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import struct
import tokenize
import zlib
from collections.abc import Iterator

import numpy as np
import tifffile
from PIL import Image, UnidentifiedImageError

from .sources import Item, Source

log = logging.getLogger(__name__)

ValueRange = tuple[float, float]
"""Stored values (low, high) that become 0 and 255; what lies outside is clipped, NaN becomes 0."""

MAX_PIXELS = 89_478_485
"""Larger images are refused as damaged: Pillow's own limit against decompression bombs, here an error."""

MODES = {1: "L", 3: "RGB"}
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_NPY_MAGIC, _PNG_MAGIC = b"\x93NUMPY", b"\x89PNG"
_ORIENTATION_TAG = 0x0112  # EXIF
_BITS_TAG, _PLANES_TAG = 258, 284  # TIFF
_ALPHA = (tifffile.EXTRASAMPLE.ASSOCALPHA, tifffile.EXTRASAMPLE.UNASSALPHA)
UPRIGHT = {  # EXIF orientation -> the transposition that brings the stored pixels upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow's decoders raise on broken files. OSError covers truncation and UnidentifiedImageError; broken PNG chunks
# are SyntaxError or zlib.error; cut headers show up as struct.error, EOFError, IndexError, KeyError, TypeError; AVIF
# raises RuntimeError, of which DDS's NotImplementedError is one.
_PILLOW_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    OverflowError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
# tifffile checks little: broken tags end in divisions by zero or failed assertions.
_TIFFFILE_ERRORS = (*_PILLOW_ERRORS, tifffile.TiffFileError, ArithmeticError, AssertionError)


class CorruptImage(ValueError):
    """Of this no image can be made: truncated, corrupted, of an unknown format, larger than MAX_PIXELS, or of a pixel
    type or channels that do not fit."""


def to_image(item: Item, in_chans: int, value_range: ValueRange | None = None) -> Image.Image | np.ndarray:
    """Decode, turn upright (EXIF) and bring to `in_chans` channels of 8 bits.

    Returns a Pillow image of mode "L" (1 channel) or "RGB" (3), else a uint8 array [H, W, C]. For 1 and 3 channels
    transparency is composited on white; 4 channels keep alpha as it is stored. Other counts can only come from arrays:
    .npy files, multi-band TIFF, or a source that returns them. Of several frames the first is taken.

    16 bits are scaled by 1/257, never clipped; with a `value_range`, they and all other integers and floats are scaled
    from that range. 8 bits are what they are.

    Raises CorruptImage for unreadable bytes, and if the channels or the pixel type do not fit `in_chans`.
    """
    opened = _open(item, in_chans, all_bits=value_range is not None)
    if isinstance(opened, np.ndarray):
        return _array_to_channels(opened, in_chans, value_range)
    return _pillow_to_channels(opened, in_chans, value_range)


def format_and_channels(item: Item) -> tuple[str, int]:
    """What an image is, by its header: (name of its format, channels), 1 for grey and 3 for colour whatever its alpha.

    Arrays have the channels of their shape. Raises CorruptImage for unreadable bytes.
    """
    opened = _open(item, 3, all_bits=True)
    if isinstance(opened, np.ndarray):
        kinds = ((_NPY_MAGIC, "npy"), (_PNG_MAGIC, "PNG"), (_TIFF_MAGIC, "TIFF"))
        name = next((n for magic, n in kinds if isinstance(item, bytes) and item.startswith(magic)), "array")
        return name, 1 if opened.ndim < 3 else opened.shape[2]
    grey = opened.mode in ("1", "L", "LA", "La", "F") or opened.mode.startswith("I")
    return opened.format or "decoded", 1 if grey else 3


def measure_value_range(source: Source, samples: int = 64) -> ValueRange | None:
    """Measure the range of values that images of more than 8 bits use, in a sample spread evenly over a source.

    Returns the quantiles 0.1 % and 99.9 % of up to 4096 pixels of each image. None where the pixels' type says the
    range: for 8 bits, and for 16 of which a quarter or more is used, so that 64 of 256 levels or more are left.
    """
    values, samples = [], min(samples, len(source))
    for index in (place * len(source) // samples for place in range(samples)):
        with contextlib.suppress(CorruptImage, OSError):  # named when its turn comes
            pixels = more_than_8_bits(source.read(index)[0])
            if pixels is not None and pixels.ndim in (2, 3) and pixels.size:
                some = _spread(pixels)
                finite = some[np.isfinite(some)]
                if finite.size:
                    values.append(finite)
    if not values:
        return None
    low, high = np.quantile(np.concatenate(values), (0.001, 0.999), method="nearest").tolist()
    is_16_bits = all(_is_uint16(part) for part in values)
    if high <= low or (is_16_bits and high - low >= 65535 / 4):
        return None
    levels = f"; as they are, these would be {1 + round((high - low) / 257)} of 256 levels" if is_16_bits else ""
    log.warning("pixels lie between %g and %g, measured in %d images%s", low, high, len(values), levels)
    return float(low), float(high)


def _spread(pixels: np.ndarray) -> np.ndarray:
    """The values of up to 4096 pixels, all channels of each: [H, W] or [H, W, C] -> [N]."""
    step = max(1, -(-pixels.shape[0] * pixels.shape[1] // 4096))
    while math.gcd(step, pixels.shape[1]) > 1:  # or the same few columns would be taken of each row
        step += 1
    return pixels.reshape(pixels.shape[0] * pixels.shape[1], -1)[::step].reshape(-1)


@contextlib.contextmanager
def corrupt_image_errors() -> Iterator[None]:
    """Whatever Pillow raises on broken files becomes CorruptImage."""
    try:
        yield
    except CorruptImage:
        raise
    except UnidentifiedImageError as error:  # its own message is an address in memory
        raise CorruptImage("not a readable image (of no known format)") from error
    except _PILLOW_ERRORS as error:
        raise CorruptImage(f"not a readable image ({type(error).__name__}: {error})") from error


def open_header(data: bytes) -> Image.Image:
    """Read the header only; pixels are decoded on `load`."""
    with corrupt_image_errors():
        image = Image.open(io.BytesIO(data))
        check_size(image.width, image.height)
    return image


def check_size(width: int, height: int, when: str = "") -> None:
    """CorruptImage for more than MAX_PIXELS, or none."""
    if width * height > MAX_PIXELS:
        raise CorruptImage(f"{when}{width}x{height} pixels are more than the limit of {MAX_PIXELS}")
    if width * height == 0:
        raise CorruptImage("the image has no pixels")


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1, upright, where it is missing or broken."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG)
    except _PILLOW_ERRORS:
        return 1  # broken metadata does not make the pixels worthless
    return value if value in UPRIGHT else 1


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels [H, W] or [H, W, C] as they are stored, turned by their EXIF orientation."""
    if orientation >= 5:  # stored on its side
        pixels = pixels.swapaxes(0, 1)
    flips = [axis for axis, turned in ((1, (2, 3, 6, 7)), (0, (3, 4, 7, 8))) if orientation in turned]
    return np.flip(pixels, flips) if flips else pixels


def _open(item: Item, in_chans: int, all_bits: bool) -> Image.Image | np.ndarray:
    """Decode .npy, TIFF and, for all its bits, 16-bit colour PNG to an array; read only the header of the others."""
    if not isinstance(item, bytes):
        return item
    if item.startswith(_NPY_MAGIC):
        return _read_npy(item, all_bits)
    if item.startswith(_TIFF_MAGIC):
        return _open_tiff(item, in_chans, all_bits)
    if all_bits and item.startswith(_PNG_MAGIC) and item[24:26] in (b"\x10\x02", b"\x10\x04", b"\x10\x06"):
        return _read_deep_png(item, in_chans)  # of which Pillow drops 8 bits
    return open_header(item)


def more_than_8_bits(item: Item) -> np.ndarray | None:
    """The pixels of an image of more than 8 bits as they are stored, else None."""
    opened = _open(item, 3, all_bits=True)
    if isinstance(opened, Image.Image):
        if not (opened.mode.startswith("I") or opened.mode == "F"):
            return None
        with corrupt_image_errors():
            opened = np.asarray(opened)
        if opened.dtype == np.int32 and opened.min() >= 0 and opened.max() <= 65535:
            opened = opened.astype(np.uint16)  # some versions of Pillow open 16 bits so
    return None if opened.dtype.itemsize == 1 or opened.dtype.kind not in "uif" else opened


def _pillow_to_channels(image: Image.Image, in_chans: int, value_range: ValueRange | None) -> Image.Image | np.ndarray:
    if in_chans not in (1, 3, 4):
        raise CorruptImage(
            f"--in_chans {in_chans} needs arrays with {in_chans} channels (.npy or multi-band TIFF);"
            f" a picture of mode {image.mode} gives 1, 3 or 4"
        )
    with corrupt_image_errors():
        image.load()
        # after `load`, because Pillow turns TIFF upright itself there and then drops the tag
        orientation = orientation_of(image)
    if image.mode.startswith("I") or image.mode == "F":
        pixels = _integer_pixels(image) if value_range is None else np.asarray(image)
        image = Image.fromarray(_to_uint8(pixels, value_range))
    with corrupt_image_errors():
        image = convert(image, in_chans)
    if orientation in UPRIGHT:
        image = image.transpose(UPRIGHT[orientation])
        image.info = {}  # or the tag would turn it once more
    return image if in_chans in MODES else np.asarray(image)


def convert(image: Image.Image, in_chans: int) -> Image.Image:
    """To 1, 3 or 4 channels; for 1 and 3 transparency is composited on white."""
    if in_chans == 4:
        return image.convert("RGBA")
    if image.mode == MODES[in_chans] and "transparency" not in image.info:
        return image
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(MODES[in_chans])


def _integer_pixels(image: Image.Image) -> np.ndarray:
    """16-bit pictures, [H, W] uint16. Depending on its version Pillow opens them as "I;16", "I;16B" or "I"."""
    pixels = np.asarray(image)
    bits = max(getattr(image, "tag_v2", {}).get(_BITS_TAG, (16,)))  # a TIFF may hold 32, and then any range
    if pixels.dtype.kind == "f" or bits > 16 or pixels.min() < 0 or pixels.max() > 65535:
        raise CorruptImage(
            f"pixels of mode {image.mode} have no known range; save them as 8 or 16 unsigned bits or give --value_range"
        )
    return pixels.astype(np.uint16)


def _to_uint8(pixels: np.ndarray, value_range: ValueRange | None) -> np.ndarray:
    if pixels.dtype == np.uint8:
        return pixels
    if value_range is not None and pixels.dtype.kind in "uif":
        low, high = value_range
        levels = (pixels.astype(np.float64) - low) * (255 / (high - low))
        return np.nan_to_num(levels, nan=0, posinf=255, neginf=0).clip(0, 255).round().astype(np.uint8)
    if not _is_uint16(pixels):
        raise CorruptImage(f"pixels are {pixels.dtype}; only uint8 and uint16 have a known range; give --value_range")
    return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)  # v/257 rounded: 0 -> 0, 65535 -> 255


def _is_uint16(pixels: np.ndarray) -> bool:
    """In either byte order."""
    return pixels.dtype.kind == "u" and pixels.dtype.itemsize == 2


def _array_to_channels(pixels: np.ndarray, in_chans: int, value_range: ValueRange | None) -> Image.Image | np.ndarray:
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3:
        raise CorruptImage(f"an image array has shape [H, W] or [H, W, C], not {list(pixels.shape)}")
    check_size(pixels.shape[1], pixels.shape[0])
    channels = pixels.shape[2]
    if channels != in_chans and {channels, in_chans} != {1, 3}:
        shape = list(pixels.shape)
        order = "; are its channels first? arrays are [H, W, C]" if shape[0] < min(shape[1:]) else ""
        raise CorruptImage(f"--in_chans is {in_chans}, but an image array of shape {shape} has {channels}{order}")
    pixels = np.ascontiguousarray(_to_uint8(pixels, value_range))
    if in_chans not in MODES:
        return pixels
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels).convert(MODES[in_chans])


def _read_npy(data: bytes, all_types: bool) -> np.ndarray:
    """[H, W] or [H, W, C] from the bytes of a .npy file, without copying and without unpickling.

    Unsigned integers, or `all_types` of integers and floats.
    """
    stream = io.BytesIO(data)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        version = np.lib.format.read_magic(stream)
        shape, is_fortran, dtype = read_header[version](stream)
    except (ValueError, KeyError, SyntaxError, TypeError, RecursionError, tokenize.TokenError) as error:
        raise CorruptImage(f"not a readable .npy file ({error})") from error
    if dtype.kind not in ("uif" if all_types else "u"):
        remedy = "" if dtype.kind not in "uif" else "; give --value_range"
        raise CorruptImage(f"a .npy image holds {dtype}; only uint8 and uint16 have a known range{remedy}")
    if len(shape) not in (2, 3) or any(type(length) is not int or length < 0 for length in shape):  # NumPy checks less
        raise CorruptImage(f"an image array has shape [H, W] or [H, W, C], not {list(shape)}")
    expected_bytes = math.prod(shape) * dtype.itemsize
    if len(data) - stream.tell() != expected_bytes:
        raise CorruptImage(f".npy of shape {list(shape)} needs {expected_bytes} bytes, has {len(data) - stream.tell()}")
    return np.frombuffer(data, dtype, offset=stream.tell()).reshape(shape, order="F" if is_fortran else "C")


def _read_deep_png(data: bytes, in_chans: int) -> np.ndarray:
    """uint16 [H, W, C], upright, from a PNG of 16 bits; alpha is kept only where 4 channels are asked for.

    Pillow keeps 8 of the 16 bits, so it is asked for either byte. (torchvision's decoder crashes on damaged files.)
    """
    with corrupt_image_errors():
        open_header(data).verify()  # decoding doesn't look at the checksums
        if data[25] == 4:  # grey and alpha: 4 bytes, as of four channels
            pixels, orientation = _png_bytes(data, "RGBA")
            channels = pixels.view(">u2").astype(np.uint16)
        else:
            mode = "RGB" if data[25] == 2 else "RGBA"
            (high, orientation), (low, _) = (_png_bytes(data, f"{mode};16{order}") for order in "BL")
            channels = high.astype(np.uint16) << 8 | low
    channels = channels[..., :-1] if channels.shape[2] in (2, 4) and in_chans != 4 else channels
    return upright(channels, orientation)


def _png_bytes(data: bytes, raw_mode: str) -> tuple[np.ndarray, int]:
    """The bytes that one of Pillow's raw modes takes of each pixel, uint8 [H, W, C], and the EXIF orientation."""
    image = open_header(data)
    image.tile = [(*tile[:3], raw_mode) for tile in image.tile]
    return np.asarray(image), orientation_of(image)


def _open_tiff(data: bytes, in_chans: int, all_bits: bool) -> Image.Image | np.ndarray:
    if in_chans in MODES:
        with contextlib.suppress(CorruptImage):  # Pillow knows more compressions, tifffile more layouts of bands
            image = open_header(data)
            bits, planes = image.tag_v2.get(_BITS_TAG, (8,)), image.tag_v2.get(_PLANES_TAG, 1)
            # Pillow takes separate planes of 16 bits for planes of 8, and makes 8 bits of colours of 16
            if max(bits) <= 8 or (planes == 1 and not (all_bits and len(bits) > 1)):
                return image
    return _read_tiff(data, in_chans)


def _read_tiff(data: bytes, in_chans: int) -> np.ndarray:
    """[H, W, C], upright, from a multi-band TIFF, whether its bands are samples, planes or pages."""
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as tiff:
            bands = tiff.series[0]
            axes, shape = bands.axes, bands.shape
            is_image = len(shape) <= 3 and "Y" in axes and "X" in axes
            if is_image:
                check_size(shape[axes.index("X")], shape[axes.index("Y")])
                if math.prod(shape) > MAX_PIXELS * (channels := max(4, in_chans)):  # compressed, a file may hold any
                    raise CorruptImage(f"{list(shape)} values are more than the limit of {MAX_PIXELS} × {channels}")
                pixels = bands.asarray(maxworkers=1)
                extra = bands.keyframe.extrasamples
                orientation = bands.keyframe.tags.valueof(_ORIENTATION_TAG, default=1)
    except _TIFFFILE_ERRORS as error:
        if "imagecodecs" in str(error):
            raise CorruptImage(f"a TIFF cannot be read without the package imagecodecs ({error})") from error
        raise CorruptImage(f"not a readable TIFF ({error})") from error
    if not is_image:
        raise CorruptImage(f"a TIFF with axes {axes} and shape {list(shape)} is no image of bands")
    if pixels.ndim == 3:
        pixels = np.moveaxis(pixels, (axes.index("Y"), axes.index("X")), (0, 1))
        has_alpha = pixels.shape[2] in (2, 4) and len(extra) == 1 and extra[0] in _ALPHA
        pixels = pixels[..., :-1] if has_alpha and in_chans in MODES else pixels
    return upright(pixels, orientation) if orientation in UPRIGHT else pixels
