"""Meters of a run: energy and peak memory, as devices tell them, and seconds without data."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Joules used since the last reading, as the devices tell.

    A CUDA device has a counter (read through nvidia-ml-py, where that is installed): this rank's, times the number of
    devices, since asking the others would make them wait. CPU packages have RAPL (Linux's powercap interface, which
    often only root may read): those of this machine. Other devices don't tell.
    """

    def __init__(self, device: torch.device, devices: int = 1) -> None:
        self._devices, self._gpu, self._packages = devices, None, []
        if device.type == "cuda":
            self._gpu = _gpu_millijoules(device)
        elif device.type == "cpu":
            found = sorted(POWERCAP.glob("intel-rapl:[0-9]*"))
            self._packages = [package for package in found if package.name.count(":") == 1]  # not parts of packages
        self._last = self._read()

    def since(self) -> float:
        """Joules since this was last called; 0 where nothing tells."""
        before, self._last = self._last, self._read()
        if before is None or self._last is None:
            return 0.0
        # RAPL's counters run over.
        return sum(max(0.0, now - then) for now, then in zip(self._last, before, strict=True))

    def _read(self) -> list[float] | None:
        if self._gpu:
            return [self._devices * self._gpu() / 1e3]  # millijoules
        try:
            return [int((package / "energy_uj").read_text()) / 1e6 for package in self._packages] or None
        except OSError:
            return None


def _gpu_millijoules(device: torch.device) -> Callable[[], int] | None:
    """Reads a CUDA device's energy counter; None where nvidia-ml-py isn't installed, or the device (or a MIG part of
    one) doesn't tell."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return None
    return functools.partial(pynvml.nvmlDeviceGetTotalEnergyConsumption, handle)


def reset_peak_memory(device: torch.device) -> None:
    """Give back what the device's allocator keeps for later, and start its high-water mark anew."""
    if device.type == "mps":
        torch.mps.empty_cache()  # torch.accelerator doesn't know MPS's allocator before torch 2.13
    elif device.type != "cpu":
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int:
    """High-water mark of memory: allocated on a device since :func:`reset_peak_memory`, else resident in this process.

    MPS has no such mark; there it is what its allocator holds, most of which it keeps.
    """
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0  # no high-water mark in the standard library
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # kilobytes on Linux


class IdleTime:
    """Seconds for which the device had nothing to do because a batch had not come.

    On a CPU the host's wait is that. A GPU may be busy while the host waits, so there it is the time between two events
    in the GPU's queue, which is known only later: reading it waits for the GPU, measuring doesn't.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._seconds = device, 0.0
        self._events: list[tuple[torch.Event, torch.Event]] = []

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what waits for a batch, with nothing of that batch's work queued yet."""
        if self._device.type != "cpu":
            idle, busy = (torch.Event(self._device, enable_timing=True) for _ in range(2))
            idle.record()  # comes to pass when all earlier work is done
            yield
            busy.record()
            self._events.append((idle, busy))
        else:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began

    def read(self) -> float:
        """Seconds since the last reading."""
        if self._events:
            self._events[-1][1].synchronize()
        seconds = self._seconds + sum(idle.elapsed_time(busy) for idle, busy in self._events) / 1e3  # milliseconds
        self._seconds, self._events = 0.0, []
        return seconds
