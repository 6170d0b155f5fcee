"""The low-frequency crop is what its definition says, and the cheaper operators are as far from it as stated."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.fft import dctn, idctn
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mae_et.data.decode import train_crop
from mae_et.data.photos import PhotoTiles
from mae_et.plan.cost import crop_flops
from mae_et.plan.curriculum import Stage
from mae_et.plan.shapes import SPECTRAL
from mae_et.spectral import low_frequency_crop, low_frequency_input, low_pass

MANY = settings(max_examples=40)
FULL, SMALL = 224, 96  # of ET++, first stage


def definition(images: Tensor, size: tuple[int, int]) -> Tensor:
    """FFT in float64, keep frequencies -floor(s/2) … ceil(s/2)-1, inverse FFT at that size, real part."""
    (H, W), (h, w) = images.shape[-2:], size
    rows, columns = (torch.arange(-(s // 2), (s + 1) // 2) for s in (h, w))
    spectrum = torch.fft.fft2(images.double())[..., rows[:, None] % H, columns % W]
    small = torch.empty_like(spectrum)
    small[..., rows[:, None] % h, columns % w] = spectrum
    return torch.fft.ifft2(small).real * (h * w) / (H * W)


def cosine_definition(images: Tensor, size: tuple[int, int]) -> Tensor:
    """scipy's orthonormal DCT-II in float64, the lowest coefficients, inverse DCT at that size."""
    (H, W), (h, w) = images.shape[-2:], size
    spectrum = dctn(images.double().numpy(), axes=(-2, -1), norm="ortho")[..., :h, :w]
    return torch.from_numpy(idctn(spectrum, axes=(-2, -1), norm="ortho")) * math.sqrt(h * w / (H * W))


DEFINITIONS = {"fourier": definition, "dct": cosine_definition}


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@st.composite
def shapes(draw, largest: int = 32):
    """Image and smaller size, any parity, sides equal or not."""
    H, W = draw(st.integers(1, largest)), draw(st.integers(1, largest))
    return (H, W), (draw(st.integers(1, H)), draw(st.integers(1, W)))


# ---------------------------------------------------------------------------------------------------------- low pass


@MANY
@given(shapes(), st.integers(0, 9))
def test_the_low_pass_cuts_the_cosine_spectrum_and_keeps_the_size(shape, seed):
    (H, W), (h, w) = shape
    images = noise(2, H, W, seed=seed)
    spectrum = dctn(images.numpy(), axes=(-2, -1), norm="ortho")
    spectrum[..., h:, :] = 0
    spectrum[..., :, w:] = 0
    blurred = low_pass(images, (h, w))
    assert (blurred - torch.from_numpy(idctn(spectrum, axes=(-2, -1), norm="ortho"))).abs().max() <= 1e-10
    small = low_frequency_crop(images, (h, w), "dct")
    assert (low_frequency_crop(blurred, (h, w), "dct") - small).abs().max() <= 1e-10  # nothing that it keeps is lost


