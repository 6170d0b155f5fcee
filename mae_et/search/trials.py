"""Trials: a schedule is trained, for a while, and evaluated on training images that were held out.

Every trial is made of ordinary runs, with run folders of their own, so a killed one goes on where it was saved.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from ..data.labelled import EvalCrops, eval_batches
from ..data.sources import open_source
from ..data.stream import mask_noise_of_batch
from ..data.workers import available_cores
from ..engine import run_folder, runtime, storage
from ..engine.pretrain import PretrainRun, pretrain, warm_up
from ..engine.step import take_step
from ..evaluate.config import FinetuneConfig
from ..evaluate.probe import probe
from ..plan.build import as_vanilla
from ..plan.config import PretrainConfig
from ..plan.curriculum import Stage
from ..plan.shapes import height_width

LOSS_BATCH = 128
"""Images at a time when the held-out loss is taken."""
TIMED_STEPS = 5


@dataclass(frozen=True)
class Trial:
    """What to train and how to evaluate it."""

    name: str
    config: PretrainConfig
    """The run that is evaluated."""
    base_run: PretrainConfig | None
    """A run that comes first, which `config` and later trials branch from."""
    judge: tuple[str, ...]
    """As --judge."""
    judge_images: int | None
    """Labelled training images that kNN and linear probe may use; None: all."""

    @property
    def runs(self) -> tuple[PretrainConfig, ...]:
        return (self.base_run, self.config) if self.base_run else (self.config,)


def run_trial(trial: Trial, device: str = "auto", threads: int = 0) -> dict[str, Any]:
    """Train and evaluate: {"name", "scores", "score", "flops", "seconds"}, of what this trial added to its branch.

    scores: as :func:`evaluate` returns them; score: their mean. What the runs print goes to log.txt in their folders.
    threads: of CPU work; 0: as they are.

    Raises what :func:`pretrain` raises.
    """
    if threads:
        torch.set_num_threads(threads)
    began = time.perf_counter()
    runs = [replace(config, device=device, resume="auto", overwrite=False) for config in trial.runs]
    training_flops = sum(_train(config) for config in runs)
    with _log_of(runs[-1]):
        scores, evaluation_flops = evaluate(runs[-1], trial.judge, trial.judge_images)
    return {
        "name": trial.name,
        "scores": scores,
        "score": statistics.fmean(scores.values()),
        "flops": training_flops + evaluation_flops,
        "seconds": time.perf_counter() - began,
    }


def _train(config: PretrainConfig) -> float:
    """Train a run to its end, if it has not got there before; FLOPs that it added to its branch."""
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with _log_of(config):
        if not (folder / run_folder.ENCODER).exists():
            pretrain(config)
    before = run_folder.read_ledger(Path(config.branch)).total.flops if config.branch else 0.0
    return run_folder.read_ledger(folder).total.flops - before


@contextlib.contextmanager
def _log_of(config: PretrainConfig) -> Iterator[None]:
    """Send what is printed to log.txt in the run folder."""
    with (Path(config.output_dir) / "log.txt").open("a") as log, contextlib.redirect_stdout(log):
        yield


def evaluate(config: PretrainConfig, judge: Sequence[str], judge_images: int | None) -> tuple[dict[str, float], float]:
    """Scores of a finished run by judge, more is always better, and what they cost in FLOPs.

    Per cent of the held-out images for kNN and linear probe, which share one extraction of features; -100 × the loss.
    """
    scores, flops = {}, 0.0
    probes = dict.fromkeys((name for name in judge if name != "loss"), True)
    if probes:
        evaluation = FinetuneConfig(
            finetune=config.output_dir,
            **probes,
            holdout=config.holdout,
            train_images=judge_images,
            num_workers=config.num_workers,
            device=config.device,
            precision=config.precision,
            damaged_limit=config.damaged_limit,
        )
        probe(evaluation)
        for protocol in evaluation.probes:
            result = json.loads((Path(config.output_dir) / f"eval-{protocol.protocol}.json").read_text())
            scores["knn" if protocol.knn else "linear_probe"] = result["top1"]
            flops += result["cost"]["flops"]
    if "loss" in judge:
        loss, loss_flops = held_out_loss(config)
        scores["loss"] = -100 * loss
        flops += loss_flops
    return scores, flops


def held_out_loss(config: PretrainConfig) -> tuple[float, float]:
    """Mean masked loss at full size, as vanilla MAE has it, on the held-out images, and its FLOPs.

    Images and masks are always the same ones. The weights are those of the run folder `config.output_dir`.
    """
    source = open_source(config.data_path, "val", config.holdout)
    state = storage.load(Path(config.output_dir) / run_folder.CHECKPOINT)
    how = config.in_chans, 1.0, state.get("value_range")
    crops = EvalCrops(source, height_width(config.input_size), *how, damaged_limit=config.damaged_limit)
    with runtime.start(config.device, config.precision, config.dist_url) as rt, torch.no_grad():
        run = PretrainRun.create(as_vanilla(config), rt, len(source))
        run.model.load_state_dict(state["model"])
        run.model.eval()
        stage, total, seen = run.curriculum.stages[0], 0.0, 0
        loading = rt.loading(config.num_workers, config.pin_mem)
        for i, (images, _) in enumerate(eval_batches(crops, 0, 1, loading, LOSS_BATCH)):
            noise = mask_noise_of_batch(0, i, len(images), stage.patches).to(rt.device)
            total += run.loss(run.prepare(images, stage), stage, noise).item() * len(images)
            seen += len(images)  # not those that can't be read
    return total / seen, held_out_loss_flops(seen, stage)


def held_out_loss_flops(num_images: int, stage: Stage) -> float:
    """FLOPs of the held-out loss: a forward pass is a third of a training step."""
    return num_images * stage.flops_per_image / 3


def seconds_of_vanilla(config: PretrainConfig, num_images: int) -> float:
    """Seconds that vanilla MAE's run takes on one device, estimated from a few steps on blank images."""
    with runtime.start(config.device, config.precision, config.dist_url) as rt:
        run = PretrainRun.create(as_vanilla(config), rt, num_images)
        stage = run.curriculum.stages[0]
        warm_up(run)
        blank = torch.zeros(stage.batch_size, config.in_chans, *stage.height_width, dtype=torch.uint8)
        batches = [blank[rows.start : rows.stop] for rows in run.micro_batches(stage)]
        seconds = []
        for _ in range(1 + TIMED_STEPS):  # the first one warms up
            began = time.perf_counter()
            take_step(run, iter(batches), stage, 0.0)
            rt.synchronize()
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:]) * run.curriculum.total_steps


