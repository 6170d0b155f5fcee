"""Fine-tuning, or training from scratch: one visible loop, `train`. Source: MAE, arXiv 2111.06377, Table 9.

B batch · C channels · K classes.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from .. import files
from ..checkpoint import timm_state
from ..console import logging_to_console
from ..data.fingerprint import fingerprint
from ..data.labelled import EvalCrops, TrainCrops, labelled_batches, open_labelled, seeded
from ..data.loader import CorruptLog
from ..data.sources import Source, is_jpeg_source
from ..data.stream import SampleStream, derive_seed
from ..data.workers import spare_cores
from ..engine import run_folder, runtime, sharded, storage
from ..engine.logger import RunLogger, data_wait_hints, warn_of_launchers
from ..engine.meters import peak_memory_bytes
from ..engine.optim import learning_rate
from ..engine.resume import FORMAT, check_config, check_images
from ..engine.runtime import Normalize, Stop, stop_signals
from ..engine.sinks import check_installed
from ..engine.step import Cadence, Outcomes, Run, evaluation_time, take_step
from ..plan.cost import Ledger
from ..plan.curriculum import Curriculum, Stage
from ..plan.flags import to_dict, to_yaml
from ..plan.shapes import ModelShape, show_size
from .accuracy import eval_crops, evaluate, evaluate_only, make_folders, open_held_out, output_folder, write_result
from .augmentation import augmentation, mixed, mixing
from .classes import classes_of, with_classes
from .config import LAYER_DECAY, FinetuneConfig
from .encoder import PretrainedEncoder, build_classifier, load_encoder, weights_of

log = logging.getLogger(__name__)

BETAS = (0.9, 0.999)  # MAE, Table 9
LOOK_STEPS = 20
"""On a GPU, steps after which the host waits for it: to hear of a signal on another rank, or of a loss that is NaN."""


@dataclass
class FinetuneRun(Run):
    """`best`, and the average of the weights, change too."""

    config: FinetuneConfig
    model: VisionTransformer
    encoder: PretrainedEncoder
    """What it began with."""
    folder: Path
    classes: list[str]
    held_out: EvalCrops | None
    images: dict[str, str]
    """Fingerprint of the training data."""
    best: float = -1.0
    """Highest top-1 so far."""
    ema: ModelEmaV3 | None = field(init=False)
    unreported: tuple[float, float, float] | None = None
    """Loss, gradient norm and learning rate of a report whose evaluation was not finished."""
    saved_step: int | None = None
    """Of the newest checkpoint."""

    def __post_init__(self) -> None:
        super().__post_init__()
        config = self.config
        self.normalize = Normalize(self.encoder.mean, self.encoder.std, self.rt)
        self.ema = ModelEmaV3(self.model, decay=config.model_ema_decay) if config.model_ema else None
        self.mix = mixing(config, len(self.classes))
        self.mixes = bool(config.mixup or config.cutmix or config.cutmix_minmax)

    @property
    def micro_size(self) -> int:
        return self.config.micro_batch

    @property
    def steps_per_evaluation(self) -> int:
        images = self.config.eval_epochs * self.curriculum.num_images
        return max(1, round(images / self.curriculum.stages[0].batch_size))

    def micro_loss(self, batch: tuple[Tensor, Tensor], stage: Stage, rows: range) -> Tensor:
        images, labels = (tensor.to(self.rt.device, non_blocking=True) for tensor in batch)
        with seeded(derive_seed(self.config.seed, "mix", self.step, rows.start)):
            images, targets = mixed(self.mix, images, labels, self.mixes)
        torch.manual_seed(derive_seed(self.config.seed, "drop", self.step, rows.start))
        with self.rt.autocast():
            logits = self.network(images)
        return nn.functional.cross_entropy(logits.float(), targets)

    def save(self, unreported: tuple[float, float, float] | None = None) -> None:
        """Everything that a resumed run needs, atomically; takes the place of an earlier checkpoint of this step.

        unreported: see there, while its evaluation is still due.
        """
        again, self.saved_step = self.saved_step == self.step, self.step
        if not self.rt.is_main:
            return
        state = self.identity() | self.weights() | {"unreported": unreported}
        state |= {"optimizer": self.optimizer.state_dict(), "precision": self.rt.precision}
        keep = None if again else self.config.keep_checkpoints
        storage.save(state, self.folder / run_folder.CHECKPOINT, keep)

    def save_best(self) -> None:
        """Only the weights."""
        if self.rt.is_main:
            storage.save(self.identity() | self.weights(), self.folder / run_folder.BEST)

    def weights(self) -> dict[str, Any]:
        state = weights_of(self.model) | {"step": self.step, "best": self.best, "ledger": self.ledger.state_dict()}
        return state | ({"ema": weights_of(self.ema.module)} if self.ema else {})

    def identity(self) -> dict[str, Any]:
        """What a checkpoint says about itself: enough to use its weights, and to refuse to resume another run."""
        return {
            "format": FORMAT,
            "config": to_dict(self.config) | {"data_path": self.encoder.data_path},
            "shape": replace(self.encoder.shape, img_size=self.encoder.input_size).to_dict(decoder=False),
            "num_images": self.curriculum.num_images,
            "sampled_images": self.images,
            "batch_size": self.curriculum.stages[0].batch_size,
            **replace(self.encoder.record, classes=tuple(self.classes), pooled=self.config.pooled).to_dict(),
        }

    def restore(self, path: Path) -> Path:
        """Go on from a checkpoint, or from the one before if it is corrupt; returns the one that was intact.

        ValueError that names the first difference if it is of another run.
        """
        state, read_from = sharded.load_newest(path)
        if state.get("format") != FORMAT or "head" not in state or "optimizer" not in state:
            raise ValueError(f"--resume {path} is not a fine-tuning checkpoint of mae_et that can go on")
        check_config(f"--resume {path}", state["config"], self.config, lambda role: role.resume)
        mine = self.identity()
        # Older checkpoints leave out defaults, or say which decoder was dropped.
        state["shape"] = ModelShape(**state["shape"]).to_dict(decoder=False)
        for name in ("shape", "num_images", "batch_size", "classes"):
            if state[name] != mine[name]:
                raise ValueError(f"--resume {path}: {name} was {state[name]}, is {mine[name]}")
        check_images(f"--resume {self.config.resume}", path, state, self.images, self.encoder.data_path)
        self.model.load_state_dict(timm_state(state, self.config.pooled))
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema:
            self.ema.module.load_state_dict(timm_state(state["ema"], self.config.pooled))
        self.step, self.best, self.ledger = state["step"], state["best"], Ledger.from_state_dict(state["ledger"])
        if self.config.precision == "auto":
            self.rt = self.normalize.rt = replace(self.rt, precision=state["precision"])
        self.unreported, self.saved_step = state.get("unreported"), self.step
        # An older run, which has no such key, took pixels as they are.
        facts = replace(self.encoder.record, value_range=state.get("value_range"))
        self.encoder = replace(self.encoder, record=facts)
        if self.held_out is not None:
            self.held_out.value_range = facts.value_range
        return read_from


def finetune(config: FinetuneConfig) -> Path:
    """Fine-tune, or only evaluate with --eval; returns the path of the result, without one the run folder.

    Raises ValueError, OSError or CheckpointError, with one line, for whatever the user can mend.
    """
    check_installed(config.log_to)
    runtime.check_launcher(config.world_size)
    with (
        runtime.start(config.device, config.precision, config.dist_url) as rt,
        logging_to_console(rt.is_main),
        stop_signals() as stop,
    ):
        if config.eval:
            return evaluate_only(config, rt, time.perf_counter())
        encoder = load_encoder(config)
        source = open_labelled(encoder.data_path, "train", config.train_images, config.seed, config.holdout)
        run = build(config, rt, encoder.with_value_range(source, rt), source)
        resume = run_folder.resume_path(config.resume, run.folder)
        read_from = run.restore(resume) if resume else None
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
        return finish(run, source, result)


def build(config: FinetuneConfig, rt: runtime.Runtime, encoder: PretrainedEncoder, source: Source) -> FinetuneRun:
    """Model, optimiser and plan: one stage, at full size and without masks."""
    classes = classes_of(config, source, encoder.data_path)
    held_out = open_held_out(config, encoder)
    if held_out is not None:
        held_out = with_classes(held_out, classes, encoder.data_path, "the training images")
    torch.manual_seed(derive_seed(config.seed, "head"))
    model = build_classifier(encoder, len(classes), config.pooled, config.drop_path).to(rt.device)
    optimizer = layer_decay_adamw(model, config)
    batch = config.total_batch(len(source), rt.world_size)
    steps = max(1, round(config.epochs * len(source) / batch))
    stage = Stage(encoder.input_size, encoder.num_patches, 0, batch, steps, 3 * encoder.flops_per_image)
    curriculum = Curriculum((stage,), len(source))
    folder = output_folder(config, encoder.folder)
    if encoder.folder is not None and folder.resolve() == encoder.folder.resolve():
        raise ValueError(f"--output_dir {folder} is the pretraining run itself; leave it out or choose another folder")
    return FinetuneRun(
        config,
        rt,
        curriculum,
        model,
        rt.parallel(model),
        optimizer,
        Ledger.of(curriculum),
        round(steps * config.start_epoch / config.epochs),
        encoder,
        folder,
        classes,
        eval_crops(config, encoder, held_out) if held_out is not None else None,
        fingerprint(source),
    )


def open_folder(run: FinetuneRun, resume: Path | None, read_from: Path | None) -> None:
    """Make or take over the run folder, and write what is known before a step is run."""
    goes_on = resume.parent.resolve() == run.folder.resolve() if resume else run.config.resume == "auto"
    run_folder.prepare(run.folder, keep=goes_on, overwrite=run.config.overwrite)
    make_folders(run.config, run.encoder)
    if resume and goes_on and read_from != resume:
        files.promote(read_from, resume)  # otherwise the next save would keep the corrupt file and drop this one
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
        evaluation = run.step % run.steps_per_evaluation == 0 or run.finished
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
