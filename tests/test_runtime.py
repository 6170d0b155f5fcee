"""What a process sets before it trains."""

from __future__ import annotations

import importlib
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import on_ranks

import mae_et
from mae_et.engine import meters, runtime

ROOT = Path(__file__).resolve().parents[1]

FAULTS = """
import resource, sys
import mae_et, torch
from mae_et.engine import runtime

def faults() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(32 * 2**20)  # 128 MiB, which glibc would map and unmap each time
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults())
with runtime.start("cpu"):
    faults()  # the first one has to come from the system
    print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_memory_that_a_step_frees_is_used_again():
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "THP_MEM_ALLOC_ENABLE": "0"}
    printed = subprocess.run(
        [sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, check=True
    )
    before, inside = map(int, printed.stdout.split())
    assert before >= 4 * 32768, "4 KiB pages of four tensors"
    assert inside < 100


@pytest.mark.parametrize(
    ("given", "spins"), [({}, "5000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_idle_threads_spin_for_a_moment_unless_the_user_says_otherwise(given, spins, monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    importlib.reload(mae_et)
    assert os.environ.get("GOMP_SPINCOUNT") == spins


def test_ranks_sleep_before_they_fork(tmp_path: Path) -> None:
    """So that no thread of gloo holds a lock of the interpreter, which the new process would wait for."""
    on_ranks(2, tmp_path / "log", _fork)


def _fork() -> None:
    with runtime.start("cpu"):
        slept: list[float] = []
        time.sleep = slept.append  # this process is the test's own
        if (process := os.fork()) == 0:
            os._exit(0)
        os.waitpid(process, 0)
        assert slept == [0.02]


def test_what_the_first_rank_fails_at_ends_all(tmp_path: Path) -> None:
    """They don't wait in the store, where Python's signal handlers aren't heard, for what will not come."""
    on_ranks(2, tmp_path / "log", _fail)


def _fail() -> None:
    with runtime.start("cpu") as rt, pytest.raises(FileNotFoundError), rt.main_first():
        raise FileNotFoundError("--data_path TYPO does not exist")


def test_ranks_agree_on_what_they_know(tmp_path: Path) -> None:
    on_ranks(2, tmp_path / "log", _agree)


def _agree() -> None:
    with runtime.start("cpu") as rt:
        assert rt.from_main([rt.rank]) == [0]
        rt.check_equal_on_ranks(one=1, mine=None if rt.is_main else 2**60 - 1, nobodys=None)
        with pytest.raises(ValueError, match="ranks differ in two: 0 to 1"):
            rt.check_equal_on_ranks(one=1, two=rt.rank)


class Queue:
    """A GPU's queue on a clock of its own: work takes time, events are passed in order."""

    def __init__(self) -> None:
        self.host = self.device = 0.0

    def work(self, seconds: float) -> None:
        self.device = max(self.device, self.host) + seconds

    def event(self, enable_timing: bool) -> Queue.Event:
        assert enable_timing
        return Queue.Event(self)

    class Event:
        def __init__(self, queue: Queue) -> None:
            self.queue, self.at = queue, math.nan

        def record(self) -> None:
            self.at = self.queue.device = max(self.queue.device, self.queue.host)

        def synchronize(self) -> None:
            self.queue.host = max(self.queue.host, self.at)

        def elapsed_time(self, end: Queue.Event) -> float:
            return 1e3 * (end.at - self.at)


def test_a_gpu_waits_for_data_only_where_it_has_no_work_left(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue()
    monkeypatch.setattr(torch.cuda, "Event", queue.event)
    idle = meters.IdleTime(torch.device("cuda"))

    def steps(number: int, load: float, compute: float) -> float:
        for _ in range(number):
            with idle.waiting():
                queue.host += load
            queue.work(compute)
        return idle.read()

    steps(1, 0, 3)
    assert steps(10, load=2, compute=3) == pytest.approx(0), "the host waits for 20 s, the GPU never"
    idle.read()
    assert steps(10, load=3, compute=2) == pytest.approx(10, abs=2), "each batch comes a second late"
    assert idle.read() == 0


def test_a_cpu_waits_as_long_as_its_host() -> None:
    idle = meters.IdleTime(torch.device("cpu"))
    with idle.waiting():
        time.sleep(0.05)
    assert 0.05 <= idle.read() < 5
    assert idle.read() == 0


@pytest.mark.parametrize(
    ("precision", "fast", "warns"), [("bf16", False, True), ("bf16", True, False), ("auto", False, False)]
)
def test_slow_bf16_is_said(monkeypatch, caplog, precision: str, fast: bool, warns: bool) -> None:
    monkeypatch.setattr(runtime, "_fast_bf16", lambda device: fast)
    with runtime.start("cpu", precision) as rt:
        assert rt.precision == ("bf16" if precision == "bf16" else "fp32")
    assert ("--precision fp32" in caplog.text) == warns


@pytest.mark.parametrize(
    "message",
    [
        "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
        "wait timeout after 86400000ms, keys: /restart_0/main_first",
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:9999",
    ],
)
def test_a_lost_rank_is_told_from_what_torch_says(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_join", lambda *where: None)
    monkeypatch.setattr(runtime.dist, "destroy_process_group", lambda: None)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConnectionError, match="another rank has died"), runtime.start("cpu"):
        raise RuntimeError(message)
