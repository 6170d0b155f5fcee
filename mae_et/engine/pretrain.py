"""Pretraining: one visible loop, `train`. Vanilla MAE is the one-stage curriculum on this same path."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .. import checkpoint, interop
from ..console import console, logging_to_console
from ..data.cache import CachedSource
from ..data.decode import CorruptImage, center_crop
from ..data.loader import CorruptLog, TrainImages, spare_cores, train_batches
from ..data.sources import is_jpeg_source, open_source
from ..data.stream import SampleStream, derive_seed, mask_noise, micro_batches, rank_rows
from ..model import MaskedAutoencoder
from ..plan.build import as_vanilla, build_curriculum
from ..plan.config import PretrainConfig
from ..plan.cost import Ledger
from ..plan.curriculum import Curriculum, Stage
from ..plan.flags import to_yaml
from ..plan.report import model_kwargs
from ..plan.shapes import grid_of, height_width, show_size
from ..spectral import low_frequency_crop
from ..targets import hog_target, pixel_target, reconstruction_loss, take_patches
from . import run_folder, runtime, sharded, storage
from .logger import data_wait_hints, ledger_table
from .meters import EnergyMeter, IdleTime, peak_memory_bytes
from .optim import adamw, guarded_step, learning_rate, set_learning_rate
from .picture import draw_reconstruction
from .progress import Recorder
from .resume import check_branch, check_same_run, find_checkpoint, fingerprint, identity, resume_path
from .runtime import Runtime, Stop, stop_signals

log = logging.getLogger(__name__)


@dataclass
class Run:
    """What the loop works on. `step`, `ledger` and the weights move; the rest stays."""

    config: PretrainConfig
    rt: Runtime
    curriculum: Curriculum
    model: MaskedAutoencoder
    network: nn.Module
    """The model, averaging over ranks where there are several."""
    optimizer: torch.optim.Optimizer
    peak_lr: float
    ledger: Ledger
    step: int
    images: dict[str, str] = field(default_factory=dict)
    """Fingerprint of the data."""
    mean: Tensor = field(init=False)
    std: Tensor = field(init=False)
    idle: IdleTime = field(init=False)

    def __post_init__(self) -> None:
        self.idle = IdleTime(self.rt.device)
        mean, std = (torch.tensor(v) for v in (self.config.pixel_mean, self.config.pixel_std))
        self.mean, self.std = (255 * v.view(-1, 1, 1).to(self.rt.device) for v in (mean, std))

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def is_sharded(self) -> bool:
        return self.config.fsdp and self.rt.world_size > 1

    def save(self, whole: bool = False) -> None:
        """Everything a resumed run needs, atomically; in shards if the model is, unless `whole`. All ranks call it."""
        state = identity(self.config, self.curriculum) | {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "ledger": self.ledger.state_dict(),
            "precision": self.rt.precision,
            "sampled_images": self.images,
        }
        keep = self.config.keep_checkpoints
        if self.is_sharded and not whole:
            sharded.save(state, self.folder / run_folder.SHARDED, keep)
        else:
            state = sharded.gather(state, self.rt.is_main)
            if self.rt.is_main:
                checkpoint.save(state, self.folder / run_folder.CHECKPOINT, keep=keep)
                run_folder.drop_shards(self.folder)
        if self.rt.is_main:
            run_folder.write_json(self.folder / run_folder.LEDGER, self.ledger.state_dict())

    def full_model(self) -> MaskedAutoencoder:
        """The model with all its weights, on rank 0 at least. All ranks call it."""
        if not self.is_sharded:
            return self.model
        state = sharded.gather(self.model.state_dict(), self.rt.is_main)
        if not self.rt.is_main:
            return self.model
        model = MaskedAutoencoder(**model_kwargs(self.config)).to(self.rt.device)
        model.load_state_dict(state)
        return model

    def prepare(self, images: Tensor, stage: Stage) -> Tensor:
        """uint8 [b, C, S, S] from the loader -> normalised float32 [b, C, s, s] at the stage's size, on the device."""
        images = (images.to(self.rt.device, non_blocking=True).float() - self.mean) / self.std
        return low_frequency_crop(images, stage.size_px) if self.config.lowfreq == "fourier" else images

    def loss(self, images: Tensor, stage: Stage, noise: Tensor) -> Tensor:
        """Mean loss of a micro-batch of prepared images; noise [b, L]."""
        with self.rt.autocast():
            pred, ids, _ = self.network(images, stage.num_visible, stage.num_predicted, noise)
        with torch.no_grad():
            if self.config.target == "hog":
                target = take_patches(hog_target(images, self.model.patch_size), ids)
            else:
                target = pixel_target(images, self.model.patch_size, self.config.norm_pix_loss, ids)
        return reconstruction_loss(pred, target)

    def loader_px(self, stage: Stage) -> tuple[int, int]:
        """(height, width) of images from the loader: full size where the device does the crop."""
        return height_width(self.config.input_size) if self.config.lowfreq == "fourier" else stage.height_width

    def micro_batches(self, stage: Stage, rank: int | None = None) -> list[range]:
        """A rank's rows of a step, by default this one's, piece by piece."""
        size, rank = stage.micro_size(self.config.batch_size), self.rt.rank if rank is None else rank
        return micro_batches(stage.batch_size, size, rank, self.rt.world_size, stage.rows_per_image)

    def patches(self, stage: Stage) -> int:
        return math.prod(grid_of(stage.size_px, self.model.patch_size))


