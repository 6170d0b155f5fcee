"""A pretraining run: model, loss of a micro-batch, saving and going on, and whether its ranks agree."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import files
from ..data.pixels import ValueRange
from ..data.stream import derive_seed, mask_noise, mask_noise_of_batch, micro_batches
from ..model import MaskedAutoencoder
from ..plan.build import build_curriculum, shape_of
from ..plan.config import PretrainConfig, peak_lr
from ..plan.cost import Ledger
from ..plan.curriculum import Curriculum, Stage
from ..plan.shapes import show_size, spectral_operator
from ..spectral import low_frequency_crop
from ..targets import hog_target, pixel_target, reconstruction_loss, take_patches
from . import attention, run_folder, sharded, storage
from .optim import adamw
from .resume import check_branch, check_same_run, identity
from .runtime import Normalize, Runtime
from .step import Run


@dataclass
class PretrainRun(Run):
    config: PretrainConfig
    model: MaskedAutoencoder
    images: dict[str, str] = field(default_factory=dict)
    """Fingerprint of the data."""
    value_range: ValueRange | None = None
    """Of pixels of more than 8 bits, as configured or measured."""
    mask_generator: str = "philox"
    """Draws the mask noise; mt19937 in runs begun before 0.2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.attention: dict[Stage, attention.Choice] = {}
        self.normalize = Normalize(self.config.pixel_mean, self.config.pixel_std, self.rt)

    @classmethod
    def create(cls, config: PretrainConfig, rt: Runtime, num_images: int) -> PretrainRun:
        """A run with initial weights, a function of the seed, that has no folder yet."""
        curriculum = build_curriculum(config, num_images, rt.world_size)
        torch.manual_seed(derive_seed(config.seed, "weights"))
        model = MaskedAutoencoder(**shape_of(config)).to(rt.device)
        network = trained_network(model, config, rt, curriculum)
        optimizer = adamw(model, config.weight_decay)
        run = cls(config, rt, curriculum, model, network, optimizer, Ledger.of(curriculum), 0)
        for stage in curriculum.stages:
            images = max(map(len, run.micro_batches(stage, rank=0)))
            run.attention[stage] = attention.choose(config.attention, model.shape, stage, images, rt)
        return run

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def is_sharded(self) -> bool:
        return self.config.fsdp and self.rt.is_distributed

    @property
    def peak_lr(self) -> float:
        return peak_lr(self.config, self.config.total_batch(self.rt.world_size))

    def prepare(self, images: Tensor, stage: Stage) -> Tensor:
        """uint8 [b, C, S, S] from the loader -> normalised float32 [b, C, s, s] at the stage's size, on the device."""
        return low_frequency_crop(self.normalize(images), stage.size_px, spectral_operator(self.config.lowfreq))

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

    def kernels(self, stage: Stage) -> AbstractContextManager:
        return attention.using(self.attention[stage].backend)

    def micro_loss(self, batch: Tensor, stage: Stage, rows: range) -> Tensor:
        return self.loss(self.prepare(batch, stage), stage, self.noise(stage, rows))

    def noise(self, stage: Stage, rows: range) -> Tensor:
        """Mask noise [b, L] of some rows of the current step."""
        if self.mask_generator == "philox":
            return self.rt.to_device(mask_noise(self.config.seed, self.step, rows, stage.patches))
        whole = mask_noise_of_batch(self.config.seed, self.step, stage.batch_size, stage.patches)
        return self.rt.to_device(whole[rows.start : rows.stop])

    def full_model(self) -> MaskedAutoencoder:
        """The model with all its weights, on rank 0 at least. All ranks call it."""
        if not self.is_sharded:
            return self.model
        state = sharded.snapshot(self.model.state_dict(), self.rt, full=True)
        if not self.rt.is_main:
            return self.model
        model = MaskedAutoencoder(**self.model.shape).to(self.rt.device)
        model.load_state_dict(state)
        return model

    def save(self, full: bool = False) -> None:
        """Have everything written that a resumed run needs, atomically, while training goes on. All ranks call it.

        Waits for the save before it, and raises what that one raised. A sharded model's are shards, unless `full`.
        """
        self.writer.wait("save")  # before there is memory for another copy
        state = identity(self.config, self.curriculum) | {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "ledger": self.ledger.state_dict(),
            "precision": self.rt.precision,
            "sampled_images": self.images,
            "value_range": self.value_range,
            "mask_generator": self.mask_generator,
        }
        in_shards = self.is_sharded and not full
        state, keep = sharded.snapshot(state, self.rt, full=not in_shards), self.config.keep_checkpoints
        group = self.rt.writing_group if in_shards else None

        def write() -> None:
            if in_shards:
                sharded.save(state, self.folder / run_folder.SHARDED, keep, group)
            elif self.rt.is_main:
                storage.save(state, self.folder / run_folder.CHECKPOINT, keep)
                run_folder.drop_shards(self.folder)
            if self.rt.is_main:
                files.write_json(self.folder / run_folder.LEDGER, state["ledger"])

        self.writer.submit("save", write)

    def restore(self, state: dict[str, Any], path: Path, flag: str, source: Path) -> None:
        """Go on from a checkpoint, read from `source`, or with the flag --branch begin where a finished run ended."""
        if flag == "--resume":
            check_same_run(state, self.config, self.curriculum, self.images, path)
            self.ledger = Ledger.from_state_dict(state["ledger"])
        else:
            check_branch(state, self.config, self.curriculum, self.images, path)
            spent = Ledger.from_state_dict(state["ledger"]).stages
            self.ledger.stages[: len(spent)] = spent
        sharded.restore(self.model, self.optimizer, state, source)
        self.step, self.mask_generator = state["step"], state.get("mask_generator", "mt19937")


