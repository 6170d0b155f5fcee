"""Device, precision and ranks, decided once; the loops have no branch for them. Variables call a Runtime `rt`.

MAE_ET_WRAP=1 in the environment makes one process a group of one rank, whose model is wrapped as those of several are:
so one GPU can run what DDP and FSDP2 do.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import re
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from timm.layers import set_fused_attn
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from ..data.workers import Loading, default_workers
from . import device as devices

log = logging.getLogger(__name__)

#: How other launchers say that there are several processes; without torchrun's RANK each would think it is alone.
OTHER_LAUNCHERS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE")
#: What gloo, NCCL and the store say when a rank is gone; (no dedicated exception type).
LOST_RANK = re.compile(
    r"gloo|NCCL|Connection (was likely )?(closed|reset|refused)|Broken pipe|time(d )?out", re.IGNORECASE
)
#: How long ranks wait for each other before the first step; the time-outs of gloo and NCCL are meant for steps.
SETUP_TIMEOUT = timedelta(days=1)


@dataclass(frozen=True)
class Runtime:
    """Where a run runs. Every rank has its own; rank 0 alone writes files."""

    device: torch.device
    precision: str
    """bf16 or fp32."""
    rank: int = 0
    world_size: int = 1
    store: dist.Store | None = None
    """What ranks meet at, where there are several."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        """Whether the model is wrapped: there are several ranks, or one that stands for them (MAE_ET_WRAP)."""
        return self.world_size > 1 or self.store is not None

    @property
    def pins(self) -> bool:
        """Whether copies from page-locked memory to the device are faster."""
        return devices.pins(self.device)

    def loading(self, num_workers: int | None, pin_memory: bool) -> Loading:
        """How this rank loads: with so many workers, by default what suits the device, and pinned where that helps."""
        on_gpu = self.device.type != "cpu"
        workers = default_workers(on_gpu) if num_workers is None else num_workers
        return Loading(workers, on_gpu, pin_memory and self.pins)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Context in which matrix products run in the chosen precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def parallel(self, model: nn.Module, static: bool = False, comm_hook: str = "none") -> nn.Module:
        """The model, averaging gradients over ranks where there are several.

        static: every step has one micro-batch, which uses all parameters, so that DDP need not look at each graph. With
        several, torch loses gradients or hangs (issue 187732). comm_hook: bf16 sends gradients in half the bytes.
        """
        if not self.is_distributed:
            return model
        own = None if self.device.type == "cpu" else [self.device]
        network = DistributedDataParallel(model, device_ids=own, gradient_as_bucket_view=True, static_graph=static)
        if comm_hook == "bf16":
            network.register_comm_hook(None, bf16_compress_hook)
        return network

    def shard(self, model: nn.Module, units: Sequence[list[nn.Module]], keep: bool = False) -> None:
        """Share the model's parameters out over ranks, in place; a unit is gathered while it runs (FSDP2).

        units: modules that are gathered together, all in the order of their use; the next unit is on its way while one
        runs. keep: a unit stays gathered from forward to backward. What belongs to no unit is gathered in float32; a
        unit in the chosen precision, which of its parameters rounds those of layer norms alone, since autocast casts
        the others all the same. Gradients are summed in float32. What is not trained stays whole.
        """
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        policy = MixedPrecisionPolicy()
        if self.precision == "bf16":
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        for unit in units:
            fully_shard(unit, mesh=mesh, reshard_after_forward=not keep, mp_policy=policy)
        for (first, *_), (second, *_) in itertools.pairwise(units):
            first.set_modules_to_forward_prefetch([second])
            second.set_modules_to_backward_prefetch([first])
        fully_shard(model, mesh=mesh, ignored_params={p for p in model.parameters() if not p.requires_grad})
        # A linear layer's output may be a view; it is a danger only to those who change predictions in place.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")

    @contextlib.contextmanager
    def local_gradients(self, network: nn.Module) -> Iterator[None]:
        """Backward does not reduce gradients: for all micro-batches of a step but the last.

        What a sharded model has gathered stays for the next micro-batch, beside its gradients, which are whole too.
        """
        if isinstance(network, FSDPModule):
            network.set_requires_gradient_sync(False)
            network.set_reshard_after_backward(False)
            yield
            network.set_requires_gradient_sync(True)
            network.set_reshard_after_backward(True)
        else:
            with network.no_sync() if isinstance(network, DistributedDataParallel) else contextlib.nullcontext():
                yield

    def to_device(self, tensor: Tensor) -> Tensor:
        """Copy without waiting for it."""
        if self.pins:
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    @functools.cached_property
    def writing_group(self) -> dist.ProcessGroup:
        """All ranks over gloo, for a thread that writes while another computes; at first all ask for it together."""
        _sleep_before_forks()
        return dist.new_group(backend="gloo")

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place; no host synchronisation."""
        if self.is_distributed:
            dist.all_reduce(tensor)
        return tensor

    def any(self, holds: bool) -> bool:
        """Whether it holds on any rank; all ranks ask together, and wait for each other."""
        if not self.is_distributed:
            return holds
        return self.sum(torch.tensor(float(holds), device=self.device)).item() > 0

    def synchronize(self) -> None:
        """Wait for the device, so that a clock read next is honest."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def from_main(self, value: Any) -> Any:
        """What rank 0 has."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, device=self.device)
        return values[0]

    def check_equal_on_ranks(self, **numbers: int | None) -> None:
        """ValueError unless all ranks that know a number have the same: a difference would hang or spoil the run."""
        if self.world_size == 1:
            return
        largest = torch.iinfo(torch.int64).max
        low = torch.tensor([largest if n is None else n for n in numbers.values()], device=self.device)
        high = torch.tensor([-largest if n is None else n for n in numbers.values()], device=self.device)
        dist.all_reduce(low, dist.ReduceOp.MIN)
        dist.all_reduce(high, dist.ReduceOp.MAX)
        for name, a, b in zip(numbers, low.tolist(), high.tolist(), strict=True):
            if a < b:  # not so where no rank knows it
                raise ValueError(
                    f"ranks differ in {name}: {a} to {b}; do all see the same --data_path and --output_dir?"
                )

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 enters before the others, who find what it has downloaded, or fail as it did."""
        if not self.is_main:
            self.store.wait(["main_first"], SETUP_TIMEOUT)
        try:
            yield
        finally:
            if self.is_main and self.store:
                self.store.set("main_first", "done")

    def wait_for_ranks(self, place: str) -> None:
        """Wait for all ranks to get to a place where some take much longer than others; collectives would give up."""
        if self.store:
            self.store.set(f"{place}/{self.rank}", "here")
            self.store.wait([f"{place}/{rank}" for rank in range(self.world_size)], SETUP_TIMEOUT)

    def barrier(self) -> None:
        if self.is_distributed:
            dist.barrier()

    def facts(self) -> dict[str, Any]:
        """What environment.json says of it."""
        return {"device": self.describe(), "precision": self.precision, "devices": self.world_size}

    def describe(self) -> str:
        ranks = f", {self.world_size} ranks" if self.world_size > 1 else ""
        return f"{self.device.type} ({devices.name_of(self.device)}{ranks}), {self.precision}"


class Normalize:
    """uint8 [B, C, H, W] -> normalised float32 on the device. mean, std: [C] each, in [0, 1]."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], rt: Runtime) -> None:
        self.rt = rt
        self.mean, self.std = (255 * torch.tensor(v).view(-1, 1, 1).to(rt.device) for v in (mean, std))

    def __call__(self, images: Tensor) -> Tensor:
        return (images.to(self.rt.device, non_blocking=True).float() - self.mean) / self.std


