"""How a process loads: worker processes, what they may have in flight, and a thread beside the one that trains."""

from __future__ import annotations

import functools
import logging
import multiprocessing.util
import os
import shutil
import signal
import sys
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

log = logging.getLogger(__name__)

MOST_BY_DEFAULT = 10
"""Workers of a process that trains on the CPU; facebookresearch/mae's number."""
BYTES_IN_FLIGHT = 2**30
"""Of a rank's decoded images between its workers and itself."""
CHUNK_IMAGES = 128
"""That a worker hands over at a time beside a GPU: enough that the work for a chunk is little for each image."""
MOST_CHUNKS = 4
"""In flight, of a worker: small stages eat several times more images a second, and a queue rides out jitter."""
SHARED_MEMORY = Path("/dev/shm")
"""Where torch lays what workers hand over, on Linux."""
START_METHOD = "fork" if sys.platform == "linux" else None
"""Of workers; None: the system's. Only forked ones share a source's arrays; Python 3.14 no longer forks by itself."""

T = TypeVar("T")


class Loading(NamedTuple):
    """How a process loads its batches. It changes none of them."""

    num_workers: int = 0
    on_gpu: bool = False
    """A thread puts micro-batches together from the chunks of several workers, so that none is waited for and the
    thread that launches steps finds them made. A CPU that trains has no core to spare for copying them.
    """
    pin_memory: bool = False


def default_workers(on_gpu: bool = False) -> int:
    """This process's share of the cores that a container leaves it: beside a GPU all but the one that trains."""
    return max(1, _cores() - 1 if on_gpu else min(MOST_BY_DEFAULT, _cores()))


def spare_cores(num_workers: int) -> int:
    """Cores of this process's share that its workers leave, not counting the one that trains."""
    return _cores() - 1 - num_workers


def available_cores() -> int:
    """Cores that this process may use, where a container or taskset leaves it fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cores() -> int:
    return available_cores() // _local_ranks()


def _local_ranks() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def in_flight(num_workers: int, image_bytes: int, most_images: int) -> tuple[int, int]:
    """Most images of a chunk, and chunks of each worker in flight: at most a GiB, and half of what /dev/shm has free.

    But each worker makes an image at a time at least. image_bytes: of the largest one. most_images: of a chunk.
    ValueError if there isn't room for that.
    """
    free = shutil.disk_usage(SHARED_MEMORY).free // _local_ranks() if SHARED_MEMORY.is_dir() else 2 * BYTES_IN_FLIGHT
    remedy = "give the container more, as Docker does with --shm-size=2g or --ipc=host"
    has = f"{SHARED_MEMORY} has {free / 2**20:.0f} MiB free for the loader of a rank"
    if free < num_workers * image_bytes:
        raise ValueError(f"--num_workers {num_workers}: {has}, less than an image of each worker: {remedy}")
    share = min(BYTES_IN_FLIGHT, free // 2) // (num_workers * image_bytes)  # images of a worker
    images = min(most_images, max(1, share // 2))
    if images < most_images and free // 2 < BYTES_IN_FLIGHT:
        log.warning("%s: workers hand over %d images at a time, which is slower; %s", has, images, remedy)
    return images, min(MOST_CHUNKS, max(1, share // images))


def ahead(batches: Generator[T, None, None], loading: Loading, depth: int = 2) -> Iterator[T]:
    """The same batches. Beside a GPU a thread makes each while those before it are used; errors come up in their place.

    Without workers it would decode, too, and keep the interpreter from the thread that launches.
    """
    if not (loading.on_gpu and loading.num_workers):
        yield from batches
        return
    thread = ThreadPoolExecutor(1, "loader")
    made = deque(thread.submit(next, batches, None) for _ in range(depth))
    try:
        while (batch := made.popleft().result()) is not None:
            made.append(thread.submit(next, batches, None))
            yield batch
    finally:
        thread.shutdown(cancel_futures=True)
        batches.close()


def worker_options(num_workers: int | None) -> dict[str, Any]:
    """Options of a DataLoader whose workers decode: how many, by default `default_workers`, and how they start."""
    _end_workers_at_exit(os.getpid())
    workers = default_workers() if num_workers is None else num_workers
    start = {"multiprocessing_context": START_METHOD} if workers else {}
    return {"num_workers": workers, "worker_init_fn": _start_worker, **start}


@functools.cache
def _end_workers_at_exit(_process: int) -> None:
    """Kill the workers before multiprocessing's exit handler: they ignore SIGTERM, so it would wait for ever.

    Registered once for each process: a forked one loses its parent's handlers.
    """

    def kill() -> None:
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises an error for a killed worker
        for process in multiprocessing.active_children():
            if process.daemon:
                process.kill()

    # Unlike atexit's handlers, it also runs in child processes. Pools and queues, which may hold locks, end before it.
    multiprocessing.util.Finalize(None, kill, exitpriority=1)


def _start_worker(worker: int) -> None:
    """In the worker: die with the trainer, leave signals to it, and keep to one core.

    Ctrl-C, `timeout` and Slurm signal the whole process group; the trainer saves and ends its workers itself.
    """
    # If the trainer died before this worker started, torch's parent watchdog watches the wrong process: exit now.
    # (A fork server is the parent of its children.)
    trainer, method = multiprocessing.parent_process().pid, START_METHOD or multiprocessing.get_start_method()
    if method != "forkserver" and os.getppid() != trainer:
        raise SystemExit
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
