"""Do equal FLOPs take equal seconds? Times steps of every stage of a recipe against steps of vanilla MAE, in turn.

    python benchmarks/seconds.py                # fashion_mnist_etpp, and ViT-B/16 at 256 images a step (12 minutes)
    python benchmarks/seconds.py --recipes in1k_vitb_etpp400_hog --flags="--total_batch_size 1024 --device cuda"
    python benchmarks/seconds.py --recipes fast --baseline MINE.yaml --loader --flags="--num_workers 0"

Per stage: how many times faster an image is than at full size, by the clock and by FLOPs, and the first over the
second (1: the stage wastes nothing). In all: seconds of the recipe's curriculum over those of vanilla MAE for the same
FLOPs. Real stages, micro-batches, masks, spectral crop, target, model and optimiser, whose updates' FLOPs count. A
round takes one step of each kind, so that a machine that slows down slows all of them.

Vanilla MAE is the recipe's own, of the same batch and optimiser; with --baseline it is another recipe, such as the
baseline of a study.

Images are noise in memory and no loader is timed; with --loader each stage reads and decodes its own within the step,
in the same process, which needs --num_workers 0.
"""

from __future__ import annotations

import mae_et  # noqa: F401, before torch: it sets how OpenMP threads wait

# isort: split
import json
import shlex
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from synthetic import Spread, Stopwatch, synthetic_run

from mae_et.cli import explain
from mae_et.data.sources import count_images, open_source
from mae_et.engine import runtime
from mae_et.plan.build import as_vanilla, build_curriculum
from mae_et.plan.config import PretrainConfig
from mae_et.plan.curriculum import Stage
from mae_et.plan.flags import parse
from mae_et.plan.shapes import show_size

#: Recipe -> flags that make it fit a laptop: what is accumulated over, not what a micro-batch holds.
RECIPES = {
    "fashion_mnist_etpp": "--num_images 60000",
    "in1k_vitb_etpp400": "--total_batch_size 256 --batch_size 32",
}


@dataclass(frozen=True)
class SecondsConfig:
    """Seconds of a curriculum over those of vanilla MAE, at equal FLOPs."""

    recipes: tuple[str, ...] = tuple(RECIPES)
    """Recipes to time."""
    baseline: str = ""
    """Recipe of vanilla MAE to time them against; default: each recipe's own."""
    flags: str = ""
    """Further flags of main_pretrain.py; they overrule those that make a known recipe small."""
    rounds: int = 15
    """Steps of each kind."""
    loader: bool = False
    """Read, crop and resize real images within the step."""
    json: bool = False
    """Machine-readable output."""


def main() -> None:
    options = tyro.cli(SecondsConfig, use_underscores=True)
    if options.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {options.rounds}")
    reports = []
    for recipe in options.recipes:
        flags = shlex.split(options.flags or RECIPES.get(recipe, ""))
        config = parse(PretrainConfig, ["--recipe", recipe, *flags])
        baseline = parse(PretrainConfig, ["--recipe", options.baseline, *flags]) if options.baseline else None
        with runtime.start(config.device, config.precision) as rt:
            report = {"recipe": recipe, "device": rt.describe(), "threads": torch.get_num_threads()}
            reports.append(report | measure(config, rt, options.rounds, options.loader, baseline))
    if options.json:
        print(json.dumps(reports, indent=1))
        return
    for report in reports:
        show(report)


def measure(
    config: PretrainConfig,
    rt: runtime.Runtime,
    rounds: int,
    loader: bool = False,
    baseline: PretrainConfig | None = None,
) -> dict[str, Any]:
    """Seconds per step of each stage and of vanilla MAE, and what follows for the whole curriculum.

    baseline: vanilla MAE; default: with all that `config` says but its curriculum. ValueError if it has several stages.
    """
    images = count_images(config)
    run = synthetic_run(config, rt, images)
    vanilla_plan = build_curriculum(baseline or as_vanilla(config), images, rt.world_size)
    if len(vanilla_plan.stages) > 1:
        raise ValueError(f"--baseline: vanilla MAE has one stage, this recipe {len(vanilla_plan.stages)}")
    source = open_source(config.data_path, "train") if loader else None
    vanilla = Stopwatch.of(synthetic_run(baseline, rt, images) if baseline else run, vanilla_plan.stages[0], source)
    stages = [Stopwatch.of(run, stage, source) for stage in run.curriculum.stages]
    for _ in range(rounds):
        for watch in (vanilla, *stages):
            watch.step()

    def per_image(watch: Stopwatch) -> float:
        return Spread.of(watch.seconds).median / watch.stage.batch_size

    def flops(stage: Stage) -> float:
        return stage.flops_per_step / stage.batch_size

    full_seconds, full_flops = per_image(vanilla), flops(vanilla.stage)
    rows = []
    for watch in stages:
        faster, cheaper = full_seconds / per_image(watch), full_flops / flops(watch.stage)
        # Of each round on its own: what slows the machine for a while slows both.
        pairs = zip(vanilla.seconds, watch.seconds, strict=True)
        scale = watch.stage.batch_size / vanilla.stage.batch_size / cheaper
        rows.append(
            {
                "size_px": watch.stage.size_px,
                "batch_size": watch.stage.batch_size,
                "micro_batch": max(map(len, run.micro_batches(watch.stage))),
                "seconds_per_step": vars(Spread.of(watch.seconds)),
                "images_per_second": 1 / per_image(watch),
                "speedup_seconds": faster,
                "speedup_flops": cheaper,
                "efficiency": vars(Spread.of([full / mine * scale for full, mine in pairs])),
            }
        )
    seconds = sum(stage.images * per_image(watch) for stage, watch in zip(run.curriculum.stages, stages, strict=True))
    same_flops = run.curriculum.total_flops / full_flops * full_seconds
    return {
        "vanilla": {
            "batch_size": vanilla.stage.batch_size,
            "seconds_per_step": vars(Spread.of(vanilla.seconds)),
            "images_per_second": 1 / full_seconds,
        },
        "stages": rows,
        "seconds_over_vanilla_at_equal_flops": seconds / same_flops,
    }


def show(report: dict[str, Any]) -> None:
    table = Table(title=f"{report['recipe']} on {report['device']}, {report['threads']} threads", title_justify="left")
    heads = (
        "size",
        "batch",
        "micro-batch",
        "s/step (quartiles)",
        "images/s",
        "faster by the clock",
        "by FLOPs",
        "ratio",
    )
    for head in heads:
        table.add_column(head, justify="right")
    vanilla = report["vanilla"]
    seconds = str(Spread(**vanilla["seconds_per_step"]))
    table.add_row("vanilla", str(vanilla["batch_size"]), "", seconds, f"{vanilla['images_per_second']:.4g}", "", "", "")
    for row in report["stages"]:
        table.add_row(
            show_size(row["size_px"]),
            str(row["batch_size"]),
            str(row["micro_batch"]),
            str(Spread(**row["seconds_per_step"])),
            f"{row['images_per_second']:.4g}",
            f"{row['speedup_seconds']:.2f}×",
            f"{row['speedup_flops']:.2f}×",
            f"{Spread(**row['efficiency'])}",
        )
    console = Console(width=140)
    console.print(table)
    console.print(f"seconds over vanilla MAE's at equal FLOPs: {report['seconds_over_vanilla_at_equal_flops']:.3f}")


if __name__ == "__main__":
    explain("seconds.py", main)
