"""Comparison of what runs cost and gave, and of what the baseline would have needed. Reads run folders; never trains.

A run is one folder; an arm is all runs of one configuration (its seeds); a family is arms that differ only in length.
Two answers for each arm and evaluation: **equal compute** (the difference in quality at the same FLOPs, or seconds) and
**equal quality** (the FLOPs, or seconds, that the baseline needs).
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from ..engine import run_folder
from ..plan.flags import RUN
from ..plan.shapes import as_size, num_patches, show_size
from .answers import AXES, equal_compute, equal_quality, wide_seconds
from .arms import Arm, arm_fields, baseline_arms, group, varied_fields
from .runs import RunRecord, evaluated_on, expand, flag_value, incomparable, on_one_clock, read_run
from .words import ONLINE

LOSS_POINTS = 100
"""Points per run that a report keeps of a loss curve."""


@dataclass(frozen=True)
class CompareConfig:
    """Compare what runs cost and gave: `compare RUN… [--baseline RUN…] [--out DIR] [--json]`."""

    runs: Annotated[tuple[str, ...], RUN, tyro.conf.Positional]
    """Run folders, or folders or zip archives that hold run folders."""
    baseline: Annotated[tuple[str, ...], RUN] = ()
    """Runs to compare with, of one or several lengths; default: the runs with --curriculum vanilla."""
    out: Annotated[str, RUN] = ""
    """Folder for report.html, report.md, report.json and the pictures; default: only the table."""
    json: Annotated[bool, RUN] = False
    """Print the report as JSON instead of the table."""
    force: Annotated[bool, RUN] = False
    """Compare what differs in data, model or evaluation all the same; the report says so."""
    title: Annotated[str, RUN] = "Cost and quality"
    """Title of the report."""


def compare(config: CompareConfig) -> dict[str, Any]:
    """The report as plain values; `report` renders it.

    Raises FileNotFoundError or ValueError, with one line, for folders that hold no run, and for runs that can't be
    compared, naming what differs.
    """
    if not (config.runs or config.baseline):
        raise ValueError("RUN is missing: give run folders, or folders or zip archives that hold them")
    named = expand(config.baseline, "--baseline")
    runs = [read_run(folder) for folder in (named | expand(config.runs, "RUN")).values()]
    differences = incomparable(runs)
    if differences and not config.force:
        raise ValueError(f"not comparable: {differences[0]}; --force compares all the same and says so in the report")
    clocks = clock_notes(runs)
    runs = on_one_clock(runs)
    arms = group(runs)
    baseline = baseline_arms(arms, named)
    protocols = sorted({protocol for run in runs for protocol in run.evaluations})
    varied = varied_fields(arm.runs[0] for arm in arms)
    asked = [
        (arm, baseline, protocol, axis)
        for arm, protocol, axis in itertools.product(arms, protocols, AXES)
        if arm.pretrained and arm not in baseline and arm.quality(protocol)
    ]
    return {
        "title": config.title,
        "baseline": [arm.name for arm in baseline],
        "protocols": protocols,
        "forced": differences,
        "warnings": clocks + warnings(runs, arms, protocols),
        "wide_seconds": wide_seconds(arms),
        "arms": [arm_report(arm, baseline, varied) for arm in arms],
        "equal_compute": [equal_compute(*question) for question in asked],
        "equal_quality": [equal_quality(*question) for question in asked],
        "environment": _environments(runs),
    }


def warnings(runs: Sequence[RunRecord], arms: Sequence[Arm], protocols: Sequence[str]) -> list[str]:
    """Sentences to read before believing a figure: other machines, single seeds, missing evaluations."""
    sentences = []
    machines = {run.clock for run in runs if run.ledger and not run.timing}
    if len(machines) > 1:
        listing = "; ".join(sorted(map(str, machines)))
        sentences.append(f"the runs were made on different machines ({listing}): don't compare their seconds")
    single = [arm.name for arm in arms if len(arm.runs) == 1]
    if single:
        sentences.append(f"one seed only, so no spread: {', '.join(single)}")
    for protocol in protocols:
        without = [arm.name for arm in arms if 0 < len(arm.quality(protocol)) < len(arm.runs)]
        if without:
            sentences.append(f"{protocol} is missing for some seeds of {', '.join(without)}")
    for path, named in _elsewhere(runs, protocols).items():
        sentences.append(f"judged on {path}, not on the data of the pretraining: {', '.join(named)}")
    return sentences


def clock_notes(runs: Sequence[RunRecord]) -> list[str]:
    """Where seconds come from if some run has a timing.json, see :func:`on_one_clock`."""
    pretrained = [run for run in runs if run.ledger]
    timings = [run.timing for run in pretrained if run.timing]
    if not timings:
        return []
    if without := [run.folder.name for run in pretrained if not run.timing]:
        return [f"seconds are those of the runs themselves: {', '.join(without)} without {run_folder.TIMING}"]
    passes = {(timing.device, timing.began) for timing in timings}
    named = "; ".join(f"{device}, {began}" for device, began in sorted(passes))
    fewest, most = min(t.steps for t in timings), max(t.steps for t in timings)
    steps = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    if len(passes) > 1:
        return [f"seconds are of several passes ({named}): don't compare them; time all runs in one"]
    return [
        f"seconds are those of one pass that timed every run's stages in turn, {steps} steps of each, loader included "
        f"({named}); memory is the runs' own"
    ]


def _elsewhere(runs: Sequence[RunRecord], protocols: Sequence[str]) -> dict[str, list[str]]:
    """Evaluations on other data than the runs were pretrained on, by the data."""
    found: dict[str, list[str]] = {}
    for protocol in protocols:
        judged = [run for run in runs if run.ledger and protocol in run.evaluations]
        paths = {path for run in judged if (path := evaluated_on(run, protocol)) != run.config.data_path.rstrip("/")}
        for path in paths:  # one, unless forced
            found.setdefault(path, []).append(protocol)
    return found


# ── per arm and stage ──


def arm_report(arm: Arm, baseline: Sequence[Arm], varied: Sequence[str]) -> dict[str, Any]:
    """Cost, quality and stages of an arm. varied: fields in which the arms of the comparison differ."""
    totals = [run.total for run in arm.runs]
    num_images = arm.runs[0].environment.get("num_images")
    images = statistics.fmean(t.images for t in totals)
    fields = arm_fields(arm.runs[0])
    protocols = dict.fromkeys(p for run in arm.runs for p in run.evaluations)
    energy = [t.energy_joules for t in totals]
    online = [curve for run in arm.runs if (curve := _online(run))]
    return {
        "name": arm.name,
        "family": arm.family,
        "baseline": arm in baseline,
        "n": len(arm.runs),
        "seeds": [run.seed for run in arm.runs],
        "differs": {field: fields[field] for field in varied} if arm.pretrained else {},
        "steps": totals[0].steps,
        "images": images,
        "decoded_images": statistics.fmean(t.decoded_images or t.images for t in totals),
        "passes": images / num_images if num_images else None,
        "visible_patches": statistics.fmean(t.visible_patches for t in totals),
        "predicted_patches": statistics.fmean(t.predicted_patches for t in totals),
        "flops": arm.cost("flops"),
        "seconds": summary([t.seconds for t in totals]),
        "data_wait": summary([t.data_wait for t in totals]),
        "peak_memory_bytes": summary([t.peak_memory_bytes for t in totals]),
        "energy_joules": summary(energy) if all(energy) else None,
        "quality": {protocol: summary(arm.quality(protocol)) for protocol in protocols},
        "stages": stage_reports(arm, baseline) if arm.pretrained else [],
        "loss": [_thinned(run) for run in arm.runs if run.metrics],
        "online": {name: summary(last) for name in ONLINE if (last := [c[name][-1] for c in online if name in c])},
        "online_curves": online,
    }


def stage_reports(arm: Arm, baseline: Sequence[Arm]) -> list[dict[str, Any]]:
    """Every stage: cost, shares, and its speed-up over the baseline per image, in FLOPs and in seconds."""
    reference = [run.total for base in baseline for run in base.runs]
    reference_images = sum(t.images for t in reference)
    flops_per_image = sum(t.flops for t in reference) / reference_images
    seconds_per_image = sum(t.seconds for t in reference) / reference_images
    patch_size = flag_value(arm.runs[0], "patch_size")
    totals = [run.total for run in arm.runs]
    rows = []
    for i, first in enumerate(arm.runs[0].ledger.stages):
        if not first.images:
            continue  # skipped by --start_epoch
        costs = [run.ledger.stages[i] for run in arm.runs]
        seconds = statistics.fmean(cost.seconds for cost in costs)
        speedup_flops = flops_per_image / (first.flops / first.images)
        speedup_seconds = seconds_per_image / (seconds / first.images) if seconds else None
        shares = [c.seconds / t.seconds if t.seconds else 0 for c, t in zip(costs, totals, strict=True)]
        rows.append(
            {
                "size_px": show_size(as_size(first.size_px)),
                "patches": num_patches(first.size_px, patch_size),
                "steps": first.steps,
                "images": first.images,
                "visible_patches": first.visible_patches,
                "predicted_patches": first.predicted_patches,
                "flops": first.flops,
                "seconds": summary([cost.seconds for cost in costs]),
                "data_wait": statistics.fmean(cost.data_wait for cost in costs),
                "images_per_second": first.images / seconds if seconds else None,
                "peak_memory_bytes": max(cost.peak_memory_bytes for cost in costs),
                "flops_share": first.flops / totals[0].flops,
                "seconds_share": statistics.fmean(shares),
                "speedup_flops": speedup_flops,
                "speedup_seconds": speedup_seconds,
                "seconds_per_flop": speedup_seconds / speedup_flops if speedup_seconds else None,
            }
        )
    return rows


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (None for one value), n and the values themselves."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std, "n": len(values), "values": list(values)}


def _thinned(run: RunRecord) -> dict[str, Any]:
    """The run's loss curve with about LOSS_POINTS points, the last one included."""
    every = max(1, math.ceil(len(run.metrics) / LOSS_POINTS))
    points = run.metrics[::every] + (run.metrics[-1:] if (len(run.metrics) - 1) % every else [])
    return {"seed": run.seed, "p": [m["p"] for m in points], "loss": [m["loss"] for m in points]}


def _online(run: RunRecord) -> dict[str, Any]:
    """Curves of online quality (--probe_every) against what the run had cost by then; empty if it has none."""
    points = [record for record in run.metrics if ONLINE.keys() & record.keys()]
    names = [name for name in ONLINE if points and all(name in point for point in points)]
    return {name: [point[name] for point in points] for name in ("flops", "seconds", *names)} if names else {}


def _environments(runs: Sequence[RunRecord]) -> dict[str, list[str]]:
    """Every value that occurs, by fact."""
    facts = ("device", "precision", "platform", "python", "git", "mae_et")
    values = {f: sorted({str(r.environment[f]) for r in runs if r.environment.get(f) is not None}) for f in facts}
    packages = {f"{k} {v}" for r in runs for k, v in r.environment.get("packages", {}).items()}
    return {fact: seen for fact, seen in values.items() if seen} | {"packages": sorted(packages)}
