"""Arms of a comparison: runs grouped by the flags whose role makes another arm, and the arms to compare with."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..plan.config import PretrainConfig
from ..plan.flags import names, to_dict
from .runs import RunRecord, flag_value

SCRATCH = "from scratch"
#: Arms that differ in nothing else are one family.
LENGTHS = frozenset(names(PretrainConfig, lambda role: role.arm and not role.family))


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


def arm_fields(run: RunRecord) -> dict[str, Any]:
    """Values that make a run's arm: of every flag with such a role, and of what flags leave to the machine."""
    plain = to_dict(run.config)
    fields = {flag: plain[flag] for flag in names(PretrainConfig, lambda role: role.arm)}
    fields |= {flag: flag_value(run, flag) for flag in fields if plain[flag] is None or flag == "data_path"}
    fields["precision"] = run.environment.get("precision", plain["precision"])  # what auto became
    if not (run.config.replay or any((stage.replay or 1) > 1 for stage in run.config.stages or ())):
        fields["replay_gib"] = None  # without effect
    batches = [f"{c.images / c.steps:g}" for c in (run.ledger.stages if run.ledger else []) if c.steps]
    fields["batch"] = "/".join(dict.fromkeys(batches))
    # The learning rate is that of the total batch, which stages that state their own need not have.
    total = f"{run.config.total_batch(run.environment.get('devices') or run.config.world_size):g}"
    fields["total_batch"] = None if total in batches[-1:] else total
    return fields


def varied_fields(runs: Iterable[RunRecord]) -> list[str]:
    """Fields in which the arms of these runs differ. Arms from scratch have none."""
    arms = [arm_fields(run) for run in runs if run.ledger]
    return [field for field in (arms[0] if arms else {}) if len({json.dumps(arm[field]) for arm in arms}) > 1]


def group(runs: Sequence[RunRecord]) -> list[Arm]:
    """Runs by arm, cheapest first, named by what the folders of an arm share, else by what differs.

    Raises ValueError for two runs of an arm with the same seed.
    """
    by_key: dict[str, list[RunRecord]] = {}
    for run in runs:
        key = json.dumps(arm_fields(run), sort_keys=True) if run.ledger else SCRATCH
        by_key.setdefault(key, []).append(run)
    groups = sorted(by_key.values(), key=lambda repeats: repeats[0].cost("flops"))
    varied = varied_fields(repeats[0] for repeats in groups)
    stems = [{_stem(run.folder) for run in repeats} for repeats in groups]
    folder_names = [next(iter(stem)) if len(stem) == 1 else "" for stem in stems]
    by_folder = all(folder_names) and len(set(folder_names)) == len(folder_names)
    arms = []
    for repeats, folder_name in zip(groups, folder_names, strict=True):
        if repeats[0].ledger is None:
            arms.append(Arm(SCRATCH, SCRATCH, _by_seed(repeats)))
            continue
        fields = arm_fields(repeats[0])
        name = folder_name if by_folder else _label(fields, varied)
        family = _label(fields, [field for field in varied if field not in LENGTHS])
        arms.append(Arm(name, family, _by_seed(repeats)))
    return arms


def _stem(folder: Path) -> str:
    """A folder's name without its seed: vanilla-seed0 is vanilla."""
    return re.sub(r"[-_]?(seed|s)?[-_]?\d+$", "", folder.resolve().name)


def _by_seed(runs: Sequence[RunRecord]) -> tuple[RunRecord, ...]:
    by_seed: dict[int, RunRecord] = {}
    for run in runs:
        first = by_seed.setdefault(run.seed, run)
        if first is not run:
            raise ValueError(
                f"{first.folder} and {run.folder} are the same configuration with the same seed; leave one out"
            )
    return tuple(by_seed[seed] for seed in sorted(by_seed))


def _label(fields: Mapping[str, Any], varied: Iterable[str]) -> str:
    """`et_pp · hog · batch 64`: the curriculum, and whatever else differs."""
    words = [str(fields["curriculum"])]
    for field in varied:
        if field in ("curriculum", "stages"):
            continue
        value = fields[field]
        if isinstance(value, bool):
            words += [field] if value else []
        elif value is not None:
            shown = f"{value:g}" if isinstance(value, float) else str(value)
            words.append(shown if field in ("target", "lowfreq") else f"{field} {shown}")
    return " · ".join(words)


def baseline_arms(arms: Sequence[Arm], named: Container[Path]) -> list[Arm]:
    """Arms that hold a run at one of the `named` resolved paths; without any, the largest family of vanilla arms."""
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
