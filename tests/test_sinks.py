"""Sinks: each gets the numbers of metrics.jsonl, in one run whatever is resumed; stand-ins record what they are told.

Where wandb or mlflow are installed, they themselves are read back, offline.
"""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import tiny

from mae_et.cli import main_finetune, main_pretrain
from mae_et.engine.pretrain import pretrain
from mae_et.engine.sinks import SINKS, open_sinks
from mae_et.evaluate.config import FinetuneConfig
from mae_et.plan.config import PretrainConfig
from mae_et.plan.shared import SINKS as NAMES


class Recorder:
    """A run of wandb or trackio, or all of mlflow."""

    def __init__(self) -> None:
        self.numbers: dict[int, dict[str, float]] = {}
        self.ended = None

    def log(self, numbers, step) -> None:
        self.numbers[step] = numbers

    def finish(self, exit_code=0) -> None:
        self.ended = exit_code


def stand_in(name: str, monkeypatch: pytest.MonkeyPatch, **members) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Recorder]]:
    """Stand-ins for all three; their runs by name or id."""
    known: dict[str, dict[str, Recorder]] = {"wandb": {}, "trackio": {}, "mlflow": {}}

    def wandb_init(*, project, dir, config, id, name, resume):
        assert (project, resume, name) == ("mae_et", "allow", "run") and config["batch_size"] == 6
        return known["wandb"].setdefault(id, Recorder())

    def trackio_init(*, project, name, config, resume):
        assert (project, resume) == ("mae_et", "allow") and json.dumps(config)
        return known["trackio"].setdefault(name, Recorder())

    stand_in("wandb", monkeypatch, init=wandb_init, Error=type("Error", (Exception,), {}))
    stand_in("trackio", monkeypatch, init=trackio_init)
    runs, active = known["mlflow"], []

    def search_runs(*, filter_string, output_format):
        wanted = filter_string.removeprefix("tags.mae_et = ").strip("'")
        return [types.SimpleNamespace(info=types.SimpleNamespace(run_id=wanted))] if wanted in runs else []

    def start_run(run_id=None, run_name="", tags=None):
        active.append(run_id or tags["mae_et"])
        runs.setdefault(active[-1], Recorder())

    def end_run(status):
        runs[active.pop()].ended = status

    stand_in(
        *("mlflow", monkeypatch),
        MlflowException=type("MlflowException", (Exception,), {}),
        set_experiment=lambda name: None,
        search_runs=search_runs,
        start_run=start_run,
        log_params=lambda params: None,
        log_metrics=lambda numbers, step: runs[active[-1]].log(numbers, step),
        end_run=end_run,
    )
    return known