def trained_network(model: MaskedAutoencoder, config: PretrainConfig, rt: Runtime, curriculum: Curriculum) -> nn.Module:
    """The model, compiled, recomputing, and shared with the other ranks or copied to them, as configured.

    Sharding replaces the parameters, so the optimiser comes after it.
    """
    if config.bf16_residual:
        if rt.precision != "bf16":
            raise ValueError("--bf16_residual needs --precision bf16, which auto does not choose on this device")
        model.residual_dtype = torch.bfloat16
    if config.compile:
        model.compile_blocks()
    if config.activation_checkpointing:
        model.recompute_blocks()
    if config.fsdp and rt.is_distributed:
        if rt.device.type not in ("cpu", "cuda"):
            raise ValueError(
                f"--fsdp is not supported on {rt.device.type}; leave it out, or choose --device cuda or cpu"
            )
        # Kept, a unit is as large as the casts of its parameters that the backward pass would hold in any case.
        rt.shard(model, fsdp_units(model), keep=rt.precision == "bf16" and not config.activation_checkpointing)
        return model
    counts = (
        len(micro_batches(s.batch_size, s.micro_size(config.batch_size), rank, rt.world_size, s.rows_per_image))
        for s in curriculum.stages
        for rank in range(rt.world_size)
    )
    return rt.parallel(model, static=max(counts) == 1, comm_hook=config.ddp_comm_hook)


def fsdp_units(model: MaskedAutoencoder) -> list[list[nn.Module]]:
    """What is gathered together: encoder blocks by four, and the decoder's, which are small. Few, for each costs time
    of the host and a collective; not all at once, so that communication overlaps the arithmetic of another unit."""
    encoder = list(model.encoder.blocks)
    return [*(encoder[i : i + 4] for i in range(0, len(encoder), 4)), list(model.decoder_blocks)]


def check_ranks(run: PretrainRun, num_images: int) -> None:
    """ValueError unless all ranks see the same data and step."""
    run.rt.check_equal_on_ranks(step=run.step, images=num_images, steps=run.curriculum.total_steps)
    # Compare the digests that rank 0 has; an image that one rank could not read is not a mismatch.
    digests = {i: int(run.images[i], 16) if i in run.images else None for i in run.rt.from_main(list(run.images))}
    run.rt.check_equal_on_ranks(**{f"image {i}": digest for i, digest in digests.items()})


def check_micro_batches(run: PretrainRun) -> None:
    """ValueError unless ranks of a sharded model have as many micro-batches: they gather its blocks for each."""
    ranks = range(run.rt.world_size if run.is_sharded else 0)
    for stage in run.curriculum.stages:
        counts = sorted({len(run.micro_batches(stage, rank)) for rank in ranks})
        if len(counts) > 1:
            raise ValueError(
                f"--fsdp: {stage.batch_size} images of {show_size(stage.size_px)} px are {counts[0]} micro-batches on "
                f"one rank and {counts[-1]} on another; make the total batch a multiple of the {len(ranks)} ranks"
            )
