"""The low-frequency crop: the centre of an image's Fourier spectrum, as a smaller image.

Shapes: images [..., H, W] -> [..., h, w]. The crop is linear and separable, so it is two small matrix products with
cached operators: no FFT, differentiable, and the same on every device.

Sources: EfficientTrain, arXiv 2211.09703, Sec. 4.1; EfficientTrain++, arXiv 2405.08768, Sec. 4.1 and 6 (`lanczos`).
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .plan.shapes import SizePx, height_width


def low_frequency_crop(images: Tensor, size: SizePx) -> Tensor:
    """Keep the frequencies -floor(s/2) … ceil(s/2)-1 of each axis, as an image of that size; the mean is kept.

    images: [..., H, W], floating point (normalise first). size: s, or (h, w), in pixels; at most (H, W).
    Returns [..., h, w] in the dtype of `images`; half precision is computed in float32. Equals the real part of
    ifft2(crop(fft2(images))) · (h·w)/(H·W). Sample j of the result sits at source pixel j·H/h.

    Raises ValueError if the size is larger than the image or not positive, or the images are not floating point.
    """
    h, w = height_width(size)
    H, W = images.shape[-2:]
    if not (0 < h <= H and 0 < w <= W):
        raise ValueError(f"low_frequency_crop: size {h}×{w} must be positive and at most the image's {H}×{W}")
    if not images.is_floating_point():
        raise ValueError(f"low_frequency_crop: images must be floating point, got {images.dtype}; normalise them first")
    if (h, w) == (H, W):
        return images
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    rows, columns = _operator(H, h, dtype, images.device), _operator(W, w, dtype, images.device)
    with torch.autocast(images.device.type, enabled=False):
        small = images.to(dtype)
        # For even sizes the operators carry one extra row, the unpaired Nyquist term (see _operator).
        if w < W:
            small = small @ columns.mT  # [..., H, w(+1)]
        if h < H:
            small = rows @ small  # [..., h(+1), w(+1)]
        if len(rows) > h and len(columns) > w:
            corner = small[..., h:, w:]  # [..., 1, 1]
            small = small[..., :h, :w] - corner * (_alternating(h, small).unsqueeze(-1) * _alternating(w, small))
    return small[..., :h, :w].to(images.dtype)


@functools.lru_cache(maxsize=128)
def _operator(full: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Re A_s, [s, N], of METHOD: A_s[j, n] = 1/N · Σ_k exp(2πi·k·(j/s − n/N)), built in float64.

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
    return operator.to(device=device, dtype=dtype)


def _alternating(size: int, like: Tensor) -> Tensor:
    """(−1)^j, [size]."""
    return 1 - 2 * (torch.arange(size, device=like.device) % 2).to(like.dtype)
