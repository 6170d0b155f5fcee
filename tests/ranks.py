"""Processes of tests, without the seconds that each takes to import torch: several ranks, or one to be killed."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

CLONE_NEWNET = 0x40000000
"""Linux's name of a network namespace, for setns."""


def on_ranks(number: int, log: Path, task: Callable, *arguments) -> None:
    """Call task(*arguments) in as many processes, as torchrun would start them; all must end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = _server()
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


def in_a_process(log: Path, task: Callable, *arguments) -> None:
    """Call task(*arguments) in a process that has loaded torch and the package, but done nothing; it must end well."""
    process = Child(task, log, *arguments)
    output, _ = process.communicate(180)
    process.kill()
    assert process.poll() == 0, output


def _server() -> multiprocessing.context.BaseContext:
    """A process that has imported everything, and forks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mae_et.engine.pretrain"])
    return context


class Child:
    """task(*arguments) in a process of its own, one thread, with the part of `subprocess.Popen` that tests use.

    environment: variables of the process. network: name of the network namespace that it lives in. session: whether it
    leads a session and process group of its own.
    """

    def __init__(
        self,
        task: Callable,
        log: Path,
        *arguments,
        environment: dict[str, str] | None = None,
        network: str = "",
        session: bool = False,
    ) -> None:
        self._log = log
        how = log, environment or {}, network, session, task, arguments
        self._process = _server().Process(target=_alone, args=how)
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        self._process.join(timeout)
        return self._log.read_text(), None


def running(session: int) -> list[int]:
    """Processes of a session that are not only waiting to be buried."""
    processes = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            state, _, _, its_session = path.read_text().rpartition(")")[2].split()[:4]
            processes += [int(path.parent.name)] if int(its_session) == session and state != "Z" else []
    return processes


def _alone(
    log: Path, environment: dict[str, str], network: str, session: bool, task: Callable, arguments: tuple
) -> None:
    if session:
        os.setsid()
    _as_started_anew(log)
    os.environ.update(environment)
    if network:
        with open(f"/var/run/netns/{network}") as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"can't enter the network {network}")
    task(*arguments)


def _rank(log: Path, rank: int, number: int, port: int, task: Callable, arguments: tuple) -> None:
    _as_started_anew(log)
    environment = {"RANK": rank, "WORLD_SIZE": number, "LOCAL_RANK": rank, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()}, MASTER_ADDR="127.0.0.1")
    task(*arguments)


def _as_started_anew(log: Path) -> None:
    sys.stdout = sys.stderr = log.open("a")
    torch.set_num_threads(1)
    # The server's children would start processes from servers of their own, which import everything anew.
    multiprocessing.set_start_method("fork", force=True)
