"""CUDA code without a GPU: the cases of nullgpu/cases.py, in one process that sees the null GPU (see nullgpu)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nullgpu
import pytest

#: torch.cuda does not survive the interpreter's own end, so the process ends without it.
RUN = "import os, sys, pytest; rc = pytest.main(sys.argv[1:]); sys.stdout.flush(); os._exit(rc)"


def test_cases_on_the_null_gpu(tmp_path: Path):
    if reason := nullgpu.missing():
        pytest.skip(f"no null GPU: {reason}")
    cases = [str(Path(nullgpu.__file__).parent / "cases.py"), "-p", "no:cacheprovider", "--basetemp", str(tmp_path)]
    command = [sys.executable, "-c", RUN, *cases]
    env = nullgpu.environment(PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    run = subprocess.run(command, capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
