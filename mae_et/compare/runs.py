"""Run folders as they are read for a comparison, and whether they can be compared at all."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..engine import run_folder
from ..plan.config import PretrainConfig
from ..plan.cost import Ledger, StageCost
from ..plan.flags import from_dict
from ..plan.shapes import model_shape

#: What makes two runs incomparable: other data, or another model.
DATA_FIELDS = ("data_path", "holdout", "mean", "std")
MODEL_FIELDS = tuple(
    "model input_size patch_size in_chans embed_dim depth num_heads decoder_embed_dim decoder_depth "
    "decoder_num_heads".split()
)
#: Flags of an evaluation that may differ between runs.
FREE_IN_EVALUATION = frozenset(
    """
    finetune like seed output_dir log_dir resume overwrite num_workers pin_mem damaged_limit device dist_eval data_path
    eval_epochs save_steps save_minutes report world_size local_rank dist_on_itp dist_url job_dir nodes ngpus
    use_volta32
    """.split()
)


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
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            raise FileNotFoundError(f"{flag} {path}: no such folder; give run folders")
        if (path / run_folder.CONFIG).exists():
            found.append(path)
            continue
        inside = sorted(p.parent for p in path.glob(f"*/{run_folder.CONFIG}"))
        if not inside:
            raise FileNotFoundError(f"{flag} {path} holds no {run_folder.CONFIG}, nor do the folders in it: not a run")
        found += inside
    return list({path.resolve(): path for path in found}.values())


def read_run(folder: Path) -> RunRecord:
    """A run folder of pretraining, or of fine-tuning from random weights. ValueError names the file that is wrong."""
    values = _read(folder / run_folder.CONFIG, yaml.safe_load)
    environment = _read(folder / run_folder.ENVIRONMENT, json.loads)
    paths = sorted(folder.glob("eval-*.json"))
    found = {path: _read(path, json.loads) for path in paths}
    for path, result in found.items():
        if not isinstance(result, dict) or not {"protocol", "top1", "num_images", "flags"} <= result.keys():
            raise ValueError(f"{path} is not a result of main_finetune.py")
    evaluations = {path.stem.removeprefix("eval-"): result for path, result in found.items()}
    if "like" in values:
        if not values["like"]:
            raise ValueError(f"{folder} is a fine-tuning run; give the pretraining run it started from")
        return RunRecord(folder, values["seed"], PretrainConfig(), None, environment, [], evaluations)
    config = from_dict(PretrainConfig, values, f"{folder / run_folder.CONFIG}")
    if not (folder / run_folder.LEDGER).exists():
        raise FileNotFoundError(f"{folder} has no {run_folder.LEDGER} yet: the run has not saved anything")
    ledger = Ledger.from_state_dict(_read(folder / run_folder.LEDGER, json.loads))
    metrics = run_folder.read_metrics(folder / run_folder.METRICS)
    return RunRecord(folder, config.seed, config, ledger, environment, metrics, evaluations)


def _read(path: Path, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(path.read_text())
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is damaged: {' '.join(str(error).split())}") from error


def incomparable(runs: Sequence[RunRecord]) -> list[str]:
    """Sentences that say which fields differ although they must not."""
    found = []
    pretrained = [run for run in runs if run.ledger]
    if not pretrained:
        raise ValueError("none of these runs has been pretrained; give pretraining runs")
    for run in pretrained[1:]:
        first = pretrained[0]
        for field in (*DATA_FIELDS, *MODEL_FIELDS):
            ours, theirs = shape_field(first, field), shape_field(run, field)
            if ours != theirs:
                found.append(f"{field} is {ours} in {first.folder} and {theirs} in {run.folder}")
        images = [r.environment.get("num_images") for r in (first, run)]
        if None not in images and images[0] != images[1]:
            found.append(f"the data set has {images[0]} images in {first.folder} and {images[1]} in {run.folder}")
    for protocol in sorted({p for run in runs for p in run.evaluations}):
        with_it = [run for run in runs if protocol in run.evaluations]
        first = with_it[0].evaluations[protocol]
        for run in with_it[1:]:
            result = run.evaluations[protocol]
            names = sorted((first["flags"].keys() & result["flags"].keys()) - FREE_IN_EVALUATION)
            pairs = [(f"--{n}", first["flags"][n], result["flags"][n]) for n in names]
            pairs.append(("num_images", first["num_images"], result["num_images"]))
            data = [_evaluated_on(r, protocol) for r in (with_it[0], run)]
            pairs += [("--data_path", *data)] if None not in data else []
            found += [
                f"evaluation {protocol}: {name} is {a} in {with_it[0].folder} and {b} in {run.folder}"
                for name, a, b in pairs
                if a != b
            ]
    found += [
        f"{run.folder} has stopped at {run.metrics[-1]['p'] if run.metrics else 0:.0%} of its compute; finish it with "
        "--resume auto"
        for run in runs
        if not run.finished
    ]
    return list(dict.fromkeys(found))


def _evaluated_on(run: RunRecord, protocol: str) -> str | None:
    """Data of an evaluation: its own, else the pretraining's; None for a run from random weights that doesn't say."""
    return run.evaluations[protocol]["flags"].get("data_path") or (run.config.data_path if run.ledger else None)


def shape_field(run: RunRecord, field: str) -> Any:
    """A field of the configuration, or what the model's name says where it is left open."""
    value = getattr(run.config, field)
    if value is None and field in ("patch_size", "embed_dim", "depth", "num_heads"):
        value = model_shape(run.config.model)[field]
    return str(value).rstrip("/") if field == "data_path" else value
