"""Fine-tuning, or training from scratch: one visible loop, `train`. Source: MAE, arXiv 2111.06377, Table 9."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from .. import checkpoint
from ..console import logging_to_console
from ..data.labelled import EvalCrops, TrainCrops, labelled_batches, open_labelled, seeded
from ..data.loader import CorruptLog
from ..data.sources import Source
from ..data.stream import SampleStream, derive_seed, micro_batches
from ..engine import run_folder, runtime, storage
from ..engine.journal import Journal
from ..engine.meters import IdleTime, peak_memory_bytes
from ..engine.optim import guarded_step, learning_rate, set_learning_rate
from ..engine.resume import check_images, fingerprint
from ..engine.runtime import Runtime, Stop, stop_signals
from ..plan.cost import Ledger
from ..plan.curriculum import Curriculum, Stage
from ..plan.flags import to_dict, to_yaml
from ..plan.shapes import show_size
from .accuracy import Normalize, check_classes, eval_crops, evaluate, evaluate_only, output_folder, write_result
from .config import LAYER_DECAY, MICRO_BATCH, FinetuneConfig
from .encoder import PretrainedEncoder, build_classifier, load_encoder, timm_state, weights_of
from .mixing import augmentation, mixed, mixing

log = logging.getLogger(__name__)

BEST = "best.pt"
BETAS = (0.9, 0.999)  # MAE, Table 9
LOOK_STEPS = 20
"""On a GPU, steps after which the host waits for it: to hear of a signal on another rank, or of a loss that is NaN."""
#: Fields that may change when a run is resumed: they change neither data nor the mathematics of a step.
FREE_ON_RESUME = frozenset(
    "finetune data_path num_workers pin_mem damaged_limit output_dir log_dir resume overwrite start_epoch device "
    "precision dist_eval eval_epochs save_steps save_minutes keep_checkpoints report eval eval_images crop_pct "
    "batch_size accum_iter total_batch_size world_size local_rank dist_on_itp dist_url job_dir nodes ngpus "
    "use_volta32".split()
)


@dataclass
class Run:
    """What the loop works on. `step`, `ledger`, `best`, the weights and their average move; the rest stays."""

    config: FinetuneConfig
    rt: Runtime
    start: PretrainedEncoder
    folder: Path
    plan: Curriculum
    """One stage."""
    classes: list[str]
    model: VisionTransformer
    network: nn.Module
    """The model, averaging gradients over ranks where there are several."""
    optimizer: torch.optim.Optimizer
    normalize: Normalize
    held_out: EvalCrops | None
    images: dict[str, str]
    """Fingerprint of the training data."""
    ema: ModelEmaV3 | None = None
    step: int = 0
    best: float = -1.0
    """Highest top-1 so far."""
    ledger: Ledger = field(init=False)
    idle: IdleTime = field(init=False)

    def __post_init__(self) -> None:
        self.idle = IdleTime(self.rt.device)
        self.ledger = Ledger.of(self.plan)

    def save(self, name: str = run_folder.CHECKPOINT) -> None:
        """Everything that a resumed run needs, or for the best only the weights, atomically."""
        if not self.rt.is_main:
            return
        state = self.identity() | weights_of(self.model)
        state |= {"step": self.step, "best": self.best, "ledger": self.ledger.state_dict()}
        if self.ema:
            state["ema"] = weights_of(self.ema.module)
        if name == run_folder.CHECKPOINT:
            state |= {"optimizer": self.optimizer.state_dict(), "precision": self.rt.precision}
        keep = self.config.keep_checkpoints if name == run_folder.CHECKPOINT else 1
        checkpoint.save(state, self.folder / name, keep)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint says about itself: enough to use its weights, and to refuse to resume another run."""
        return {
            "format": checkpoint.FORMAT,
            "config": to_dict(self.config) | {"data_path": self.start.data_path},
            "shape": self.start.shape | {"img_size": self.start.input_size},
            "pooled": self.config.pooled,
            "classes": self.classes,
            "num_images": self.plan.num_images,
            "sampled_images": self.images,
            "batch_size": self.plan.stages[0].batch_size,
            "mean": list(self.start.mean),
            "std": list(self.start.std),
        }

    def resume(self, path: Path) -> Path:
        """Go on from a checkpoint, or from the one before if it is damaged; returns the one that was whole.

        ValueError that names the first difference if it is of another run.
        """
        state, whole = checkpoint.load_newest(path)
        if state.get("format") != checkpoint.FORMAT or "head" not in state or "optimizer" not in state:
            raise ValueError(f"--resume {path} is not a fine-tuning checkpoint of mae_et that can go on")
        mine = self.identity()
        for name in mine["config"]:
            theirs, ours = state["config"].get(name), mine["config"][name]
            if name not in FREE_ON_RESUME and theirs != ours:
                raise ValueError(f"--resume {path} is of another configuration: {name} was {theirs}, is {ours}")
        for name in ("num_images", "batch_size", "classes"):
            if state[name] != mine[name]:
                raise ValueError(f"--resume {path}: {name} was {state[name]}, is {mine[name]}")
        check_images(f"--resume {self.config.resume}", path, state, self.images, self.start.data_path)
        self.model.load_state_dict(timm_state(state, self.config.pooled))
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema:
            self.ema.module.load_state_dict(timm_state(state["ema"], self.config.pooled))
        self.step, self.best, self.ledger = state["step"], state["best"], Ledger.from_state_dict(state["ledger"])
        if self.config.precision == "auto":
            self.rt = self.normalize.rt = dataclasses.replace(self.rt, precision=state["precision"])
        return whole


