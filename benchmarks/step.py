"""A training step of `mae_et` against one of transformers' ViTMAE: same shapes, same batch, identical work, in turn.

    python benchmarks/step.py                                       # ViT-B/16 and ViT-S/16, at 96, 160 and 224 px
    python benchmarks/step.py --models mae_vit_base_patch16 --batch_size 16 --curriculum vanilla --rounds 7
    python benchmarks/step.py --device cuda --batch_size 128 --json

Every contestant gets the same uint8 images at full size and does the same with them: normalise, spectral crop to the
stage's size, forward (all masked patches are decoded), loss on normalised pixels, backward, fused AdamW. Each model
runs in fp32 and in bf16 autocast; a round takes one step of each, in turn. ViTMAE is there twice: in a process of its
own, as torch and transformers leave it (rival.py; the first ratio), and in this one, which shares what mae_et sets for
threads and memory (the second ratio: the model's and the loop's part alone). `--batch_size` is the batch at full size;
smaller stages take more images for the same work (`--same_batch`: no). Utilisation: training FLOPs a second over those
of the best matrix product in the same run and precision. Memory: high-water mark of a step over what was in use before.
"""

from __future__ import annotations

import os

UNTOUCHED = dict(os.environ)  # what a process without mae_et would find

import mae_et  # noqa: F401, before torch: it sets how OpenMP threads wait

# isort: split
import contextlib
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
import tyro
from rich.console import Console
from rich.table import Table
from synthetic import LEARNING_RATE, Spread, loader_output, peak_memory, reset_peak_memory, synthetic_run
from torch import Tensor, nn

from mae_et.cli import explain
from mae_et.engine import runtime
from mae_et.engine.pretrain import PretrainRun
from mae_et.engine.step import take_step
from mae_et.interop import huggingface_config
from mae_et.plan.config import PretrainConfig
from mae_et.plan.curriculum import Stage
from mae_et.plan.shapes import show_size

OURS, THEIRS, THEIRS_HERE = "mae_et", "transformers ViTMAE", "ViTMAE, our process"
NUM_IMAGES = 1_000_000  # of a data set: whole steps of every stage
MATMUL_SHAPES = ((1024, 1024, 1024), (2048, 2048, 2048), (4096, 1024, 4096))
CUDA_MATMUL_SHAPES = ((4096, 4096, 4096), (8192, 8192, 8192), (16384, 4096, 4096))


@dataclass(frozen=True)
class StepConfig:
    """Time training steps against transformers' ViTMAE."""

    models: tuple[str, ...] = ("mae_vit_base_patch16", "mae_vit_small_patch16")
    """Models of mae_et to time."""
    curriculum: str = "et_pp"
    """Whose sizes: vanilla is 224 px alone, et_pp 96, 160 and 224."""
    batch_size: int = 16
    """Images of a step at full size."""
    same_batch: bool = False
    """The same number of images at every size."""
    rounds: int = 5
    """Steps of each contestant."""
    precisions: tuple[str, ...] = ("auto",)
    """bf16, fp32 or both; auto is what main_pretrain.py would choose: bf16 where it is fast."""
    decoder: str = "self"
    """Of mae_et; with cross the work is no longer identical."""
    device: str = "auto"
    """As of main_pretrain.py."""
    compile: bool = False
    """torch.compile both models."""
    json: bool = False
    """Machine-readable output."""


