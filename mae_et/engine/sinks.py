"""Sinks: where the numbers of metrics.jsonl go besides. TensorBoard comes with the package, the others are extras.

A library is imported when its sink is opened. Addresses, keys and offline modes are those of its own environment
variables, such as WANDB_MODE=offline or MLFLOW_TRACKING_URI.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from ..files import make_folder, write_text
from ..plan.flags import to_dict
from ..plan.shared import RunFlags
from .run_folder import SINK_ID

log = logging.getLogger(__name__)

PROJECT = "mae_et"


class Sink(Protocol):
    def log(self, numbers: Mapping[str, float], step: int) -> None: ...

    def close(self, failed: bool) -> None: ...


def check_sinks(config: RunFlags) -> None:
    """ValueError that names the extra if a sink's library isn't installed, CheckpointError if --log_dir can't be made.

    For the time before anything on disk is replaced.
    """
    for name in config.log_to:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"--log_to {name}: {name} isn't installed; pip install 'mae_et[{name}]'")
    if config.log_dir and "tensorboard" in config.log_to:
        make_folder(Path(config.log_dir), "--log_dir")


def open_sinks(folder: Path, config: RunFlags, first_step: int) -> list[Sink]:
    """The sinks of a run that goes on at `first_step`."""
    return [SINKS[name](folder, config, first_step) for name in dict.fromkeys(config.log_to)]


def sink_id(folder: Path) -> str:
    """What sinks know a run by, so that it goes on there when it is resumed; it goes when the run is replaced."""
    path = folder / SINK_ID
    if not path.exists():
        write_text(path, uuid.uuid4().hex[:12])
    return path.read_text()


class TensorBoard:
    """Events in --log_dir, by default the run folder."""

    def __init__(self, folder: Path, config: RunFlags, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(config.log_dir or str(folder), purge_step=first_step)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        self.writer.close()


class Wandb:
    """Weights & Biases. Steps that a resumed run does again are left out there: they give the same numbers."""

    def __init__(self, folder: Path, config: RunFlags, first_step: int) -> None:
        import wandb

        identity = {"id": sink_id(folder), "name": folder.resolve().name, "resume": "allow"}
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        try:
            self.run = wandb.init(project=project, dir=str(folder), config=to_dict(config), **identity)
        except wandb.Error as error:
            raise ValueError(f"--log_to wandb: {error}; log in, or set WANDB_MODE=offline") from error

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self.run.log(dict(numbers), step=step)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class Trackio:
    """Trackio, which keeps its files in TRACKIO_DIR. It knows runs by name."""

    def __init__(self, folder: Path, config: RunFlags, first_step: int) -> None:
        import trackio

        name = f"{folder.resolve().name}-{sink_id(folder)}"
        self.run = trackio.init(project=PROJECT, name=name, config=to_dict(config), resume="allow")

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self.run.log(dict(numbers), step=step)

    def close(self, failed: bool) -> None:
        self.run.finish()


class MLflow:
    """MLflow. It numbers runs itself, so this one is found by a tag."""

    def __init__(self, folder: Path, config: RunFlags, first_step: int) -> None:
        import mlflow

        self.mlflow, identity = mlflow, sink_id(folder)
        try:
            if "MLFLOW_EXPERIMENT_NAME" not in os.environ and "MLFLOW_EXPERIMENT_ID" not in os.environ:
                mlflow.set_experiment(PROJECT)
            found = mlflow.search_runs(filter_string=f"tags.mae_et = '{identity}'", output_format="list")
            if found:
                mlflow.start_run(run_id=found[0].info.run_id)
            else:
                mlflow.start_run(run_name=folder.resolve().name, tags={"mae_et": identity})
                mlflow.log_params(to_dict(config))
        except mlflow.MlflowException as error:
            raise ValueError(f"--log_to mlflow: {error}; see MLFLOW_TRACKING_URI") from error

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        try:
            self.mlflow.log_metrics(dict(numbers), step=step)
        except self.mlflow.MlflowException as error:  # a server that is away is no reason to stop
            log.warning("--log_to mlflow: step %d is only in metrics.jsonl: %s", step, error)

    def close(self, failed: bool) -> None:
        self.mlflow.end_run("FAILED" if failed else "FINISHED")


SINKS: dict[str, type[Sink]] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio, "mlflow": MLflow}
