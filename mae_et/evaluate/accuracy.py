"""Accuracy, counted exactly, and the result file that it goes to; the --eval command.

B batch · C channels · K classes.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from ..data.corruptions import CORRUPTIONS, STRENGTHS, CommonCorruption
from ..data.labelled import EvalCrops, eval_batches, open_labelled
from ..data.sources import Source, is_same_path
from ..engine import run_folder
from ..engine.runtime import Normalize, Runtime
from ..files import make_folder, write_json, write_text
from ..plan.flags import names, to_dict, to_yaml
from ..plan.shapes import height_width
from ..record import INTERPOLATION
from .classes import classes_of, with_classes
from .config import FinetuneConfig
from .encoder import PretrainedEncoder, build_classifier, load_encoder

log = logging.getLogger(__name__)


def evaluate_only(config: FinetuneConfig, rt: Runtime, began: float) -> Path:
    """--eval: the accuracy of a fine-tuned model on the held-out images."""
    source = _judged(config)
    config = dataclasses.replace(config, finetune=source, resume="")
    encoder = load_encoder(config)
    check_result_folders(config, encoder)
    if "head.weight" not in encoder.head:
        raise ValueError(
            f"{source} has no classifier to --eval: fine-tune it, or judge its features with --linear_probe"
        )
    val = open_labelled(encoder.data_path, "val", config.eval_images, config.seed, config.holdout)
    encoder = encoder.with_value_range(val, rt)
    outputs = len(encoder.head["head.weight"])
    named = encoder.record.classes
    for what, count in (("--nb_classes", config.nb_classes), ("its list of class names", named and len(named))):
        if count not in (None, outputs):
            raise ValueError(f"{source} tells {outputs} classes apart, {what} says {count}")
    if encoder.record.classes:
        classes = list(encoder.record.classes)
        val = with_classes(val, classes, encoder.data_path, source)
    else:
        classes = classes_of(config, val, encoder.data_path)
        if outputs != len(classes):
            raise ValueError(
                f"{source} tells {outputs} classes apart, --data_path {encoder.data_path} has {len(classes)}"
            )
        log.warning("%s doesn't name its classes: taken to be those of %s, in order", source, encoder.data_path)
    model = build_classifier(encoder, outputs, "fc_norm.weight" in encoder.head, head=encoder.head).to(rt.device)
    encoder.log_record()
    crops, normalize = eval_crops(config, encoder, val), Normalize(encoder.mean, encoder.std, rt)
    make_folders(config, encoder)
    accuracy, images = evaluate(model, crops, normalize, config, outputs), len(val)
    result = accuracy.result() | {"num_classes": outputs} | (accuracy.details(classes) if config.report else {})
    if config.corruptions:
        result |= under_corruptions(lambda c: evaluate(model, crops.corrupted(c), normalize, config, outputs))
        images += len(CORRUPTIONS) * len(val)
    log.info("%s: top-1 %.2f %% of %d images", source, result["top1"], result["num_images"])
    cost = time.perf_counter() - began, encoder.flops_per_image * images
    paths = write_result(config, encoder, rt, result, *cost) if rt.is_main else []
    rt.barrier()
    return paths[0] if paths else Path(source)


def _judged(config: FinetuneConfig) -> str:
    """The fine-tuned model that flags mean. ValueError if there is none."""
    if config.resume != "auto":
        if not (config.resume or config.finetune):
            raise ValueError("--eval needs a fine-tuned model: --finetune or --resume")
        return config.resume or config.finetune
    folder = output_folder(config, run_folder.run_of(config.finetune) if config.finetune else None)
    checkpoint = run_folder.resume_path("auto", folder)
    if checkpoint is None:
        raise ValueError(f"--resume auto: {folder} holds no checkpoint; give --finetune or --resume a fine-tuned model")
    return str(checkpoint)


@torch.no_grad()
def evaluate(
    model: nn.Module, crops: EvalCrops, normalize: Normalize, config: FinetuneConfig, num_classes: int
) -> Accuracy:
    """Classify all centre crops, shared out among the ranks, in evaluation mode."""
    rt = normalize.rt
    accuracy = Accuracy(num_classes, rt.device)
    model.eval()
    for images, labels in eval_batches(crops, rt.rank, rt.world_size, rt.loading(config.num_workers, config.pin_mem)):
        with rt.autocast():
            logits = model(normalize(images))
        accuracy.add(logits.float(), labels.to(rt.device, non_blocking=True))
    accuracy = accuracy.over(rt)
    accuracy.check(config.finetune if config.eval else "the model that is being fine-tuned")
    crops.corrupt.check(len(crops) - accuracy.num_images)  # over all ranks; each one has checked its own
    return accuracy


def under_corruptions(judge: Callable[[CommonCorruption], Accuracy]) -> dict[str, Any]:
    """Top-1 in per cent on corrupted images: `corruptions`, by kind a list over strengths, and their mean."""
    top1: dict[str, list[float]] = {kind: [] for kind in STRENGTHS}
    for corruption in CORRUPTIONS:
        top1[corruption.kind].append(judge(corruption).top1)
    mean = sum(map(sum, top1.values())) / len(CORRUPTIONS)
    for kind, values in top1.items():
        log.info("%s: top-1 %s %%", kind, " ".join(f"{value:.1f}" for value in values))
    log.info("corrupted images: top-1 %.2f %% on average", mean)
    return {"corrupted_top1": mean, "corruptions": top1}


def open_held_out(config: FinetuneConfig, encoder: PretrainedEncoder) -> Source | None:
    """What fine-tuning is judged on; None, with a warning, if there is nothing."""
    try:
        return open_labelled(encoder.data_path, "val", config.eval_images, config.seed, config.holdout)
    except FileNotFoundError as error:
        log.warning("evaluation is skipped: %s", error)
        return None


def eval_crops(config: FinetuneConfig, encoder: PretrainedEncoder, source: Source) -> EvalCrops:
    """Centre crops as the weights, or flags, want them."""
    record = encoder.record
    size = height_width(encoder.input_size)
    how = record.crop_pct, record.value_range, record.interpolation or INTERPOLATION
    return EvalCrops(source, size, encoder.shape.in_chans, *how, config.damaged_limit)


class Accuracy:
    """Counts of what was classified how; everything that is reported follows from them. Stays on the device."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)  # [true, predicted]
        self.in_top5 = torch.zeros((), dtype=torch.int64, device=device)
        self.not_finite = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, scores: Tensor, labels: Tensor) -> None:
        """scores: [B, K]. labels: [B]."""
        classes = len(self.confusion)
        top = scores.topk(min(5, classes), dim=1).indices
        # Not bincount, which waits for a GPU: how long its result is depends on the data.
        self.confusion.view(-1).index_add_(0, labels * classes + top[:, 0], torch.ones_like(labels))
        self.in_top5 += (top == labels[:, None]).sum()
        self.not_finite += (~scores.isfinite()).any(dim=1).sum()

    def over(self, rt: Runtime) -> Accuracy:
        """Summed over the ranks."""
        rt.sum(self.confusion)
        rt.sum(self.in_top5)
        rt.sum(self.not_finite)
        return self

    def check(self, whose: str) -> None:
        """FloatingPointError if images have scores that are not finite, which have no order. whose: what gave them."""
        if count := self.not_finite.item():
            raise FloatingPointError(f"{whose} gives {count} of {self.num_images} images scores that are not finite")

    @property
    def num_images(self) -> int:
        return self.confusion.sum().item()

    @property
    def top1(self) -> float:
        """Per cent."""
        return 100 * self.confusion.diagonal().sum().item() / max(1, self.num_images)

    def result(self) -> dict[str, Any]:
        """top1 and top5 in per cent (top5 from 5 classes on) and the number of images."""
        count = self.num_images
        top5 = {"top5": 100 * self.in_top5.item() / max(1, count)} if len(self.confusion) >= 5 else {}
        return {"top1": self.top1, **top5, "num_images": count}

    def details(self, classes: Sequence[str]) -> dict[str, Any]:
        """Accuracy per class in per cent (None: no images), and the confusion matrix: rows true, columns predicted."""
        rows = self.confusion.tolist()
        accuracy = {
            c: 100 * row[i] / sum(row) if sum(row) else None
            for i, (c, row) in enumerate(zip(classes, rows, strict=True))
        }
        return {"per_class_accuracy": accuracy, "confusion": rows}


