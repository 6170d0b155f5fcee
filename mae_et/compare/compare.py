"""What runs cost and gave, side by side, and what the baseline would have needed. Reads run folders; never trains.

A run is one folder; an arm is all runs of one configuration (its seeds); a family is arms that differ only in length.
Two answers for each arm and evaluation: **equal compute** (the difference in quality at the same FLOPs, or seconds) and
**equal quality** (the FLOPs, or seconds, that the baseline needs). The baseline's curve is interpolated between its
arms, linearly in log cost; intervals are 95 % bootstrap intervals over seeds.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from ..plan.config import PretrainConfig
from ..plan.flags import RUN, names, to_dict
from ..plan.shapes import as_size, num_patches, show_size
from .runs import RunRecord, expand, flag_value, incomparable, read_run

AXES = ("flops", "seconds")
#: Arms that differ in nothing else are one family.
LENGTHS = frozenset(names(PretrainConfig, lambda role: role.arm and not role.family))
RESAMPLES = 2000
LOSS_POINTS = 100
"""Points per run that a report keeps of a loss curve."""


@dataclass(frozen=True)
class CompareConfig:
    """Compare what runs cost and gave: `compare RUN… [--baseline RUN…] [--out DIR] [--json]`."""

    runs: Annotated[tuple[str, ...], RUN, tyro.conf.Positional]
    """Run folders, or folders that hold run folders."""
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


@dataclass(frozen=True)
class Arm:
    """Runs that differ only in their seed."""

    name: str
    family: str
    runs: tuple[RunRecord, ...]

    @property
    def pretrained(self) -> bool:
        return self.runs[0].ledger is not None

    def cost(self, axis: str) -> float:
        return statistics.fmean(run.cost(axis) for run in self.runs)

    def quality(self, protocol: str) -> list[float]:
        """Top-1 in per cent of every run that has this evaluation."""
        return [run.evaluations[protocol]["top1"] for run in self.runs if protocol in run.evaluations]


def compare(config: CompareConfig) -> dict[str, Any]:
    """The report as plain values; `report` renders it.

    Raises FileNotFoundError or ValueError, with one line, for folders that hold no run, and for runs that can't be
    compared, naming what differs.
    """
    baseline = [read_run(path) for path in expand(config.baseline, "--baseline")]
    known = {run.folder.resolve() for run in baseline}
    runs = baseline + [read_run(p) for p in expand(config.runs, "RUN") if p.resolve() not in known]
    differences = incomparable(runs)
    if differences and not config.force:
        raise ValueError(f"not comparable: {differences[0]}; --force compares all the same and says so in the report")
    arms = group(runs)
    chosen = _baseline_arms(arms, known)
    protocols = sorted({protocol for run in runs for protocol in run.evaluations})
    others = [arm for arm in arms if arm.pretrained and arm not in chosen]
    report = {
        "title": config.title,
        "baseline": [arm.name for arm in chosen],
        "protocols": protocols,
        "forced": differences,
        "warnings": warnings(runs, arms, protocols),
        "arms": [arm_report(arm, arm in chosen, chosen, arms) for arm in arms],
        "equal_compute": [
            equal_compute(arm, chosen, protocol, axis)
            for arm, protocol, axis in itertools.product(others, protocols, AXES)
            if arm.quality(protocol)
        ],
        "equal_quality": [
            equal_quality(arm, chosen, protocol, axis)
            for arm, protocol, axis in itertools.product(others, protocols, AXES)
            if arm.quality(protocol)
        ],
        "environment": _environment(runs),
    }
    return report


# ── grouping ──


def arm_fields(run: RunRecord) -> dict[str, Any]:
    """What makes a run's arm: every flag with such a role, and what came of flags that leave it to the machine."""
    plain = to_dict(run.config)
    fields = {flag: plain[flag] for flag in names(PretrainConfig, lambda role: role.arm)}
    fields |= {flag: flag_value(run, flag) for flag in fields if plain[flag] is None or flag == "data_path"}
    fields["computed_in"] = run.environment.get("precision")
    batches = [f"{c.images / c.steps:g}" for c in (run.ledger.stages if run.ledger else []) if c.steps]
    fields["batch"] = "/".join(dict.fromkeys(batches))
    # The learning rate is that of the total batch, which stages that state their own need not have.
    total = f"{run.config.total_batch(run.environment.get('devices') or run.config.world_size):g}"
    fields["total_batch"] = None if total in batches[-1:] else total
    return fields


