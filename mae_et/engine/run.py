"""A pretraining run: model, loss of a micro-batch, saving and going on, and whether its ranks agree."""

from __future__ import annotations

import logging
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import files
from ..data.pixels import ValueRange
from ..data.stream import derive_seed, mask_noise, mask_noise_of_batch, micro_batches
from ..model import MaskedAutoencoder
from ..plan.build import build_curriculum, shape_of
from ..plan.config import PretrainConfig
from ..plan.cost import Ledger
from ..plan.curriculum import Curriculum, Stage
from ..plan.shapes import height_width, show_size, spectral_operator
from ..plan.shared import peak_lr
from ..spectral import low_frequency_input
from ..targets import hog_target, pixel_target, reconstruction_loss, take_patches
from . import attention, run_folder, sharded, storage
from .graphs import Graph, Inputs, wants_graphs
from .optim import adamw, muon
from .resume import check_branch, check_peak_lr, check_same_run, identity
from .runtime import Normalize, Runtime
from .step import Run

log = logging.getLogger(__name__)


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
        if self.config.compile:  # blocks are, in the model; these are many small operations on whole images
            self.normalize = torch.compile(self.normalize.__call__, dynamic=False)
            self.compare = torch.compile(self.compare, dynamic=False)
        self.captures = wants_graphs(self.config.cuda_graphs, self.rt, self.is_sharded)
        self.graphs: dict[tuple[Stage, int, bool], Graph] = {}

    @classmethod
    def create(cls, config: PretrainConfig, rt: Runtime, num_images: int) -> PretrainRun:
        """A run with initial weights, a function of the seed, that has no folder yet."""
        curriculum = build_curriculum(config, num_images, rt.world_size)
        torch.manual_seed(derive_seed(config.seed, "weights"))
        model = MaskedAutoencoder(**shape_of(config)).to(rt.device)
        network = trained_network(model, config, rt, curriculum)
        if config.opt == "muon":
            optimizer: torch.optim.Optimizer = muon(model, config.weight_decay, rt.precision)
        else:
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
        return low_frequency_input(self.normalize(images), stage, spectral_operator(self.config.lowfreq))

    def loss(self, images: Tensor, stage: Stage, noise: Tensor) -> Tensor:
        """Mean loss of a micro-batch of prepared images; noise [b, L]."""
        with self.rt.autocast():
            pred, ids, _ = self.network(images, stage.num_visible, stage.num_predicted, noise)
        return self.compare(pred, images, ids)

    def compare(self, pred: Tensor, images: Tensor, ids: Tensor) -> Tensor:
        """Mean loss of predictions [b, P, D] of the patches ids [b, P]."""
        with torch.no_grad():
            if self.config.target == "hog":
                target = take_patches(hog_target(images, self.model.patch_size), ids)
            else:
                target = pixel_target(images, self.model.patch_size, self.config.norm_pix_loss, ids)
        return reconstruction_loss(pred, target)

    def kernels(self, stage: Stage) -> AbstractContextManager:
        return attention.using(self.attention[stage].backend)

    def micro_loss(self, batch: tuple[Tensor, Tensor], stage: Stage, rows: range) -> Tensor:
        """batch: uint8 images from the loader, on any device, and their noise."""
        images, noise = batch
        return self.loss(self.prepare(images, stage), stage, noise)

    def accumulate(self, batch: Tensor, stage: Stage, rows: range, reduce: bool) -> Tensor:
        images, noise = self._inputs.put(batch) if self._inputs else batch, self.noise(stage, rows)
        graph = self.graphs.get((stage, *self._kind(rows, reduce)))
        return graph.replay(noise) if graph else self.backward((images, noise), stage, rows, reduce)

    def _kind(self, rows: range, reduce: bool) -> tuple[int, bool]:
        """What graphs of a stage differ in."""
        return len(rows), reduce or not self.rt.is_distributed

    @cached_property
    def _inputs(self) -> Inputs | None:
        """Where micro-batches of this rank arrive on a CUDA device."""
        if self.rt.device.type != "cuda":
            return None
        stages = self.curriculum.stages
        sizes = (len(rows) * math.prod(self._loader_shape(s)) for s in stages for rows in self.micro_batches(s))
        return Inputs(max(sizes), self.rt.device)

    def _loader_shape(self, stage: Stage) -> tuple[int, int, int]:
        return self.config.in_chans, *height_width(stage.loader_px)

    def zero_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=not self.graphs)  # graphs hold the addresses of gradients

    def warm(self, stage: Stage, rounds: int = 1) -> None:
        """Run each shape of a stage on blank images, `rounds` times, so that what is made once is there."""
        # The sizes of all ranks, since each backward is one that they do together.
        ranks = range(self.rt.world_size)
        for size in sorted({len(rows) for rank in ranks for rows in self.micro_batches(stage, rank)}):
            images = torch.zeros(size, *self._loader_shape(stage), dtype=torch.uint8, device=self.rt.device)
            for _ in range(rounds):
                noise = torch.rand(size, stage.patches, device=self.rt.device)
                self.backward((images, noise), stage, range(size), reduce=True)

    def capture(self, stage: Stage, pool: tuple[int, int]) -> None:
        """Record a graph for each shape of this rank's micro-batches of a stage, which is warm.

        Where one can't be recorded on some rank, all go on without any, and say so; ValueError with --cuda_graphs on.
        """
        micro_batches, problem = self.micro_batches(stage), ""
        try:
            for size, reduce in sorted({self._kind(rows, rows is micro_batches[-1]) for rows in micro_batches}):
                images, rows = self._inputs.view((size, *self._loader_shape(stage))), range(size)
                noise = torch.rand(size, stage.patches, device=self.rt.device)
                work = partial(self.backward, (images, noise), stage, rows, reduce)
                self.graphs[stage, size, reduce] = Graph(work, noise, pool)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            problem = str(error).partition("\n")[0]
        if self.rt.any(bool(problem)):
            self.captures, problem = False, problem or "another rank can't"
            self.graphs.clear()
            if self.config.cuda_graphs == "on":
                raise ValueError(f"--cuda_graphs on: a step can't be captured ({problem}); choose auto or off")
            log.warning("no CUDA graphs: a step can't be captured (%s); kernels are launched one by one", problem)

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
            "peak_lr": self.peak_lr,
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
        check_peak_lr(f"{flag} {path}", state, self.peak_lr)
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