def check_launcher(world_size: int) -> None:
    """ValueError for a --world_size without the processes that it speaks of."""
    if world_size > 1 and "WORLD_SIZE" not in os.environ:
        raise ValueError(f"--world_size {world_size}: start with torchrun --nproc_per_node={world_size}")


@contextlib.contextmanager
def start(device: str = "auto", precision: str = "auto", dist_url: str = "env://", deterministic: bool = False):
    """Decide device, precision and ranks (from torchrun's environment); yields a :class:`Runtime`, tidies up after it.

    Raises ValueError for a device that is not there.
    """
    if "RANK" not in os.environ and any(int(os.environ.get(name, 1)) > 1 for name in OTHER_LAUNCHERS):
        raise ValueError(f"several processes without torchrun's RANK ({', '.join(OTHER_LAUNCHERS)} > 1): use torchrun")
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    chosen = devices.choose(device, int(os.environ.get("LOCAL_RANK", 0)), world_size)
    with devices.deterministic(deterministic):
        devices.prepare(chosen)
        if precision == "auto":
            precision = "bf16" if devices.has_fast_bf16(chosen) else "fp32"
        elif precision == "bf16" and rank == 0 and not devices.has_fast_bf16(chosen):
            kind = chosen.type
            log.warning("%s has no fast bf16 that torch knows of; --precision fp32 may be many times as fast", kind)
        # On CPU the backward of fused attention in bf16 takes more than half of a step; plain products are faster.
        set_fused_attn(not (chosen.type == "cpu" and precision == "bf16"))
        joins = world_size > 1 or os.environ.get("MAE_ET_WRAP") == "1"
        store = _join(chosen, dist_url, rank, world_size) if joins else None
        try:
            with devices.stream(chosen):
                yield Runtime(chosen, precision, rank, world_size, store)
        except RuntimeError as error:
            if world_size == 1 or not LOST_RANK.search(str(error)):
                raise
            raise ConnectionError(
                f"rank {rank} of {world_size}: another rank has died or can't be reached; the last checkpoint is "
                "intact, start again with --resume auto"
            ) from error
    if joins:  # not after an error: tearing down would wait for ranks that wait for this one
        dist.destroy_process_group()


