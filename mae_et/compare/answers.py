"""The two answers of a comparison: the difference at equal compute, and the compute for equal quality.

The baseline's curve is interpolated between its arms, linearly in log cost; intervals are 95 % bootstrap intervals over
seeds.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from .arms import Arm

AXES = ("flops", "seconds")
RESAMPLES = 2000
MAX_SPREAD = 0.1
"""Arms whose seconds spread over seeds by more, as a share of their mean, are not ranked by seconds."""
Point = tuple[float, list[float]]
"""Cost of an arm, and the quality of each of its seeds."""


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
    """Quality of an arm minus the baseline's at the same cost.

    `nearest`: of an arm cheaper than all of the baseline's, its difference to the cheapest of those if it is ahead even
    of that, and what that costs, as a multiple; of one dearer than all, the same if it is behind even the dearest.
    """
    quality, cost = statistics.fmean(arm.quality(protocol)), arm.cost(axis)
    curve, at = _answering(baseline, protocol, axis, lambda curve: interpolate(*_means(curve), cost))
    row = {"arm": arm.name, "protocol": protocol, "axis": axis, "cost": cost}
    row |= _counted(arm, baseline, protocol, axis, _around(curve, cost))
    row |= {"quality": quality, "baseline_quality": at, "difference": None, "interval": None, "nearest": None}
    if at is None:
        return row | {"nearest": _nearest(arm.quality(protocol), cost, curve)} if curve else row
    samples = [
        mean - interpolate([c for c, _ in curve], means, cost)
        for mean, means in _resample(arm.quality(protocol), curve)
    ]
    return row | {"difference": quality - at, "interval": _interval(samples)}


def _nearest(values: Sequence[float], cost: float, curve: Sequence[Point]) -> dict[str, Any] | None:
    """How far values at a cost outside the curve are ahead of its cheapest arm, or behind its dearest; None if not."""
    cheaper = cost < curve[0][0]
    nearest = curve[0 if cheaper else -1]
    interval = _interval([mean - theirs for mean, (theirs,) in _resample(values, [nearest])])
    if interval is None or (interval[0] <= 0 if cheaper else interval[1] >= 0):
        return None
    difference = statistics.fmean(values) - statistics.fmean(nearest[1])
    return {"factor": nearest[0] / cost, "difference": difference, "interval": interval}


def equal_quality(arm: Arm, baseline: Sequence[Arm], protocol: str, axis: str) -> dict[str, Any]:
    """Cost that the baseline needs for an arm's quality; `status` is reached, below (its shortest arm has it) or not
    reached. An end of the interval that lies outside the baseline's arms is None; `told_apart`: it leaves out 1."""
    quality, cost = statistics.fmean(arm.quality(protocol)), arm.cost(axis)

    def reached(curve: Sequence[Point]) -> float | None:
        at = needed(*_means(curve), quality)
        return at if 0 < at < math.inf else None

    curve, at = _answering(baseline, protocol, axis, reached)
    row = {"arm": arm.name, "protocol": protocol, "axis": axis, "cost": cost, "quality": quality}
    row |= _counted(arm, baseline, protocol, axis, curve)
    row |= {"needed": None, "ratio": None, "interval": None, "told_apart": False, "status": "no baseline"}
    if not curve:
        return row
    costs = [c for c, _ in curve]
    ends = _interval([needed(costs, means, mean) / cost for mean, means in _resample(arm.quality(protocol), curve)])
    row["interval"] = [None if end in (0.0, math.inf) else end for end in ends] if ends else None
    row["told_apart"] = ends is not None and (ends[0] > 1 or ends[1] < 1)
    row |= {"shortest": costs[0], "longest": costs[-1]}
    if at is None:
        return row | {"status": "below" if quality <= _means(curve)[1][0] else "not reached"}
    return row | {"needed": at, "ratio": at / cost, "status": "reached"}


def wide_seconds(arms: Sequence[Arm]) -> dict[str, float]:
    """Arms whose seconds spread widely over seeds: standard deviation over mean, by name."""
    spreads = {}
    for arm in (arm for arm in arms if arm.pretrained and len(arm.runs) > 1 and arm.cost("seconds")):
        spreads[arm.name] = statistics.stdev(run.cost("seconds") for run in arm.runs) / arm.cost("seconds")
    return {name: share for name, share in spreads.items() if share > MAX_SPREAD}


def not_ranked(arms: Sequence[Arm]) -> str:
    """Why the seconds of these arms don't rank them; empty if they do."""
    if len({run.clock for arm in arms for run in arm.runs} - {None}) > 1:
        return "different devices"
    return "wide spread" if wide_seconds(arms) else ""


def _counted(arm: Arm, baseline: Sequence[Arm], protocol: str, axis: str, curve: Sequence[Point]) -> dict[str, Any]:
    """Seeds of the arm, of that arm of the curve that has fewest, and why the costs are not firm enough to rank by."""
    why = "" if axis == "flops" else not_ranked([arm, *baseline])
    seeds = min((len(values) for _, values in curve), default=0)
    return {"n": len(arm.quality(protocol)), "baseline_n": seeds, "not_ranked": why}


def _answering(
    baseline: Sequence[Arm], protocol: str, axis: str, answer: Callable[[Sequence[Point]], float | None]
) -> tuple[list[Point], float | None]:
    """The baseline's curve that gives an answer, and the answer: of arms with several seeds if that does, else of all.

    So a single run, say of another length, takes no interval from the others.
    """
    points = [(arm.cost(axis), arm.quality(protocol)) for arm in baseline if arm.quality(protocol)]
    firm, whole = _best([point for point in points if len(point[1]) > 1]), _best(points)
    for curve in (firm, whole):
        if curve and (at := answer(curve)) is not None:
            return curve, at
    as_long = firm and (firm[0][0], firm[-1][0]) == (whole[0][0], whole[-1][0])
    return (firm if as_long else whole), None


def _best(points: Sequence[Point]) -> list[Point]:
    """In the order of cost; of several at one cost (1 % is rounding) the best, which is what an arm has to beat."""
    curve: list[Point] = []
    for cost, values in sorted(points, key=lambda point: point[0]):
        if not curve or cost > curve[-1][0] * 1.01:
            curve.append((cost, values))
        elif statistics.fmean(values) > statistics.fmean(curve[-1][1]):
            curve[-1] = cost, values
    return curve


def _around(curve: Sequence[Point], cost: float) -> Sequence[Point]:
    """The arms that decide the curve's quality at a cost: one that costs as much (1 % is rounding), else neighbours."""
    for point in curve:
        if point[0] * 0.99 <= cost <= point[0] * 1.01:
            return [point]
    above = sum(c < cost for c, _ in curve)
    return curve[max(0, above - 1) : above + 1]


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