def write_result(
    config: FinetuneConfig,
    encoder: PretrainedEncoder,
    rt: Runtime,
    result: Mapping[str, Any],
    seconds: float,
    flops: float,
) -> list[Path]:
    """eval-<protocol>.json in each of `result_folders`, with the flags and the data that were used.

    The folder of an encoder that was never trained becomes a run folder, which `compare` reads.
    """
    record = {
        "protocol": config.protocol,
        **result,
        **_subject(config, encoder),
        "origin": encoder.origin,
        "input_size": encoder.input_size,
        "record": encoder.record.to_dict(),
        "cost": {"seconds": seconds, "flops": flops},
        "environment": run_folder.environment(device=rt.describe(), precision=rt.precision, devices=rt.world_size),
    }
    paths = result_paths(config, encoder)
    for path in paths:
        if changed := _differences(path, record):
            log.warning("%s is replaced; it was of %s", path, ", ".join(changed))
        write_json(path, record)
        if config.is_probe and config.like and not (path.parent / run_folder.CONFIG).exists():
            write_text(path.parent / run_folder.CONFIG, to_yaml(config))
            write_json(path.parent / run_folder.ENVIRONMENT, record["environment"])
    return paths


def is_written(config: FinetuneConfig, encoder: PretrainedEncoder) -> bool:
    """Whether all results are there, by the same flags and of the same weights."""
    record = _subject(config, encoder)
    return all(
        _differences(path, record) == [] and (not config.report or "confusion" in json.loads(path.read_text()))
        for path in result_paths(config, encoder)
    )