def _join(device: torch.device, dist_url: str, rank: int, world_size: int) -> dist.Store:
    """Meet the other ranks, in a part of torchrun's store of its own for each restart; returns that part.

    torchrun keeps its store when it restarts ranks; where those before were, the new ones would find dead addresses.
    """
    on_cpu = device.type == "cpu"
    if on_cpu:
        _sleep_before_forks()
    if world_size > 1:
        store, rank, world_size = next(rendezvous(dist_url, rank, world_size))
        store = dist.PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    else:
        store = dist.HashStore()
    dist.init_process_group(
        dist.get_default_backend_for_device(device),
        store=store,
        rank=rank,
        world_size=world_size,
        device_id=None if on_cpu else device,  # else a barrier takes the GPU of the rank's number, whoever has it
    )
    return store


@functools.cache
def _sleep_before_forks() -> None:
    """gloo's threads take a lock of the interpreter for a moment when they let go of a tensor. A process forked just
    then, as loader processes are, would wait for it for ever (CPython issue 112275, up to 3.11); while this one sleeps,
    they get done.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=lambda: time.sleep(0.02))


@dataclass
class Stop:
    """Whether a signal has asked this process to stop, and which."""

    by: signal.Signals | None = None

    @property
    def requested(self) -> bool:
        return self.by is not None

    def end(self) -> NoReturn:
        """End as the signal would have: what follows in a script is not meant to run on half a training.

        Ctrl-C raises KeyboardInterrupt, SIGTERM SystemExit(143), on ranks that got no signal themselves, too.
        """
        if self.by == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + signal.SIGTERM)


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """SIGTERM and SIGINT ask for a stop after the current step; a second Ctrl-C stops at once.

    Launchers often send SIGTERM twice, to the group and to each process, so only Ctrl-C counts.
    """
    stop = Stop()

    def request(number: int, _: Any) -> None:
        if stop.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.by = signal.Signals(number)
        log.warning("%s: stopping after this step", stop.by.name)

    before = {number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