def written(folder: Path) -> dict[int, dict[str, float]]:
    """Numbers of metrics.jsonl by step, as sinks name them."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: {f"pretrain/{k}": v for k, v in r.items() if k != "step"} for r in records}


def test_every_sink_has_the_numbers_of_metrics_jsonl_in_one_run(photos, tmp_path, libraries) -> None:
    """Resumed after its end, replaced, and resumed again where its sinks know it."""
    config = tiny(photos, tmp_path / "run", epochs=0.5, warmup_epochs=0.1, log_to=list(NAMES))
    folder = pretrain(config)
    first = written(folder)
    board = EventAccumulator(str(folder)).Reload()
    losses = {event.step: event.value for event in board.Scalars("pretrain/loss")}
    assert losses == pytest.approx({step: numbers["pretrain/loss"] for step, numbers in first.items()})
    pretrain(replace(config, resume="auto"))
    for name, ended in (("wandb", 0), ("trackio", 0), ("mlflow", "FINISHED")):
        (run,) = libraries[name].values()
        assert run.numbers == first and run.ended == ended
    pretrain(replace(config, overwrite=True))
    assert all(len(runs) == 2 for runs in libraries.values())
    assert list(libraries["mlflow"].values())[1].numbers == written(folder)


def test_a_run_that_fails_says_so(photos, tmp_path, libraries) -> None:
    for sink in open_sinks(tmp_path, tiny(photos, tmp_path / "run", log_to=["mlflow"]), 0):
        sink.close(failed=True)
    (run,) = libraries["mlflow"].values()
    assert run.ended == "FAILED"


def test_a_server_that_is_away_is_no_reason_to_stop(photos, tmp_path, libraries, monkeypatch, caplog) -> None:
    mlflow = sys.modules["mlflow"]

    def fail(numbers, step):
        raise mlflow.MlflowException("connection refused")

    monkeypatch.setattr(mlflow, "log_metrics", fail)
    (sink,) = open_sinks(tmp_path, tiny(photos, tmp_path / "run", log_to=["mlflow"]), 0)
    sink.log({"pretrain/loss": 1.0}, 7)
    assert "step 7 is only in metrics.jsonl: connection refused" in caplog.text


def test_who_is_not_logged_in_is_told_what_to_do(photos, tmp_path, libraries, monkeypatch) -> None:
    wandb = sys.modules["wandb"]

    def refuse(**_):
        raise wandb.Error("api_key not configured")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ValueError, match="--log_to wandb: api_key not configured; log in, or set WANDB_MODE=offline"):
        open_sinks(tmp_path, tiny(photos, tmp_path / "run", log_to=["wandb"]), 0)


def test_a_sink_that_is_not_installed_is_named_before_anything_is_replaced(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    old = tmp_path / "run" / "metrics.jsonl"
    old.parent.mkdir()
    old.write_text("{}\n")
    words = ["--data_path", str(photos), "--output_dir", str(old.parent), "--overwrite", "--log_to", "trackio"]
    with pytest.raises(SystemExit) as end:
        main_pretrain(words)
    assert end.value.code == 1 and old.exists()
    assert capsys.readouterr().err == (
        "main_pretrain.py: error: --log_to trackio: trackio isn't installed; pip install 'mae_et[trackio]'\n"
    )


@pytest.mark.parametrize("script", [main_pretrain, main_finetune])
def test_a_log_dir_that_cannot_be_made_is_named_before_anything_is_replaced(photos, tmp_path, capsys, script):
    (tmp_path / "file").touch()
    words = ["--data_path", str(photos), "--output_dir", str(tmp_path / "run"), "--log_dir", str(tmp_path / "file/x")]
    with pytest.raises(SystemExit) as end:
        script(words)
    assert end.value.code == 1 and not (tmp_path / "run").exists()
    error = f"{script.__name__}.py: error: --log_dir {tmp_path}/file/x: can't be created: Not a directory\n"
    assert capsys.readouterr().err == error


def test_every_name_has_a_sink_and_an_extra() -> None:
    assert tuple(SINKS) == NAMES
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    core = (Path(__file__).parents[1] / "requirements.txt").read_text()
    for name in NAMES[1:]:
        assert f'\n{name} = ["{name}' in project and name not in core


def test_mlflow_itself_keeps_the_numbers(photos, tmp_path, monkeypatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # from 3.7 on it must be asked for
    config = tiny(photos, tmp_path / "run", log_to=["mlflow"])
    for step in (0, 3):  # twice: it goes on in the same run
        (sink,) = open_sinks(tmp_path, config, step)
        sink.log({"pretrain/loss": 0.5 + step}, step)
        sink.close(failed=False)
    (run,) = mlflow.search_runs(experiment_names=["mae_et"], output_format="list")
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "pretrain/loss")
    assert [(point.step, point.value) for point in history] == [(0, 0.5), (3, 3.5)]
    assert float(run.data.params["epochs"]) == 2 and run.info.status == "FINISHED"


def test_wandb_itself_keeps_the_numbers_offline(photos, tmp_path, monkeypatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (sink,) = open_sinks(tmp_path, tiny(photos, tmp_path / "run", log_to=["wandb"]), 0)
    sink.log({"pretrain/loss": 0.625}, 3)
    sink.close(failed=False)
    wandb.teardown()  # its process writes until the end
    (file,) = (tmp_path / "wandb").glob(f"offline-run-*-{(tmp_path / 'sink_id.txt').read_text()}/*.wandb")
    assert b"pretrain/loss" in file.read_bytes() and b"0.625" in file.read_bytes()


def test_none_is_no_sink():
    assert PretrainConfig(log_to=("none",)).log_to == FinetuneConfig(model="m", log_to=("none",)).log_to == ()
    with pytest.raises(ValueError, match="unknown --log_to 'none'"):
        PretrainConfig(log_to=("none", "tensorboard"))
