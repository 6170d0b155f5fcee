"""The low-frequency crop: the low end of an image's spectrum, as a smaller image.

Shapes: images [..., H, W] -> [..., h, w]. The crop is linear and separable, so it is two small matrix products with
cached operators: no FFT, differentiable, and the same on every device.

`fourier`, the papers' operator, takes an image as periodic: the jump between opposite borders of a photograph rings
along them. `dct` mirrors the borders instead, so there is no jump.

Sources: EfficientTrain, arXiv 2211.09703, Sec. 4.1; EfficientTrain++, arXiv 2405.08768, Sec. 4.1 and 6 (`lanczos`).
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .plan.curriculum import Stage
from .plan.shapes import SPECTRAL, SizePx, choice, height_width


def low_frequency_crop(images: Tensor, size: SizePx, operator: str = "fourier") -> Tensor:
    """Keep the lowest frequencies of each axis, as an image of that size; the mean is kept.

    images: [..., H, W], floating point (normalise first). size: s, or (h, w), in pixels; at most (H, W).
    operator: `fourier` keeps the frequencies -floor(s/2) … ceil(s/2)-1: the real part of
    ifft2(crop(fft2(images))) · (h·w)/(H·W), with sample j at source pixel j·H/h. `dct` keeps the s lowest of the
    orthonormal DCT-II: sqrt(h·w/(H·W)) · idct2(crop(dct2(images))), with sample j at (j + ½)·H/h − ½.
    Returns [..., h, w] in the dtype of `images`; half precision is computed in float32.

    Raises ValueError if the operator is unknown, the size is larger than the image or not positive, or the images are
    not floating point.
    """
    choice("operator", operator, SPECTRAL)
    h, w = height_width(size)
    H, W = images.shape[-2:]
    if not (0 < h <= H and 0 < w <= W):
        raise ValueError(f"low_frequency_crop: size {h}×{w} must be positive and at most the image's {H}×{W}")
    if not images.is_floating_point():
        raise ValueError(f"low_frequency_crop: images must be floating point, got {images.dtype}; normalise them first")
    if (h, w) == (H, W):
        return images
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    rows, columns = (_operator(operator, *axis, dtype, images.device) for axis in ((H, h), (W, w)))
    with torch.autocast(images.device.type, enabled=False):
        small = images.to(dtype)
        # For even sizes the Fourier operators carry one extra row, the unpaired Nyquist term (see _fourier).
        if w < W:
            small = small @ columns.mT  # [..., H, w(+1)]
        if h < H:
            small = rows @ small  # [..., h(+1), w(+1)]
        if len(rows) > h and len(columns) > w:
            corner = small[..., h:, w:]  # [..., 1, 1]
            small = small[..., :h, :w] - corner * (_alternating(h, small).unsqueeze(-1) * _alternating(w, small))
    return small[..., :h, :w].to(images.dtype)


def low_pass(images: Tensor, cutoff: SizePx) -> Tensor:
    """Keep the frequencies that the cosine crop to `cutoff` keeps, at the images' own size: a blur.

    images: [..., H, W], floating point. Returns [..., H, W]. ValueError as from :func:`low_frequency_crop`.
    """
    (h, w), (H, W) = height_width(cutoff), images.shape[-2:]
    small = low_frequency_crop(images, cutoff, "dct")
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    with torch.autocast(images.device.type, enabled=False):
        large = small.to(dtype)
        # A crop's rows are orthogonal with squared length s/N, so N/s times its transpose undoes it.
        if h < H:
            large = _operator("dct", H, h, dtype, images.device).mT @ large * (H / h)
        if w < W:
            large = large @ _operator("dct", W, w, dtype, images.device) * (W / w)
    return large.to(images.dtype)


def low_frequency_input(images: Tensor, stage: Stage, operator: str = "fourier") -> Tensor:
    """What a stage trains on: images [..., H, W] -> [..., h, w] at its size, without frequencies above its cut-off."""
    small = low_frequency_crop(images, stage.size_px, operator)
    return low_pass(small, stage.cutoff_px) if stage.cutoff_px else small


@functools.lru_cache(maxsize=128)
def _operator(name: str, full: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What one axis is multiplied with, [s, N] or with the Nyquist row [s + 1, N], built in float64."""
    with torch.inference_mode(False):  # one made under it couldn't be differentiated through, ever after
        return {"fourier": _fourier, "dct": _dct}[name](full, size).to(device=device, dtype=dtype)


def _fourier(full: int, size: int) -> Tensor:
    """Re A_s[j, n] = 1/N · Re Σ_k exp(2πi·k·(j/s − n/N)), k = -floor(s/2) … ceil(s/2)-1.

    The crop is Re A_h · x · Re A_wᵀ − Im A_h · x · Im A_wᵀ. Im A is zero for odd s; for even s only the unpaired
    frequency k = −s/2 is left in it: Im A[j, n] = (−1)^j · sin(π·s·n/N)/N, of rank 1. Its n-part is appended as row s,
    so the same two products compute it, and the j-part is applied afterwards. At s = N the operator is the identity.
    """
    k = 2 * math.pi * torch.arange(-(size // 2), (size + 1) // 2, dtype=torch.float64)
    n = torch.arange(full, dtype=torch.float64) / full
    j = torch.arange(size, dtype=torch.float64) / size
    kj, kn = j[:, None] * k, k[:, None] * n  # [s, s], [s, N]
    operator = (kj.cos() @ kn.cos() + kj.sin() @ kn.sin()) / full  # Σ_k cos(k·(j/s − n/N)), [s, N]
    if size % 2 == 0 and size < full:
        operator = torch.cat([operator, (torch.sin(math.pi * size * n) / full)[None]])
    return operator


def _dct(full: int, size: int) -> Tensor:
    """sqrt(s/N) · D_sᵀ · D_N[:s], with D the orthonormal DCT-II: the Fourier crop of the mirrored axis."""
    k = math.pi * torch.arange(size, dtype=torch.float64)
    j = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    n = (torch.arange(full, dtype=torch.float64) + 0.5) / full
    weight = torch.full((size, 1), 2 / full, dtype=torch.float64)  # sqrt(s/N) · sqrt(2/s) · sqrt(2/N)
    weight[0] = 1 / full
    return (j[:, None] * k).cos() @ (weight * (k[:, None] * n).cos())


def _alternating(size: int, like: Tensor) -> Tensor:
    """(−1)^j, [size]."""
    return 1 - 2 * (torch.arange(size, device=like.device) % 2).to(like.dtype)
