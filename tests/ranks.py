"""Several ranks in one test, without the seconds that each of torchrun's processes takes to import torch."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch


def on_ranks(number: int, log: Path, task: Callable, *arguments) -> None:
    """Call task(*arguments) in as many processes, as torchrun would start them; all must end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mae_et.engine.pretrain"])
    log.mkdir(parents=True, exist_ok=True)
    logs = [log / f"rank{rank}.txt" for rank in range(number)]
    processes = [
        context.Process(target=_rank, args=(file, rank, number, port, task, arguments))
        for rank, file in enumerate(logs)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 180
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    for process in processes:
        process.kill()
    codes = [process.exitcode for process in processes]
    assert codes == [0] * number, "\n".join(f"── {file.name} ──\n{file.read_text()}" for file in logs)


def _rank(log: Path, rank: int, number: int, port: int, task: Callable, arguments: tuple) -> None:
    sys.stdout = sys.stderr = log.open("w")
    torch.set_num_threads(1)
    environment = {"RANK": rank, "WORLD_SIZE": number, "LOCAL_RANK": rank, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()}, MASTER_ADDR="127.0.0.1")
    task(*arguments)
