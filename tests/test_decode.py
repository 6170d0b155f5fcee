"""Bytes to crops: every pixel format, every kind of damage, and one geometry for all operators."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import RandomResizedCrop, v2

from mae_et.data import decode, pixels
from mae_et.data.decode import center_crop, center_crops, jpeg_objection, train_crop, train_crops
from mae_et.data.labelled import EvalCrops, eval_batches
from mae_et.data.photos import photograph
from mae_et.data.pixels import UPRIGHT, CorruptImage, format_and_channels, measure_value_range, to_image
from mae_et.data.views import draw_view
from mae_et.data.workers import Loading
from mae_et.plan.shapes import OPERATORS, SPECTRAL

FEW = settings(max_examples=15)
FULL, SMALL = (64, 64), (32, 32)


def encode(image: Image.Image | np.ndarray, kind: str = "PNG", **options) -> bytes:
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def npy_of_shape(shape: str, size: int) -> bytes:
    """A .npy file of bytes whose header says so."""
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + bytes(size)


def npy(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, pixels)
    return buffer.getvalue()


def tiff(pixels: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, **options)
    return buffer.getvalue()


def oriented(image: Image.Image, orientation: int, kind: str = "JPEG", **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image, kind, exif=exif.tobytes(), **options)


def crop(item, size_px=SMALL, operator="fourier", seed=0, in_chans=3, augment=0, crop_scale=(0.2, 1.0), full_px=FULL):
    return train_crop(item, size_px, full_px, operator, crop_scale, augment, seed, in_chans)


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """180 x 240 pixels of the coffee cup, small and smooth."""
    return Image.fromarray(photograph("coffee")).resize((240, 180), Image.Resampling.LANCZOS)


@pytest.fixture(scope="module")
def jpeg(photo) -> bytes:
    return encode(photo, "JPEG", quality=90)


# ------------------------------------------------------------------------------------------------------ pixel formats


def gradient(width=20, height=12) -> np.ndarray:
    return np.linspace(0, 255, width * height).astype(np.uint8).reshape(height, width)


RGB = Image.merge("RGB", [Image.fromarray(gradient()), Image.fromarray(gradient()[::-1]), Image.new("L", (20, 12), 90)])
FORMATS = {
    "rgb jpeg": encode(RGB, "JPEG"),
    "progressive jpeg": encode(RGB, "JPEG", progressive=True),
    "grey jpeg": encode(RGB.convert("L"), "JPEG"),
    "cmyk jpeg": encode(RGB.convert("CMYK"), "JPEG"),
    "rgb png": encode(RGB),
    "rgba png": encode(RGB.convert("RGBA")),
    "la png": encode(RGB.convert("LA")),
    "palette png": encode(RGB.convert("P")),
    "transparent palette png": encode(RGB.convert("P"), transparency=0),
    "transparent rgb png": encode(RGB, transparency=(0, 0, 0)),
    "1-bit png": encode(RGB.convert("1")),
    "16-bit png": encode(gradient().astype(np.uint16) * 257),
    "16-bit pgm": b"P5 20 12 65535\n" + (gradient().astype(">u2") * 257).tobytes(),  # not every Pillow writes it
    "ppm": encode(RGB, "PPM"),
    "bmp": encode(RGB, "BMP"),
    "webp": encode(RGB, "WEBP"),
    "animated gif": encode(RGB, "GIF", save_all=True, append_images=[RGB.rotate(180)]),
    "multi-page tiff": encode(RGB, "TIFF", save_all=True, append_images=[RGB.rotate(180)]),
    "cmyk tiff": encode(RGB.convert("CMYK"), "TIFF"),
    "16-bit tiff": tiff(gradient().astype(np.uint16) * 257),
    "planar 16-bit tiff": tiff(
        np.stack([gradient().astype(np.uint16) * 257] * 3), planarconfig="separate", photometric="rgb"
    ),
    "pillow rgb": RGB,
    "pillow I;16": Image.fromarray(gradient().astype(np.uint16)),
    "npy grey": npy(gradient()),
    "npy rgb": npy(np.asarray(RGB)),
    "npy fortran": npy(np.asfortranarray(np.asarray(RGB))),
    "array grey": gradient(),
    "array [H, W, 1]": gradient()[..., None],
    "array uint16": gradient().astype(np.uint16) * 257,
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("in_chans", [1, 3])
def test_every_format_gives_the_asked_channels(name, in_chans):
    image = to_image(FORMATS[name], in_chans)
    assert (image.mode, image.size) == ({1: "L", 3: "RGB"}[in_chans], (20, 12))
    for operator in OPERATORS:
        out = crop(FORMATS[name], operator=operator, in_chans=in_chans)
        assert out.dtype == torch.uint8
        assert out.is_contiguous()
        assert out.shape == (in_chans, *(FULL if operator in SPECTRAL else SMALL))


@pytest.mark.parametrize("name", ["rgb png", "bmp", "ppm", "multi-page tiff", "npy rgb", "npy fortran", "pillow rgb"])
def test_lossless_formats_keep_every_pixel(name):
    assert np.array_equal(np.asarray(to_image(FORMATS[name], 3)), np.asarray(RGB))


@pytest.mark.parametrize("name", ["16-bit png", "16-bit pgm", "16-bit tiff", "array uint16", "planar 16-bit tiff"])
def test_16_bits_are_scaled_not_clipped(name):
    assert np.array_equal(np.asarray(to_image(FORMATS[name], 3))[..., 1], gradient())


def test_16_bits_round():
    values = np.array([[0, 128, 129, 65535 - 129, 65535]], dtype=np.uint16)
    assert np.asarray(to_image(values, 1)).tolist() == [[0, 0, 1, 254, 255]]


def test_cmyk_comes_out_in_its_own_colours():
    assert np.abs(np.asarray(to_image(FORMATS["cmyk tiff"], 3), float) - np.asarray(RGB)).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP"])
def test_transparency_is_composited_on_white(kind):
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, 4:] = (10, 20, 30, 255)
    options = {"lossless": True} if kind == "WEBP" else {}
    out = np.asarray(to_image(encode(pixels, kind, **options), 3))
    assert (out[:, :4] == 255).all()
    assert np.abs(out[:, 4:].astype(int) - (10, 20, 30)).max() <= 3


def test_half_transparency_mixes_with_white():
    assert to_image(encode(Image.new("LA", (4, 4), (0, 128))), 1).getpixel((0, 0)) == 127


def test_transparent_colour_of_an_opaque_mode_counts():
    assert to_image(encode(Image.new("L", (4, 4), 0), transparency=0), 1).getpixel((0, 0)) == 255


def test_four_channels_are_kept_apart():
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[..., 0] = 200  # fully transparent, and still red: a fourth band need not be transparency
    for item in (encode(pixels), pixels, npy(pixels)):
        assert np.array_equal(to_image(item, 4), pixels)
        assert crop(item, operator="lanczos", in_chans=4)[0].unique().tolist() == [200]


BANDS = np.random.default_rng(0).integers(0, 65536, (12, 20, 13)).astype(np.uint16)


@pytest.mark.parametrize(
    "item",
    [
        BANDS,
        npy(BANDS),
        tiff(BANDS, planarconfig="contig", photometric="minisblack"),
        tiff(np.moveaxis(BANDS, 2, 0), planarconfig="separate", photometric="minisblack"),
        tiff(np.moveaxis(BANDS, 2, 0), photometric="minisblack"),  # 13 pages
        tiff(BANDS, planarconfig="contig", photometric="minisblack", compression="zlib"),
    ],
    ids=["array", "npy", "tiff samples", "tiff planes", "tiff pages", "tiff zlib"],
)
def test_thirteen_bands(item):
    expected = np.round(BANDS / 257).astype(np.uint8)
    assert np.array_equal(to_image(item, 13), expected)
    for operator in OPERATORS:
        assert crop(item, operator=operator, in_chans=13).shape[0] == 13


def test_thirteen_bands_are_not_taken_for_colours():
    for item in (BANDS, npy(BANDS), tiff(BANDS, planarconfig="contig", photometric="minisblack")):
        with pytest.raises(CorruptImage, match=r"--in_chans is 3.* has 13"):
            to_image(item, 3)


def test_bands_are_cropped_like_colours(photo):
    """Channel by channel must be the same picture as Pillow's RGB, whatever the operator."""
    pixels = np.asarray(photo)
    for operator in OPERATORS:
        for seed in range(4):
            bands = crop(np.concatenate([pixels, pixels[..., :2]], axis=2), operator=operator, in_chans=5, seed=seed)
            assert torch.equal(bands[:3], crop(pixels, operator=operator, seed=seed))


