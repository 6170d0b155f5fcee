"""Run folders, read back for a comparison, and whether they can be compared at all. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..engine import run_folder
from ..evaluate.config import FinetuneConfig
from ..files import read_json_lines
from ..plan.config import PretrainConfig
from ..plan.cost import Ledger, StageCost
from ..plan.flags import from_dict, names
from ..plan.shapes import model_shape


@dataclass(frozen=True)
class RunRecord:
    """What one run folder says."""

    folder: Path
    seed: int
    config: PretrainConfig
    ledger: Ledger | None
    """None: not pretrained, the model of `config` from random weights."""
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluations: dict[str, dict[str, Any]]
    """By protocol."""

    @property
    def finished(self) -> bool:
        return self.ledger is None or (bool(self.metrics) and math.isclose(self.metrics[-1]["p"], 1.0))

    @property
    def total(self) -> StageCost:
        return self.ledger.total if self.ledger else StageCost(self.config.input_size)

    def cost(self, axis: str) -> float:
        """Training FLOPs, or seconds of training and waiting for data."""
        return self.total.flops if axis == "flops" else self.total.seconds


def expand(paths: Sequence[str], flag: str) -> list[Path]:
    """Run folders among `paths`; a folder without a config.yaml stands for the run folders in it."""
    folders: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            raise FileNotFoundError(f"{flag} {path}: no such folder; give run folders")
        if (path / run_folder.CONFIG).exists():
            folders.append(path)
            continue
        inside = sorted(p.parent for p in path.glob(f"*/{run_folder.CONFIG}"))
        if not inside:
            raise FileNotFoundError(f"{flag} {path} holds no {run_folder.CONFIG}, nor do the folders in it: not a run")
        folders += inside
    return list({path.resolve(): path for path in folders}.values())


def read_run(folder: Path) -> RunRecord:
    """A run folder of pretraining, or of fine-tuning from random weights. ValueError names the file that is wrong."""
    values = _read(folder / run_folder.CONFIG, yaml.safe_load)
    environment = _read(folder / run_folder.ENVIRONMENT, json.loads)
    paths = sorted(folder.glob("eval-*.json"))
    results = {path: _read(path, json.loads) for path in paths}
    for path, result in results.items():
        if not isinstance(result, dict) or not {"protocol", "top1", "num_images", "flags"} <= result.keys():
            raise ValueError(f"{path} is not a result of main_finetune.py")
    evaluations = {path.stem.removeprefix("eval-"): result for path, result in results.items()}
    if "like" in values:
        if not values["like"]:
            raise ValueError(f"{folder} is a fine-tuning run; give the pretraining run it started from")
        return RunRecord(folder, values["seed"], PretrainConfig(), None, environment, [], evaluations)
    config = from_dict(PretrainConfig, values, f"{folder / run_folder.CONFIG}")
    if not (folder / run_folder.LEDGER).exists():
        raise FileNotFoundError(f"{folder} has no {run_folder.LEDGER} yet: the run has not saved anything")
    ledger = Ledger.from_state_dict(_read(folder / run_folder.LEDGER, json.loads))
    metrics = read_json_lines(folder / run_folder.METRICS)
    return RunRecord(folder, config.seed, config, ledger, environment, metrics, evaluations)


def _read(path: Path, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(path.read_text())
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is damaged: {' '.join(str(error).split())}") from error


def incomparable(runs: Sequence[RunRecord]) -> list[str]:
    """Sentences that say which flags differ although they must not, see `Role.match` and `Role.judged`."""
    pretrained = [run for run in runs if run.ledger]
    if not pretrained:
        raise ValueError("none of these runs has been pretrained; give pretraining runs")
    sentences = [line for run in pretrained[1:] for line in _other_data_or_model(pretrained[0], run)]
    for protocol in sorted({p for run in runs for p in run.evaluations}):
        judged = [run for run in runs if protocol in run.evaluations]
        sentences += [line for run in judged[1:] for line in _other_evaluation(judged[0], run, protocol)]
    sentences += [
        f"{run.folder} has stopped at {run.metrics[-1]['p'] if run.metrics else 0:.0%} of its compute; finish it with "
        "--resume auto"
        for run in runs
        if not run.finished
    ]
    return list(dict.fromkeys(sentences))


def _other_data_or_model(first: RunRecord, run: RunRecord) -> list[str]:
    sentences = []
    for flag in names(PretrainConfig, lambda role: role.match):
        values = flag_value(first, flag), flag_value(run, flag)
        if values[0] != values[1]:
            sentences.append(f"{flag} is {values[0]} in {first.folder} and {values[1]} in {run.folder}")
    images = [r.environment.get("num_images") for r in (first, run)]
    if None not in images and images[0] != images[1]:
        sentences.append(f"the data set has {images[0]} images in {first.folder} and {images[1]} in {run.folder}")
    return sentences


def _other_evaluation(first: RunRecord, run: RunRecord, protocol: str) -> list[str]:
    results = first.evaluations[protocol], run.evaluations[protocol]
    flags = [result["flags"] for result in results]
    judged = [f for f in names(FinetuneConfig, lambda role: role.judged) if f in flags[0] and f in flags[1]]
    values = [(f"--{flag}", flags[0][flag], flags[1][flag]) for flag in judged]
    values.append(("num_images", *(result["num_images"] for result in results)))
    data = [_evaluated_on(r, protocol) for r in (first, run)]
    values += [("--data_path", *data)] if None not in data else []
    return [
        f"evaluation {protocol}: {name} is {a} in {first.folder} and {b} in {run.folder}"
        for name, a, b in values
        if a != b
    ]


def _evaluated_on(run: RunRecord, protocol: str) -> str | None:
    """Data of an evaluation: its own, else the pretraining's; None for a run from random weights that doesn't say."""
    return run.evaluations[protocol]["flags"].get("data_path") or (run.config.data_path if run.ledger else None)


def flag_value(run: RunRecord, name: str) -> Any:
    """A flag's value in a pretraining run, or what the model's name says where it is left open."""
    value = getattr(run.config, name)
    if value is None:
        value = model_shape(run.config.model).get(name)
    return str(value).rstrip("/") if name == "data_path" else value
