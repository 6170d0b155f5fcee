"""CUDA graphs: the kernels of a micro-batch's forward and backward, recorded once and launched as one.

A micro-batch of ViT-B is some 1,300 kernels whatever its size, and where images are small or few the host takes longer
to launch them than a GPU to run them. A graph has fixed addresses: it reads its inputs where :class:`Inputs` puts them,
and adds to gradients that stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .runtime import Runtime

DDP_ROUNDS = 11
"""Micro-batches before DDP can be captured: in the first ten it times itself, for which the host waits (torch's docs,
"CUDA Graphs: usage with DistributedDataParallel")."""


def wants_graphs(setting: str, rt: Runtime, sharded: bool) -> bool:
    """Whether --cuda_graphs, one of auto, on and off, asks for graphs. ValueError for `on` where there can't be any."""
    possible = rt.device.type == "cuda" and not sharded
    if setting == "on" and not possible:
        what = "--fsdp gathers parameters anew for each block" if sharded else f"there are none on {rt.device.type}"
        raise ValueError(f"--cuda_graphs on: {what}; choose auto or off")
    return possible and setting != "off"


class Inputs:
    """Micro-batches on a CUDA device, uint8, always at the same address.

    Each is copied from pinned memory on a stream of its own, while the device works on the one before.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        """num_bytes: of the largest micro-batch."""
        self._arriving, self._current = (torch.empty(num_bytes, dtype=torch.uint8, device=device) for _ in range(2))
        self._copies, self._left = torch.cuda.Stream(device), torch.cuda.Event()
        self._left.record()  # the memory may be of tensors that are still in use

    def view(self, shape: torch.Size | tuple[int, ...]) -> Tensor:
        """Where :meth:`put` puts a micro-batch of this shape."""
        return self._current[: torch.Size(shape).numel()].view(shape)

    def put(self, batch: Tensor) -> Tensor:
        """The micro-batch on the device; valid until the next one is put. The host does not wait, if it is pinned."""
        arriving, current = self._arriving[: batch.numel()].view(batch.shape), self.view(batch.shape)
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(self._left)
            arriving.copy_(batch, non_blocking=True)
        compute = torch.cuda.current_stream()
        compute.wait_stream(self._copies)
        current.copy_(arriving)
        self._left.record(compute)
        return current


class Graph:
    """Forward and backward of a micro-batch as one launch."""

    def __init__(self, work: Callable[[], Tensor], noise: Tensor, pool: tuple[int, int]) -> None:
        """Record work() -> share of the loss, []. It must have run before: what is made once is in memory then.

        noise: [b, L], which it reads. pool: memory of graphs of which one runs at a time. RuntimeError if something in
        it can't be recorded.
        """
        self._noise, self._graph = noise, torch.cuda.CUDAGraph()
        # Errors of this thread's calls only: meanwhile the loader's thread may pin memory.
        how = {"pool": pool, "stream": torch.cuda.current_stream(), "capture_error_mode": "thread_local"}
        with torch.cuda.graph(self._graph, **how):
            self._loss = work()

    def replay(self, noise: Tensor) -> Tensor:
        """Run it on what :class:`Inputs` holds; the loss is valid until the next graph runs."""
        self._noise.copy_(noise)
        self._graph.replay()
        return self._loss
