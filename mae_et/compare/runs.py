"""Run folders, on disk or in a zip archive, read back for a comparison, and what makes runs incomparable. No torch."""

from __future__ import annotations

import json
import math
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ..engine import run_folder
from ..evaluate.config import FinetuneConfig
from ..files import parse_json_lines
from ..plan.config import PretrainConfig
from ..plan.cost import Ledger, StageCost
from ..plan.flags import MODEL, from_dict, names
from ..plan.shapes import as_size, model_shape
from .words import ONLINE

ARCHIVE = "runs.zip"
"""Run folders of a study in one file, in the folder of its report."""
MAX_UNPACKED_BYTES = 2**30
"""Limit of an archive's contents, far above any study: a few kilobytes of zip can unpack to more than the memory."""
RunFolder = Path | zipfile.Path
MODEL_FLAGS = names(FinetuneConfig, lambda role: role is MODEL)
"""Of evaluations; pretraining has the same ones."""
NEEDED = ("step", "p", "loss")
"""Numbers in every line of metrics.jsonl."""


@dataclass(frozen=True)
class Timing:
    """What a step of each stage took in a pass that timed the steps of all runs of a comparison in turn."""

    device: str
    """What the pass ran on, with its precision."""
    began: str
    """Date and time; the same in all runs of a pass."""
    steps: int
    """Steps of each stage."""
    train_seconds: tuple[float, ...]
    """Forward, backward and update, by stage."""
    data_seconds: tuple[float, ...]
    """Waiting for the loader, by stage."""


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
    untrained: FinetuneConfig | None = None
    """What a run that was not pretrained is an evaluation of: its flags say which model, or which run it is like."""
    timing: Timing | None = None
    """Of its timing.json; :func:`on_one_clock` takes the ledger's seconds from it, or drops it."""

    @property
    def device(self) -> str | None:
        """What it ran on, without the precision, which stands behind it."""
        device = self.environment.get("device")
        return device and device.removesuffix(f", {self.environment.get('precision')}")

    @property
    def clock(self) -> str | None:
        """What its seconds were measured on; those of other clocks can't be compared."""
        if self.timing:
            return f"{self.timing.device}, {self.timing.began}"
        machine = self.device, self.environment.get("platform")
        return " on ".join(filter(None, machine)) if self.device else None

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
    config = _read(folder / run_folder.CONFIG, _config)
    environment = _read(folder / run_folder.ENVIRONMENT, _environment)
    evaluations = {}
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if path.name.startswith("eval-") and path.name.endswith(".json"):
            result = _read(path, _evaluation)
            evaluations |= _protocols(path.name.removeprefix("eval-").removesuffix(".json"), result)
    if isinstance(config, FinetuneConfig):
        if config.finetune:
            raise ValueError(f"{where} is a fine-tuning run; give the pretraining run it started from")
        model = {flag: value for flag in MODEL_FLAGS if (value := getattr(config, flag)) is not None}
        return RunRecord(where, config.seed, PretrainConfig(**model), None, environment, [], evaluations, config)
    if not (folder / run_folder.LEDGER).exists():
        raise FileNotFoundError(f"{where} has no {run_folder.LEDGER} yet: the run has not saved anything")
    ledger = _read(folder / run_folder.LEDGER, _ledger)
    begun = [stage for stage in ledger.stages if stage.images]
    if not begun or not all(0 < stage.flops < math.inf for stage in begun):
        raise ValueError(f"{where / run_folder.LEDGER} books no images, or no FLOPs for them: nothing to compare")
    metrics = _read(folder / run_folder.METRICS, _metrics) if (folder / run_folder.METRICS).exists() else []
    timing = None
    if (folder / run_folder.TIMING).exists():
        timing = _read(folder / run_folder.TIMING, lambda text: _timing(text, len(ledger.stages)))
    return RunRecord(where, config.seed, config, ledger, environment, metrics, evaluations, timing=timing)


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


def _environment(text: str) -> dict[str, Any]:
    facts = _mapping(json.loads(text))
    _mapping(facts.get("packages", {}))
    _words(facts, "device", "precision")
    return facts


def _evaluation(text: str) -> dict[str, Any]:
    result = _mapping(json.loads(text))
    if missing := {"protocol", "top1", "num_images", "flags"} - result.keys():
        raise ValueError(f"it lacks {', '.join(sorted(missing))}: not a result of main_finetune.py")
    _words(_mapping(result["flags"]), "model", "data_path")
    _words(_mapping(result.get("environment", {})), "precision")
    places = result.get("places", [])
    if not isinstance(places, list):
        raise ValueError("its places are no list")
    for place in map(_mapping, places):
        _numbers(place, "layer", "top1")
        if "pooling" not in place:
            raise ValueError("a place lacks its pooling")
    _numbers(result, "top1", "num_images", *({"corrupted_top1"} & result.keys()))
    return result


def _config(text: str) -> PretrainConfig | FinetuneConfig:
    values = _mapping(yaml.safe_load(text))
    return from_dict(FinetuneConfig if "like" in values else PretrainConfig, values, "flags")