def finetune(config: FinetuneConfig) -> Path:
    """Fine-tune, or only evaluate with --eval; returns the path of the result, without one the run folder.

    Raises ValueError, OSError or CheckpointError, with one line, for whatever the user can mend.
    """
    with (
        runtime.start(config.device, config.precision, config.dist_url) as rt,
        logging_to_console(rt.is_main),
        stop_signals() as stop,
    ):
        began = time.perf_counter()
        if config.eval:
            return evaluate_only(config, rt, began)

        # ── data, model, optimiser ──
        start = load_encoder(config)
        train_source = open_labelled(start.data_path, "train", config.train_images, config.seed, config.holdout)
        val_source = _held_out(config, start)
        classes = check_classes(config, start.data_path, train_source, val_source)
        torch.manual_seed(derive_seed(config.seed, "head"))
        model = build_classifier(start, len(classes), config.pooled, config.drop_path).to(rt.device)
        optimizer = layer_decay_adamw(model, config)
        batch = config.total_batch(len(train_source), rt.world_size)
        steps = max(1, round(config.epochs * len(train_source) / batch))
        stage = Stage(start.input_size, start.num_patches, 0, batch, steps, 3 * start.flops_per_image)
        plan = Curriculum((stage,), len(train_source))
        held_out = eval_crops(config, start, val_source) if val_source is not None else None
        folder, normalize = output_folder(config, start), Normalize(start.mean, start.std, rt)
        if start.folder is not None and folder.resolve() == start.folder.resolve():
            raise ValueError(
                f"--output_dir {folder} is the pretraining run itself; leave it out or choose another folder"
            )
        network = rt.parallel(model)
        images = fingerprint(train_source)
        run = Run(config, rt, start, folder, plan, classes, model, network, optimizer, normalize, held_out, images)
        run.ema = ModelEmaV3(model, decay=config.model_ema_decay) if config.model_ema else None
        run.step = round(steps * config.start_epoch / config.epochs)

        # ── resume and run folder ──
        resume = resume_path(config, folder)
        whole = run.resume(resume) if resume else None
        rt.barrier()  # before rank 0 moves what another one may still read
        if rt.is_main:
            run_folder.prepare(folder, keep=bool(resume), overwrite=config.overwrite)
            if resume and whole != resume and resume.parent.resolve() == folder.resolve():
                os.replace(whole, resume)  # a damaged one must not take its place when the next is saved
            if config.overwrite:
                (folder / BEST).unlink(missing_ok=True)
            run_folder.write_text(folder / run_folder.CONFIG, to_yaml(config))
            facts = run_folder.environment(device=rt.describe(), precision=rt.precision, devices=rt.world_size)
            run_folder.write_json(folder / run_folder.ENVIRONMENT, facts)
            log_plan(run)

        # ── train ──
        crops = TrainCrops(
            train_source, stage.height_width, start.mean, start.std, augmentation(config, len(start.mean)), config.seed
        )
        batches = labelled_batches(
            crops,
            SampleStream(plan, config.seed, config.batch_size or MICRO_BATCH, run.step, rt.rank, rt.world_size),
            CorruptLog(len(train_source), config.damaged_limit),
            config.num_workers,
            config.pin_mem and rt.device.type == "cuda",
        )
        with (
            storage.disk_full_errors(folder),
            contextlib.closing(batches),
            Journal(folder, config.log_dir, plan, config.epochs, run.step, rt.is_main) as journal,
        ):
            result = train(run, batches, journal, stop)

        # ── result ──
        run.save()
        if run.step < plan.total_steps:
            log.info("stopped and saved after step %d of %d; go on with --resume auto", run.step, plan.total_steps)
        paths = [folder]
        if rt.is_main and result is not None:
            flops = run.ledger.total.flops + start.flops_per_image * len(held_out)
            facts = {"num_classes": len(classes), "train_images": len(train_source), "best_top1": run.best}
            facts |= {"training": run.ledger.state_dict()["total"]}
            paths = write_result(config, start, rt, result | facts, began, flops)
            log.info("written: %s", ", ".join(map(str, paths)))
        rt.barrier()
        return paths[0]