def pretrain(config: PretrainConfig) -> Path:
    """Run a configuration to its end, or until SIGTERM or SIGINT; returns the run folder.

    Raises ValueError, OSError or CheckpointError, with one line, for whatever the user can mend.
    """
    resume = resume_path(config)
    branch = None if resume or not config.branch else find_checkpoint("--branch", config.branch)
    state, whole = checkpoint.load_newest(resume or branch) if resume or branch else ({}, None)
    if config.world_size > 1 and "WORLD_SIZE" not in os.environ:
        raise ValueError(f"--world_size {config.world_size}: start with torchrun --nproc_per_node={config.world_size}")
    # A resumed run keeps its precision, which also decides how attention is computed.
    precision = state.get("precision", "auto") if config.precision == "auto" else config.precision
    with (
        runtime.start(config.device, precision, config.dist_url) as rt,
        logging_to_console(verbose=rt.is_main),
        stop_signals() as stop,
    ):
        # ── plan and model ──
        with rt.main_first():
            source = open_source(config.data_path, "train", config.holdout)
        if config.cache_gib:
            source = CachedSource(source, int(config.cache_gib * 2**30))
        sampled = fingerprint(source)
        curriculum = build_curriculum(config, len(source), rt.world_size)
        vanilla = build_curriculum(as_vanilla(config), len(source), rt.world_size)
        torch.manual_seed(derive_seed(config.seed, "weights"))
        model = MaskedAutoencoder(**model_kwargs(config)).to(rt.device)
        network = trained_network(model, config, rt)
        optimizer = adamw(model, config.weight_decay)
        peak_lr = config.blr * vanilla.stages[0].batch_size / 256 if config.lr is None else config.lr

        # ── resume ──
        step, ledger = _first_step(config, curriculum), Ledger.of(curriculum)
        if resume:
            check_same_run(state, config, curriculum, sampled, resume)
            ledger = Ledger.from_state_dict(state["ledger"])
        elif branch:
            check_branch(state, config, curriculum, sampled, branch)
            spent = Ledger.from_state_dict(state["ledger"]).stages
            ledger.stages[: len(spent)] = spent
        if state:
            sharded.restore(model, optimizer, state, whole)
            step = state["step"]
        del state
        rt.check_equal_on_ranks(step=step, images=len(source), steps=curriculum.total_steps)
        # Rank 0 says which; one that can't be read, here or there, is no difference.
        indices = rt.from_main(list(sampled))
        rt.check_equal_on_ranks(**{f"image {i}": int(sampled[i], 16) if i in sampled else None for i in indices})

        # ── data: the first batch before anything on disk is replaced ──
        stream = SampleStream(curriculum, config.seed, config.batch_size, step, rt.rank, rt.world_size)
        images = TrainImages(source, curriculum, config.input_size, config.lowfreq, config.in_chans, config.seed)
        damage = CorruptLog(len(source), config.damaged_limit)
        pin_memory = config.pin_mem and rt.device.type == "cuda"
        loader = train_batches(images, stream, damage, config.num_workers, pin_memory)
        batches = itertools.chain(list(itertools.islice(loader, 1)), loader)

        # ── run folder ──
        run = Run(config, rt, curriculum, model, network, optimizer, peak_lr, ledger, step, sampled)
        check_shards(run)
        if rt.is_main:
            same = resume is not None and resume.parent.resolve() == run.folder.resolve()
            run_folder.prepare(run.folder, keep=same, overwrite=config.overwrite)
            if same and whole != resume:  # a damaged one must not take the place of a whole one when the next is saved
                storage.promote(whole, resume)
            lasting = dataclasses.replace(config, resume="", overwrite=False)  # it is a recipe: no one-off flags
            run_folder.write_text(run.folder / run_folder.CONFIG, to_yaml(lasting))
            facts = run_folder.environment(
                device=rt.describe(),
                precision=rt.precision,
                devices=rt.world_size,
                num_images=len(source),
            )
            run_folder.write_json(run.folder / run_folder.ENVIRONMENT, facts)
            log_plan(run, vanilla)

        # ── train ──
        recorder = Recorder(run.folder, config.log_dir, curriculum, step, ledger, on=rt.is_main)
        with storage.disk_full_errors(run.folder), contextlib.closing(loader), recorder:
            train(run, batches, recorder, stop, vanilla.stages[0].flops_per_image)

        # ── what the run leaves behind ──
        finished = run.step == curriculum.total_steps
        if finished:
            weights = run.full_model().state_dict()
            if rt.is_main:
                shape = {checkpoint.METADATA_KEY: json.dumps(model_kwargs(config))}
                checkpoint.save_safetensors(interop.to_timm(weights), run.folder / run_folder.ENCODER, shape)
            with _clock(run, len(curriculum.stages) - 1):
                draw(run, curriculum.stages, run.folder / run_folder.PICTURE)
        run.save(whole=finished)
        if rt.is_main:
            console.print(ledger_table(run.ledger, curriculum, vanilla.stages[0].flops_per_image))
            is_jpeg = is_jpeg_source(source)
            for line in data_wait_hints(config, curriculum, run.ledger, is_jpeg, spare_cores(config.num_workers)):
                log.warning(line)
            if finished:
                log.info("done: %s", run.folder)
            else:
                log.info(
                    "stopped and saved after step %d of %d; go on with --resume auto", run.step, curriculum.total_steps
                )
        rt.barrier()
        return run.folder


