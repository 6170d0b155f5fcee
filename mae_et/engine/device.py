"""The device of a run: which one, and how fast and exact its arithmetic is. Any accelerator that torch knows can be it.

What torch.accelerator tells of all is asked there. Written for CUDA and CPUs; others do without what is CUDA's own.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ..data.workers import available_cores

log = logging.getLogger(__name__)

CPU_INFO = Path("/proc/cpuinfo")
#: glibc's names in malloc.h: how many blocks may be mapped, and how many free bytes the heap may keep.
M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1


def choose(name: str, local_rank: int = 0, world_size: int = 1) -> torch.device:
    """The device of --device; where there are several ranks, each has its own.

    auto is CUDA's where there is one, else the CPU. Raises ValueError, with the choices, for a device that is not here.
    """
    here = torch.accelerator.current_accelerator(check_available=True)
    kind = here.type if here else "cpu"
    if name == "auto":
        if kind not in ("cpu", "cuda"):
            log.info("there is an accelerator that this package was not tried on: --device %s would use it", kind)
        name = "cuda" if kind == "cuda" else "cpu"
    legal = ", ".join(["auto", *([] if kind == "cpu" else [kind, f"{kind}:N"]), "cpu"])
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown --device {name!r}; choose from {legal}") from None
    if device.type == "cpu":
        return device
    if device.type != kind:
        raise ValueError(f"--device {name}: torch finds no such device here; choose from {legal}")
    if kind == "mps" and world_size > 1:
        raise ValueError("--device mps: torch has one such device and no ranks on it; start one process, or use cpu")
    if device.index is None or world_size > 1:
        device = torch.device(kind, local_rank)
    if device.index >= torch.accelerator.device_count():
        raise ValueError(f"--device {name}: this machine has {torch.accelerator.device_count()} {kind} devices")
    return device


def prepare(device: torch.device) -> None:
    """Set what holds for the whole process, before anything is computed on the device."""
    if device.type == "cpu":
        _keep_freed_memory()
        return
    torch.accelerator.set_device_index(device)  # first of all: what torch tells of the GPU is of the current one
    if device.type == "cuda":
        _exact_float32()
    else:
        log.warning("%s: no --fsdp, no energy, and not tried by the authors; cpu and cuda are", device.type)


def _exact_float32() -> None:
    """Keep TF32 off, whatever TORCH_ALLOW_TF32_CUBLAS_OVERRIDE or another library says: the spectral crop is exact.

    torch has two sets of names for it and refuses to read the older one where they disagree, as compiling does. Written
    in this order they agree, whatever was there.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for part in (torch.backends, torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn):
        part.fp32_precision = "ieee"


def stream(device: torch.device) -> contextlib.AbstractContextManager:
    """Where a run's work is queued: on CUDA a stream of its own, since the default one can't be captured as a graph.
    DDP and its gradients stay on the stream that they begin on.
    """
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """Allow only kernels that give the same bits each time, if `on`; attention is flash, or in float32 plain products.

    torch raises RuntimeError for an operation that has no such kernel.
    """
    if not on:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    kernels = torch.backends.cuda.mem_efficient_sdp_enabled(), torch.backends.cuda.cudnn_sdp_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a help for debugging, at a launch a tensor
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]
        torch.backends.cuda.enable_mem_efficient_sdp(kernels[0])
        torch.backends.cuda.enable_cudnn_sdp(kernels[1])


def has_fast_bf16(device: torch.device) -> bool:
    """Whether torch knows that the device multiplies bf16 in hardware."""
    if device.type == "cpu":
        capabilities: Callable[[], dict] = getattr(torch.cpu, "get_capabilities", dict)  # new in torch 2.10
        known = capabilities()
        return bool(known.get("amx_bf16") or known.get("avx512_bf16"))
    supported = getattr(torch.get_device_module(device), "is_bf16_supported", None)
    return supported is not None and supported(including_emulation=False)


def pins(device: torch.device) -> bool:
    """Whether copies from page-locked memory to the device are faster."""
    return device.type not in ("cpu", "mps")


def name_of(device: torch.device) -> str:
    """What the device calls itself; of a CPU, how many cores this process may use, and its model where known."""
    if device.type == "cpu":
        cores = available_cores()
        return ", ".join(filter(None, [f"{cores} core{'s' * (cores != 1)}", cpu_model()]))
    get_name = getattr(torch.get_device_module(device), "get_device_name", None)
    return get_name(device) if get_name else device.type


def cpu_model() -> str:
    """As Linux tells it, else what the platform calls its processor; empty if neither does."""
    with contextlib.suppress(OSError):
        for line in CPU_INFO.read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    return platform.processor()


def _keep_freed_memory() -> None:
    """Let glibc reuse what a step has freed, instead of giving it back to the system and faulting it in again.

    A step frees and allocates the same few gigabytes of activations; fresh pages cost more than the arithmetic on them.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never
