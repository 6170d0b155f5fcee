"""Run a script on the null GPU: python tests/nullgpu SCRIPT ARGUMENTS."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from nullgpu import environment, missing

if reason := missing():
    sys.exit(f"no null GPU: {reason}")
CODE = """
import runpy, sys
import nullgpu.counters  # switches off what the null GPU lacks
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
os.execve(sys.executable, [sys.executable, "-c", CODE, *sys.argv[1:]], environment())
