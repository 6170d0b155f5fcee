"""Fine-tuning, or training from scratch: one visible loop, `train`. Source: MAE, arXiv 2111.06377, Table 9.

B batch · C channels · K classes.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import files
from ..console import logging_to_console
from ..data.labelled import TrainCrops, labelled_batches, open_labelled
from ..data.loader import CorruptLog
from ..data.sources import Source, is_jpeg_source
from ..data.stream import SampleStream
from ..data.workers import spare_cores
from ..engine import run_folder, runtime
from ..engine.logger import RunLogger, data_wait_hints, warn_of_launchers, warn_of_rates
from ..engine.meters import peak_memory_bytes
from ..engine.optim import learning_rate
from ..engine.runtime import Stop, stop_signals
from ..engine.sinks import check_sinks
from ..engine.step import Cadence, Outcomes, evaluation_time, take_step
from ..engine.storage import load
from ..plan.flags import to_yaml
from ..plan.shapes import show_size
from .accuracy import (
    check_result_folders,
    evaluate,
    evaluate_only,
    is_written,
    make_folders,
    result_paths,
    write_result,
)
from .augmentation import augmentation
from .config import LAYER_DECAY, FinetuneConfig
from .encoder import load_encoder
from .run import FinetuneRun

log = logging.getLogger(__name__)

LOOK_STEPS = 20
"""On a GPU, steps after which the host waits for it: to hear of a signal on another rank, or of a loss that is NaN."""


def finetune(config: FinetuneConfig) -> Path:
    """Fine-tune, or only evaluate with --eval; returns the path of the result, without one the run folder.

    Raises ValueError, OSError or CheckpointError, with one line, for whatever the user can mend. After SIGTERM or
    SIGINT it saves and raises SystemExit or KeyboardInterrupt.
    """
    check_sinks(config)
    runtime.check_launcher(config.world_size)
    with (
        runtime.start(config.device, config.precision, config.dist_url) as rt,
        logging_to_console(rt.is_main),
        contextlib.ExitStack() as signals,
    ):
        if config.eval:
            return evaluate_only(config, rt, time.perf_counter())
        stop = signals.enter_context(stop_signals())
        encoder = load_encoder(config)
        with encoder.explained(config):
            source = open_labelled(encoder.data_path, "train", config.train_images, config.seed, config.holdout)
        run = FinetuneRun.create(config, rt, encoder.with_value_range(source, rt), source)
        resume = run_folder.resume_path(config.resume, run.folder)
        read_from = run.restore(resume) if resume else None
        if rt.from_main(rt.is_main and resume and finished_before(run, resume)):
            log.info("finished before: %s", run.folder)
            return run.folder if run.held_out is None else result_paths(config, encoder)[0]
        goes_on = run_folder.goes_on(run.folder, resume, config.resume)
        if not (config.overwrite or goes_on):
            run_folder.check_free(run.folder)
        if not (config.overwrite or (resume and goes_on)):
            check_result_folders(config, run.encoder)
        if run.held_out is not None and rt.is_main:
            run.held_out.look()
        # The first batch before anything on disk is replaced.
        loader = open_loader(run, source)
        batches = itertools.chain(list(itertools.islice(loader, 1)), loader)
        rt.barrier()  # before rank 0 moves what another one may still read
        if rt.is_main:
            open_folder(run, resume, read_from)
            log_plan(run)
        first_step = run.step - bool(run.unreported)
        logger = RunLogger(run.folder, config, run.curriculum, first_step, run.ledger, on=rt.is_main)
        with files.disk_full_errors(run.folder), contextlib.closing(loader), logger:
            result = train(run, batches, logger, stop)
        path = finish(run, source, result)
    if not run.finished:
        stop.end()
    return path


def finished_before(run: FinetuneRun, resume: Path) -> bool:
    """Whether nothing is left to do in the run folder: trained to the end, and judged as it would be now."""
    if not run.finished or run.unreported or not run_folder.goes_on(run.folder, resume, run.config.resume):
        return False
    return run.held_out is None or is_written(run.config, run.encoder)


def open_folder(run: FinetuneRun, resume: Path | None, read_from: Path | None) -> None:
    """Make or take over the run folder, and write what is known before a step is run."""
    goes_on = run_folder.goes_on(run.folder, resume, run.config.resume)
    run_folder.prepare(run.folder, keep=goes_on, overwrite=run.config.overwrite)
    make_folders(run.config, run.encoder)
    if resume and goes_on and read_from != resume:
        files.promote(read_from, resume)  # otherwise the next save would keep the corrupt file and drop this one
    if resume and not goes_on and (metrics := resume.parent / run_folder.METRICS).is_file():
        files.write_json_lines(run.folder / run_folder.METRICS, files.read_json_lines(metrics))
        if (best := resume.parent / run_folder.BEST).is_file() and load(best)["step"] <= run.step:
            shutil.copyfile(best, run.folder / run_folder.BEST)
    if run.finished and goes_on:
        return  # only an evaluation is left: what the folder says of how the weights were made stays
    files.write_text(run.folder / run_folder.CONFIG, to_yaml(run.config))
    files.write_json(run.folder / run_folder.ENVIRONMENT, run_folder.environment(**run.rt.facts()))


def open_loader(run: FinetuneRun, source: Source) -> Iterator[tuple[Tensor, Tensor]]:
    config, encoder, rt, size = run.config, run.encoder, run.rt, run.curriculum.stages[0].height_width
    policy = augmentation(config, len(encoder.mean))
    return labelled_batches(
        TrainCrops(source, size, encoder.mean, encoder.std, policy, config.seed, encoder.record.value_range),
        SampleStream(run.curriculum, config.seed, run.micro_size, run.step, rt.rank, rt.world_size),
        CorruptLog(len(source), config.damaged_limit),
        rt.loading(config.num_workers, config.pin_mem),
    )


def log_plan(run: FinetuneRun) -> None:
    """Log what is going to run."""
    config, encoder, stage = run.config, run.encoder, run.curriculum.stages[0]
    log.info("%s on %s", encoder.origin, run.rt.describe())
    encoder.log_record()
    log.info(
        "%d × %d blocks, %s px, patch %d · %s images, %d classes in %s",
        *(encoder.shape.embed_dim, encoder.shape.depth, show_size(encoder.input_size), encoder.shape.patch_size),
        *(f"{run.curriculum.num_images:,}", len(run.classes), encoder.data_path),
    )
    log.info(
        "total batch %d · %g epochs, %d steps · peak lr %.2e · layer decay %g · %s",
        *(stage.batch_size, config.epochs, stage.steps, config.peak_lr(stage.batch_size)),
        *(config.layer_decay or LAYER_DECAY, "mean of the patches" if config.pooled else "class token"),
    )
    warn_of_launchers(config)
    warn_of_rates(*(config.min_lr, config.peak_lr(stage.batch_size), config.warmup_epochs, config.epochs, stage.steps))
    if run.step:
        log.info("going on after step %d of %d", run.step, stage.steps)


def train(
    run: FinetuneRun, batches: Iterator[tuple[Tensor, Tensor]], logger: RunLogger, stop: Stop
) -> dict[str, Any] | None:
    """The loop, from `run.step` to the end; returns its result, or None if asked to stop before.

    A step is a function of (seed, step).
    """
    config, curriculum, stage = run.config, run.curriculum, run.curriculum.stages[0]
    peak, warmup = config.peak_lr(stage.batch_size), config.warmup_epochs / config.epochs
    cadence, outcomes = Cadence.of(run, LOOK_STEPS), Outcomes()
    result = None
    if run.unreported:  # killed while it evaluated
        result = evaluate_run(run)
        report(run, logger, *run.unreported, result)
        run.save()
    elif run.finished:
        result = evaluate_run(run)
    run.network.train()
    while not run.finished:
        began = time.perf_counter()
        lr = learning_rate(curriculum.position(run.step), peak=peak, floor=config.min_lr, warmup=warmup)
        outcomes.add(take_step(run, batches, stage, lr, stop.requested))
        if run.ema:
            run.ema.update(run.model)
        run.step += 1
        evaluation = run.evaluation_is_due
        due = cadence.after(run.step, save=evaluation, stopping=stop.requested)
        stopping, data_seconds = False, 0.0
        if due.look:
            stopping = outcomes.look(run.step) and due.stop
            data_seconds = run.idle.read()  # of all steps since it was last asked
        seconds = time.perf_counter() - began
        run.ledger.add(0, stage, train_seconds=seconds - data_seconds, data_seconds=data_seconds)
        if evaluation:
            latest = (*outcomes.report(), lr)
            run.save(unreported=latest)  # the evaluation may fail
            result = evaluate_run(run)
            report(run, logger, *latest, result)
            run.network.train()
        if due.save:
            run.save()
            cadence.saved()
        if stopping and not run.finished:
            return None
    return result


def evaluate_run(run: FinetuneRun) -> dict[str, Any] | None:
    """Accuracy on the held-out images, of averaged weights too; None without such images. Saves the best weights."""
    if run.held_out is None:
        return None
    config, classes = run.config, run.classes
    with evaluation_time(run, 0):
        accuracy = evaluate(run.model, run.held_out, run.normalize, config, len(classes))
        result = accuracy.result()
        if run.ema:
            averaged = evaluate(run.ema.module, run.held_out, run.normalize, config, len(classes))
            result |= {f"ema_{name}": value for name, value in averaged.result().items() if name != "num_images"}
        if config.report:
            result |= accuracy.details(classes)
    cost = run.ledger.stages[0]
    cost.eval_flops += run.encoder.flops_per_image * result["num_images"] * (2 if run.ema else 1)
    cost.peak_memory_bytes = peak_memory_bytes(run.rt.device)
    if result["top1"] > run.best:
        run.best = result["top1"]
        run.save_best()
    return result


def report(
    run: FinetuneRun, logger: RunLogger, loss: float, norm: float, lr: float, result: dict[str, Any] | None
) -> None:
    """One record of metrics.jsonl and its line: mean loss since the last one, and accuracies if there are any."""
    curriculum, total = run.curriculum, run.ledger.total
    epoch = curriculum.images_before(run.step) / curriculum.num_images
    accuracies = {name: value for name, value in (result or {}).items() if "top" in name}
    rates = logger.rates(total)
    record = {"step": run.step - 1, "epoch": epoch, "loss": loss, "grad_norm": norm, "lr": lr, **accuracies, **rates}
    line = (
        f"epoch {epoch:.1f} of {run.config.epochs:g} · step {run.step}/{curriculum.total_steps} · loss {loss:.4f}"
        f"{''.join(f' · {name} {value:.2f}' for name, value in accuracies.items())} · "
        f"{rates['images_per_second']:.0f} img/s · data wait {rates['data_wait']:.0%} · lr {lr:.2e}"
    )
    logger.report("finetune", record, line, total)


def finish(run: FinetuneRun, source: Source, result: dict[str, Any] | None) -> Path:
    """Save, and write the result if there is one; returns its path, else the run folder."""
    config, encoder, rt, steps = run.config, run.encoder, run.rt, run.curriculum.total_steps
    run.save()
    if not run.finished:
        log.info("stopped and saved after step %d of %d; go on with --resume auto", run.step, steps)
    paths = [run.folder]
    if rt.is_main:
        where = replace(config, data_path=encoder.data_path)
        cores = spare_cores(rt.loading(config.num_workers, False).num_workers)
        for line in data_wait_hints(where, run.curriculum, run.ledger, is_jpeg_source(source), cores):
            log.warning(line)
    if rt.is_main and result is not None and run.finished:
        spent = run.ledger.total  # by all processes of a run that was resumed
        cost = spent.seconds + spent.eval_seconds, spent.flops + spent.eval_flops
        facts = {"num_classes": len(run.classes), "train_images": len(source), "best_top1": run.best}
        facts |= {"training": run.ledger.state_dict()["total"]}
        paths = write_result(config, encoder, rt, result | facts, *cost)
        log.info("written: %s", ", ".join(map(str, paths)))
    rt.barrier()
    return paths[0]
