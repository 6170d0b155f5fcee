"""A run on synthetic images, taken one real step at a time: what the benchmarks of speed have in common."""

from __future__ import annotations

import ctypes
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from mae_et.data.sources import Source
from mae_et.engine import attention
from mae_et.engine.pretrain import PretrainRun, open_loader
from mae_et.engine.runtime import Runtime
from mae_et.engine.step import take_step
from mae_et.plan.config import PretrainConfig
from mae_et.plan.curriculum import Curriculum, Stage
from mae_et.plan.shapes import height_width

LEARNING_RATE = 1e-5


def synthetic_run(config: PretrainConfig, rt: Runtime, num_images: int) -> PretrainRun:
    """Everything `train` works on but data and a folder: real stages, model, optimiser."""
    return PretrainRun.create(config, rt, num_images)


def loader_output(run: PretrainRun, stage: Stage) -> list[Tensor]:
    """Micro-batches of one step as the loader delivers them: uint8, at full size if the device does the crop."""
    micro_batches = run.micro_batches(stage)
    generator = torch.Generator().manual_seed(0)
    shape = (max(map(len, micro_batches)), run.config.in_chans, *height_width(stage.loader_px))
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    images = images.pin_memory() if run.rt.device.type == "cuda" else images
    return [images[: len(rows)] for rows in micro_batches]


def stage_loader(run: PretrainRun, stage: Stage, source: Source) -> Iterator[Tensor]:
    """The loader of a run that has this stage alone, in this process: workers would work ahead while others step."""
    if run.config.num_workers != 0:
        raise ValueError("timing the loader needs --num_workers 0")
    curriculum = Curriculum((replace(stage, steps=10**6),), len(source))
    alone = SimpleNamespace(config=run.config, rt=run.rt, curriculum=curriculum, step=0, value_range=run.value_range)
    return open_loader(alone, source)


@dataclass
class Stopwatch:
    """Times one kind of step: forward, backward and update, from uint8 images to new weights."""

    run: PretrainRun
    stage: Stage
    batches: Callable[[], Iterable[Tensor]]
    """Micro-batches of the next step; getting them is timed, too."""
    seconds: list[float] = field(default_factory=list)
    data_seconds: list[float] = field(default_factory=list)
    """The part of them that was waiting for batches."""

    @classmethod
    def of(cls, run: PretrainRun, stage: Stage, source: Source | None = None) -> Stopwatch:
        """source: images that a loader of the stage's own reads within the step; default: one batch of noise."""
        if stage not in run.attention:  # vanilla MAE's is none of the run's
            images = max(map(len, run.micro_batches(stage)))
            run.attention[stage] = attention.choose(run.config.attention, run.model.shape, stage, images, run.rt)
        if source is None:
            noise = loader_output(run, stage)
            watch = cls(run, stage, lambda: noise)
        else:
            loader, count = stage_loader(run, stage, source), len(run.micro_batches(stage))
            watch = cls(run, stage, lambda: itertools.islice(loader, count))
        watch.step()  # warms its shapes
        watch.seconds.clear()
        watch.data_seconds.clear()
        return watch

    def step(self) -> None:
        self.run.rt.synchronize()
        self.run.idle.read()
        began = time.perf_counter()
        take_step(self.run, iter(self.batches()), self.stage, LEARNING_RATE)
        self.run.rt.synchronize()
        self.seconds.append(time.perf_counter() - began)
        self.data_seconds.append(self.run.idle.read())


@dataclass(frozen=True)
class Spread:
    """Of a few measurements: the median, and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.4g} ({self.low:.4g} to {self.high:.4g})"


def reset_peak_memory(device: torch.device) -> int:
    """Start the high-water mark anew; returns bytes in use now. 0 where the system can't."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if not Path("/proc/self/clear_refs").exists():
        return 0
    ctypes.CDLL(None).malloc_trim(0)  # or the step would find its memory where the last one left it
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_memory(device: torch.device) -> int:
    """High-water mark since :func:`reset_peak_memory`, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM") if Path("/proc/self/status").exists() else 0


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])