@pytest.mark.parametrize(
    ("item", "in_chans", "message"),
    [
        (FORMATS["rgb jpeg"], 5, "--in_chans 5"),
        (FORMATS["rgb png"], 2, "--in_chans 2"),
        (np.zeros((4, 4, 5), np.uint8), 3, "has 5$"),
        (np.zeros((5, 40, 40), np.uint8), 5, r"has 40; are its channels first\? arrays are \[H, W, C\]"),
        (np.zeros((4, 4, 3), np.uint8), 4, "--in_chans is 4"),
        (np.zeros((4, 4), np.float32), 1, "float32"),
        (npy(np.zeros((4, 4), np.float32)), 1, "float32.*; give --value_range"),
        (npy(np.zeros((4, 4), bool)), 1, "bool; only uint8 and uint16 have a known range$"),
        (np.zeros(4, np.uint8), 1, r"\[H, W\]"),
        (encode(Image.new("F", (4, 4), 0.5), "TIFF"), 3, "no known range"),
        (encode(Image.new("I", (4, 4), 70000), "TIFF"), 3, "no known range"),
        (encode(Image.new("I", (4, 4), 200), "TIFF"), 3, "no known range"),
    ],
)
def test_what_does_not_fit_is_damage(item, in_chans, message):
    """One such file among many is skipped and named like any other that is of no use."""
    with pytest.raises(CorruptImage, match=message):
        to_image(item, in_chans)


@pytest.mark.parametrize("side", [60, 64, 128, 100])
def test_every_channel_and_column_is_measured(side):
    """At the sides of images, a power of two, a step through the values would meet one channel, or a few columns."""
    ramp = np.arange(side * side).reshape(side, side) % 1000
    bands = np.stack([ramp, *[10 * ramp] * 3], axis=2).astype(np.float32)
    low, high = measure_value_range(Items([bands] * 4))
    assert 0 <= low < 100 and high > 9900
    columns = np.tile(np.arange(side, dtype=np.float32), (side, 1))
    assert measure_value_range(Items([columns])) == (0, side - 1)