def train(run: Run, batches: Iterator[tuple[Tensor, Tensor]], journal: Journal, stop: Stop) -> dict[str, Any] | None:
    """The loop, from `run.step` to the end; returns its result, or None if asked to stop before.

    A step is a function of (seed, step).
    """
    config, plan, stage = run.config, run.plan, run.plan.stages[0]
    every = max(1, round(config.eval_epochs * plan.num_images / stage.batch_size))  # steps between evaluations
    peak, warmup = config.peak_lr(stage.batch_size), config.warmup_epochs / config.epochs
    outcomes, losses, saved_at = [], [], time.monotonic()  # outcomes wait on the device; losses since an evaluation
    result = assess(run) if run.step == plan.total_steps else None  # a finished run that is resumed
    while run.step < plan.total_steps:
        began = time.perf_counter()
        lr = learning_rate(plan.position(run.step), peak=peak, floor=config.min_lr, warmup=warmup)
        loss = accumulate_gradients(run, batches, stage)
        # Over ranks: the sum of their shares of the loss, and of those that were asked to stop.
        outcome = run.rt.sum(torch.stack([loss, torch.full_like(loss, stop.requested)]))
        if config.clip_grad is not None:
            nn.utils.clip_grad_norm_(run.model.parameters(), config.clip_grad)
        set_learning_rate(run.optimizer, lr)
        guarded_step(run.optimizer, outcome[0])
        run.optimizer.zero_grad(set_to_none=True)
        if run.ema:
            run.ema.update(run.model)
        run.step += 1
        outcomes.append(outcome)

        due = run.step % every == 0 or run.step == plan.total_steps
        save = due or (config.save_steps > 0 and run.step % config.save_steps == 0)
        # Ranks stop at the same step only if they look at the same steps: clocks differ, so they are left out here.
        agreed = save or run.rt.device.type == "cpu" or run.step % LOOK_STEPS == 0
        agreed = agreed or (run.rt.world_size == 1 and stop.requested)
        save = save or time.monotonic() - saved_at > 60 * config.save_minutes
        stopping, data_seconds = False, 0.0
        if save or agreed:
            values = torch.stack(outcomes).tolist()  # waits for the device
            data_seconds = run.idle.read()  # of all steps since it was last asked
            outcomes, latest = [], [loss for loss, _ in values]
            _check_finite(latest, run.step)
            losses += latest
            stopping = agreed and values[-1][1] > 0
        seconds = time.perf_counter() - began
        run.ledger.add(0, stage, train_seconds=seconds - data_seconds, data_seconds=data_seconds)
        if due:
            result = assess(run)
            journal.write(run.step - 1, sum(losses) / len(losses), lr, run.ledger, result)
            losses = []
        if due and result and result["top1"] > run.best:
            run.best = result["top1"]
            run.save(BEST)
        if save:
            run.save()
            saved_at = time.monotonic()
        if stopping and run.step < plan.total_steps:
            return None
    return result