@dataclass
class Contestant:
    """One model in one precision at one size. A step takes uint8 images to new weights."""

    run: PretrainRun
    stage: Stage
    theirs: nn.Module | None = None

    def __post_init__(self) -> None:
        self.batches = loader_output(self.run, self.stage)
        if self.theirs is not None:
            self.optimizer = torch.optim.AdamW(self.theirs.parameters(), lr=LEARNING_RATE, fused=True)

    def warm_up(self) -> int:
        """Two steps that don't count: the first makes the optimiser's state, the second's memory is returned."""
        self._step()
        before = reset_peak_memory(self.run.rt.device)
        self._step()
        return peak_memory(self.run.rt.device) - before

    def step(self) -> float:
        """Seconds of one step."""
        began = time.perf_counter()
        self._step()
        return time.perf_counter() - began

    def _step(self) -> None:
        if self.theirs is None:
            take_step(self.run, iter(self.batches), self.stage, LEARNING_RATE)
        else:
            self._their_step(self.batches[0])
        self.run.rt.synchronize()

    def _their_step(self, images: Tensor) -> None:
        prepared = self.run.prepare(images, self.stage)
        noise = torch.rand(len(images), self.stage.patches, device=prepared.device)
        with self.run.rt.autocast():
            loss = self.theirs(prepared, noise=noise).loss
        loss.backward()
        nn.utils.get_total_norm(p.grad for p in self.theirs.parameters() if p.grad is not None)  # as take_step does
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Rival:
    """A :class:`Contestant` of transformers in a process of its own, to which mae_et has set nothing."""

    def __init__(self, options: StepConfig, model: str, precision: str, stage_index: int) -> None:
        command = [sys.executable, Path(__file__).with_name("rival.py"), json.dumps(asdict(options))]
        command += [model, precision, str(stage_index)]
        self.process = subprocess.Popen(
            command, env=UNTOUCHED, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def warm_up(self) -> int:
        return int(self._ask("warm_up"))

    def step(self) -> float:
        return float(self._ask("step"))

    def _ask(self, what: str) -> str:
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


@dataclass
class Times:
    """Of one contestant: what is reported."""

    name: str
    precision: str
    contestant: Contestant | Rival
    step_bytes: int = 0
    seconds: list[float] = field(default_factory=list)


def main() -> None:
    options = tyro.cli(StepConfig, use_underscores=True)
    if options.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {options.rounds}")
    reports = []
    for model in options.models:
        reports += measure(options, model)
    facts = {"torch": torch.__version__, "transformers": transformers.__version__, "threads": torch.get_num_threads()}
    if options.json:
        print(json.dumps(facts | {"options": asdict(options), "results": reports}, indent=1))
    else:
        show(reports, facts)


def pretrain_config(options: StepConfig, model: str) -> PretrainConfig:
    return PretrainConfig(
        model=model,
        curriculum=options.curriculum,
        batch_size=options.batch_size,
        early_large_batch=not options.same_batch,
        norm_pix_loss=True,
        decoder=options.decoder,
        device=options.device,
        compile=options.compile,
        warmup_epochs=0,
    )


def measure(options: StepConfig, model: str) -> list[dict[str, Any]]:
    """One row per size, model and precision."""
    rows = []
    with contextlib.ExitStack() as stack:
        # Entering decides how attention is computed; the model built next keeps it.
        runs = {}
        for precision in options.precisions:
            rt = stack.enter_context(runtime.start(options.device, precision))
            runs[rt.precision] = synthetic_run(pretrain_config(options, model), rt, NUM_IMAGES)
        best = {precision: best_matmul(run.rt) for precision, run in runs.items()}
        for index in range(len(next(iter(runs.values())).curriculum.stages)):
            rows += measure_stage(options, model, index, runs, best)
    return rows


def measure_stage(
    options: StepConfig, model: str, index: int, runs: dict[str, PretrainRun], best: dict[str, float]
) -> list[dict[str, Any]]:
    """Rows of one size: a round takes one step of each contestant."""
    with contextlib.ExitStack() as stack:
        everyone = []
        for precision, run in runs.items():
            stage = run.curriculum.stages[index]
            rival = stack.enter_context(contextlib.closing(Rival(options, model, precision, index)))
            everyone += [
                Times(OURS, precision, Contestant(run, stage)),
                Times(THEIRS, precision, rival),
                Times(THEIRS_HERE, precision, Contestant(run, stage, vit_mae(run, stage))),
            ]
        for one in everyone:
            one.step_bytes = one.contestant.warm_up()
        for _ in range(options.rounds):
            for one in everyone:
                one.seconds.append(one.contestant.step())
        return [row(model, runs[one.precision], index, one, everyone, best[one.precision]) for one in everyone]


def vit_mae(run: PretrainRun, stage: Stage) -> nn.Module:
    """transformers' ViTMAE of the same shape, for inputs of the stage's size."""
    shape = replace(run.model.shape, img_size=stage.size_px)
    patches = stage.patches
    ratio = 1 - (stage.num_visible + 0.5) / patches  # theirs keeps int(L · (1 − ratio))
    config = huggingface_config(shape, norm_pix_loss=True, mask_ratio=ratio)
    assert int(patches * (1 - ratio)) == stage.num_visible and stage.num_predicted == patches - stage.num_visible
    model = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**config)).to(run.rt.device).train()
    return torch.compile(model, dynamic=False) if run.config.compile else model


