"""Targets against slow loops written from the definitions, and HOG against scikit-image where the two coincide."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage.feature import hog

from mae_et.plan.shapes import target_dim
from mae_et.targets import hog_target, pixel_target, reconstruction_loss


def integers(*shape: int, high: int = 256, seed: int = 0) -> torch.Tensor:
    """Whole numbers: float32 holds their gradients exactly, so none falls on the other side of a bin's border."""
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed)).float()


# -------------------------------------------------------------------------------------------------------------- pixel


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("height", "width", "patch"), [(8, 8, 4), (6, 15, 3), (16, 8, 8)])
@pytest.mark.parametrize("contrast", [1.0, 1e-5])  # 1e-5: the 1e-6 beside the variance counts
def test_pixel_target_equals_a_slow_loop(channels, normalize, height, width, patch, contrast):
    images = contrast * integers(2, channels, height, width)
    wanted = []
    for image in images.double().numpy():
        for top in range(0, height, patch):
            for left in range(0, width, patch):
                values = []
                for y in range(top, top + patch):
                    for x in range(left, left + patch):
                        values += [image[c, y, x] for c in range(channels)]
                if normalize:
                    mean = sum(values) / len(values)
                    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
                    values = [(value - mean) / math.sqrt(variance + 1e-6) for value in values]
                wanted.append(values)
    found = pixel_target(images, patch, normalize)
    assert found.shape == (2, height * width // patch**2, target_dim("pixel", patch, channels))
    np.testing.assert_allclose(found.flatten(0, 1).numpy(), wanted, rtol=0, atol=1e-5)


def test_a_flat_patch_is_normalised_to_zero():
    assert pixel_target(torch.full((1, 3, 8, 8), 7.0), 4, normalize=True).abs().max() == 0


@pytest.mark.parametrize("normalize", [False, True])
def test_targets_of_some_patches_are_those_of_all_taken_there(normalize):
    images, ids = torch.randn(2, 3, 16, 24), torch.tensor([[5, 0, 3], [1, 5, 2]])
    everything = pixel_target(images, 8, normalize)
    wanted = torch.stack([everything[row, ids[row]] for row in range(2)])
    assert torch.equal(pixel_target(images, 8, normalize, ids), wanted)
    prediction = torch.randn(2, 3, 192)
    assert reconstruction_loss(prediction, wanted) == reconstruction_loss(prediction, everything, ids)


# ---------------------------------------------------------------------------------------------------------------- HOG


def slow_hog(image: np.ndarray, patch: int) -> np.ndarray:
    """[C, H, W] -> [L, C·9·4], pixel by pixel from the definition."""
    channels, height, width = image.shape
    cell = patch // 2
    histogram = np.zeros((channels, 9, height // cell, width // cell))
    sobel = np.array([[1, 0, -1], [2, 0, -2], [1, 0, -1]], dtype=np.float64)
    for c in range(channels):
        padded = np.pad(image[c].astype(np.float64), 1, mode="reflect")
        for y in range(height):
            for x in range(width):
                window = padded[y : y + 3, x : x + 3]
                gx, gy = (window * sobel).sum(), (window * sobel.T).sum()
                orientation = math.floor(math.atan2(gx, gy) / math.pi * 9) % 9
                histogram[c, orientation, y // cell, x // cell] += math.sqrt(gx**2 + gy**2)
    for c, row, column in np.ndindex(channels, height // cell, width // cell):
        histogram[c, :, row, column] /= max(np.linalg.norm(histogram[c, :, row, column]), 1e-12)
    patches = []
    for row in range(0, height // cell, 2):
        for column in range(0, width // cell, 2):
            patches.append(
                [
                    histogram[c, o, row + y, column + x]
                    for c in range(channels)
                    for o in range(9)
                    for y in (0, 1)
                    for x in (0, 1)
                ]
            )
    return np.array(patches)


@pytest.mark.parametrize("high", [4, 256])  # 4: many gradients along an axis, or none
@pytest.mark.parametrize(
    ("channels", "height", "width", "patch"), [(3, 32, 32, 16), (1, 16, 24, 8), (5, 12, 8, 4), (2, 4, 6, 2)]
)
def test_hog_target_equals_a_slow_loop(channels, height, width, patch, high):
    images = integers(2, channels, height, width, high=high)
    found = hog_target(images, patch)
    assert found.shape == (2, height * width // patch**2, target_dim("hog", patch, channels))
    for image, target in zip(images.numpy(), found.numpy(), strict=True):
        np.testing.assert_allclose(target, slow_hog(image, patch), rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (48, 16)])
def test_hog_target_equals_scikit_image_where_the_definitions_coincide(height, width, seed):
    """scikit-image differs in three ways, none of which matters here.

    It takes central differences, where MaskFeat smooths them across with (1, 2, 1): on images f(y) + g(x) the smoothing
    is a factor of 4, which the norm removes. It measures the angle from the columns' axis, MaskFeat from the rows': so
    it gets the transposed image. It sets gradients at borders to 0, which is what reflection gives across a border.
    """
    f, g = integers(height, seed=seed), integers(width, seed=seed + 10)
    image = f[:, None] + g  # gradients of every orientation
    theirs = hog(
        image.T.double().numpy(),
        orientations=9,
        pixels_per_cell=(8, 8),
        cells_per_block=(1, 1),
        block_norm="L2",
        feature_vector=False,
    )[:, :, 0, 0]  # [W/8, H/8, 9]
    assert (theirs.mean((0, 1)) > 0.05).all()  # every bin is compared
    ours = hog_target(image[None, None], 16)[0]  # [L, 9·2·2]
    ours = ours.reshape(height // 16, width // 16, 9, 2, 2).permute(0, 3, 1, 4, 2).reshape(height // 8, width // 8, 9)
    np.testing.assert_allclose(ours.numpy(), theirs.transpose(1, 0, 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("orientation", range(9))
def test_a_ramp_fills_one_bin(orientation):
    """A ramp whose gradient stands at 20·bin + 10 degrees from the rows' axis."""
    angle = math.radians(20 * orientation + 10)
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(48.0), indexing="ij")
    ramp = math.cos(angle) * y + math.sin(angle) * x
    inner = hog_target(ramp[None, None], 16).reshape(3, 3, 9, 4)[1, 1]  # without borders
    assert inner[orientation] == pytest.approx(torch.ones(4), abs=1e-4)
    assert hog_target(-ramp[None, None], 16).reshape(3, 3, 9, 4)[1, 1, orientation].min() > 0.99  # unsigned


def test_hog_ignores_brightness_and_contrast_and_is_zero_on_flat_images():
    images = integers(2, 3, 32, 32)
    assert (hog_target(0.5 * images - 7, 16) - hog_target(images, 16)).abs().max() <= 1e-5
    assert hog_target(torch.full((1, 3, 16, 16), 5.0), 16).abs().max() == 0


def test_hog_is_computed_in_float32():
    images = integers(1, 3, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert hog_target(images, 16).equal(hog_target(images.to(torch.bfloat16), 16))
        found = hog_target(images, 16)
    assert found.dtype == torch.float32
    assert found.equal(hog_target(images, 16))


# -------------------------------------------------------------------------------------------------- sizes, loss, errors


def test_target_dim():
    assert [target_dim("pixel", p, c) for p, c in ((16, 3), (14, 3), (4, 1))] == [768, 588, 16]
    assert [target_dim("hog", p, c) for p, c in ((16, 3), (14, 3), (4, 1))] == [108, 108, 36]


def test_an_odd_patch_has_no_four_cells():
    with pytest.raises(ValueError, match="patch_size must be even; got 7"):
        hog_target(torch.zeros(1, 3, 14, 14), 7)


def test_the_loss_is_the_mean_over_predicted_patches_only():
    generator = torch.Generator().manual_seed(0)
    target, prediction = torch.randn(2, 6, 5, generator=generator), torch.randn(2, 3, 5, generator=generator)
    ids = torch.tensor([[4, 0, 2], [5, 1, 3]])
    wanted = [
        sum((prediction[b, p, d] - target[b, ids[b, p], d]) ** 2 for d in range(5)) / 5
        for b in range(2)
        for p in range(3)
    ]
    loss = reconstruction_loss(prediction, target, ids)
    assert loss.item() == pytest.approx(sum(wanted).item() / 6, rel=1e-6)
    target[0, 1] = target[1, 0] = math.inf  # not predicted, so not looked at
    assert reconstruction_loss(prediction, target, ids).equal(loss)
    half = reconstruction_loss(prediction.bfloat16(), target, ids)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(loss.item(), rel=1e-2)