def _subject(config: FinetuneConfig, encoder: PretrainedEncoder) -> dict[str, Any]:
    """What a result is of: weights and flags."""
    resumed = config.resume if config.is_probe or config.eval else ""  # a training run goes on with its own
    return {
        "checkpoint": config.finetune or resumed or config.like,
        "step": encoder.step,
        "flags": to_dict(config) | {"data_path": encoder.data_path},
    }


def _differences(path: Path, record: Mapping[str, Any]) -> list[str] | None:
    """Flags and weights that another result of the same protocol was of; None if there is none that can be read."""
    try:
        before = json.loads(path.read_text())
        flags, weights, step = dict(before["flags"]), before["checkpoint"], before.get("step")
        same_weights = Path(weights).resolve() == Path(record["checkpoint"]).resolve()
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None  # damaged, or of another program: nothing to tell
    judged = (*names(FinetuneConfig, lambda role: role.judged), "data_path", "seed")
    told = {name: flags[name] for name in judged if flags.get(name, "") != ""}  # data_path was once left open
    changed = [f"--{name} {value}" for name, value in told.items() if value != record["flags"][name]]
    if not same_weights:
        changed.append(f"the weights {weights}")
    if step not in (None, record["step"]):
        changed.append(f"step {step}")
    return changed


def result_paths(config: FinetuneConfig, encoder: PretrainedEncoder) -> list[Path]:
    """Of the protocol's result, in each of `result_folders`; with --output_dir not over one on other images."""
    paths = [folder / f"eval-{config.protocol}.json" for folder in result_folders(config, encoder)]
    if config.output_dir:
        return [*(path for path in paths[:-1] if not _is_on_other_images(path, encoder)), paths[-1]]
    return paths


def _is_on_other_images(path: Path, encoder: PretrainedEncoder) -> bool:
    try:
        other = json.loads(path.read_text())["flags"]["data_path"]
        return other != "" and not is_same_path(other, encoder.data_path)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def result_folders(config: FinetuneConfig, encoder: PretrainedEncoder) -> list[Path]:
    """The run folder of the checkpoint, and --output_dir if given, if there is no such, and for fine-tuning.

    What is fine-tuned from a fine-tuned model is another one, whose results are not those of the first.
    """
    fine_tunes = not (config.is_probe or config.eval)
    folders = [encoder.folder] if encoder.folder and not (fine_tunes and encoder.head) else []
    if config.output_dir or not folders or fine_tunes:
        folders.append(output_folder(config, encoder.folder))
    return list(dict.fromkeys(folders))


def check_result_folders(config: FinetuneConfig, encoder: PretrainedEncoder) -> None:
    """Before the work: ValueError if results would lie in the run of other weights and be taken for theirs."""
    for folder in result_folders(config, encoder):
        path = folder / run_folder.CONFIG
        if not path.exists() or (encoder.folder and folder.resolve() == encoder.folder.resolve()):
            continue
        try:
            held = yaml.safe_load(path.read_text())
        except (yaml.YAMLError, ValueError) as error:
            raise ValueError(f"--output_dir {folder} holds a {path.name} that can't be read; choose another") from error
        held = held if isinstance(held, dict) else {}
        # A fine-tuning that died before its first checkpoint left its own.
        began = config.like or not (config.is_probe or config.eval)
        if not (began and all(held.get(name, "") == getattr(config, name) for name in ("finetune", "like", "seed"))):
            raise ValueError(f"--output_dir {folder} is the run of other weights; choose another folder for these")


def make_folders(config: FinetuneConfig, encoder: PretrainedEncoder) -> None:
    """Those that results go to. CheckpointError, which names the flag, where one can't be made or written to."""
    for folder in result_folders(config, encoder):
        make_folder(folder, "--finetune" if folder == encoder.folder else "--output_dir")


def output_folder(config: FinetuneConfig, pretraining: Path | None) -> Path:
    """Where a fine-tuning run lives. pretraining: run folder of the weights it began with."""
    default = pretraining / "finetune" if pretraining else Path("./output_dir")
    return Path(config.output_dir) if config.output_dir else default
