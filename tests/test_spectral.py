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
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mae_et.data.decode import train_crop
from mae_et.plan.cost import crop_flops
from mae_et.spectral import low_frequency_crop

MANY = settings(max_examples=40, deadline=None)
FULL, SMALL = 224, 96  # of ET++, first stage


def definition(images: Tensor, size: tuple[int, int]) -> Tensor:
    """FFT in float64, keep frequencies -floor(s/2) … ceil(s/2)-1, inverse FFT at that size, real part."""
    (H, W), (h, w) = images.shape[-2:], size
    rows, columns = (torch.arange(-(s // 2), (s + 1) // 2) for s in (h, w))
    spectrum = torch.fft.fft2(images.double())[..., rows[:, None] % H, columns % W]
    small = torch.empty_like(spectrum)
    small[..., rows[:, None] % h, columns % w] = spectrum
    return torch.fft.ifft2(small).real * (h * w) / (H * W)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@st.composite
def shapes(draw, largest: int = 32):
    """Image and smaller size, any parity, sides equal or not."""
    H, W = draw(st.integers(1, largest)), draw(st.integers(1, largest))
    return (H, W), (draw(st.integers(1, H)), draw(st.integers(1, W)))


# -------------------------------------------------------------------------------------------------------- definition


@MANY
@given(shapes(), st.integers(0, 9))
def test_it_equals_the_fft(shape, seed):
    (H, W), size = shape
    images = noise(2, H, W, seed=seed)
    wanted = definition(images, size)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        small = low_frequency_crop(images.to(dtype), size)
        assert (small.dtype, small.shape) == (dtype, (2, *size))
        assert (small - wanted).abs().max() <= tolerance


@pytest.mark.parametrize("size", [96, 98, 160, 192, (96, 161), (224, 96), (96, 224)])
def test_it_equals_the_fft_at_the_sizes_of_training(size):
    images = noise(2, 3, FULL, FULL, dtype=torch.float32)
    small = low_frequency_crop(images, size)
    assert (small - definition(images, (size, size) if isinstance(size, int) else size)).abs().max() <= 1e-5


@MANY
@given(shapes(24), st.integers(-3, 3))
def test_the_mean_is_kept(shape, level):
    (H, W), size = shape
    images = noise(H, W) + level
    assert low_frequency_crop(images, size).mean().item() == pytest.approx(images.mean().item(), abs=1e-10)
    constant = torch.full((H, W), float(level))
    assert (low_frequency_crop(constant, size) - level).abs().max() <= 1e-5


def test_full_size_is_the_identity():
    images = noise(3, 14, 9)
    assert low_frequency_crop(images, (14, 9)) is images
    assert low_frequency_crop(images[..., :9, :], 9).equal(images[..., :9, :])


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


@pytest.mark.parametrize(("shape", "size"), [((6, 8), (4, 4)), ((7, 6), (3, 4)), ((6, 5), (6, 3)), ((8, 4), (5, 4))])
def test_gradients(shape, size):
    images = noise(2, *shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: low_frequency_crop(x, size), images)


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


@pytest.mark.parametrize("size", [(16, 24), (15, 24), (15, 23), (32, 24), (16, 48), (32, 48), (31, 48)])
def test_the_formula_counts_what_pytorch_counts(size):
    images = torch.zeros(3, 32, 48)
    low_frequency_crop(images, size)  # builds the operators, once
    with FlopCounterMode(display=False) as counter:
        low_frequency_crop(images, size)
    assert 3 * crop_flops((32, 48), size) == counter.get_total_flops()


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