def test_a_stage_sees_its_size_without_frequencies_above_its_cut_off():
    images = noise(2, 3, 32, 32, dtype=torch.bfloat16)
    stage = Stage(16, 4, 12, 1, cutoff_px=8)
    wanted = low_pass(low_frequency_crop(images, 16, "fourier"), 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert low_frequency_input(images, stage, "fourier").equal(wanted) and wanted.dtype == torch.bfloat16
    whole = low_frequency_input(images, Stage(16, 4, 12, 1), "fourier")
    assert whole.equal(low_frequency_crop(images, 16, "fourier")) and not whole.equal(wanted)


# -------------------------------------------------------------------------------------------------------- definition


@MANY
@given(shapes(), st.integers(0, 9), st.sampled_from(SPECTRAL))
def test_it_equals_the_transform(shape, seed, operator):
    (H, W), size = shape
    images = noise(2, H, W, seed=seed)
    wanted = DEFINITIONS[operator](images, size)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        small = low_frequency_crop(images.to(dtype), size, operator)
        assert (small.dtype, small.shape) == (dtype, (2, *size))
        assert (small - wanted).abs().max() <= tolerance


@pytest.mark.parametrize("operator", SPECTRAL)
@pytest.mark.parametrize("size", [96, 98, 160, 192, (96, 161), (224, 96), (96, 224)])
def test_it_equals_the_transform_at_the_sizes_of_training(size, operator):
    images = noise(2, 3, FULL, FULL, dtype=torch.float32)
    small = low_frequency_crop(images, size, operator)
    wanted = DEFINITIONS[operator](images, (size, size) if isinstance(size, int) else size)
    assert (small - wanted).abs().max() <= 1e-5


@MANY
@given(shapes(24), st.integers(-3, 3), st.sampled_from(SPECTRAL))
def test_the_mean_is_kept(shape, level, operator):
    (H, W), size = shape
    images = noise(H, W) + level
    assert low_frequency_crop(images, size, operator).mean().item() == pytest.approx(images.mean().item(), abs=1e-10)
    constant = torch.full((H, W), float(level))
    assert (low_frequency_crop(constant, size, operator) - level).abs().max() <= 1e-5


@pytest.mark.parametrize("operator", SPECTRAL)
def test_full_size_is_the_identity(operator):
    images = noise(3, 14, 9)
    assert low_frequency_crop(images, (14, 9), operator) is images
    assert low_frequency_crop(images[..., :9, :], 9, operator).equal(images[..., :9, :])


@MANY
@given(shapes(32), st.integers(0, 32), st.integers(0, 32))
def test_cosines_below_the_cut_off_stay_and_those_above_vanish(shape, k, m):
    (H, W), (h, w) = shape
    k, m = k % H, m % W

    def wave(rows: int, columns: int) -> Tensor:
        """Half-periods k and m, sampled at pixel centres."""
        y, x = ((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in (rows, columns))
        return torch.cos(math.pi * k * y)[:, None] * torch.cos(math.pi * m * x)

    wanted = wave(h, w) if k < h and m < w else torch.zeros(h, w, dtype=torch.float64)
    assert (low_frequency_crop(wave(H, W), (h, w), "dct") - wanted).abs().max() <= 1e-10


@MANY
@given(shapes(16), st.integers(0, 9))
def test_the_cosine_crop_is_the_fourier_crop_of_the_mirrored_image(shape, seed):
    (H, W), (h, w) = shape
    images = noise(H, W, seed=seed)
    mirrored = torch.cat([images, images.flip(-1)], -1)
    mirrored = torch.cat([mirrored, mirrored.flip(-2)], -2)  # [2H, 2W], periodic without a jump
    k, m = (torch.fft.fftfreq(2 * n, 1 / (2 * n), dtype=torch.float64) for n in (H, W))
    # Kept: frequencies below s, since those of the mirrored image are half as high; sampled at pixel centres.
    kept = ((k.abs() < h)[:, None] & (m.abs() < w)) * torch.fft.fft2(mirrored)
    y, x = ((torch.arange(s, dtype=torch.float64) + 0.5) * n / s - 0.5 for s, n in ((h, H), (w, W)))
    rows, columns = (torch.exp(2j * math.pi * p[:, None] * f / (2 * n)) for p, f, n in ((y, k, H), (x, m, W)))
    wanted = (rows @ kept @ columns.mT).real / (4 * H * W)
    assert (low_frequency_crop(images, (h, w), "dct") - wanted).abs().max() <= 1e-10


@MANY
@given(shapes(32), st.integers(0, 40), st.integers(0, 40), st.floats(0, 2 * math.pi))
def test_sinusoids_below_the_cut_off_stay_and_those_above_vanish(shape, k, m, phase):
    (H, W), (h, w) = shape
    k, m = k % (H // 2 + 1), m % (W // 2 + 1)
    if any(2 * f == s < N for f, s, N in ((k, h, H), (m, w, W))):
        reject()  # the unpaired frequency of an even size: half of it is kept

    def wave(rows: int, columns: int) -> Tensor:
        y, x = torch.arange(rows, dtype=torch.float64) / rows, torch.arange(columns, dtype=torch.float64) / columns
        return torch.cos(2 * math.pi * (k * y[:, None] + m * x) + phase)

    above = any(2 * f > s for f, s in ((k, h), (m, w)))
    wanted = torch.zeros(h, w, dtype=torch.float64) if above else wave(h, w)
    assert (low_frequency_crop(wave(H, W), (h, w)) - wanted).abs().max() <= 1e-10


# --------------------------------------------------------------------------------------------- numbers and gradients


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_computed_in_float32(dtype, autocast):
    images = noise(2, 3, 32, 48).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        small = low_frequency_crop(images, (16, 24))
        single = low_frequency_crop(images.float(), (16, 24))
    assert small.dtype == dtype
    assert small.equal(single.to(dtype))
    assert (single - definition(images, (16, 24))).abs().max() <= 1e-5


@pytest.mark.parametrize("operator", SPECTRAL)
@pytest.mark.parametrize(("shape", "size"), [((6, 8), (4, 4)), ((7, 6), (3, 4)), ((6, 5), (6, 3)), ((8, 4), (5, 4))])
def test_gradients(shape, size, operator):
    images = noise(2, *shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: low_frequency_crop(x, size, operator), images)


@pytest.mark.parametrize(
    ("images", "size", "message"),
    [
        (torch.zeros(3, 8, 8), 9, "size 9×9 must be positive and at most the image's 8×8"),
        (torch.zeros(3, 8, 6), (8, 7), "size 8×7 must be positive and at most the image's 8×6"),
        (torch.zeros(3, 8, 8), 0, "size 0×0 must be positive"),
        (torch.zeros(3, 8, 8), (4, -4), "size 4×-4 must be positive"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), 4, "must be floating point, got torch.uint8; normalise them first"),
    ],
)
def test_errors(images, size, message):
    with pytest.raises(ValueError, match=message):
        low_frequency_crop(images, size)


def test_an_operator_of_the_loader_is_none_of_the_device():
    with pytest.raises(ValueError, match="unknown operator 'lanczos'; choose from fourier, dct"):
        low_frequency_crop(torch.zeros(3, 8, 8), 4, "lanczos")


@pytest.mark.parametrize("operator", SPECTRAL)
@pytest.mark.parametrize("size", [(16, 24), (15, 24), (15, 23), (32, 24), (16, 48), (32, 48), (31, 48)])
def test_the_formula_counts_what_pytorch_counts(size, operator):
    images = torch.zeros(3, 32, 48)
    low_frequency_crop(images, size, operator)  # builds the operators, once
    with FlopCounterMode(display=False) as counter:
        low_frequency_crop(images, size, operator)
    assert 3 * crop_flops((32, 48), size, operator) == counter.get_total_flops()


# --------------------------------------------------------------- how far the cheaper operators are from the exact one


def half_pixel_twin(images: Tensor, size: int) -> Tensor:
    """The exact crop, but sampled where resizing samples: at the centres of the new pixels, (N/s - 1)/2 further on."""
    shift = (images.shape[-1] / size - 1) / 2
    angle = 2 * math.pi * torch.fft.fftfreq(images.shape[-1], dtype=torch.float64) * shift
    phase = torch.polar(torch.ones(len(angle), len(angle), dtype=torch.float64), angle[:, None] + angle)
    return low_frequency_crop(torch.fft.ifft2(torch.fft.fft2(images) * phase).real, size)


def distance(found: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference, over that of the exact image without its mean."""
    return ((found - exact).square().mean().sqrt() / (exact - exact.mean()).square().mean().sqrt()).item()


@pytest.fixture(scope="module")
def pink() -> Tensor:
    """Images whose amplitude spectrum falls as 1/f, as that of photographs does."""
    f = torch.fft.fftfreq(FULL, dtype=torch.float64)
    radius = torch.hypot(f[:, None], f)
    radius[0, 0] = math.inf
    return torch.fft.ifft2(torch.fft.fft2(noise(8, FULL, FULL)) / radius).real


def pillow(images: Tensor, filter: Image.Resampling) -> Tensor:
    resized = [Image.fromarray(i.float().numpy()).resize((SMALL, SMALL), filter) for i in images]
    return torch.from_numpy(np.stack([np.array(image) for image in resized])).double()


@pytest.mark.parametrize(
    ("operator", "stated"),
    [
        (lambda x: pillow(x, Image.Resampling.LANCZOS), 0.11),
        (lambda x: pillow(x, Image.Resampling.BICUBIC), 0.14),
        (lambda x: pillow(x, Image.Resampling.BILINEAR), 0.20),
        (lambda x: F.interpolate(x[None], (SMALL, SMALL), mode="bicubic", antialias=True)[0], 0.14),
        (lambda x: F.interpolate(x[None], (SMALL, SMALL), mode="bilinear", antialias=True)[0], 0.20),
        (lambda x: F.interpolate(x[None], (SMALL, SMALL), mode="bicubic")[0], 0.39),
    ],
    ids=["lanczos", "bicubic", "bilinear", "torch bicubic", "torch bilinear", "bicubic without antialiasing"],
)
def test_the_distance_from_the_exact_crop_on_1_over_f_images_is_as_stated(pink, operator, stated):
    assert distance(operator(pink), half_pixel_twin(pink, SMALL)) == pytest.approx(stated, abs=0.01)


def test_the_distance_contains_the_half_pixel_shift_unless_it_is_removed(pink):
    plain = F.interpolate(pink[None], (SMALL, SMALL), mode="bicubic")[0]
    assert distance(plain, low_frequency_crop(pink, SMALL)) == pytest.approx(0.51, abs=0.01)


@pytest.mark.parametrize(
    ("name", "operator", "size", "stated"),
    [
        ("china.jpg", "lanczos", 96, 0.044),
        ("china.jpg", "lanczos", 160, 0.035),
        ("china.jpg", "scaled", 96, 0.064),
        ("china.jpg", "scaled", 160, 0.047),
        ("flower.jpg", "lanczos", 96, 0.040),
        ("flower.jpg", "scaled", 96, 0.054),
    ],
)
def test_the_distance_from_the_exact_crop_on_a_jpeg_photograph_is_as_stated(name, operator, size, stated):
    folder = importlib.util.find_spec("sklearn").submodule_search_locations[0]
    jpeg = (Path(folder) / "datasets" / "images" / name).read_bytes()

    def crop(operator: str) -> Tensor:
        whole = train_crop(jpeg, (size, size), (FULL, FULL), operator, (1.0, 1.0), augment=0, seed=0, in_chans=3)
        return whole.double()

    found = crop(operator)
    assert found.shape == (3, size, size)
    # Decoders differ in their last bits, and the photograph's opposite borders meet: hence a band, not a number.
    assert distance(found, half_pixel_twin(crop("fourier"), size)) == pytest.approx(stated, rel=0.1)


# -------------------------------------------------------------------------------------- borders of real photographs


def border_error(tiles: Tensor, operator: str) -> float:
    """RMS error of the outermost pixels of 32 → 16 crops against the 96 px tiles around them, by their spread."""
    small, reference = tiles[..., 32:64, 32:64], tiles
    if operator in SPECTRAL:
        small, reference = low_frequency_crop(small, 16, operator), low_frequency_crop(reference, 48, operator)
    else:
        resize = {"lanczos": Image.Resampling.LANCZOS, "bilinear": Image.Resampling.BILINEAR}[operator]
        planes = [Image.fromarray(plane.float().numpy()).resize((16, 16), resize) for plane in small]
        small, reference = torch.tensor(np.stack(planes)).double(), low_frequency_crop(reference, 48, "dct")
    difference = small - reference[..., 16:32, 16:32]
    border = torch.ones(16, 16, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    return (difference[..., border].square().mean().sqrt() / tiles.std()).item()


def test_the_fourier_crop_rings_at_borders_of_photographs_and_the_cosine_crop_does_not():
    source = PhotoTiles("val")
    pixels = [np.asarray(source.read(i)[0], dtype=np.float64) for i in range(0, len(source), 4)]
    tiles = torch.from_numpy(np.stack([p.mean(-1) if p.ndim == 3 else p for p in pixels]))
    errors = {operator: border_error(tiles, operator) for operator in (*SPECTRAL, "lanczos", "bilinear")}
    assert errors == pytest.approx({"fourier": 0.151, "dct": 0.041, "lanczos": 0.043, "bilinear": 0.073}, abs=0.003)


@pytest.mark.parametrize("operator", SPECTRAL)
def test_operators_made_under_inference_mode_can_be_differentiated(operator):
    images = noise(1, 11, 13).float()
    with torch.inference_mode():
        low_frequency_crop(images, (7, 9), operator)
    images.requires_grad_()
    low_frequency_crop(images, (7, 9), operator).square().sum().backward()
    assert images.grad.abs().sum() > 0
