"""Runs of a search: a schedule is trained, for a while, and judged on training images that were held out.

Every trial is made of ordinary runs, with run folders of their own, so a killed one goes on where it was saved.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from .. import checkpoint
from ..data.labelled import EvalCrops, eval_batches
from ..data.sources import open_source
from ..data.stream import mask_noise
from ..engine import run_folder, runtime
from ..engine.optim import adamw
from ..engine.pretrain import pretrain
from ..engine.runtime import Runtime
from ..engine.step import Run, take_step
from ..evaluate.config import FinetuneConfig
from ..evaluate.probe import probe
from ..model import MaskedAutoencoder
from ..plan.build import as_vanilla, build_curriculum
from ..plan.config import PretrainConfig
from ..plan.cost import Ledger
from ..plan.curriculum import Stage
from ..plan.report import model_kwargs
from ..plan.shapes import height_width

JUDGES = ("knn", "linear_probe", "loss")
LOSS_BATCH = 128
"""Images at a time when the held-out loss is taken."""
TIMED_STEPS = 5


@dataclass(frozen=True)
class Trial:
    """What to train and how to judge it."""

    name: str
    config: PretrainConfig
    """The run that is judged."""
    trunk: PretrainConfig | None = None
    """A run that comes first, which `config` and later trials branch from."""
    judges: tuple[str, ...] = ("knn",)
    judge_images: int | None = None
    """Labelled training images that kNN and linear probe may use; None: all."""

    @property
    def runs(self) -> tuple[PretrainConfig, ...]:
        return (self.trunk, self.config) if self.trunk else (self.config,)


def run_trial(trial: Trial, device: str = "auto", threads: int = 0) -> dict[str, Any]:
    """Train and judge: {"name", "scores", "score", "flops", "seconds"}, of what this trial added to its branch.

    scores: per cent of the held-out images for kNN and linear probe; -100 × the loss, so that more is always better.
    score: their mean. What the runs print goes to log.txt in their folders. threads: of CPU work; 0: as they are.
    Raises what :func:`pretrain` raises, and InterruptedError if it was told to stop.
    """
    if threads:
        torch.set_num_threads(threads)
    began, flops = time.perf_counter(), 0.0
    for config in trial.runs:
        folder = Path(config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        config = replace(config, device=device, resume="auto", overwrite=False)
        with (folder / "log.txt").open("a") as log, contextlib.redirect_stdout(log):
            if not (folder / run_folder.ENCODER).exists():
                pretrain(config)
            if not (folder / run_folder.ENCODER).exists():
                raise InterruptedError("stopped and saved; the same command goes on")
            before = _ledger(Path(config.branch)).total.flops if config.branch else 0.0
            flops += _ledger(folder).total.flops - before
    with (folder / "log.txt").open("a") as log, contextlib.redirect_stdout(log):
        scores, judging = judge(trial, config)
    return {
        "name": trial.name,
        "scores": scores,
        "score": sum(scores.values()) / len(scores),
        "flops": flops + judging,
        "seconds": time.perf_counter() - began,
    }


def judge(trial: Trial, config: PretrainConfig) -> tuple[dict[str, float], float]:
    """Scores by judge, and their FLOPs."""
    scores, flops = {}, 0.0
    for name in trial.judges:
        if name == "loss":
            scores[name], cost = held_out_loss(config)
            scores[name] *= -100
        else:
            evaluation = FinetuneConfig(
                finetune=config.output_dir,
                knn=name == "knn",
                linear_probe=name == "linear_probe",
                holdout=config.holdout,
                train_images=trial.judge_images,
                num_workers=config.num_workers,
                device=config.device,
                precision=config.precision,
            )
            probe(evaluation)
            result = json.loads((Path(config.output_dir) / f"eval-{evaluation.protocol}.json").read_text())
            scores[name], cost = result["top1"], result["cost"]["flops"]
        flops += cost
    return scores, flops


def held_out_loss(config: PretrainConfig) -> tuple[float, float]:
    """Mean masked loss at full size, as vanilla MAE has it, on the held-out images, and its FLOPs.

    Images and masks are always the same ones. The weights are those of the run folder `config.output_dir`.
    """
    source = open_source(config.data_path, "val", config.holdout)
    crops = EvalCrops(source, height_width(config.input_size), config.in_chans, 1.0)
    with runtime.start(config.device, config.precision, config.dist_url) as rt, torch.no_grad():
        run = new_run(as_vanilla(config), rt, len(source))
        run.model.load_state_dict(checkpoint.load(run.folder / run_folder.CHECKPOINT)["model"])
        run.model.eval()
        stage, total = run.curriculum.stages[0], 0.0
        for i, (images, _) in enumerate(eval_batches(_Unlabelled(crops), 0, 1, config.num_workers, False, LOSS_BATCH)):
            noise = mask_noise(0, i, len(images), run.patches(stage)).to(rt.device)
            total += run.loss(run.prepare(images, stage), stage, noise).item() * len(images)
    return total / len(source), loss_flops(len(source), stage)


def loss_flops(num_images: int, stage: Stage) -> float:
    """FLOPs of the held-out loss: a forward pass is a third of a training step."""
    return num_images * stage.flops_per_image / 3


class _Unlabelled(torch.utils.data.Dataset):
    """Centre crops with label 0: what batches of an unlabelled source need."""

    def __init__(self, crops: EvalCrops) -> None:
        self.crops = crops

    def __len__(self) -> int:
        return len(self.crops)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.crops[index][0], 0


def new_run(config: PretrainConfig, rt: Runtime, num_images: int) -> Run:
    """A run with random weights that has no folder yet."""
    plan = build_curriculum(config, num_images)
    model = MaskedAutoencoder(**model_kwargs(config)).to(rt.device)
    lr = config.blr * plan.stages[-1].batch_size / 256 if config.lr is None else config.lr
    return Run(config, rt, plan, model, model, adamw(model, config.weight_decay), lr, Ledger.of(plan), 0)


def seconds_of_vanilla(config: PretrainConfig, num_images: int) -> float:
    """Seconds that vanilla MAE's run takes on one device, told from a few steps on blank images."""
    with runtime.start(config.device, config.precision, config.dist_url) as rt:
        run = new_run(as_vanilla(config), rt, num_images)
        stage = run.curriculum.stages[0]
        blank = torch.zeros(stage.batch_size, config.in_chans, *stage.height_width, dtype=torch.uint8)
        pieces = [blank[piece.start : piece.stop] for piece in run.micro_batches(stage)]
        seconds = []
        for _ in range(1 + TIMED_STEPS):  # the first one warms up
            began = time.perf_counter()
            take_step(run, iter(pieces), stage, 0.0)
            rt.synchronize()
            seconds.append(time.perf_counter() - began)
    return sorted(seconds[1:])[TIMED_STEPS // 2] * run.curriculum.total_steps


class Workers(contextlib.AbstractContextManager):
    """Runs trials, `jobs` at a time, each on one of `devices` that is its own while it runs.

    With one job in this process; else in as many others, which end when this one does, whatever ends it.
    """

    def __init__(self, jobs: int, devices: tuple[str, ...]) -> None:
        self.jobs, self.free = jobs, SimpleQueue[str]()
        for _, device in zip(range(jobs), itertools.cycle(devices)):
            self.free.put(device)
        self.threads = max(1, (os.cpu_count() or 1) // jobs)
        if jobs > 1:
            spawn = multiprocessing.get_context("spawn")  # a fork would inherit CUDA's and OpenMP's state
            self.processes, self.waiting = ProcessPoolExecutor(jobs, spawn, _die_with_parent), ThreadPoolExecutor(jobs)

    def __exit__(self, *exception: object) -> None:
        if self.jobs > 1:
            for pool in (self.waiting, self.processes):  # after an error, what has not begun never does
                pool.shutdown(cancel_futures=True)

    def run(self, trials: Iterable[Trial]) -> Iterator[dict[str, Any]]:
        """The results of :func:`run_trial`, as they come."""
        if self.jobs == 1:
            yield from map(self._run, trials)
        else:
            for future in as_completed([self.waiting.submit(self._run, trial) for trial in trials]):
                yield future.result()

    def _run(self, trial: Trial) -> dict[str, Any]:
        device = self.free.get()
        try:
            if self.jobs == 1:
                return run_trial(trial, device)
            return self.processes.submit(run_trial, trial, device, self.threads).result()
        except BrokenProcessPool as error:
            raise ChildProcessError("a trial's process was killed, perhaps for want of memory; lower --jobs") from error
        finally:
            self.free.put(device)


def delete_weights(folder: Path) -> None:
    """Delete a run's weights and keep what it says."""
    for path in (*folder.glob("checkpoint*.pt"), *folder.glob("*.safetensors"), *folder.glob("*.png")):
        path.unlink()


def _ledger(folder: Path) -> Ledger:
    return Ledger.from_state_dict(json.loads((folder / run_folder.LEDGER).read_text()))


def _die_with_parent() -> None:
    """A process of a killed search must not go on writing where the next search writes too."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