class Workers(contextlib.AbstractContextManager):
    """Runs trials, `jobs` at a time, each on one of `devices` that is its own while it runs.

    With one job in this process; else in as many others, which end when this one does, whatever ends it.
    """

    def __init__(self, jobs: int, devices: tuple[str, ...]) -> None:
        self.jobs, self.idle_devices = jobs, SimpleQueue[str]()
        for _, device in zip(range(jobs), itertools.cycle(devices)):
            self.idle_devices.put(device)
        if jobs > 1:
            self.threads_per_job = max(1, available_cores() // jobs)
            spawn = multiprocessing.get_context("spawn")  # a fork would inherit CUDA's and OpenMP's state
            self.processes = ProcessPoolExecutor(jobs, spawn, _die_with_parent)
            self.dispatchers = ThreadPoolExecutor(jobs)

    def __exit__(self, *exception: object) -> None:
        if self.jobs > 1:
            for pool in (self.dispatchers, self.processes):  # after an error, what has not begun never does
                pool.shutdown(cancel_futures=True)

    def run(self, trials: Iterable[Trial]) -> Iterator[dict[str, Any]]:
        """The results of :func:`run_trial`, as they come."""
        if self.jobs == 1:
            yield from map(self._run, trials)
        else:
            for future in as_completed([self.dispatchers.submit(self._run, trial) for trial in trials]):
                yield future.result()

    def _run(self, trial: Trial) -> dict[str, Any]:
        device = self.idle_devices.get()
        try:
            if self.jobs == 1:
                return run_trial(trial, device)
            return self.processes.submit(run_trial, trial, device, self.threads_per_job).result()
        except BrokenProcessPool as error:
            raise ChildProcessError("a trial's process was killed, perhaps for want of memory; lower --jobs") from error
        finally:
            self.idle_devices.put(device)


def _die_with_parent() -> None:
    """A process of a killed search must not go on writing where the next search writes too."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
