"""Launches, host time and memory of a step, by stage, on the null GPU: python tests/nullgpu tests/nullgpu/count.py.

Arguments: flags of main_pretrain; RANKS=N in the environment counts for rank 0 of N. Peaks are of a step whose
optimiser has its state. Host time is CPU time of this machine; a GPU's driver takes more for each launch.
"""

from __future__ import annotations

import os
import sys
import time

from nullgpu.counters import counting
from nullgpu.steps import started, steady, step

print("size  images  launches  collectives  graphs  host ms  peak GiB  reserved GiB")
with started(" ".join(sys.argv[1:]), int(os.environ.get("RANKS", 1))) as run:
    for stage, cost in zip(run.curriculum.stages, run.ledger.stages, strict=True):
        batches = steady(run, stage)
        began = time.process_time()
        with counting() as found:
            for _ in range(3):
                step(run, stage, batches)
        milliseconds = (time.process_time() - began) / 3 * 1e3
        launches = sum(found[kind] for kind in ("launches", "gemms", "memsets")) / 3
        # What a graph needs shows only while it is captured, before the first step.
        peak, reserved = max(found["peak"], cost.peak_memory_bytes) / 2**30, found["reserved"] / 2**30
        print(
            f"{stage.size_px}  {len(batches)} × {len(batches[0])}  {launches:.0f}  {found['collectives'] / 3:.0f}  "
            f"{found['graphs'] / 3:.0f}  {milliseconds:.1f}  {peak:.2f}  {reserved:.2f}"
        )
sys.stdout.flush()
os._exit(0)
