"""Processes of tests, without the seconds that each takes to import torch: several ranks, or one to be killed."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

CLONE_NEWNET = 0x40000000
"""Linux's name of a network namespace, for setns."""


_KEPT: dict[tuple[int, int], tuple[multiprocessing.Process, Connection]] = {}
"""(Number of ranks, rank) -> that rank of earlier tests, which has paid for what torch builds when it is first used."""


def on_ranks(number: int, log: Path, task: Callable, *arguments) -> None:
    """Call task(*arguments) in as many processes, as torchrun would start them; all must end well.

    A process that ended well is the same rank of later tests, so a task puts back the functions that it replaces.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log.mkdir(parents=True, exist_ok=True)
    logs = [log / f"rank{rank}.txt" for rank in range(number)]
    ranks = [_KEPT.pop((number, rank), None) or _new_rank() for rank in range(number)]
    for rank, (_, pipe) in enumerate(ranks):
        environment = {"RANK": rank, "WORLD_SIZE": number, "LOCAL_RANK": rank, "MASTER_PORT": port}
        environment = {name: str(value) for name, value in environment.items()} | {"MASTER_ADDR": "127.0.0.1"}
        pipe.send((logs[rank], environment, task, arguments))
    deadline = time.monotonic() + 180
    ended = [_end_of(pipe, deadline) for _, pipe in ranks]
    for rank, (process, pipe) in enumerate(ranks):
        if ended[rank] == "as it was":
            _KEPT[number, rank] = process, pipe
        else:
            process.kill()
    assert all(ended), "\n".join(f"── {file.name} ──\n{file.read_text()}" for file in logs)


def _new_rank() -> tuple[multiprocessing.Process, Connection]:
    if not _KEPT:
        atexit.register(_end_ranks)  # before multiprocessing waits for them
    ours, theirs = multiprocessing.Pipe()
    process = _server().Process(target=_rank, args=(theirs,))
    process.start()
    theirs.close()
    return process, ours


def _end_ranks() -> None:
    while _KEPT:
        _KEPT.popitem()[1][0].kill()


def _end_of(pipe: Connection, deadline: float) -> str:
    """How a rank's task ended: well, and then "as it was" or "used up"; "" if it failed, died or took too long."""
    try:
        return pipe.recv() if pipe.poll(max(0, deadline - time.monotonic())) else ""
    except EOFError:
        return ""


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


def _rank(pipe: Connection) -> None:
    """Do what comes through the pipe until a task fails or leaves its group of ranks behind."""
    multiprocessing.set_start_method("fork", force=True)
    end = "as it was"
    while end == "as it was":
        try:
            log, environment, task, arguments = pipe.recv()
        except EOFError:  # the tests are over
            return
        _as_started_anew(log)
        with mock.patch.dict(os.environ, environment):
            try:
                task(*arguments)
                end = "used up" if dist.is_initialized() else "as it was"
            except BaseException:
                traceback.print_exc()
                end = ""
        sys.stdout.close()
        sys.stdout = sys.stderr = sys.__stderr__
        pipe.send(end)


def _as_started_anew(log: Path) -> None:
    sys.stdout = sys.stderr = log.open("a")
    torch.set_num_threads(1)
    # The server's children would start processes from servers of their own, which import everything anew.
    multiprocessing.set_start_method("fork", force=True)
