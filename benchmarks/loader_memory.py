"""Does the loader keep its memory, and does a killed run leave anything behind?

    python benchmarks/loader_memory.py [--images 2000] [--epochs 3] [--workers 2]

Prints the memory of the loader's processes (proportional set size, from /proc) after every epoch over JPEGs in a
temporary folder, with the replay buffer on and freed memory kept, as in a run; then kills a training loop with SIGKILL
and counts what stays of its processes and of its segments in /dev/shm. Exit code 1 if memory grew by more than a tenth
after the first epoch, or if anything stayed. Linux only.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from loader import photographs

from mae_et.data import open_source
from mae_et.data.loader import CorruptLog, TrainImages, train_batches
from mae_et.data.stream import SampleStream
from mae_et.data.workers import Loading
from mae_et.engine import runtime
from mae_et.plan.curriculum import Curriculum, Stage

BATCH = 64


def batches(folder: str, epochs: int, workers: int) -> tuple[Iterator, int]:
    """Batches of a stage that replays, and how many of them are an epoch of decoded images."""
    source = open_source(folder)
    steps = len(source) * 2 // BATCH
    stage = Stage(96, 9, 27, BATCH, steps * epochs, 1.0, replay=2, replay_depth=8)
    plan = Curriculum((stage,), len(source))
    images = TrainImages(source, plan, 224, "scaled", 3, seed=0)
    return train_batches(images, SampleStream(plan, 0, BATCH), CorruptLog(len(source), 0.0), Loading(workers)), steps


def processes(parent: int) -> list[int]:
    """The parent and its children, itself first."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [parent, *map(int, children)]


def megabytes(pid: int) -> float:
    """Memory of a process, with its share of what it shares."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for doesn't."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def memory_over_epochs(folder: str, epochs: int, workers: int) -> bool:
    loader, steps = batches(folder, epochs, workers)
    totals = []
    for step, _ in enumerate(loader, start=1):
        if step % steps == 0:
            each = [megabytes(pid) for pid in processes(os.getpid())]
            totals.append(sum(each[1:]) or each[0])
            print(
                f"epoch {step // steps}: trainer {each[0]:.0f} MB, loader processes {[round(mb) for mb in each[1:]]} MB"
            )
    return totals[-1] <= 1.1 * totals[0]


def leftovers_after_kill(folder: str, workers: int) -> bool:
    before = set(os.listdir("/dev/shm"))
    command = [sys.executable, __file__, "--folder", folder, "--workers", str(workers), "--epochs", "1000"]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while len(processes(run.pid)) < 1 + workers:
        time.sleep(0.1)
    time.sleep(3)
    family = processes(run.pid)
    during = set(os.listdir("/dev/shm")) - before
    run.send_signal(signal.SIGKILL)
    run.wait()
    began = time.monotonic()
    while any(map(is_alive, family)) and time.monotonic() - began < 60:
        time.sleep(0.1)
    alive, left = [pid for pid in family if is_alive(pid)], set(os.listdir("/dev/shm")) - before
    print(
        f"killed a trainer with {len(family) - 1} loader processes: {len(alive)} of them left after "
        f"{time.monotonic() - began:.1f} s; segments in /dev/shm: {len(during)} while it ran, {len(left)} left"
    )
    return not alive and not left


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        memory_over_epochs(arguments.folder, arguments.epochs, arguments.workers)
        return
    with runtime.start("cpu"), tempfile.TemporaryDirectory() as folder:
        files = photographs()
        for i in range(arguments.images):
            (Path(folder) / f"{i:06}.jpg").write_bytes(files[i % len(files)])
        flat = memory_over_epochs(folder, arguments.epochs, arguments.workers)
        clean = leftovers_after_kill(folder, arguments.workers)
    raise SystemExit(0 if flat and clean else 1)


if __name__ == "__main__":
    main()