def _ledger(text: str) -> Ledger:
    stages = _mapping(json.loads(text)).get("stages")
    if not stages or not isinstance(stages, list):
        raise ValueError("it has no stages")
    costs = [from_dict(StageCost, _mapping(stage), "stages") for stage in stages]
    for cost in costs:
        _numbers(vars(cost), *(name for name in vars(cost) if name != "size_px"))
    return Ledger(costs)


def _timing(text: str, num_stages: int) -> Timing:
    timing = from_dict(Timing, _mapping(json.loads(text)), "times")
    if not len(timing.train_seconds) == len(timing.data_seconds) == num_stages:
        raise ValueError(f"it has not one time for each of {num_stages} stages")
    if not (min(timing.train_seconds) > 0 <= min(timing.data_seconds) and sum(timing.train_seconds) < math.inf):
        raise ValueError("a step takes some time, and not for ever")
    return timing


def _metrics(text: str) -> list[dict[str, Any]]:
    records = [_mapping(record) for record in parse_json_lines(text)]
    for record in records:
        _numbers(record, *NEEDED)
        if online := ONLINE.keys() & record.keys():
            _numbers(record, "flops", "seconds", *online)
    return records


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"names and values are expected, not {value!r:.40}")
    return value


def _numbers(record: Mapping[str, Any], *wanted: str) -> None:
    """ValueError unless these are finite numbers: JSON may hold NaN, of which no mean or interval can be told."""
    for name in wanted:
        value = record.get(name)
        if not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
            raise ValueError(f"{name} should be a finite number, not {value!r:.40}")


def _words(record: Mapping[str, Any], *wanted: str) -> None:
    """ValueError unless these are text, where they are there."""
    for name in wanted:
        if not isinstance(value := record.get(name) or "", str):
            raise ValueError(f"{name} should be a word, not {value!r:.40}")


def _read(path: RunFolder, parse: Callable[[str], Any]) -> Any:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing")
    try:
        return parse(path.read_text())
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is damaged or of another version: {' '.join(str(error).split())}") from error


def flag_value(run: RunRecord, name: str) -> Any:
    """A flag's value in a pretraining run, or what the model's name says where it is left open."""
    value = getattr(run.config, name)
    if value is None:
        value = model_shape(run.config.model).get(name)
    return str(value).rstrip("/") if name == "data_path" else value


# ── compare like with like ──


def on_one_clock(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Runs with the seconds of their timing in place of those of their ledger; without timings, unless all have one.

    Seconds of a run are those of its hour; a pass that times all of them step by step in turn is fair to each.
    """
    if not all(run.timing for run in runs if run.ledger):
        return [replace(run, timing=None) for run in runs]
    return [replace(run, ledger=_timed(run.ledger, run.timing)) if run.ledger and run.timing else run for run in runs]


def _timed(ledger: Ledger, timing: Timing) -> Ledger:
    seconds = zip(ledger.stages, timing.train_seconds, timing.data_seconds, strict=True)
    return Ledger(
        [
            replace(cost, train_seconds=cost.steps * train, data_seconds=cost.steps * data)
            for cost, train, data in seconds
        ]
    )


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
    flags = [_evaluation_flags(r, protocol) for r in (first, run)]
    judged = [f for f in names(FinetuneConfig, lambda role: role.judged) if f in flags[0] and f in flags[1]]
    computed = [result.get("environment", {}).get("precision") for result in results]
    if None not in computed:  # what auto became
        flags = [given | {"precision": precision} for given, precision in zip(flags, computed, strict=True)]
    values = [(f"--{flag}", flags[0][flag], flags[1][flag]) for flag in judged]
    values.append(("num_images", *(result["num_images"] for result in results)))
    data = [evaluated_on(r, protocol) for r in (first, run)]
    values += [("--data_path", *data)] if None not in data else []
    return [
        f"evaluation {protocol}: {name} is {a} in {first.folder} and {b} in {run.folder}"
        for name, a, b in values
        if a != b
    ]


def _evaluation_flags(run: RunRecord, protocol: str) -> dict[str, Any]:
    """Flags of an evaluation. What they leave to the model is filled in, and left out where that is unknown."""
    result = run.evaluations[protocol]
    flags = dict(result["flags"])
    of_model = {flag: flags.pop(flag, None) for flag in MODEL_FLAGS}
    for flag, value in of_model.items():
        value = result.get(flag) if value is None else value
        if value is None and not (run.untrained and run.untrained.like):
            value = flag_value(run, flag)
        if value is not None:
            flags[flag] = as_size(value) if flag == "input_size" else value
    if "model" in flags:
        flags["model"] = flags["model"].removeprefix("mae_").removesuffix("_dec512d8b")
    return flags


def evaluated_on(run: RunRecord, protocol: str) -> str | None:
    """Data of an evaluation: its own, else the pretraining's; None for a run from random weights that doesn't say."""
    path = run.evaluations[protocol]["flags"].get("data_path") or (run.config.data_path if run.ledger else None)
    return path and path.rstrip("/")
