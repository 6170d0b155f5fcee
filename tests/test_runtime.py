"""What a process sets before it trains."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_fsdp import on_ranks

from mae_et import runtime

ROOT = Path(__file__).resolve().parents[1]

FAULTS = """
import resource, sys
import mae_et, torch
from mae_et import runtime

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


def python(code: str, **environment: str) -> str:
    kept = {key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    environment = kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_memory_that_a_step_frees_is_used_again():
    before, inside = map(int, python(FAULTS, THP_MEM_ALLOC_ENABLE="0").split())
    assert before >= 4 * 32768, "4 KiB pages of four tensors"
    assert inside < 100


@pytest.mark.parametrize(
    ("given", "spins"), [({}, "5000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")]
)
def test_idle_threads_spin_for_a_moment_unless_the_user_says_otherwise(given, spins):
    assert python("import os, mae_et; print(os.environ.get('GOMP_SPINCOUNT'))", **given).strip() == spins


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
