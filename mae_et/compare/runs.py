"""Run folders, on disk or in a zip archive, read back for a comparison, and what makes runs incomparable. No torch."""

from __future__ import annotations

import json
import math
import zipfile
import zlib
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

ARCHIVE = "runs.zip"
"""Run folders of a study in one file, in the folder of its report."""
MAX_UNPACKED_BYTES = 2**30
"""Limit of an archive's contents, far above any study: a few kilobytes of zip can unpack to more than the memory."""
RunFolder = Path | zipfile.Path


@dataclass(frozen=True)
class RunRecord:
    """Files of one run, read back."""

    folder: Path
    """Where the run is; for an archived one, the archive's path and the run's name in it."""
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


# ── find ──


def expand(paths: Sequence[str], flag: str) -> dict[Path, RunFolder]:
    """Run folders among `paths`, by resolved path.

    A folder without a config.yaml, or a zip archive, stands for the run folders in it; runs.zip/NAME is one of an
    archive. Raises FileNotFoundError or ValueError, which name the flag or the archive, where there is no run.
    """
    folders: dict[Path, RunFolder] = {}
    for path in map(Path, paths):
        folder = _open(path)
        if not folder.is_dir():
            raise FileNotFoundError(f"{flag} {path}: no such folder; give run folders, or a zip archive of them")
        runs = [folder] if (folder / run_folder.CONFIG).exists() else runs_in(folder).values()
        if not runs:
            raise FileNotFoundError(f"{flag} {path} holds no {run_folder.CONFIG}, nor do the folders in it: not a run")
        folders |= {Path(str(run)).resolve(): run for run in runs}
    return folders


def runs_in(folder: RunFolder) -> dict[str, RunFolder]:
    """Run folders in a folder and in its runs.zip, by name. One that lies in both is read from the folder."""
    runs = {child.name: child for child in folder.iterdir() if (child / run_folder.CONFIG).exists()}
    if isinstance(folder, Path) and (folder / ARCHIVE).is_file():
        runs = runs_in(_open(folder / ARCHIVE)) | runs
    return dict(sorted(runs.items()))


def _open(path: Path) -> RunFolder:
    """The path itself, or for a zip archive or a folder in it, its contents: in memory, nothing is unpacked to disk."""
    if path.is_file():
        return _open_archive(path)
    return _open_archive(path.parent) / path.name if path.parent.is_file() else path


def _open_archive(path: Path) -> zipfile.Path:
    """Contents of a zip archive, whose checksums are right. ValueError if it is anything else."""
    try:
        archive = zipfile.ZipFile(path)
        unpacked_bytes = sum(member.file_size for member in archive.infolist())
        if unpacked_bytes > MAX_UNPACKED_BYTES:
            raise ValueError(f"it unpacks to {unpacked_bytes / 2**30:.1f} GiB")
        for name in archive.namelist():
            # Printed, an escape sequence would steer the terminal, and .. would lead to the place of another run.
            if not name.isprintable() or ".." in name.split("/"):
                raise ValueError(f"it holds the name {name!r}")
        if corrupt := archive.testzip():
            raise ValueError(f"{corrupt} in it is corrupt")
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is neither a run folder nor an intact zip archive of them: {error}") from error
    return zipfile.Path(archive)


# ── read ──


def read_run(folder: RunFolder) -> RunRecord:
    """A run folder of pretraining, or of fine-tuning from random weights. ValueError names the file that is wrong."""
    where = Path(str(folder))
    values = _read(folder / run_folder.CONFIG, yaml.safe_load)
    environment = _read(folder / run_folder.ENVIRONMENT, json.loads)
    evaluations = {}
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if path.name.startswith("eval-") and path.name.endswith(".json"):
            result = _read(path, json.loads)
            if not isinstance(result, dict) or not {"protocol", "top1", "num_images", "flags"} <= result.keys():
                raise ValueError(f"{path} is not a result of main_finetune.py")
            evaluations |= _protocols(path.name.removeprefix("eval-").removesuffix(".json"), result)
    if "like" in values:
        if not values["like"]:
            raise ValueError(f"{where} is a fine-tuning run; give the pretraining run it started from")
        return RunRecord(where, values["seed"], PretrainConfig(), None, environment, [], evaluations)
    config = from_dict(PretrainConfig, values, f"{where / run_folder.CONFIG}")
    if not (folder / run_folder.LEDGER).exists():
        raise FileNotFoundError(f"{where} has no {run_folder.LEDGER} yet: the run has not saved anything")
    ledger = Ledger.from_state_dict(_read(folder / run_folder.LEDGER, json.loads))
    metrics = read_json_lines(folder / run_folder.METRICS)
    return RunRecord(where, config.seed, config, ledger, environment, metrics, evaluations)


def _protocols(name: str, result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A result, and what else is in it as protocols of their own: other blocks and poolings, corrupted images."""
    found, places = {name: result}, result.get("places", ())
    pooling = "mean" if result["flags"].get("global_pool") else "cls"
    headline = max((place["layer"] for place in places), default=0), pooling
    for place in places:
        if len(places) > 1 and (place["layer"], place["pooling"]) != headline:
            found[f"{name}-block{place['layer']}-{place['pooling']}"] = result | place
    if "corrupted_top1" in result:
        found[f"{name}-corrupted"] = result | {"top1": result["corrupted_top1"]}
    return found


def _read(path: RunFolder, parse: Callable[[str], Any]) -> Any:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing")
    try:
        return parse(path.read_text())
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is damaged: {' '.join(str(error).split())}") from error


def flag_value(run: RunRecord, name: str) -> Any:
    """A flag's value in a pretraining run, or what the model's name says where it is left open."""
    value = getattr(run.config, name)
    if value is None:
        value = model_shape(run.config.model).get(name)
    return str(value).rstrip("/") if name == "data_path" else value


# ── compare like with like ──


def incomparable(runs: Sequence[RunRecord]) -> list[str]:
    """Sentences that name the flags that differ although they must not, see `Role.match` and `Role.judged`."""
    pretrained = [run for run in runs if run.ledger]
    if not pretrained:
        raise ValueError("none of these runs has been pretrained; give pretraining runs")
    sentences = [line for run in pretrained[1:] for line in _other_data_or_model(pretrained[0], run)]
    for protocol in sorted({p for run in runs for p in run.evaluations}):
        judged = [run for run in runs if protocol in run.evaluations]
        sentences += [line for run in judged[1:] for line in _other_evaluation(judged[0], run, protocol)]
    sentences += [
        f"evaluation {protocol} of {run.folder} is of step {result['step']} of {run.metrics[-1]['step'] + 1}: evaluate "
        "it again"
        for run in runs
        for protocol, result in run.evaluations.items()
        if run.finished and run.metrics and result.get("step") not in (None, run.metrics[-1]["step"] + 1)
    ]
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
    computed = [result.get("environment", {}).get("precision") for result in results]
    if None not in computed:  # what auto became
        flags = [given | {"precision": precision} for given, precision in zip(flags, computed, strict=True)]
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
