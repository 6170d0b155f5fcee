"""Pretraining: one visible loop, `train`. Vanilla MAE is the one-stage curriculum on this same path."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .. import files, interop
from ..console import console, logging_to_console
from ..data.decode import center_crops
from ..data.fingerprint import fingerprint
from ..data.loader import CorruptLog, TrainImages, train_batches
from ..data.pixels import measure_value_range
from ..data.sources import CachedSource, Source, is_jpeg_source, open_held_out, open_source
from ..data.stream import SampleStream
from ..data.workers import spare_cores
from ..plan.build import as_vanilla, build_curriculum
from ..plan.config import PretrainConfig
from ..plan.curriculum import Curriculum, Stage
from ..plan.flags import to_yaml
from ..plan.shapes import height_width, show_size, spectral_operator
from ..record import RECORD_KEY, WeightsRecord
from . import run_folder, runtime, sharded, storage
from .graphs import DDP_ROUNDS
from .logger import RunLogger, data_wait_hints, ledger_table, log_plan
from .meters import EnergyMeter, peak_memory_bytes, reset_peak_memory
from .online import OnlineProbe, is_due, quality_words
from .optim import allocate, learning_rate
from .picture import reconstruction_blocks, write_sheet
from .progress import write_progress
from .run import PretrainRun, check_micro_batches, check_ranks
from .runtime import Stop, stop_signals
from .sinks import check_sinks
from .step import Cadence, Outcomes, evaluation_time, take_step

log = logging.getLogger(__name__)


def pretrain(config: PretrainConfig) -> Path:
    """Run a configuration to its end; returns the run folder.

    Raises ValueError, OSError or CheckpointError, with one line, for whatever the user can mend. After SIGTERM or
    SIGINT it saves and raises SystemExit or KeyboardInterrupt.
    """
    check_sinks(config)
    resume = run_folder.resume_path(config.resume, Path(config.output_dir))
    branch = None if resume or not config.branch else run_folder.find_checkpoint("--branch", config.branch)
    state, read_from = sharded.load_newest(resume or branch) if resume or branch else ({}, None)
    runtime.check_launcher(config.world_size)
    # A resumed run keeps its precision, which also decides how attention is computed.
    precision = state.get("precision", "auto") if config.precision == "auto" else config.precision
    with (
        runtime.start(config.device, precision, config.dist_url, config.deterministic) as rt,
        logging_to_console(verbose=rt.is_main),
        stop_signals() as stop,
    ):
        with rt.main_first():
            source = open_source(config.data_path, "train", config.holdout)
        if config.cache_gib:
            source = CachedSource(source, int(config.cache_gib * 2**30))
            rt.wait_for_ranks("cached")
        run = PretrainRun.create(config, rt, len(source))
        run.images = fingerprint(source)
        # All ranks ask rank 0, also one that alone found a checkpoint: what differs is refused below.
        measured = rt.from_main(None if state or config.value_range or not rt.is_main else measure_value_range(source))
        # An older run, which has no such key, took pixels as they are.
        run.value_range = config.value_range or (state.get("value_range") if state else measured)
        run.step = first_step(config, run.curriculum)
        if state:
            run.restore(state, resume or branch, "--resume" if resume else "--branch", read_from)
        del state
        check_ranks(run, len(source))
        check_micro_batches(run)
        goes_on = run_folder.goes_on(run.folder, resume, config.resume)
        done = run.finished and resume and goes_on and (run.folder / run_folder.ENCODER).exists()
        if rt.from_main(done):  # what the folder says of how it was made stays
            log.info("finished before: %s", run.folder)
            return run.folder
        probe = OnlineProbe(run) if config.probe_every else None

        # The first batch, and memory for all that is to come, before anything on disk is replaced.
        loader = open_loader(run, source)
        batches = itertools.chain(list(itertools.islice(loader, 1)), loader)
        vanilla = build_curriculum(as_vanilla(config), len(source), rt.world_size)
        if rt.is_main:
            if not config.overwrite:
                if not goes_on:
                    run_folder.check_free(run.folder)
                run_folder.check_no_results(run.folder)
            log_plan(run, vanilla)
        warm_up(run)
        if rt.is_main:
            open_folder(run, resume, read_from)
        logger = RunLogger(run.folder, config, run.curriculum, run.step, run.ledger, on=rt.is_main)
        with run.writer:
            with files.disk_full_errors(run.folder), contextlib.closing(loader), logger:
                train(run, batches, logger, stop, vanilla.total_flops / vanilla.total_images, probe)
            finish(run, source, vanilla)
    if not run.finished:
        stop.end()
    return run.folder


def first_step(config: PretrainConfig, curriculum: Curriculum) -> int:
    """Step at which --start_epoch begins."""
    skipped = config.start_epoch / config.epochs
    for step in range(curriculum.total_steps):
        if curriculum.position(step) >= skipped:
            return step
    raise ValueError(f"--start_epoch {config.start_epoch:g}: none of {curriculum.total_steps:,} steps would be left")


def open_loader(run: PretrainRun, source: Source) -> Iterator[Tensor]:
    config, rt = run.config, run.rt
    return train_batches(
        TrainImages(
            *(source, run.curriculum, config.input_size, config.lowfreq, config.in_chans, config.seed, run.value_range)
        ),
        SampleStream(run.curriculum, config.seed, config.batch_size, run.step, rt.rank, rt.world_size),
        CorruptLog(len(source), config.damaged_limit),
        rt.loading(config.num_workers, config.pin_mem),
    )


def open_folder(run: PretrainRun, resume: Path | None, read_from: Path | None) -> None:
    """Make or take over the run folder, and write what is known before a step is run."""
    config = run.config
    goes_on = run_folder.goes_on(run.folder, resume, config.resume)
    run_folder.prepare(run.folder, keep=goes_on, overwrite=config.overwrite)
    if resume and goes_on and read_from != resume:
        # Otherwise the next save would rotate the corrupt file into prev1 and drop an intact one.
        files.promote(read_from, resume)
    if resume and not goes_on and (metrics := resume.parent / run_folder.METRICS).is_file():
        files.write_json_lines(run.folder / run_folder.METRICS, files.read_json_lines(metrics))
    lasting = dataclasses.replace(config, resume="", overwrite=False)  # it is a recipe: no one-off flags
    files.write_text(run.folder / run_folder.CONFIG, to_yaml(lasting))
    facts = {"num_images": run.curriculum.num_images, "value_range": run.value_range}
    kernels = {show_size(s.size_px): choice._asdict() for s, choice in run.attention.items() if choice.backend}
    facts |= {"attention": kernels} if kernels else {}
    environment = run_folder.environment(**run.rt.facts(), **facts)
    files.write_json(run.folder / run_folder.ENVIRONMENT, environment)


def train(
    run: PretrainRun,
    batches: Iterator[Tensor],
    logger: RunLogger,
    stop: Stop,
    vanilla_flops_per_image: float,
    probe: OnlineProbe | None,
) -> None:
    """The loop: from `run.step` to the end of the curriculum, or until asked to stop.

    Everything at a step is a function of (seed, step). The host waits for the device only where it reports or saves.
    """
    config, curriculum, ledger = run.config, run.curriculum, run.ledger
    cadence, outcomes = Cadence.of(run, config.print_steps, collective_saves=run.is_sharded), Outcomes()
    index, meter = -1, EnergyMeter(run.rt.device, run.rt.world_size)
    while not run.finished:
        if index != curriculum.index(run.step):
            index = curriculum.index(run.step)
            stage, cost = curriculum.stages[index], ledger.stages[index]
            reset_peak_memory(run.rt.device)
            meter.since()  # saving the last stage's end is not this one's
        began = time.perf_counter()
        lr = stage.lr_scale * learning_rate(
            curriculum.position(run.step),
            peak=run.peak_lr,
            floor=config.min_lr,
            warmup=config.warmup_epochs / config.epochs,
            hold=config.hold_epochs / config.epochs,
        )
        outcomes.add(take_step(run, batches, stage, lr, stop.requested))
        run.step += 1

        stage_ends = run.step == curriculum.start(index) + stage.steps
        picture = config.picture_steps > 0 and run.step % config.picture_steps == 0
        measure = is_due(curriculum, run.step, config.probe_every)
        due = cadence.after(run.step, save=stage_ends, report=picture or measure, stopping=stop.requested)
        stopping, data_seconds = False, 0.0
        if due.look:
            stopping = outcomes.look(run.step, f" in stage {index + 1} ({show_size(stage.size_px)} px)") and due.stop
            data_seconds = run.idle.read()  # of all steps since it was last asked
        seconds = time.perf_counter() - began
        ledger.add(index, stage, train_seconds=seconds - data_seconds, data_seconds=data_seconds)
        if due.report or stopping:
            cost.peak_memory_bytes = max(cost.peak_memory_bytes, peak_memory_bytes(run.rt.device))
            cost.energy_joules += meter.since()
            quality = probe.measure(run, index) if measure else {}
            meter.since()  # what measuring quality takes is not the stage's
            report(run, logger, index, *outcomes.report(), lr, vanilla_flops_per_image, quality)
        with evaluation_time(run, index):
            if picture:
                draw(run, [stage], run.folder / f"reconstruction-{run.step:07d}.png")
            if due.save:
                run.save()
                cadence.saved()
        if stopping:
            return


def report(
    run: PretrainRun,
    logger: RunLogger,
    index: int,
    loss: float,
    norm: float,
    lr: float,
    vanilla_flops: float,
    quality: Mapping[str, float],
) -> None:
    """One record of metrics.jsonl and its line, after the latest step, which is of stage number `index`."""
    curriculum, total, size_px = run.curriculum, run.ledger.total, run.curriculum.stages[index].size_px
    rates = logger.rates(total)
    record = {
        "step": run.step - 1,
        "p": curriculum.position(run.step),
        "stage": index,
        "size_px": size_px,
        "loss": loss,
        "grad_norm": norm,
        "lr": lr,
        **rates,
        "flops": total.flops,
        "flops_vanilla": total.images * vanilla_flops,
        **quality,
    }
    line = (
        f"step {run.step}/{curriculum.total_steps} · loss {loss:.4f} · stage {index + 1}, {show_size(size_px)} px"
        f"{quality_words(logger.latest | record)} · {rates['images_per_second']:,.0f} img/s · "
        f"data wait {rates['data_wait']:.0%} · lr {lr:.2e} · "
        f"{total.flops:.2e} FLOPs, vanilla {record['flops_vanilla']:.2e}"
    )
    logger.report("pretrain", record, line, total)


def warm_up(run: PretrainRun) -> None:
    """Compile, warm and capture all stages to come: clocks are honest, and what doesn't fit into memory fails now.

    Weights stay as they are.
    """
    rt, curriculum = run.rt, run.curriculum
    if not run.optimizer.state:
        allocate(run.optimizer)
    pool = torch.cuda.graph_pool_handle() if run.captures else None
    rounds = DDP_ROUNDS if run.captures and rt.is_distributed else 1
    # The largest stage first: graphs of the others find room in the memory of its graph.
    for index in reversed(range(len(curriculum.stages))):
        stage, cost = curriculum.stages[index], run.ledger.stages[index]
        if curriculum.start(index) + stage.steps <= run.step:
            continue
        began = time.perf_counter()
        reset_peak_memory(rt.device)
        run.warm(stage, rounds)
        rounds = 1
        if run.captures:
            run.capture(stage, pool)
        run.zero_gradients()
        rt.synchronize()
        cost.peak_memory_bytes = max(cost.peak_memory_bytes, peak_memory_bytes(rt.device))  # replays show none
        cost.warmup_seconds += time.perf_counter() - began


def title_of(config: PretrainConfig) -> str:
    return config.recipe or config.model


def draw(run: PretrainRun, stages: list[Stage] | tuple[Stage, ...], path: Path) -> None:
    """A reconstruction picture of held-out images, or of training images where none are held out. All ranks call it."""
    config, model = run.config, run.full_model()
    if not run.rt.is_main:
        return
    source = open_held_out(config.data_path, config.holdout)
    images, _ = center_crops(source, 6, height_width(config.input_size), config.in_chans, run.value_range)
    if not len(images):
        log.warning("no picture: none of the held-out images tried can be read")
        return
    with run.rt.autocast(), torch.compiler.set_stance("force_eager"):  # not compiled anew for a picture
        blocks = reconstruction_blocks(
            model,
            run.normalize(images),
            stages,
            target=config.target,
            normalized=config.norm_pix_loss,
            mean=config.pixel_mean,
            std=config.pixel_std,
            operator=spectral_operator(config.lowfreq),
        )
    title = f"{title_of(config)} after {run.step} of {run.curriculum.total_steps} steps"
    run.writer.submit("picture", partial(write_sheet, path, title, config.target, blocks))


def finish(run: PretrainRun, source: Source, vanilla: Curriculum) -> None:
    """Leave behind what is worth keeping: the encoder and a picture at the end, the checkpoint and the cost always."""
    run.graphs.clear()  # NCCL waits for the graphs that hold its calls before it ends
    if run.finished:
        weights = run.full_model().state_dict()
        if run.rt.is_main:
            metadata = {interop.METADATA_KEY: json.dumps(run.model.shape.to_dict(), sort_keys=True)}
            facts = WeightsRecord(run.config.pixel_mean, run.config.pixel_std, run.value_range)
            metadata[RECORD_KEY] = json.dumps(facts.to_dict(), sort_keys=True)
            storage.save_safetensors(interop.to_timm(weights), run.folder / run_folder.ENCODER, metadata)
        with evaluation_time(run, len(run.curriculum.stages) - 1):
            draw(run, run.curriculum.stages, run.folder / run_folder.PICTURE)
            if run.rt.is_main:
                title = f"{title_of(run.config)}: predictions on the way"
                run.writer.submit("progress", partial(write_progress, run.folder, title, run.step))
            run.writer.wait()
    run.save(full=run.finished)
    run.writer.wait()
    if run.rt.is_main:
        console.print(ledger_table(run.ledger, run.curriculum, vanilla.total_flops / vanilla.total_images))
        cores = spare_cores(run.rt.loading(run.config.num_workers, False).num_workers)
        for line in data_wait_hints(run.config, run.curriculum, run.ledger, is_jpeg_source(source), cores):
            log.warning(line)
        if run.finished:
            log.info("done: %s", run.folder)
        else:
            steps = run.curriculum.total_steps
            log.info("stopped and saved after step %d of %d; go on with --resume auto", run.step, steps)
    run.rt.barrier()