def accumulate_gradients(run: Run, batches: Iterator[tuple[Tensor, Tensor]], stage: Stage) -> Tensor:
    """Forward and backward of this rank's rows of a step; returns its share of the loss."""
    config, rt, loss = run.config, run.rt, torch.zeros((), device=run.rt.device)
    mix, mixes = mixing(config, len(run.classes)), bool(config.mixup or config.cutmix or config.cutmix_minmax)
    run.network.train()
    pieces = micro_batches(stage.batch_size, config.batch_size or MICRO_BATCH, rt.rank, rt.world_size)
    for piece in pieces:
        with run.idle.waiting():
            images, labels = next(batches)
        images, labels = images.to(rt.device, non_blocking=True), labels.to(rt.device, non_blocking=True)
        with seeded(derive_seed(config.seed, "mix", run.step, piece.start)):
            images, targets = mixed(mix, images, labels, mixes)
        torch.manual_seed(derive_seed(config.seed, "drop", run.step, piece.start))
        with contextlib.nullcontext() if piece is pieces[-1] else rt.local_gradients(run.network):
            with rt.autocast():
                logits = run.network(images)
            part = nn.functional.cross_entropy(logits.float(), targets) * (len(piece) / stage.batch_size)
            (part * rt.world_size).backward()  # DDP takes the mean over ranks; the sum is meant
        loss += part.detach()
    return loss


def layer_decay_adamw(model: VisionTransformer, config: FinetuneConfig) -> torch.optim.AdamW:
    """AdamW whose groups carry `lr_scale`: head 1, last block layer_decay, … embeddings its (depth+1)th power.

    Weight decay on matrices only, as in pretraining. (The class token's final norm learns with the last block.)
    """
    groups = param_groups_layer_decay(
        model,
        config.weight_decay,
        no_weight_decay_list=model.no_weight_decay(),
        layer_decay=LAYER_DECAY if config.layer_decay is None else config.layer_decay,
    )
    return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, fused=True)


def assess(run: Run) -> dict[str, Any] | None:
    """Accuracy on the held-out images, of the averaged weights too; None without such images."""
    if run.held_out is None:
        return None
    began, config, classes = time.perf_counter(), run.config, run.classes
    tally = evaluate(run.model, run.held_out, run.normalize, config, len(classes))
    result = tally.result()
    if run.ema:
        averaged = evaluate(run.ema.module, run.held_out, run.normalize, config, len(classes))
        result |= {f"ema_{name}": value for name, value in averaged.result().items() if name != "num_images"}
    if config.report:
        result |= tally.details(classes)
    run.ledger.stages[0].eval_seconds += time.perf_counter() - began
    run.ledger.stages[0].peak_memory_bytes = peak_memory_bytes(run.rt.device)
    return result


def resume_path(config: FinetuneConfig, folder: Path) -> Path | None:
    """The checkpoint to go on from, or None to start."""
    if not config.resume:
        return None
    path = folder if config.resume == "auto" else Path(config.resume)
    if path.is_dir() or config.resume == "auto":
        path = path / run_folder.CHECKPOINT
    if path.exists() or storage.kept(path):
        return path
    if config.resume == "auto":
        return None
    raise FileNotFoundError(f"--resume {config.resume}: no checkpoint there; give a run folder, a checkpoint or auto")


def log_plan(run: Run) -> None:
    """What is going to run, in a few lines."""
    config, start, stage = run.config, run.start, run.plan.stages[0]
    log.info("%s on %s", start.origin, run.rt.describe())
    log.info(
        "%d × %d blocks, %s px, patch %d · %s images, %d classes in %s",
        *(start.shape["embed_dim"], start.shape["depth"], show_size(start.input_size), start.shape["patch_size"]),
        *(f"{run.plan.num_images:,}", len(run.classes), start.data_path),
    )
    log.info(
        "total batch %d · %g epochs, %d steps · peak lr %.2e · layer decay %g · %s",
        *(stage.batch_size, config.epochs, stage.steps, config.peak_lr(stage.batch_size)),
        *(config.layer_decay or LAYER_DECAY, "mean of the patches" if config.pooled else "class token"),
    )
    if config.nodes or config.ngpus or config.use_volta32:
        log.warning("--nodes, --ngpus and --use_volta32 are a launcher's: start with torchrun for more devices")
    if run.step:
        log.info("going on after step %d of %d", run.step, stage.steps)


def _held_out(config: FinetuneConfig, start: PretrainedEncoder) -> Source | None:
    try:
        return open_labelled(start.data_path, "val", config.eval_images, config.seed, config.holdout)
    except FileNotFoundError as error:
        log.warning("evaluation is skipped: %s", error)
        return None


def _check_finite(losses: list[float], next_step: int) -> None:
    for i, loss in enumerate(losses):
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"loss is {loss} at step {next_step - len(losses) + i}; the weights were not updated with it and the "
                "last checkpoint is intact; try a lower --blr, or --clip_grad 1"
            )