def group(runs: Sequence[RunRecord]) -> list[Arm]:
    """Runs by arm, cheapest first, named by what the folders of an arm share, else by what differs."""
    by_key: dict[str, list[RunRecord]] = {}
    for run in runs:
        key = "from scratch" if run.ledger is None else json.dumps(arm_fields(run), sort_keys=True)
        by_key.setdefault(key, []).append(run)
    groups = sorted(by_key.values(), key=lambda repeats: repeats[0].cost("flops"))
    differing = _differing([arm_fields(repeats[0]) for repeats in groups if repeats[0].ledger])
    stems = [
        {re.sub(r"[-_]?(seed|s)?[-_]?\d+$", "", run.folder.resolve().name) for run in repeats} for repeats in groups
    ]
    stem_names = [next(iter(stem)) if len(stem) == 1 else "" for stem in stems]
    named = all(stem_names) and len(set(stem_names)) == len(stem_names)
    arms = []
    for repeats, stem in zip(groups, stem_names, strict=True):
        if repeats[0].ledger is None:
            arms.append(Arm("from scratch", "from scratch", _by_seed(repeats)))
            continue
        fields = arm_fields(repeats[0])
        name = stem if named else _label(fields, differing)
        family = _label(fields, [field for field in differing if field not in LENGTHS])
        arms.append(Arm(name, family, _by_seed(repeats)))
    return arms


def _stem(name: str) -> str:
    """A folder's name without its seed: vanilla-seed0 is vanilla."""
    return re.sub(r"[-_]?(seed|s)?[-_]?\d+$", "", name)


def _by_seed(runs: list[RunRecord]) -> tuple[RunRecord, ...]:
    seeds = [run.seed for run in runs]
    if len(set(seeds)) < len(seeds):
        twice = [run.folder for run in runs if seeds.count(run.seed) > 1]
        raise ValueError(f"{twice[0]} and {twice[1]} are the same configuration with the same seed; leave one out")
    return tuple(sorted(runs, key=lambda run: run.seed))


def _differing(arms: Sequence[Mapping[str, Any]]) -> list[str]:
    return [field for field in (arms[0] if arms else {}) if len({json.dumps(arm[field]) for arm in arms}) > 1]


def _label(fields: Mapping[str, Any], differing: Iterable[str]) -> str:
    """`et_pp · hog · batch 64`: the curriculum, and whatever else differs."""
    words = [str(fields["curriculum"])]
    for field in differing:
        if field in ("curriculum", "stages"):
            continue
        value = fields[field]
        if isinstance(value, bool):
            words += [field] if value else []
        elif value is not None:
            bare = field in ("target", "lowfreq")
            words.append(
                str(value) if bare else f"{field} {value:g}" if isinstance(value, float) else f"{field} {value}"
            )
    return " · ".join(words)


def _baseline_arms(arms: Sequence[Arm], named: set[Path]) -> list[Arm]:
    """The arms that --baseline names, or the largest family of vanilla arms."""
    if named:
        chosen = [arm for arm in arms if any(run.folder.resolve() in named for run in arm.runs)]
    else:
        vanilla = [arm for arm in arms if arm.pretrained and arm.runs[0].config.curriculum == "vanilla"]
        families = [[a for a in vanilla if a.family == family] for family in dict.fromkeys(a.family for a in vanilla)]
        chosen = max(families, key=len, default=[])
    if not chosen:
        raise ValueError("no run with --curriculum vanilla among these: say what to compare with, --baseline RUN…")
    if not all(arm.pretrained for arm in chosen):
        raise ValueError("--baseline: a run from random weights has no pretraining cost to compare with")
    return sorted(chosen, key=lambda arm: arm.cost("flops"))


# ── what a reader must know ──