def best_matmul(rt: runtime.Runtime) -> float:
    """The most FLOP/s that a matrix product reaches here in the precision of the run."""
    dtype, best = (torch.bfloat16 if rt.precision == "bf16" else torch.float32), 0.0
    for m, k, n in CUDA_MATMUL_SHAPES if rt.device.type == "cuda" else MATMUL_SHAPES:
        a, b = torch.randn(m, k, device=rt.device, dtype=dtype), torch.randn(k, n, device=rt.device, dtype=dtype)
        for _ in range(8):
            rt.synchronize()
            began = time.perf_counter()
            a @ b
            rt.synchronize()
            best = max(best, 2 * m * k * n / (time.perf_counter() - began))
    return best


def row(model: str, run: PretrainRun, index: int, mine: Times, everyone: list[Times], best: float) -> dict[str, Any]:
    """What was measured of one contestant, and how much faster it is than ViTMAE in the same precision."""
    stage = run.curriculum.stages[index]
    rate = Spread.of([stage.batch_size / seconds for seconds in mine.seconds])

    def speedup_over(name: str) -> dict[str, float]:
        theirs = next(other for other in everyone if (other.name, other.precision) == (name, mine.precision))
        return vars(Spread.of([their / our for our, their in zip(mine.seconds, theirs.seconds, strict=True)]))

    return {
        "model": model,
        "contestant": mine.name,
        "precision": mine.precision,
        "device": run.rt.describe(),
        "size_px": stage.size_px,
        "patches": stage.patches,
        "batch_size": stage.batch_size,
        "images_per_second": vars(rate),
        "speedup_over_transformers": speedup_over(THEIRS),
        "speedup_in_our_process": speedup_over(THEIRS_HERE),
        "flops_per_image": stage.flops_per_image,
        "best_matmul_flops": best,
        "utilisation": rate.median * stage.flops_per_image / best,
        "step_bytes": mine.step_bytes,
    }


def show(rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    table = Table(title=", ".join(f"{name} {value}" for name, value in facts.items()), title_justify="left")
    heads = ("model", "size", "batch", "what", "precision", "images/s (quartiles)", "× transformers")
    for head in (*heads, "× in our process", "of best matmul", "memory of a step"):
        table.add_column(head, justify="right")
    for found in rows:
        table.add_row(
            found["model"].removeprefix("mae_"),
            show_size(found["size_px"]),
            str(found["batch_size"]),
            found["contestant"],
            found["precision"],
            str(Spread(**found["images_per_second"])),
            f"{found['speedup_over_transformers']['median']:.2f}",
            f"{found['speedup_in_our_process']['median']:.2f}",
            f"{found['utilisation']:.2f}",
            f"{found['step_bytes'] / 2**20:,.0f} MiB",
            end_section=found["contestant"] == THEIRS_HERE and found["precision"] == rows[-1]["precision"],
        )
    console = Console(width=170)
    console.print(table)
    console.print(rows[0]["device"].rpartition(",")[0])
    for line in scaling_lines(rows):
        console.print(line)


def scaling_lines(rows: list[dict[str, Any]]) -> list[str]:
    """images/s of each size over images/s at full size times the FLOP ratio: 1 where small stages waste nothing."""
    lines = []
    for model, precision in dict.fromkeys((found["model"], found["precision"]) for found in rows):
        ours = [
            found
            for found in rows
            if (found["model"], found["precision"], found["contestant"]) == (model, precision, OURS)
        ]
        full = ours[-1]
        for found in ours[:-1]:
            faster = found["images_per_second"]["median"] / full["images_per_second"]["median"]
            cheaper = full["flops_per_image"] / found["flops_per_image"]
            lines.append(
                f"{model} {precision}: {show_size(found['size_px'])} px is {faster:.2f}× faster by the clock, "
                f"{cheaper:.2f}× by FLOPs: {faster / cheaper:.2f}"
            )
    return lines


if __name__ == "__main__":
    explain("step.py", main)