@pytest.mark.parametrize("order", "<>")
def test_the_order_of_bytes_changes_no_range(order):
    ramp = np.linspace(0, 65535, 64 * 64).astype(f"{order}u2").reshape(64, 64)
    for item in (npy(ramp), tiff(ramp, byteorder=order)):
        assert measure_value_range(Items([item])) is None
    dark = npy((ramp // 10).astype(f"{order}u2"))
    low, high = measure_value_range(Items([dark]))
    assert low < 10 and 6500 < high <= 6553


def test_alpha_of_a_tiff_is_not_measured():
    """Nor counted as a channel; what is not said to be alpha is."""
    pixels = np.dstack([SENTINEL[..., :3], np.full(SENTINEL.shape[:2], 65535, np.uint16)])
    item = tiff(pixels, photometric="rgb", extrasamples=["unassalpha"])
    assert measure_value_range(Items([item]))[1] < 1010 and format_and_channels(item) == ("TIFF", 3)
    bands = tiff(pixels, photometric="rgb", extrasamples=["unspecified"])  # the fourth may be infrared
    assert format_and_channels(bands) == ("TIFF", 4)
    with pytest.raises(CorruptImage, match=r"--in_chans is 3, but an image array of shape .* has 4"):
        to_image(bands, 3, (776, 1009))


def test_bands_count_towards_the_limit_of_pixels_before_they_are_decompressed(monkeypatch):
    monkeypatch.setattr("mae_et.data.pixels.MAX_PIXELS", BANDS.shape[0] * BANDS.shape[1])
    item = tiff(BANDS, planarconfig="contig", photometric="minisblack", compression="zlib")
    assert to_image(item, 13).shape == BANDS.shape
    monkeypatch.setattr(tifffile.TiffPageSeries, "asarray", lambda *arguments, **options: pytest.fail("decompressed"))
    with pytest.raises(CorruptImage, match=r"13\] values are more than the limit of \d+ × 4"):
        to_image(item, 3)


# -------------------------------------------------------------------------------------------------------- value range

SENTINEL = np.linspace(776, 1009, 12 * 20 * 13).astype(np.uint16).reshape(12, 20, 13)  # EuroSAT's values


def deep_png(pixels: np.ndarray, damage: str = "") -> bytes:
    """A 16-bit colour PNG, which Pillow can't write: [H, W, C] uint16, C = 2 (grey and alpha), 3 or 4."""
    height, width, channels = pixels.shape
    rows = np.pad(pixels.astype(">u2").reshape(height, -1).view(np.uint8), ((0, 0), (1, 0)))
    rows[-1, 0] = 77 if damage == "unknown filter" else 0
    data = bytearray(zlib.compress(rows))
    data[-1] ^= damage == "wrong sum of the pixels"
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", bytes(data)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


RED, PLANES = SENTINEL[..., :3], np.moveaxis(SENTINEL[..., :4], 2, 0)
DEEP = {
    "array": (SENTINEL, SENTINEL),
    "npy": (npy(SENTINEL), SENTINEL),
    "float npy": (npy(SENTINEL.astype(np.float32)), SENTINEL),
    "signed npy": (npy(SENTINEL.astype(np.int32)), SENTINEL),
    "bands": (tiff(SENTINEL, planarconfig="contig", photometric="minisblack"), SENTINEL),
    "float bands": (tiff(SENTINEL.astype(np.float32), planarconfig="contig", photometric="minisblack"), SENTINEL),
    "colour tiff": (tiff(RED, photometric="rgb"), RED),
    "colour png": (deep_png(RED), RED),
    "transparent png": (deep_png(np.concatenate([RED, RED[..., :1]], axis=2)), RED),
    "grey and alpha png": (deep_png(RED[..., :2]), RED[..., :1]),
    "transparent tiff": (tiff(SENTINEL[..., :4], photometric="rgb", extrasamples=["unassalpha"]), RED),
    "planar transparent tiff": (
        tiff(PLANES, photometric="rgb", planarconfig="separate", extrasamples=["assocalpha"]),
        RED,
    ),
    "grey and alpha tiff": (
        tiff(RED[..., :2], photometric="minisblack", planarconfig="contig", extrasamples=["unassalpha"]),
        RED[..., :1],
    ),
    "four bands": (tiff(SENTINEL[..., :4], photometric="minisblack", planarconfig="contig"), SENTINEL[..., :4]),
    "grey png": (encode(RED[..., 0]), RED[..., :1]),
    "grey tiff": (encode(RED[..., 0], "TIFF"), RED[..., :1]),
    "float tiff": (encode(RED[..., 0].astype(np.float32), "TIFF"), RED[..., :1]),
    "32-bit tiff": (encode(RED[..., 0].astype(np.int32), "TIFF"), RED[..., :1]),
    "pillow": (Image.fromarray(RED[..., 0]), RED[..., :1]),
}


@pytest.mark.parametrize("name", DEEP)
def test_a_value_range_makes_256_levels_of_whatever_is_stored(name):
    item, stored = DEEP[name]
    expected = np.round((stored.astype(float) - 776) * 255 / (1009 - 776)).astype(np.uint8)
    channels = stored.shape[2]
    pixels = np.asarray(to_image(item, channels, (776, 1009))).reshape(stored.shape)
    assert np.array_equal(pixels, expected)
    assert len(np.unique(pixels)) > 100
    size = stored.shape[:2]
    view = center_crop(item, size, channels, value_range=(776, 1009))
    assert np.array_equal(view.numpy(), expected.transpose(2, 0, 1))
    for operator in OPERATORS:
        out = train_crop(item, SMALL, FULL, operator, (1.0, 1.0), 0, 3, channels, (776, 1009))
        assert out.max() > 230 and out.min() < 25
    if "float" not in name and "32-bit" not in name and "signed" not in name:  # as it was: almost black
        assert len(np.unique(np.asarray(to_image(item, channels)))) <= 3


def test_values_outside_of_the_range_are_clipped_and_nan_is_black():
    values = np.array([[-9.0, 0.0, 0.5, 1.0, 7.0, np.nan, np.inf, -np.inf]], dtype=np.float32)
    assert np.asarray(to_image(values, 1, (0.0, 1.0))).tolist() == [[0, 0, 128, 255, 255, 0, 255, 0]]


@pytest.mark.parametrize("name", FORMATS)
def test_a_value_range_changes_nothing_of_8_bits(name):
    if "16" not in name:
        for in_chans in (1, 3):
            plain, ranged = (np.asarray(to_image(FORMATS[name], in_chans, r)) for r in (None, (10.0, 20.0)))
            assert np.array_equal(plain, ranged)


class Items:
    """An unlabelled source of these items."""

    classes = labels = None

    def __init__(self, items: list) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def read(self, index: int) -> tuple[object, None]:
        return self.items[index], None

    def name(self, index: int) -> str:
        return f"item {index}"


@pytest.mark.parametrize("name", DEEP)
def test_the_range_of_a_source_is_measured(name, caplog):
    source = Items([DEEP[name][0], b"broken", FORMATS["rgb jpeg"]] * 50)
    low, high = measure_value_range(source)
    assert (low, high) == measure_value_range(source)
    assert 776 <= low <= 782 and 1003 <= high <= 1009
    assert "pixels lie between 776 and" in caplog.text
    sixteen_bits = "float" not in name and "32-bit tiff" not in name and "signed" not in name
    assert ("would be 2 of 256 levels" in caplog.text) == (sixteen_bits or name == "32-bit tiff")


def test_a_range_that_the_type_tells_is_not_measured(caplog):
    for name in ("rgb jpeg", "rgb png", "16-bit png", "array uint16", "npy rgb", "multi-page tiff"):
        assert measure_value_range(Items([FORMATS[name]] * 3)) is None
    assert measure_value_range(Items([b"broken"])) is measure_value_range(Items([])) is None
    assert measure_value_range(Items([np.full((4, 4), np.nan, np.float32)])) is None
    for shape in ((0, 4), (4, 0), (4, 4, 0), (4,), (2, 2, 2, 2)):  # no images
        assert measure_value_range(Items([np.ones(shape, np.float32)])) is None
    assert measure_value_range(Items([np.full((4, 4), 900, np.uint16)])) is None  # of a constant nothing can be made
    assert not caplog.records


def test_outliers_do_not_set_the_range():
    image = np.linspace(100, 300, 10_000).astype(np.float32).reshape(100, 100)
    image[0, 0], image[99, 99], image[50, 0] = -1e9, 1e9, np.nan
    low, high = measure_value_range(Items([image] * 5))
    assert 100 <= low < 101 and 299 < high <= 300


# ------------------------------------------------------------------------------------------------------------- damage


def _damaged(photo: Image.Image) -> dict[str, bytes]:
    png, jpeg, webp = encode(photo), encode(photo, "JPEG"), encode(photo, "WEBP")
    at = png.index(b"IDAT") + 4
    return {
        "truncated jpeg": jpeg[: len(jpeg) // 2],
        "jpeg without its last rows": jpeg[: len(jpeg) * 97 // 100],
        "jpeg header only": jpeg[:200],
        "truncated progressive jpeg": encode(photo, "JPEG", progressive=True)[: len(jpeg) // 2],
        "truncated png": png[: len(png) // 2],
        "png with a wrong checksum": png[:29] + bytes(4) + png[33:],
        "png with broken pixels": png[: at + 40] + bytes(200) + png[at + 240 :],
        "png header only": png[:33],
        "half a webp": webp[: len(webp) // 2],
        "half a gif": encode(photo, "GIF")[:3000],
        "half a tiff": encode(photo, "TIFF")[:5000],
        "half a 13-band tiff": tiff(BANDS, planarconfig="contig", photometric="minisblack")[:4000],
        "tiff magic only": b"II*\0",
        "half an npy": npy(np.asarray(photo))[:1000],
        "npy magic only": b"\x93NUMPY",
        "npy with a broken header": b"\x93NUMPY\x01\x00\x08\x00{'descr(",
        "npy of negative shape": npy_of_shape("(-10, -10)", 100),
        "npy with a truth for a length": npy_of_shape("(10, True)", 10),
        "npy of 70 axes": npy_of_shape(f"({'1,' * 70})", 1),
        "npy with an endless header": npy_of_shape("-" * 4000 + "10", 10),
        "npy of objects, which would run code": npy(np.array([[{}]], dtype=object))[:60],
        "empty": b"",
        "text": b"this is not a photograph\n",
        "html": b"<!DOCTYPE html><html><body>404</body></html>",
        "zip": b"PK\x03\x04" + zlib.compress(bytes(1000)),
        "random bytes": np.random.default_rng(1).bytes(5000),
    }


DAMAGED = _damaged(RGB.resize((120, 90)))


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_reported_as_such(name):
    for operator in OPERATORS:
        with pytest.raises(CorruptImage):
            crop(DAMAGED[name], operator=operator)
    for in_chans in (1, 3, 4, 13):
        with pytest.raises(ValueError, match=r"."):  # CorruptImage, or --in_chans where no picture has so many
            center_crop(DAMAGED[name], SMALL, in_chans)
    with pytest.raises(CorruptImage) as error:
        to_image(DAMAGED[name], 3)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("channels", [2, 3, 4])
@pytest.mark.parametrize("damage", ["unknown filter", "wrong sum of the pixels", "half", "a bit", "wrong checksum"])
def test_a_damaged_png_of_16_bit_colours_is_named(damage, channels):
    """torchvision's decoder ends the process."""
    item = bytearray(deep_png(SENTINEL[..., :channels], damage))
    item[len(item) // 2] ^= damage == "a bit"
    item[-13] ^= damage == "wrong checksum"
    item = bytes(item[: len(item) // 2] if damage == "half" else item)
    for read in (pixels.more_than_8_bits, lambda item: to_image(item, 3, (776, 1009))):
        with pytest.raises(CorruptImage, match="not a readable image"):
            read(item)


@pytest.mark.parametrize("channels", [2, 3, 4])
@pytest.mark.parametrize("size_px", [(1, 3), (13, 11)])
def test_an_interlaced_png_of_16_bit_colours_is_read_whole(size_px, channels):
    """All seven passes of Adam7 (PNG specification, section 8.2), written here by hand."""
    wanted = np.random.default_rng(0).integers(0, 2**16, (*size_px, channels), dtype=np.uint16)
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    parts = [wanted[top::down, left::right] for top, left, down, right in passes]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for part in parts if part.size for row in part)
    kind = {2: 4, 3: 2, 4: 6}[channels]
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", *size_px[::-1], 16, kind, 0, 0, 1)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
    assert np.array_equal(pixels._read_deep_png(data, 4), wanted)


def holes(data: bytes) -> list[bytes]:
    """A JPEG with 300 bytes missing, at 36 places."""
    starts = range(1000, len(data) - 1000, (len(data) - 2000) // 36)
    return [data[:start] + data[start + 300 :] for start in list(starts)[:36]]


@pytest.mark.skipif(decode.simplejpeg is None, reason="Pillow does not see it")
@pytest.mark.parametrize("operator", ["fourier", "scaled"])
def test_what_the_strict_decoder_objects_to_is_told_with_the_crop(operator):
    whole = encode(Image.fromarray(photograph("coffee")).resize((300, 200)), "JPEG", quality=85)
    for item, damaged in [(whole, False), *((item, True) for item in holes(whole))]:
        objections: list[str] = []
        try:
            crops = train_crops(item, SMALL, FULL, operator, (0.2, 1.0), 0, [1, 2], 3, objections=objections)
        except CorruptImage:
            assert damaged
            continue
        assert bool(objections) == bool(jpeg_objection(item)) == damaged
        assert len(objections) in (0, 1)
        assert all(map(torch.equal, crops, train_crops(item, SMALL, FULL, operator, (0.2, 1.0), 0, [1, 2], 3)))
    for item in (b"", b"\xff\xd8", FORMATS["cmyk jpeg"], FORMATS["grey jpeg"], FORMATS["rgb png"], RGB):
        assert bool(jpeg_objection(item)) == (item == b"\xff\xd8")


@settings(max_examples=500, derandomize=True)
@given(
    st.sampled_from(
        ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "npy", "bands", "AVIF", "DDS", "JPEG2000", "TGA"]
    ),
    st.data(),
)
def test_any_corruption_is_an_image_or_damage(kind, data):
    """Nothing but ValueError ever leaves the decoder, whichever bytes are hit."""
    small = RGB.resize((24, 16))
    original = {"npy": lambda: npy(np.asarray(small)), "bands": lambda: tiff(np.moveaxis(BANDS, 2, 0))}
    item = bytearray(original[kind]() if kind in original else encode(small, kind))
    for _ in range(data.draw(st.integers(1, 6))):
        near_the_start = data.draw(st.booleans())
        item[data.draw(st.integers(0, min(200, len(item)) - 1 if near_the_start else len(item) - 1))] = data.draw(
            st.integers(0, 255)
        )
    item = bytes(item[: data.draw(st.integers(0, len(item)))] if data.draw(st.booleans()) else item)
    for in_chans, value_range in ((3, None), (13, None), (3, (0.0, 9.0)), (13, (0.0, 9.0))):
        try:
            out = train_crop(item, SMALL, FULL, "scaled", (0.2, 1.0), 0, 0, in_chans, value_range)
        except ValueError:
            continue
        assert out.shape == (in_chans, *SMALL)


def test_bombs_are_refused_before_they_are_decoded(monkeypatch):
    monkeypatch.setattr(pixels, "MAX_PIXELS", 239)
    for name in ("rgb png", "rgb jpeg", "npy rgb", "16-bit tiff"):
        for operator in OPERATORS:
            with pytest.raises(CorruptImage, match="limit"):
                crop(FORMATS[name], operator=operator)
    monkeypatch.setattr(pixels, "_png_bytes", None)  # nothing is decoded
    for name in ("colour png", "grey and alpha png", "colour tiff", "npy"):
        with pytest.raises(CorruptImage, match="limit"):
            to_image(DEEP[name][0], DEEP[name][1].shape[2], (776, 1009))
    monkeypatch.setattr(pixels, "MAX_PIXELS", 240)
    assert to_image(FORMATS["rgb png"], 3).size == (20, 12)


def test_broken_exif_does_not_cost_the_image(photo):
    whole = encode(photo, "JPEG", exif=b"Exif\0\0II*\0" + b"\xff" * 20)
    assert to_image(whole, 3).size == photo.size
    assert crop(whole, operator="scaled").shape == (3, *SMALL)


# ----------------------------------------------------------------------------------------------------------- geometry

SEEDS = st.integers(0, 2**63 - 1)


@FEW
@given(SEEDS, st.sampled_from(list(OPERATORS)), st.sampled_from([0, 9]))
def test_the_seed_decides_everything(seed, operator, augment):
    item = FORMATS["rgb jpeg"]
    first = crop(item, operator=operator, seed=seed, augment=augment)
    torch.rand(3)  # the state of the global generator must not matter
    assert torch.equal(first, crop(item, operator=operator, seed=seed, augment=augment))


@pytest.mark.parametrize("operator", OPERATORS)
def test_different_seeds_differ(jpeg, operator):
    crops = {crop(jpeg, operator=operator, seed=seed).numpy().tobytes() for seed in range(20)}
    assert len(crops) == 20


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("augment", [0, 5])
def test_the_global_generator_is_left_alone(jpeg, operator, augment):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    crop(jpeg, operator=operator, augment=augment)
    with pytest.raises(CorruptImage):
        crop(jpeg[:500], operator=operator, augment=augment)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_crop_is_torchvisions(photo):
    reference = v2.Compose([
        v2.RandomResizedCrop(FULL, scale=(0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC),
        v2.RandomHorizontalFlip(),
    ])  # fmt: skip
    for seed in range(10):
        torch.manual_seed(seed)
        assert torch.equal(crop(photo, seed=seed), v2.functional.pil_to_tensor(reference(photo)))


@pytest.mark.parametrize("size", [(375, 500), (500, 375), (1, 1), (2, 90), (400, 3), (31, 33), (1, 4000)])
@pytest.mark.parametrize("crop_scale", [(0.2, 1.0), (0.08, 1.0), (1.0, 1.0), (0.3, 0.35)])
def test_a_view_is_what_torchvision_draws(size, crop_scale):
    for seed in range(40):
        view = draw_view(seed, size, crop_scale)
        torch.manual_seed(seed)
        image = torch.empty(()).expand(3, *size)
        top, left, height, width = RandomResizedCrop.get_params(image, list(crop_scale), [3 / 4, 4 / 3])
        assert view.box == (left, top, left + width, top + height)
        assert view.flip == (torch.rand(1) < 0.5)
        assert torch.equal(view.generator.get_state(), torch.get_rng_state())  # RandAugment goes on from here


def test_lanczos_is_the_published_pipeline(photo):
    for seed in range(3):
        full = v2.functional.to_pil_image(crop(photo, seed=seed))
        expected = v2.functional.pil_to_tensor(full.resize(SMALL, Image.Resampling.LANCZOS))
        assert torch.equal(crop(photo, seed=seed, operator="lanczos"), expected)


def test_at_full_size_lanczos_and_fourier_are_the_plain_crop(jpeg):
    for augment in (0, 9):
        a, b = (crop(jpeg, FULL, operator, seed=3, augment=augment) for operator in ("lanczos", "fourier"))
        assert torch.equal(a, b)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_takes_a_short_way_to_the_same_crop(photo, orientation, monkeypatch):
    """torch's resize of the stored pixels, then upright, is Pillow's of the upright ones, to 0.2 of 255 levels."""
    item = oriented(photo, orientation, quality=90)
    decoded = to_image(item, 3)  # not bytes: the long way
    fast = [crop(item, seed=seed) for seed in range(6)]
    for seed in range(6):
        difference = (fast[seed].int() - crop(decoded, seed=seed).int()).abs()
        assert difference.max() <= 8
        assert difference.float().mean() < 0.25
    if orientation == 1:
        pixels = v2.functional.pil_to_tensor(decoded)
        reference = v2.Compose([
            v2.RandomResizedCrop(FULL, scale=(0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(),
        ])  # fmt: skip
        for seed in range(6):
            torch.manual_seed(seed)
            assert torch.equal(fast[seed], reference(pixels))
    monkeypatch.setattr(decode, "simplejpeg", None)
    assert all(torch.equal(fast[seed], crop(item, seed=seed)) for seed in range(6))
    monkeypatch.undo()
    for operator in ("scaled", "lanczos"):
        quick = crop(item, operator=operator, size_px=(24, 24))
        monkeypatch.setattr(decode, "simplejpeg", None)
        assert torch.equal(quick, crop(item, operator=operator, size_px=(24, 24)))
        monkeypatch.undo()


@pytest.mark.skipif(decode.cykooz_resizer is None, reason="has no wheel for this platform")
@pytest.mark.parametrize("channels", [1, 3])
def test_lanczos_of_a_box_is_pillows(photo, channels, monkeypatch):
    """Wherever the box begins, down and up: half a level of 255 on average. Overshoots are cut off between the two
    passes, which come in another order, so single pixels differ by more.
    """
    pixels = np.asarray(photo)[:90, :120, :channels]
    random_numbers = np.random.default_rng(0)
    sizes = random_numbers.integers(1, 61, (300, 2)).tolist()
    edges = [[np.sort(random_numbers.choice(8 * side, 2, replace=False)) / 8 for side in (120, 90)] for _ in sizes]
    boxes = [(left, top, right, bottom) for (left, right), (top, bottom) in edges]
    ours = [decode._lanczos(pixels, size, box).astype(int) for size, box in zip(sizes, boxes, strict=True)]
    monkeypatch.setattr(decode, "cykooz_resizer", None)
    for size, box, mine in zip(sizes, boxes, ours, strict=True):
        difference = np.abs(mine - decode._lanczos(pixels, size, box))
        assert mine.shape == (*size, channels)
        assert difference.max() <= 12
        assert difference.mean() <= max(0.75, 6 / difference.size)


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


@pytest.mark.parametrize(
    ("mode", "options", "needs_pillow"),
    [
        ("RGB", {}, False),
        ("L", {}, False),
        ("RGB", {"progressive": True, "comment": b"Exif", "icc_profile": b"x" * 70000}, False),
        ("RGB", {"keep_rgb": True}, False),
        ("CMYK", {}, True),
        ("RGB", {"exif": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x08\0\0\0\0\0\0\0"}, True),
        ("RGB", {"icc_profile": b"x" * 70000, "xmp": XMP}, True),
        ("RGB", {"padding": True}, True),
    ],
)
def test_jpegs_without_orientation_are_opened_without_pillow(photo, mode, options, needs_pillow, monkeypatch):
    padding = options.pop("padding", False)
    item = encode(photo.convert(mode), "JPEG", **options)
    if padding:  # between segments, as the standard allows
        item = item[:2] + b"\xff\xff" + item[2:]
    opened = decode._open_jpeg(item)
    assert opened.orientation == {"exif": 8, "xmp": 6}.get(max(options, default=""), 1)
    with monkeypatch.context() as patched:
        patched.setattr(decode, "simplejpeg", None)
        assert decode._open_jpeg(item) == opened
    monkeypatch.setattr(decode, "open_header", lambda data: pytest.fail("Pillow"))
    with pytest.raises(pytest.fail.Exception) if needs_pillow else contextlib.nullcontext():
        decode._open_jpeg(item)


def test_a_jpeg_that_only_pillow_understands_or_nobody(jpeg, monkeypatch):
    frame = jpeg.index(b"\xff\xc0")
    for place, byte in ((frame + 4, b"\x0c"), (frame + 1, b"\xfe")):  # 12 bits; a comment in place of the frame
        with pytest.raises(CorruptImage, match="not a readable image"):
            crop(jpeg[:place] + byte + jpeg[place + 1 :], operator="scaled")
    assert decode._may_be_turned(jpeg[:2] + b"\0\xda" + jpeg[2:])  # no marker: not for us to say
    monkeypatch.setattr(pixels, "MAX_PIXELS", 100)
    with pytest.raises(CorruptImage, match="more than the limit of 100"):
        crop(jpeg, operator="scaled")


@pytest.mark.parametrize("operator", OPERATORS)
def test_crops_of_one_decode_are_those_of_several(jpeg, photo, operator):
    for item in (jpeg, photo):
        group_size = train_crops(item, (16, 16), FULL, operator, (0.3, 0.4), 0, [1, 2, 3], 3)
        alone = [crop(item, (16, 16), operator, seed, crop_scale=(0.3, 0.4)) for seed in (1, 2, 3)]
        assert all(psnr(a, b) > 30 for a, b in zip(group_size, alone, strict=True))  # scaled takes the finest scale
        if operator != "scaled" or item is photo:
            assert all(torch.equal(a, b) for a, b in zip(group_size, alone, strict=True))


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return (10 * torch.log10(255**2 / (a.float() - b.float()).square().mean())).item()


@pytest.mark.parametrize("size", [(16, 16), (32, 32), (24, 40)])
def test_scaled_shows_what_a_full_decode_shows(jpeg, photo, size):
    """Same seed, same picture: the JPEG at a reduced scale against Lanczos from all pixels."""
    everything = to_image(jpeg, 3)  # not bytes: decoded in full, then the same single resize
    for seed in range(20):
        scaled = crop(jpeg, size, "scaled", seed)
        assert psnr(scaled, crop(everything, size, "scaled", seed)) > 30
        assert psnr(scaled, crop(jpeg, size, "lanczos", seed)) > 27
    assert psnr(crop(jpeg, size, "scaled", 0), crop(jpeg, size, "scaled", 1)) < 20  # what a wrong crop would give


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("at", [(40, 30), (157, 41), (77, 99)])
def test_scaled_puts_a_dot_where_it_belongs(orientation, at):
    """Centre of mass of a bright dot, in pixels of the crop; the odd size leaves reduced edges rounded up."""
    x, y = np.meshgrid(np.arange(201), np.arange(139))
    dot = (255 * np.exp(-((x - at[0]) ** 2 + (y - at[1]) ** 2) / (2 * 9.0**2))).astype(np.uint8)
    item = oriented(Image.fromarray(dot), orientation, quality=95)
    upright = to_image(item, 1)
    assert upright.size == ((201, 139) if orientation < 5 else (139, 201))
    seen = 0
    for seed in range(12):
        centres = []
        for source in (item, upright):
            out = crop(source, (24, 24), "scaled", seed, in_chans=1, crop_scale=(0.5, 1.0))[0].double()
            out[out < 12] = 0  # ringing
            centres.append((out.sum(0) @ torch.arange(24.0).double(), out.sum(1) @ torch.arange(24.0).double()))
            centres[-1] = torch.stack(centres[-1]) / out.sum()
        if out.sum() > 1500:  # the dot, or most of it, is inside this crop
            seen += 1
            assert (centres[0] - centres[1]).abs().max() < 0.1
    assert seen >= 3


@FEW
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 8), SEEDS, st.integers(1, 40), st.integers(1, 40))
def test_any_size_can_be_cropped(width, height, orientation, seed, out_height, out_width):
    item = oriented(RGB.resize((width, height)), orientation)
    for operator in OPERATORS:
        out = crop(item, (out_height, out_width), operator, seed, full_px=(40, 40))
        assert out.shape == (3, *((40, 40) if operator in SPECTRAL else (out_height, out_width)))


def test_scaled_decodes_no_more_than_it_needs(photo, monkeypatch):
    """A crop of the whole picture at 1/8 must be decoded at 1/8, at 1/3 at 1/2: otherwise nothing is gained."""
    decoded = []
    resize = decode._jpeg_crop
    monkeypatch.setattr(
        decode,
        "_jpeg_crop",
        lambda jpeg, pixels, *rest: decoded.append(pixels.shape[:2]) or resize(jpeg, pixels, *rest),
    )
    item = encode(photo.resize((256, 256)), "JPEG")
    for size in (32, 33, 85, 128, 129):
        train_crop(item, (size, size), (256, 256), "scaled", (1.0, 1.0), 0, 5, 3)
    assert decoded == [(32, 32), (64, 64), (128, 128), (128, 128), (256, 256)]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind, orientation):
    picture = Image.new("L", (24, 16), 30)
    picture.paste(220, (0, 0, 12, 8))  # the stored top left corner is bright
    upright = np.asarray(to_image(oriented(picture, orientation, kind), 1))
    assert upright.shape == ((16, 24) if orientation < 5 else (24, 16))
    bright = {1: "tl", 2: "tr", 3: "br", 4: "bl", 5: "tl", 6: "tr", 7: "br", 8: "bl"}[orientation]
    corners = {"tl": (1, 1), "tr": (1, -2), "bl": (-2, 1), "br": (-2, -2)}
    assert {name: bool(upright[at] > 120) for name, at in corners.items()} == {n: n == bright for n in corners}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("value_range", [None, (0, 65535)])
@pytest.mark.parametrize("kind", ["16-bit png", "16-bit tiff", "8-bit tiff", "pages"])
def test_orientation_of_what_opens_as_an_array(kind, value_range, orientation):
    """As for pictures, whether a range of values is given or not."""
    stored = np.arange(2 * 3, dtype=np.uint16).reshape(2, 3) * 9000
    exif = Image.Exif()
    exif[0x0112] = orientation
    chunk = struct.pack(">I", len(exif.tobytes()) - 6) + b"eXIf" + exif.tobytes()[6:]
    chunk += struct.pack(">I", zlib.crc32(chunk[4:]))
    tag = {"extratags": [(0x0112, "H", 1, orientation, True)]}
    png = deep_png(np.stack([stored] * 3, axis=-1))
    items = {
        "16-bit png": (png[:33] + chunk + png[33:], 3),
        "16-bit tiff": (tiff(np.stack([stored] * 3, axis=-1), photometric="rgb", **tag), 3),
        "8-bit tiff": (tiff((np.stack([stored] * 4, axis=-1) // 257).astype(np.uint8), photometric="rgb", **tag), 4),
        "pages": (tiff(np.stack([stored] * 5), photometric="minisblack", **tag), 5),
    }
    item, channels = items[kind]
    flat = to_image(item, channels, value_range)
    wanted = Image.fromarray(((stored.astype(np.uint32) + 128) // 257).astype(np.uint8))
    if orientation in UPRIGHT:
        wanted = wanted.transpose(UPRIGHT[orientation])
    assert np.allclose(np.asarray(flat)[..., 0], np.asarray(wanted), atol=1)


def test_upright_pictures_are_not_turned_again(photo):
    once = to_image(oriented(photo, 6), 3)
    assert to_image(once, 3).size == once.size == (180, 240)


@pytest.mark.parametrize("in_chans", [1, 3])
def test_augment_changes_the_picture_after_the_same_crop(jpeg, in_chans):
    changed = [not torch.equal(*(crop(jpeg, augment=a, seed=s, in_chans=in_chans) for a in (0, 30))) for s in range(8)]
    assert sum(changed) >= 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"operator": "nearest"}, "fourier, dct, lanczos, bilinear, scaled"),
        ({"augment": 31}, r"0\.\.30"),
        ({"augment": 5, "in_chans": 4}, "augment .*--in_chans"),
    ],
)
def test_wrong_arguments(jpeg, arguments, message):
    with pytest.raises(ValueError, match=message):
        crop(jpeg, **arguments)


@pytest.mark.parametrize("crop_pct", [1.0, 224 / 256, 0.5])
@pytest.mark.parametrize("size", [(240, 180), (180, 240), (97, 53), (50, 50)])
def test_center_crop_is_torchvisions(photo, size, crop_pct):
    image = photo.resize(size)
    reference = v2.Compose([
        v2.Resize(int(48 / crop_pct), interpolation=v2.InterpolationMode.BICUBIC),
        v2.CenterCrop(48),
    ])  # fmt: skip
    assert torch.equal(center_crop(image, (48, 48), 3, crop_pct), v2.functional.pil_to_tensor(reference(image)))


@FEW
@given(*[st.integers(1, 60)] * 4, st.floats(0.3, 1.0), st.sampled_from([1, 3, 5]))
def test_center_crop_covers_any_shape(height, width, out_height, out_width, crop_pct, in_chans):
    out = center_crop(np.full((height, width, in_chans), 77, np.uint8), (out_height, out_width), in_chans, crop_pct)
    assert out.shape == (in_chans, out_height, out_width)
    assert (out == 77).all()  # nothing outside the picture was padded in


@pytest.mark.parametrize(("shape", "resized"), [((1, 60_000), "5760000x96"), ((60_000, 1, 5), "96x5760000")])
def test_a_long_thin_image_is_not_resized_to_gigabytes(shape, resized, monkeypatch):
    monkeypatch.setattr(decode, "_resize", None)
    with pytest.raises(CorruptImage, match=f"resized for its centre crop, {resized} pixels are more than the limit"):
        center_crop(np.zeros(shape, np.uint8), (96, 96), shape[2] if len(shape) > 2 else 3)


class Pictures(Items):
    """Ten images, of which every third can't be read."""

    def __init__(self) -> None:
        super().__init__([b"broken" if i % 3 == 0 else np.full((20, 30, 3), i, np.uint8) for i in range(10)])

    def read(self, index: int) -> tuple[np.ndarray | bytes, None]:
        if index == 3:
            raise OSError("gone")
        return super().read(index)


def test_center_crops_are_spread_evenly_and_name_what_is_left_out():
    crops, skipped = center_crops(Pictures(), 5, (8, 12), 3)  # numbers 0, 2, 4, 6, 8
    assert crops.dtype == torch.uint8 and crops.shape == (3, 3, 8, 12)
    assert crops[:, 0, 0, 0].tolist() == [2, 4, 8]
    assert [text.partition(":")[0] for text in skipped] == ["item 0", "item 6"]
    everything, skipped = center_crops(Pictures(), 99, (8, 12), 3)
    assert everything[:, 0, 0, 0].tolist() == [1, 2, 4, 5, 7, 8] and "item 3: gone" in skipped
    nothing, skipped = center_crops(Pictures(), 1, (8, 12), 3)
    assert nothing.shape == (0, 3, 8, 12) and len(skipped) == 1


def test_crops_of_an_unlabelled_source_have_label_minus_one():
    crops = EvalCrops(Pictures(), (8, 8), 3, 1.0)
    assert [crops[index][1] for index in (1, 2)] == [-1, -1]


def test_images_that_cannot_be_read_are_left_out_of_an_evaluation_up_to_a_limit(caplog):
    """Of ten pictures, every third can't be read."""
    crops = EvalCrops(Pictures(), (8, 8), 3, 1.0, damaged_limit=0.5)
    batches = list(eval_batches(crops, 0, 1, Loading(), batch_size=4))
    assert torch.cat([images[:, 0, 0, 0] for images, _ in batches]).tolist() == [1, 2, 4, 5, 7, 8]
    kept = [labels for _, labels in eval_batches(crops, 0, 1, Loading(), batch_size=4, keep_places=True)]
    assert torch.cat(kept).tolist() == [-2, -1, -1, -2, -1, -1, -2, -1, -1, -2]
    named = [record.getMessage() for record in caplog.records]
    assert [text.split(": ")[1] for text in named] == ["item 0", "item 3", "item 6", "item 9"]  # once each
    second = list(eval_batches(crops, 1, 2, Loading(), batch_size=4))  # of two ranks
    assert torch.cat([images[:, 0, 0, 0] for images, _ in second]).tolist() == [5, 7, 8]
    for use in (lambda crops: list(eval_batches(crops, 0, 1, Loading())), lambda crops: crops.look()):
        with pytest.raises(ValueError, match=r"1 of 10 images are damaged, .* the last is item 0"):
            use(EvalCrops(Pictures(), (8, 8), 3, 1.0))


def test_center_crop_refuses_an_impossible_share(photo):
    with pytest.raises(ValueError, match="crop_pct"):
        center_crop(photo, SMALL, 3, crop_pct=0.0)