def warnings(runs: Sequence[RunRecord], arms: Sequence[Arm], protocols: Sequence[str]) -> list[str]:
    """What a reader must know before believing a figure."""
    found = []
    machines = {(r.environment.get("device"), r.environment.get("platform")) for r in runs if r.ledger}
    if len(machines) > 1:
        devices = sorted({str(device) for device, _ in machines})
        found.append(f"the runs were made on different machines ({'; '.join(devices)}): don't compare their seconds")
    single = [arm.name for arm in arms if len(arm.runs) == 1]
    if single:
        found.append(f"one seed only, so no spread: {', '.join(single)}")
    for protocol in protocols:
        without = [arm.name for arm in arms if 0 < len(arm.quality(protocol)) < len(arm.runs)]
        if without:
            found.append(f"{protocol} is missing for some seeds of {', '.join(without)}")
    return found


# ── per arm and stage ──


def arm_report(arm: Arm, is_baseline: bool, baseline: Sequence[Arm], arms: Sequence[Arm]) -> dict[str, Any]:
    """Cost, quality and stages of an arm."""
    totals = [run.total for run in arm.runs]
    num_images = arm.runs[0].environment.get("num_images")
    images = statistics.fmean(t.images for t in totals)
    differing = _differing([arm_fields(a.runs[0]) for a in arms if a.pretrained])
    fields = arm_fields(arm.runs[0])
    protocols = dict.fromkeys(p for run in arm.runs for p in run.evaluations)
    energy = [t.energy_joules for t in totals]
    return {
        "name": arm.name,
        "family": arm.family,
        "baseline": is_baseline,
        "n": len(arm.runs),
        "seeds": [run.seed for run in arm.runs],
        "differs": {field: fields[field] for field in differing} if arm.pretrained else {},
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
    }