def trained_network(model: MaskedAutoencoder, config: PretrainConfig, rt: Runtime) -> nn.Module:
    """The model, compiled, recomputing, and shared with the other ranks or copied to them, as configured.

    Sharding replaces the parameters, so the optimiser comes after it.
    """
    if config.compile:
        model.compile_blocks()
    if config.activation_checkpointing:
        model.recompute_blocks()
    if config.fsdp and rt.world_size > 1:
        rt.shard(model, model.blocks)
        return model
    return rt.parallel(model)


def check_shards(run: Run) -> None:
    """ValueError unless all ranks of a sharded model have as many micro-batches: they gather its blocks for each."""
    ranks = range(run.rt.world_size if run.is_sharded else 0)
    for stage in run.curriculum.stages:
        counts = sorted({len(run.micro_batches(stage, rank)) for rank in ranks})
        if len(counts) > 1:
            raise ValueError(
                f"--fsdp: {stage.batch_size} images of {show_size(stage.size_px)} px are {counts[0]} micro-batches on "
                f"one rank and {counts[-1]} on another; make the total batch a multiple of the {len(ranks)} ranks"
            )


def train(run: Run, batches: Iterator[Tensor], recorder: Recorder, stop: Stop, vanilla_flops: float) -> None:
    """The loop: from `run.step` to the end of the curriculum, or until asked to stop.

    Everything at a step is a function of (seed, step). The host waits for the device only where it reports or saves.
    """
    config, rt, curriculum = run.config, run.rt, run.curriculum
    index, outcomes, saved_at, meter = -1, [], time.monotonic(), EnergyMeter(rt.device, rt.world_size)
    while run.step < curriculum.total_steps:
        if index != curriculum.index(run.step):
            index = curriculum.index(run.step)
            stage, account = curriculum.stages[index], run.ledger.stages[index]
            account.warmup_seconds += warm_up(run, stage)
            meter.since()  # warming up is not the stage's
        began = time.perf_counter()
        position = curriculum.position(run.step)
        lr = stage.lr_scale * learning_rate(
            position,
            peak=run.peak_lr,
            floor=config.min_lr,
            warmup=config.warmup_epochs / config.epochs,
            hold=config.hold_epochs / config.epochs,
        )
        outcome = take_step(run, batches, stage, lr, stop.requested)
        run.step += 1
        outcomes.append(outcome)

        end_of_stage = run.step == curriculum.start(index) + stage.steps
        picture = bool(config.picture_steps) and run.step % config.picture_steps == 0
        save = end_of_stage or (bool(config.save_steps) and run.step % config.save_steps == 0)
        # Ranks stop at the same step only if they look at the same steps: clocks differ, so they are left out here.
        agreed = save or picture or run.step % config.print_steps == 0 or rt.device.type == "cpu"
        agreed = agreed or (rt.world_size == 1 and stop.requested)
        due = time.monotonic() - saved_at > 60 * config.save_minutes
        # Shards are written by all ranks, so there one's clock is heard by all, at a step that all look at.
        save = save or ((agreed and rt.any(due)) if run.is_sharded else due)
        report = save or picture or run.step % config.print_steps == 0
        stopping, data_seconds = False, 0.0
        if report or agreed:
            values = torch.stack(outcomes).tolist()  # waits for the device
            data_seconds = run.idle.read()  # of all steps since it was last asked
            _check_finite(values, run.step, index, stage)
            stopping = agreed and values[-1][1] > 0
        seconds = time.perf_counter() - began
        run.ledger.add(index, stage, train_seconds=seconds - data_seconds, data_seconds=data_seconds)
        if report or stopping:
            account.peak_memory_bytes = max(account.peak_memory_bytes, peak_memory_bytes(rt.device))
            account.energy_joules += meter.since()
            mean_loss = sum(value for value, *_ in values) / len(values)
            recorder.report(run.step - 1, index, mean_loss, values[-1][2], lr, run.ledger, vanilla_flops)
            outcomes = []
        with _clock(run, index):
            if picture:
                draw(run, [stage], run.folder / f"reconstruction-{run.step:07d}.png")
            if save:
                run.save()
                saved_at = time.monotonic()
        if stopping:
            return


