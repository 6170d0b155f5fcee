"""A fine-tuning run: model, optimiser and plan, and what a checkpoint of it holds.

B batch · C channels · K classes.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ..checkpoint import timm_state
from ..data.fingerprint import fingerprint
from ..data.labelled import EvalCrops, seeded
from ..data.sources import Source
from ..data.stream import derive_seed
from ..engine import run_folder, sharded, storage
from ..engine.resume import FORMAT, check_config, check_images
from ..engine.runtime import Normalize, Runtime
from ..engine.step import Run
from ..plan.cost import Ledger
from ..plan.curriculum import Curriculum, Stage
from ..plan.flags import to_dict
from ..plan.shapes import ModelShape, of_file
from .accuracy import eval_crops, open_held_out, output_folder
from .augmentation import mixed, mixing
from .classes import classes_of, with_classes
from .config import LAYER_DECAY, FinetuneConfig
from .encoder import PretrainedEncoder, build_classifier, weights_of

log = logging.getLogger(__name__)

BETAS = (0.9, 0.999)  # MAE, Table 9


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

    @classmethod
    def create(cls, config: FinetuneConfig, rt: Runtime, encoder: PretrainedEncoder, source: Source) -> FinetuneRun:
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
        skipped = round(steps * config.start_epoch / config.epochs)
        if skipped >= steps:
            raise ValueError(f"--start_epoch {config.start_epoch:g}: none of {steps:,} steps would be left")
        folder = output_folder(config, encoder.folder)
        if encoder.folder is not None and folder.resolve() == encoder.folder.resolve():
            raise ValueError(
                f"--output_dir {folder} is the pretraining run itself; leave it out or choose another folder"
            )
        return cls(
            config,
            rt,
            curriculum,
            model,
            rt.parallel(model),
            optimizer,
            Ledger.of(curriculum),
            skipped,
            encoder,
            folder,
            classes,
            eval_crops(config, encoder, held_out) if held_out is not None else None,
            fingerprint(source),
        )

    @property
    def micro_size(self) -> int:
        return self.config.micro_batch

    @property
    def evaluation_is_due(self) -> bool:
        """After the step nearest to each multiple of --eval_epochs, and at the end."""
        per_step = self.curriculum.stages[0].batch_size / (self.config.eval_epochs * self.curriculum.num_images)
        return self.finished or int((self.step + 0.5) * per_step) > int((self.step - 0.5) * per_step)

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
            "began_with": self.began_with,
            "steps": self.curriculum.total_steps,
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
        state["shape"] = of_file(ModelShape, state["shape"], f"--resume {path}").to_dict(decoder=False)
        for name in ("shape", "num_images", "batch_size", "classes"):
            if state[name] != mine[name]:
                raise ValueError(f"--resume {path}: {name} was {state[name]}, is {mine[name]}")
        check_images(f"--resume {self.config.resume}", path, state, self.images, self.encoder.data_path)
        self._check_beginning(path, state)
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

    @cached_property
    def began_with(self) -> str:
        """Digest of the pretrained weights: tells them from others. Those from scratch follow from seed and torch."""
        if not self.config.finetune:
            return ""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.encoder.state.items()):
            digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def _check_beginning(self, path: Path, state: dict[str, Any]) -> None:
        """ValueError for --resume auto if the checkpoint's run began with other weights, as those of a run folder are
        once it has been replaced. Who names a checkpoint may know better: a warning."""
        if state.get("began_with", self.began_with) == self.began_with:
            return
        what = f"{path} began with other weights than those of {self.encoder.origin}"
        if self.config.resume == "auto":
            raise ValueError(f"--resume auto: {what}; begin anew with --overwrite, or go on with --resume {path}")
        log.warning("--resume %s: %s", self.config.resume, what)


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
