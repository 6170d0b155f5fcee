"""Arms of a comparison: runs grouped by the flags whose role makes another arm, and the arms to compare with."""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..plan.config import PretrainConfig
from ..plan.curriculum import StageRow
from ..plan.flags import names, to_dict
from .runs import MODEL_FLAGS, RunRecord, flag_value

SCRATCH = "from scratch"
MASK_RATIO = PretrainConfig.mask_ratio
#: Arms that differ in nothing else are one family.
LENGTHS = frozenset(names(PretrainConfig, lambda role: role.arm and not role.family))
#: Fields whose values say what they are of.
NAMELESS = ("target", "lowfreq", "untrained")
STAGE_FIELDS = tuple(field.name for field in dataclasses.fields(StageRow))


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
    """Values that make a run's arm: of every flag with such a role, and of what flags leave to the machine.

    Without pretraining the model is all there is: its flags, and the run that it is like, whatever the seed of that.
    """
    if run.untrained:
        like = re.sub(r"[-_/]seed[-_]?\d+(?=/|$)", "", run.untrained.like.rstrip("/"))
        model = {"like": like or None} | {flag: getattr(run.untrained, flag) for flag in MODEL_FLAGS}
        words = [f"{flag} {_shown(value)}" for flag, value in model.items() if value is not None]
        return {"curriculum": SCRATCH, "untrained": ", ".join(words) or None}
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
    return _varied([arm_fields(run) for run in runs if run.ledger])


def _varied(arms: Sequence[Mapping[str, Any]]) -> list[str]:
    """Fields with several values. An arm that lacks a field has no value of it."""
    found = dict.fromkeys(field for arm in arms for field in arm)
    return [field for field in found if len({json.dumps(arm[field]) for arm in arms if field in arm}) > 1]


def group(runs: Sequence[RunRecord]) -> list[Arm]:
    """Runs by arm, cheapest first, named by what the folders of an arm share, else by what differs.

    Raises ValueError for two runs of an arm with the same seed.
    """
    by_key: dict[str, list[RunRecord]] = {}
    for run in runs:
        by_key.setdefault(json.dumps(arm_fields(run), sort_keys=True), []).append(run)
    groups = sorted(by_key.values(), key=lambda repeats: repeats[0].cost("flops"))
    stems = [{_stem(run) for run in repeats} for repeats in groups]
    folder_names = [next(iter(stem)) if len(stem) == 1 else "" for stem in stems]
    by_folder = all(folder_names) and len(set(folder_names)) == len(folder_names)
    arms = [arm_fields(repeats[0]) for repeats in groups]
    curves = [{field: value for field, value in arm.items() if field not in LENGTHS} for arm in arms]
    labels, families = _labels(arms), _labels(curves)
    chosen = [
        name if by_folder and repeats[0].ledger else label
        for name, label, repeats in zip(folder_names, labels, groups, strict=True)
    ]
    named = zip(_numbered(chosen, arms), _numbered(families, curves), groups, strict=True)
    return [Arm(name, family, _by_seed(repeats)) for name, family, repeats in named]


def _stem(run: RunRecord) -> str:
    """The name of a run's folder without its seed: vanilla-seed0 is vanilla, et_pp_192 is et_pp_192."""
    return re.sub(rf"[-_]?(seed[-_]?|(?<=[-_])s|(?<=[-_])){run.seed}$", "", run.folder.resolve().name)


def _by_seed(runs: Sequence[RunRecord]) -> tuple[RunRecord, ...]:
    """Runs in the order of their seeds. Different evaluations of one untrained model are one run."""
    by_seed: dict[int, RunRecord] = {}
    for run in runs:
        first = by_seed.setdefault(run.seed, run)
        if first is run:
            continue
        if not run.untrained or first.evaluations.keys() & run.evaluations.keys():
            raise ValueError(
                f"{first.folder} and {run.folder} are the same configuration with the same seed; leave one out"
            )
        by_seed[run.seed] = replace(first, evaluations=first.evaluations | run.evaluations)
    return tuple(by_seed[seed] for seed in sorted(by_seed))


def _labels(arms: Sequence[Mapping[str, Any]]) -> list[str]:
    """`et_pp · hog · batch 64` for each arm: the curriculum, and whatever else differs."""
    apart = [_stages_apart(arm) for arm in arms]
    varied = [field for field in _varied(apart) if field != "curriculum"]
    labels = []
    for arm in apart:
        words = [arm["curriculum"]]
        for field in varied:
            value = arm.get(field)
            if value is True:
                words.append(field)
            elif value is not None and value is not False:
                words.append(_shown(value) if field in NAMELESS else f"{field} {_shown(value)}")
        labels.append(" · ".join(words))
    return labels


def _stages_apart(arm: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of an arm, with those of its stages in place of the stages: `stage size_px` is `16/32`."""
    found = {field: value for field, value in arm.items() if field != "stages"}
    if rows := arm.get("stages"):
        found |= {f"stage {name}": "/".join(_shown(row.get(name)) for row in rows) for name in STAGE_FIELDS}
    return found


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "×".join(map(_shown, value))
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _numbered(labels: Sequence[str], arms: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Labels, numbered where others have the same: `et`, `et (2)`."""
    alike: dict[str, list[Mapping[str, Any]]] = {}
    for label, arm in zip(labels, arms, strict=True):
        same = alike.setdefault(label, [])
        same += [] if arm in same else [arm]
        yield label if arm == same[0] else f"{label} ({same.index(arm) + 1})"


def _as_mae(config: PretrainConfig) -> tuple[bool, bool]:
    return config.opt == "adamw", config.mask_ratio == MASK_RATIO


def baseline_arms(arms: Sequence[Arm], named: Container[Path]) -> list[Arm]:
    """Arms that hold a run at one of the `named` resolved paths; without any, the largest family of vanilla arms.

    A family with MAE's optimiser and mask ratio comes first.
    """
    if named:
        chosen = [arm for arm in arms if any(run.folder.resolve() in named for run in arm.runs)]
    else:
        vanilla = [arm for arm in arms if arm.pretrained and arm.runs[0].config.curriculum == "vanilla"]
        families = [[a for a in vanilla if a.family == family] for family in dict.fromkeys(a.family for a in vanilla)]
        chosen = max(families, key=lambda each: (*_as_mae(each[0].runs[0].config), len(each)), default=[])
    if not chosen:
        raise ValueError("no run with --curriculum vanilla among these: say what to compare with, --baseline RUN…")
    if not all(arm.pretrained for arm in chosen):
        raise ValueError("--baseline: a run from random weights has no pretraining cost to compare with")
    return sorted(chosen, key=lambda arm: arm.cost("flops"))