def take_step(run: Run, batches: Iterator[Tensor], stage: Stage, lr: float, stopping: bool = False) -> Tensor:
    """One optimiser step. Returns [loss, number of ranks `stopping`, gradient norm]."""
    loss = accumulate_gradients(run, batches, stage)
    # Over ranks: the sum of their shares of the loss, and of those that were asked to stop.
    outcome = run.rt.sum(torch.stack([loss, torch.full_like(loss, stopping)]))
    norm = nn.utils.get_total_norm(p.grad for p in run.model.parameters() if p.grad is not None)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if run.config.clip_grad is not None:
        nn.utils.clip_grads_with_norm_(run.model.parameters(), run.config.clip_grad, norm)
    set_learning_rate(run.optimizer, lr)
    guarded_step(run.optimizer, outcome[0] + norm)  # finite only if both are
    run.optimizer.zero_grad(set_to_none=True)
    return torch.cat([outcome, norm[None]])


def accumulate_gradients(run: Run, batches: Iterator[Tensor], stage: Stage) -> Tensor:
    """Forward and backward of this rank's rows of one step; returns its share of the loss.

    Ranks and micro-batches may differ in size: every image weighs 1/batch in loss and gradient, however it is split.
    """
    rt, loss = run.rt, torch.zeros((), device=run.rt.device)
    rows = rank_rows(stage.batch_size, rt.rank, rt.world_size)
    noise = mask_noise(run.config.seed, run.step, stage.batch_size, run.patches(stage))
    noise = rt.to_device(noise[rows.start : rows.stop])
    pieces = run.micro_batches(stage)
    for piece in pieces:
        with run.idle.waiting():
            images = next(batches)
        with contextlib.nullcontext() if piece is pieces[-1] else rt.local_gradients(run.network):
            piece_noise = noise[piece.start - rows.start : piece.stop - rows.start]
            part = run.loss(run.prepare(images, stage), stage, piece_noise) * (len(piece) / stage.batch_size)
            (part * rt.world_size).backward()  # DDP takes the mean over ranks; the sum is meant
        loss += part.detach()
    return loss


def warm_up(run: Run, stage: Stage) -> float:
    """Compile and warm the stage's shapes before its clock starts; weights stay as they are. Returns seconds."""
    began, rt = time.perf_counter(), run.rt
    if rt.device.type == "cuda":
        torch.cuda.empty_cache()  # blocks of the last stage's sizes
        torch.cuda.reset_peak_memory_stats(rt.device)
    # The sizes of all ranks, since each backward is one that they do together.
    for size in sorted({len(piece) for rank in range(rt.world_size) for piece in run.micro_batches(stage, rank)}):
        images = torch.zeros(size, run.config.in_chans, *run.loader_px(stage), dtype=torch.uint8)
        run.loss(run.prepare(images, stage), stage, torch.rand(size, run.patches(stage), device=rt.device)).backward()
    run.optimizer.zero_grad(set_to_none=True)
    rt.synchronize()
    return time.perf_counter() - began


