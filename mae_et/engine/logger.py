"""What a person sees of a run: metrics.jsonl and its sinks, a line per report, and what the run cost at its end."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from ..console import WideTable, console
from ..data.sources import is_prepared
from ..files import append_json_line, read_json_lines, write_json_lines
from ..plan.build import shape_of
from ..plan.config import PretrainConfig
from ..plan.cost import Ledger, StageCost
from ..plan.curriculum import Curriculum, Stage
from ..plan.schedules import published_replay
from ..plan.shapes import show_size
from ..plan.shared import DataFlags, LauncherFlags, RunFlags
from .run_folder import METRICS
from .sinks import open_sinks
from .step import Run

log = logging.getLogger(__name__)

MAX_DATA_WAIT = 0.1
"""Print data-wait hints above this share of a stage's time."""
BAR_WIDTH = 8
LINE = Column(no_wrap=True, overflow="ellipsis")
SEPARATOR = " · "
"""Between the facts of a line, the most important of which come first."""


class RunLogger:
    """Reports a run on the console, in metrics.jsonl and to the sinks of --log_to. Off on all ranks but one.

    On a terminal a progress bar holds the latest line; elsewhere lines are printed below each other.
    """

    def __init__(
        self, folder: Path, config: RunFlags, curriculum: Curriculum, first_step: int, ledger: Ledger, on: bool
    ) -> None:
        self.curriculum, self.on, self.live, self.last = curriculum, on, on and console.is_terminal, ledger.total
        self.latest: dict[str, Any] = {}
        """The latest value of each name in metrics.jsonl."""
        self.bar = Progress(
            BarColumn(BAR_WIDTH),
            TextColumn("{task.percentage:3.0f}% · {task.fields[left]} left · {task.description}", table_column=LINE),
            console=console,
            disable=not self.live,
        )
        self.task = self.bar.add_task("starting", total=curriculum.total_flops, left="?")
        if on:
            self.metrics = folder / METRICS
            kept = [record for record in read_json_lines(self.metrics) if record["step"] < first_step]
            write_json_lines(self.metrics, kept)
            for record in kept:
                self.latest |= record
        self.sinks = open_sinks(folder, config, first_step) if on else []

    def __enter__(self) -> RunLogger:
        self.bar.start()
        return self

    def __exit__(self, failure: object, *_: object) -> None:
        self.bar.stop()
        for sink in self.sinks:
            sink.close(failed=failure is not None)

    def rates(self, total: StageCost) -> dict[str, float]:
        """Images and seconds so far, and images per second and share of waiting for data since this was last called."""
        images, seconds = total.images - self.last.images, total.seconds - self.last.seconds
        data_seconds, self.last = total.data_seconds - self.last.data_seconds, total
        return {
            "images": total.images,
            "images_per_second": images / seconds if seconds else 0.0,
            "data_wait": data_seconds / seconds if seconds else 0.0,
            "seconds": total.seconds,
        }

    def report(self, prefix: str, record: Mapping[str, Any], line: str, total: StageCost) -> None:
        """Write a record, whose "step" was the latest, and show its line. Numbers go to sinks as prefix/name."""
        if not self.on:
            return
        append_json_line(self.metrics, record)
        self.latest |= record
        numbers = {f"{prefix}/{k}": v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
        for sink in self.sinks:
            sink.log(numbers, record["step"])
        done = self.curriculum.flops_before(record["step"] + 1)  # with what --start_epoch skips, and no ledger holds
        left = timedelta(seconds=round((self.curriculum.total_flops - done) / total.flops * total.seconds))
        if self.live:
            room = console.width - BAR_WIDTH - len(f" 100% · {left} left · ")
            self.bar.update(self.task, completed=done, description=fitting(line, room), left=left)
        else:
            console.print(f"{line} · {left} left", soft_wrap=True)


def fitting(line: str, room: int) -> str:
    """As many facts of a line, whole and from its beginning, as there is room for; one at least."""
    facts = line.split(SEPARATOR)
    while len(facts) > 1 and len(SEPARATOR.join(facts)) > room:
        facts.pop()
    return SEPARATOR.join(facts)


def warn_of_rates(
    floor: float | None, peak: float, warmup: float | None, epochs: float, steps: int, hold: float = 0.0
) -> None:
    """Of learning rates that are hardly meant: --min_lr, --warmup_epochs, --epochs and --hold_epochs."""
    floor, warmup = floor or 0.0, warmup or 0.0
    if floor > peak:
        log.warning("--min_lr %g is above the peak, %g: the learning rate grows towards the end", floor, peak)
    if warmup and steps == 1:
        log.warning("--epochs %g is one step, whose learning rate is 0: it never trains anything", epochs)
    elif warmup >= epochs:
        log.warning("--warmup_epochs %g of --epochs %g: the learning rate never reaches its peak", warmup, epochs)
    elif warmup + hold >= epochs:
        words = "--warmup_epochs %g and --hold_epochs %g of --epochs %g: the learning rate never falls"
        log.warning(words, warmup, hold, epochs)


def log_plan(run: Run, vanilla: Curriculum) -> None:
    """Log what is going to run, and what it is going to cost."""
    config, rt, curriculum = run.config, run.rt, run.curriculum
    parameters = sum(p.numel() for p in run.model.parameters()) / 1e6
    log.info("%s on %s", config.model, rt.describe())
    log.info("%.1f M parameters · %s images in %s", parameters, f"{curriculum.num_images:,}", config.data_path)
    batch = vanilla.stages[0].batch_size
    log.info(
        "total batch %d = %d device(s) × %d micro-batch(es) of at most %d · peak lr %.2e",
        *(batch, rt.world_size, vanilla.stages[0].micro_batches(config.batch_size, rt.world_size)),
        *(config.batch_size, run.peak_lr),
    )
    warn_of_launchers(config)
    if config.fsdp and not rt.is_distributed:
        log.warning("--fsdp: one rank has nothing to share out; start with torchrun for more")
    for i, stage in enumerate(curriculum.stages):
        log.info(
            "stage %d: %s px, %d of %d patches visible, %d predicted, %s steps, %.1f passes, %.0f%% of the compute",
            *(i + 1, show_size(stage.size_px), stage.num_visible, stage.patches, stage.num_predicted),
            *(f"{stage.steps:,}", curriculum.passes(stage), 100 * stage.flops / curriculum.total_flops),
        )
        if stage.cutoff_px:
            log.info("stage %d: only frequencies that %s px hold", i + 1, show_size(stage.cutoff_px))
        if stage.replay > 1:
            log.info(
                "stage %d: each decoded sample in %d steps, from a replay buffer of %.2f GiB over all devices",
                *(i + 1, stage.replay, stage.replay_bytes / 2**30),
            )
    ratio = curriculum.total_images * vanilla.total_flops / vanilla.total_images / curriculum.total_flops
    log.info("%.2e training FLOPs; vanilla MAE needs %.2f× that for the same images", curriculum.total_flops, ratio)
    if curriculum.update_share:
        log.info("%.0f%% of them are updates by %s", 100 * curriculum.update_share, config.opt)
    warn_of_rates(
        *(config.min_lr, run.peak_lr, config.warmup_epochs, config.epochs, curriculum.total_steps, config.hold_epochs)
    )
    if abs(curriculum.remainder_images) > 0.1 * curriculum.total_images:
        log.warning("whole steps are %+.0f images off what was asked for", -curriculum.remainder_images)
    if run.step:
        log.info("going on after step %d of %d", run.step, curriculum.total_steps)


def warn_of_launchers(config: LauncherFlags) -> None:
    if config.nodes or config.ngpus or config.use_volta32:
        log.warning("--nodes, --ngpus and --use_volta32 are a launcher's: start with torchrun for more devices")


def data_wait_hints(
    config: DataFlags, curriculum: Curriculum, ledger: Ledger, is_jpeg: bool, spare_cores: int
) -> list[str]:
    """A line for every stage that waited for data too long, with what would help.

    config: of pretraining or of fine-tuning, which has less to choose from.
    """
    lines = []
    for i, (stage, cost) in enumerate(zip(curriculum.stages, ledger.stages, strict=True)):
        if cost.data_wait <= MAX_DATA_WAIT:
            continue
        pretraining = isinstance(config, PretrainConfig)
        small = pretraining and stage.size_px != config.input_size
        choices = {
            f"more --num_workers ({spare_cores} core{'s' * (spare_cores != 1)} left)": spare_cores > 0,
            "--lowfreq scaled (decodes JPEGs smaller)": small and is_jpeg and config.lowfreq != "scaled",
            "--replay": small and stage.replay == 1 and _would_replay(stage, config),
            "--views_per_image 2": pretraining and stage.views_per_image == 1,
            "python -m mae_et prepare (smaller files)": is_jpeg and not is_prepared(config.data_path),
        }
        fitting = [remedy for remedy, fits in choices.items() if fits]
        lines.append(
            f"stage {i + 1}, {show_size(stage.size_px)} px, waited for data {cost.data_wait:.0%} of its time; what "
            f"helps: {', '.join(fitting) or 'more cores'}"
        )
    return lines


def _would_replay(stage: Stage, config: PretrainConfig) -> bool:
    """Whether --replay replays a stage."""
    return published_replay(stage.size_px, config.input_size, shape_of(config).patch_size) > 1


def ledger_table(ledger: Ledger, curriculum: Curriculum, vanilla_flops_per_image: float) -> WideTable:
    """What a run has cost, stage by stage, next to vanilla MAE's FLOPs for the same number of images."""
    heads = (
        "size",
        "steps",
        "images",
        "decoded",
        "images/s",
        "seconds",
        "data wait",
        "FLOPs",
        "share",
        "vanilla FLOPs",
        "ratio",
    )
    total = ledger.total

    def row(name: str, cost: StageCost) -> tuple[str, ...]:
        vanilla = cost.images * vanilla_flops_per_image
        return (
            name,
            f"{cost.steps:,}",
            f"{cost.images:,}",
            f"{cost.decoded_images:,}",
            f"{cost.images / cost.seconds if cost.seconds else 0:,.0f}",
            f"{cost.seconds:,.1f}",
            f"{cost.data_wait:.0%}",
            f"{cost.flops:.2e}",
            f"{cost.flops / total.flops if total.flops else 0:.0%}",
            f"{vanilla:.2e}",
            f"{vanilla / cost.flops if cost.flops else 0:.2f}×",
        )

    stages = zip(curriculum.stages, ledger.stages, strict=True)
    rows = [row(show_size(stage.size_px), cost) for stage, cost in stages]
    caption = f"Online quality apart from that: {total.probe_seconds:,.1f} s, {total.probe_flops:.2e} FLOPs"
    title = "Cost, and vanilla MAE's for the same images"
    return WideTable(title, heads, rows, row("total", total), caption if total.probe_flops else "")