def stage_reports(arm: Arm, baseline: Sequence[Arm]) -> list[dict[str, Any]]:
    """Every stage: cost, shares, and its speed-up over the baseline per image, in FLOPs and in seconds."""
    reference = [run.total for base in baseline for run in base.runs]
    images = sum(t.images for t in reference)
    flops_per_image, seconds_per_image = (
        sum(values) / images for values in ((t.flops for t in reference), (t.seconds for t in reference))
    )
    rows = []
    for i, first in enumerate(arm.runs[0].ledger.stages):
        if not first.images:
            continue  # skipped by --start_epoch
        accounts = [run.ledger.stages[i] for run in arm.runs]
        totals = [run.total for run in arm.runs]
        seconds = statistics.fmean(a.seconds for a in accounts)
        speedup_flops = flops_per_image / (first.flops / first.images)
        speedup_seconds = seconds_per_image / (seconds / first.images) if seconds else None
        patch = flag_value(arm.runs[0], "patch_size")
        rows.append(
            {
                "size_px": show_size(as_size(first.size_px)),
                "patches": num_patches(first.size_px, patch),
                "steps": first.steps,
                "images": first.images,
                "visible_patches": first.visible_patches,
                "predicted_patches": first.predicted_patches,
                "flops": first.flops,
                "seconds": summary([a.seconds for a in accounts]),
                "data_wait": statistics.fmean(a.data_wait for a in accounts),
                "images_per_second": first.images / seconds if seconds else None,
                "peak_memory_bytes": max(a.peak_memory_bytes for a in accounts),
                "flops_share": first.flops / totals[0].flops,
                "seconds_share": statistics.fmean(
                    a.seconds / t.seconds if t.seconds else 0 for a, t in zip(accounts, totals, strict=True)
                ),
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
    every = max(1, math.ceil(len(run.metrics) / LOSS_POINTS))
    points = run.metrics[::every] + (run.metrics[-1:] if (len(run.metrics) - 1) % every else [])
    return {"seed": run.seed, "p": [m["p"] for m in points], "loss": [m["loss"] for m in points]}


def _environment(runs: Sequence[RunRecord]) -> dict[str, list[str]]:
    """Where the figures come from: every value that occurs."""
    names = ("device", "precision", "platform", "python", "git", "mae_et")
    found = {n: sorted({str(r.environment[n]) for r in runs if r.environment.get(n) is not None}) for n in names}
    packages = {f"{k} {v}" for r in runs for k, v in r.environment.get("packages", {}).items()}
    return {n: v for n, v in found.items() if v} | {"packages": sorted(packages)}


# ── the two answers ──


def interpolate(costs: Sequence[float], qualities: Sequence[float], cost: float) -> float | None:
    """Quality at a cost, linearly in log cost between the arms; None outside them (1 % is rounding)."""
    if not costs[0] * 0.99 <= cost <= costs[-1] * 1.01:
        return None
    return float(np.interp(math.log(cost), np.log(costs), qualities))


def needed(costs: Sequence[float], qualities: Sequence[float], quality: float) -> float:
    """The smallest cost at which the curve reaches a quality: 0 if its first arm has it already, inf if none has."""
    if quality <= qualities[0]:
        return 0.0
    for (c0, q0), (c1, q1) in itertools.pairwise(zip(costs, qualities, strict=True)):
        if q0 < quality <= q1:
            return math.exp(math.log(c0) + (quality - q0) / (q1 - q0) * math.log(c1 / c0))
    return math.inf


def equal_compute(arm: Arm, baseline: Sequence[Arm], protocol: str, axis: str) -> dict[str, Any]:
    """Quality of an arm minus the baseline's at the same cost."""
    curve = _curve(baseline, protocol, axis)
    row = {"arm": arm.name, "protocol": protocol, "axis": axis, "cost": arm.cost(axis), "n": len(arm.quality(protocol))}
    quality = statistics.fmean(arm.quality(protocol))
    at = interpolate(*_means(curve), row["cost"]) if curve else None
    row |= {"quality": quality, "baseline_quality": at, "difference": None, "interval": None}
    if at is None:
        return row
    samples = [
        mean - interpolate([c for c, _ in curve], means, row["cost"])
        for mean, means in _resample(arm.quality(protocol), curve)
    ]
    return row | {"difference": quality - at, "interval": _interval(samples)}


def equal_quality(arm: Arm, baseline: Sequence[Arm], protocol: str, axis: str) -> dict[str, Any]:
    """Cost that the baseline needs for an arm's quality; `status` is reached, below (its shortest arm has it) or not
    reached. An end of the interval that lies outside the baseline's arms is None."""
    curve = _curve(baseline, protocol, axis)
    quality, cost = statistics.fmean(arm.quality(protocol)), arm.cost(axis)
    row = {"arm": arm.name, "protocol": protocol, "axis": axis, "cost": cost, "quality": quality}
    row |= {"needed": None, "ratio": None, "interval": None, "status": "no baseline"}
    if not curve:
        return row
    at = needed(*_means(curve), quality)
    costs = [c for c, _ in curve]
    ends = _interval([needed(costs, means, mean) / cost for mean, means in _resample(arm.quality(protocol), curve)])
    row["interval"] = [None if end in (0.0, math.inf) else end for end in ends] if ends else None
    row |= {"shortest": costs[0], "longest": costs[-1]}
    if at in (0.0, math.inf):
        return row | {"status": "below" if at == 0 else "not reached"}
    return row | {"needed": at, "ratio": at / cost, "status": "reached"}


Point = tuple[float, list[float]]
"""Cost of an arm, and the quality of each of its seeds."""


def _curve(baseline: Sequence[Arm], protocol: str, axis: str) -> list[Point]:
    points = [(arm.cost(axis), arm.quality(protocol)) for arm in baseline if arm.quality(protocol)]
    return sorted(points, key=lambda point: point[0])


def _means(curve: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [cost for cost, _ in curve], [statistics.fmean(values) for _, values in curve]


def _resample(values: Sequence[float], curve: Sequence[Point]) -> Iterable[tuple[float, Sequence[float]]]:
    """Bootstrap over seeds: means of the arm, and of every arm of the baseline. Empty if any of them has one seed."""
    groups = [*(seeds for _, seeds in curve), values]
    sizes = [len(seeds) for seeds in groups]
    if min(sizes) < 2:
        return []
    picks = np.random.default_rng(0).integers(0, np.tile(np.repeat(sizes, sizes), (RESAMPLES, 1)))
    parts = np.split(picks, np.cumsum(sizes)[:-1], axis=1)
    means = [np.asarray(seeds)[part].mean(axis=1).tolist() for seeds, part in zip(groups, parts, strict=True)]
    return zip(means[-1], zip(*means[:-1], strict=True), strict=True)


def _interval(samples: Sequence[float]) -> list[float] | None:
    """The middle 95 %; None without samples."""
    if not len(samples):
        return None
    ordered = sorted(samples)  # may hold inf, which percentiles of numpy would turn into nan
    last = len(ordered) - 1
    return [float(ordered[round(last * share)]) for share in (0.025, 0.975)]