def draw(run: Run, stages: list[Stage] | tuple[Stage, ...], path: Path) -> None:
    """A reconstruction picture of held-out images, or of training images where none are held out. All ranks call it."""
    config, model = run.config, run.full_model()
    if not run.rt.is_main:
        return
    try:
        source = open_source(config.data_path, "val", config.holdout)
    except (ValueError, OSError):
        source = open_source(config.data_path, "train")
    views = []
    for i in range(0, len(source), max(1, len(source) // 6)):
        with contextlib.suppress(CorruptImage, OSError):  # training has named it, or never needs it
            views.append(center_crop(source.read(i)[0], height_width(config.input_size), config.in_chans))
    if not views:
        log.warning("no picture: none of the held-out images tried can be read")
        return
    images = (torch.stack(views).to(run.rt.device).float() - run.mean) / run.std
    with run.rt.autocast(), torch.compiler.set_stance("force_eager"):  # not compiled anew for a picture
        draw_reconstruction(
            model,
            images,
            stages,
            target=config.target,
            normalized=config.norm_pix_loss,
            mean=config.pixel_mean,
            std=config.pixel_std,
            path=path,
            title=f"{config.recipe or config.model} after {run.step} of {run.curriculum.total_steps} steps",
        )


def log_plan(run: Run, vanilla: Curriculum) -> None:
    """What is going to run, and what it is going to cost, in a few lines."""
    config, rt, plan = run.config, run.rt, run.curriculum
    parameters = sum(p.numel() for p in run.model.parameters()) / 1e6
    log.info("%s on %s", config.model, rt.describe())
    log.info("%.1f M parameters · %s images in %s", parameters, f"{plan.num_images:,}", config.data_path)
    batch = vanilla.stages[0].batch_size
    pieces = len(micro_batches(batch, config.batch_size, rt.rank, rt.world_size))
    log.info(
        "total batch %d = %d device(s) × %d micro-batch(es) of at most %d · peak lr %.2e",
        *(batch, rt.world_size, pieces, config.batch_size, run.peak_lr),
    )
    if config.nodes or config.ngpus or config.use_volta32:
        log.warning("--nodes, --ngpus and --use_volta32 are a launcher's: start with torchrun for more devices")
    if config.fsdp and not run.is_sharded:
        log.warning("--fsdp: one rank has nothing to share out; start with torchrun for more")
    for i, stage in enumerate(plan.stages):
        log.info(
            "stage %d: %s px, %d of %d patches visible, %d predicted, %s steps, %.1f passes, %.0f%% of the compute",
            *(i + 1, show_size(stage.size_px), stage.num_visible, run.patches(stage), stage.num_predicted),
            *(f"{stage.steps:,}", plan.passes(stage), 100 * stage.flops / plan.total_flops),
        )
        if stage.replay > 1:
            log.info(
                "stage %d: each decoded sample in %d steps, from a replay buffer of %.2f GiB over all devices",
                *(i + 1, stage.replay, stage.replay_bytes / 2**30),
            )
    ratio = plan.total_images * vanilla.stages[0].flops_per_image / plan.total_flops
    log.info("%.2e training FLOPs; vanilla MAE needs %.2f× that for the same images", plan.total_flops, ratio)
    if config.warmup_epochs >= config.epochs:
        what = "rate never reaches its peak"
        log.warning("--warmup_epochs %g of --epochs %g: the learning %s", config.warmup_epochs, config.epochs, what)
    if abs(plan.remainder_images) > 0.1 * plan.total_images:
        log.warning("whole steps are %+.0f images off what was asked for", -plan.remainder_images)
    if run.step:
        log.info("going on after step %d of %d", run.step, plan.total_steps)


def _first_step(config: PretrainConfig, curriculum: Curriculum) -> int:
    """Step at which --start_epoch begins."""
    skipped = config.start_epoch / config.epochs
    if not 0 <= skipped < 1:
        raise ValueError(f"--start_epoch must be in [0, --epochs {config.epochs:g}), got {config.start_epoch:g}")
    return next(step for step in range(curriculum.total_steps + 1) if curriculum.position(step) >= skipped)


def _check_finite(values: list[list[float]], next_step: int, index: int, stage: Stage) -> None:
    for i, (loss, _, norm) in enumerate(values):
        if not math.isfinite(loss + norm):
            step = next_step - len(values) + i
            raise FloatingPointError(
                f"loss is {loss} and the gradient's norm {norm} at step {step} in stage {index + 1} "
                f"({show_size(stage.size_px)} px); the weights were not updated with it and the last checkpoint is "
                "intact; try a lower --blr"
            )


@contextlib.contextmanager
def _clock(run: Run, index: int) -> Iterator[None]:
    """Books what is not training under eval_seconds."""
    began = time.perf_counter()
    yield
    run.ledger.stages[index].eval_seconds += time.perf_counter() - began
