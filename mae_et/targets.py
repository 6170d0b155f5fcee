"""What the decoder has to predict: images [B, C, H, W] -> targets [B, L, D], patches in row-major order.

B batch · C channels · L = (H/p)·(W/p) patches · D values per patch.
Sources: MAE, arXiv 2111.06377, Sec. 3 and Table 1d (pixels); MaskFeat, arXiv 2112.09133, Sec. 3.2 (HOG).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .plan.shapes import HOG_BINS


def pixel_target(images: Tensor, patch_size: int, normalize: bool = False, ids: Tensor | None = None) -> Tensor:
    """The pixels of each patch, [B, L, p·p·C], ordered row, column, channel (MAE, Sec. 3).

    ids: [B, P], places of the patches that are wanted -> [B, P, p·p·C]; default: all.
    normalize: per patch, minus its mean and over sqrt(unbiased variance + 1e-6) (MAE, Table 1d, "pixel (w/ norm)").
    """
    target = rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=patch_size, q=patch_size)
    if ids is not None:
        target = take_patches(target, ids)
    if normalize:
        variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()
    return target


def hog_target(images: Tensor, patch_size: int) -> Tensor:
    """Histograms of oriented gradients per patch, [B, L, C·9·4], ordered channel, bin, cell row, cell column.

    On the normalised image that the encoder sees, in float32: Sobel gradients with reflected borders; 9 unsigned
    orientations, hard assignment; magnitudes summed over cells of p/2 pixels (8 for p = 16, MaskFeat, Sec. 3.2);
    L2-normalised over the bins of each cell and channel.

    Raises ValueError if the patch size is odd, since a patch holds 2×2 cells.
    """
    if patch_size % 2:
        raise ValueError(f"hog_target: a patch holds 2×2 cells, so patch_size must be even; got {patch_size}")
    cell = patch_size // 2
    with torch.autocast(images.device.type, enabled=False):
        padded = F.pad(images.float(), (1, 1, 1, 1), mode="reflect")
        # Sobel by slices, not as a convolution, which a GPU would round to TF32.
        rows = padded[..., :-2, :] + 2 * padded[..., 1:-1, :] + padded[..., 2:, :]  # smoothed along y
        columns = padded[..., :-2] + 2 * padded[..., 1:-1] + padded[..., 2:]  # smoothed along x
        gx, gy = rows[..., :-2] - rows[..., 2:], columns[..., :-2, :] - columns[..., 2:, :]
        magnitude = torch.hypot(gx, gy)
        orientation = torch.floor(torch.atan2(gx, gy) / math.pi * HOG_BINS).remainder(HOG_BINS)
        # One bin at a time: a histogram of the cells needs no [B, C, 9, H, W] tensor.
        histogram = torch.stack(
            [F.avg_pool2d(magnitude * (orientation == b), cell) * cell**2 for b in range(HOG_BINS)], dim=2
        )  # [B, C, 9, H/cell, W/cell]
        histogram = F.normalize(histogram, p=2, dim=2, eps=1e-12)
    return rearrange(histogram, "b c o (h y) (w x) -> b (h w) (c o y x)", y=2, x=2)


def take_patches(target: Tensor, ids: Tensor) -> Tensor:
    """Patches of a target [B, L, D] at the places ids [B, P] -> [B, P, D]."""
    # Whole rows, looked up in all patches of the batch: on a CPU `gather` takes single values, and three times as long.
    first = torch.arange(len(target), device=ids.device).unsqueeze(1) * target.shape[1]
    return F.embedding(ids + first, target.flatten(0, 1))


def reconstruction_loss(prediction: Tensor, target: Tensor, predicted_ids: Tensor | None = None) -> Tensor:
    """Mean squared error over the values of a patch, then the mean over the predicted patches (MAE, Sec. 3), float32.

    prediction: [B, P, D]. target: [B, L, D] with predicted_ids [B, P], the places of the predicted patches in L; or,
    without them, [B, P, D] of those patches alone.
    """
    wanted = target if predicted_ids is None else take_patches(target, predicted_ids)
    return F.mse_loss(prediction.float(), wanted.float())
