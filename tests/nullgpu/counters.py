"""Read the null GPU's counters, in a process that runs on it."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

import torch

from . import KINDS

_library = ctypes.CDLL("libnullgpu.so")
_library.null_counted.restype = ctypes.c_long
# There is no null cuDNN.
torch.backends.cuda.enable_cudnn_sdp(False)
torch.backends.cudnn.enabled = False


def _now() -> dict[str, int]:
    return {kind: _library.null_counted(number) for number, kind in enumerate(KINDS)}


@contextlib.contextmanager
def counting() -> Iterator[dict[str, int]]:
    """What the block asks of the device: KINDS, and peak and reserved bytes of the allocator. Filled at its end."""
    torch.cuda.reset_peak_memory_stats()
    before, found = _now(), {}
    yield found
    found.update({kind: after - before[kind] for kind, after in _now().items()})
    found["peak"] = torch.cuda.max_memory_allocated()
    found["reserved"] = torch.cuda.max_memory_reserved()


@contextlib.contextmanager
def real_reads() -> Iterator[None]:
    """Reads of device memory give what copies and NCCL left there, as checks of ranks need, instead of zeros."""
    _library.null_read_zeros(0)
    yield
    _library.null_read_zeros(1)


@contextlib.contextmanager
def no_sync() -> Iterator[None]:
    """RuntimeError at the line that waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
