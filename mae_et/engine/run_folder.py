"""Run folders: a run's files and where its checkpoint is. The only link between training and any claim. No torch."""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import sys
import time
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import files
from ..plan.cost import Ledger

log = logging.getLogger(__name__)

CHECKPOINT, CONFIG, ENVIRONMENT = "checkpoint.pt", "config.yaml", "environment.json"
SHARDED = "checkpoint.dcp"
METRICS, LEDGER, ENCODER, PICTURE = "metrics.jsonl", "ledger.json", "encoder.safetensors", "reconstruction.png"
PROGRESS = "progress.png"
TIMING = "timing.json"
"""Seconds per step of a pass that timed the run's stages beside those of other runs (benchmarks/quiet_pass.py)."""
BEST = "best.pt"
OWN_WEIGHTS = ("checkpoint*.pt", "checkpoint*.dcp", BEST, ENCODER)
SINK_ID = "sink_id.txt"
MADE_OF_A_RUN = ("finetune", "timm", "facebook.pth", "huggingface")
"""Where fine-tuning and exports of a run lie by default."""
PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow")


def prepare(path: Path, keep: bool, overwrite: bool) -> None:
    """Make the folder. Without `keep` (a resumed run) or `overwrite`, refuse one that already holds a run."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"--output_dir {path} cannot be made: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise PermissionError(f"--output_dir {path} is not writable")
    if not (keep or overwrite):
        check_free(path)
    if overwrite:
        for old in (*_held(path), LEDGER, TIMING, ENCODER, PICTURE, PROGRESS, BEST, SINK_ID):
            files.remove(path / old)
        for pattern in ("eval-*.json", "events.out.tfevents.*", "reconstruction-*.png"):
            for old in path.glob(pattern):
                old.unlink()
        if left := [name for name in MADE_OF_A_RUN if (path / name).exists()]:
            log.warning("--overwrite: %s in %s stays, of the run that was there", " and ".join(left), path)


def check_free(path: Path) -> None:
    """FileExistsError if the folder already holds a run."""
    if held := _held(path):
        raise FileExistsError(
            f"--output_dir {path} already holds a run ({held[0]}): go on with --resume auto, replace it with "
            "--overwrite, or choose another folder"
        )


def check_no_results(path: Path) -> None:
    """FileExistsError if a folder without a run holds results, which would be taken for those of the run to come."""
    results = sorted(file.name for file in path.glob("eval-*.json"))
    if results and not _held(path):
        raise FileExistsError(
            f"--output_dir {path} holds results of other weights ({results[0]}): choose another folder, or delete them "
            "with --overwrite, and without --resume"
        )


def _held(path: Path) -> list[str]:
    older = [old.name for name in (CHECKPOINT, SHARDED) for old in files.kept(path / name)]
    return [name for name in (CHECKPOINT, SHARDED, METRICS, *older) if (path / name).exists()]


def checkpoint_in(path: Path) -> Path | None:
    """The newest checkpoint of a run folder, or a checkpoint's own path; None if nothing is there.

    The path may be missing while older ones are kept, see `files.load_newest`.
    """
    if path.is_dir() and path.suffix != Path(SHARDED).suffix:
        # A sharded one is newer than checkpoint.pt, see drop_shards.
        candidates = [path / SHARDED, path / CHECKPOINT]
    else:
        candidates = [path]
    return next((file for file in candidates if file.exists() or files.kept(file)), None)


def find_checkpoint(flag: str, where: str) -> Path:
    """The checkpoint of a run folder, or a checkpoint's own path."""
    if checkpoint := checkpoint_in(Path(where)):
        return checkpoint
    legal = "a run folder, a checkpoint or auto" if flag == "--resume" else "a run folder or a checkpoint"
    raise FileNotFoundError(f"{flag} {where}: no checkpoint there; give {legal}")


def resume_path(resume: str, folder: Path) -> Path | None:
    """The checkpoint that --resume means for a run in `folder`; None to start."""
    if resume == "auto":
        return checkpoint_in(folder)
    return find_checkpoint("--resume", resume) if resume else None


def goes_on(folder: Path, checkpoint: Path | None, resume: str) -> bool:
    """Whether the folder may hold the beginning of the run that goes on from the checkpoint that --resume means."""
    # A first try may have died before its first checkpoint: then --resume auto starts anew.
    return checkpoint.parent.resolve() == folder.resolve() if checkpoint else resume == "auto"


def run_of(source: str | Path) -> Path | None:
    """The run folder that a checkpoint lies in; None for any other file, a foreign folder or a model name."""
    path = Path(source)
    if not path.is_dir() or path.suffix == Path(SHARDED).suffix:
        if not any(fnmatch(path.name, name) for name in OWN_WEIGHTS):
            return None  # an export, or a copy of other weights
        return path.parent if (path.parent / CONFIG).is_file() and path.exists() else None
    return path if (path / CONFIG).is_file() else None


def read_ledger(folder: Path) -> Ledger:
    return Ledger.from_state_dict(json.loads((folder / LEDGER).read_text()))


def drop_shards(path: Path) -> None:
    """Remove the sharded checkpoints of a run folder, whose checkpoint.pt has just become the newest."""
    for old in (*files.kept(path / SHARDED)[::-1], path / SHARDED):
        files.remove(old)


def delete_weights(folder: Path) -> None:
    """Delete a run's weights and pictures; what it says of itself stays."""
    for path in (*folder.glob("checkpoint*.pt"), *folder.glob("*.safetensors"), *folder.glob("*.png")):
        path.unlink()


def environment(**facts: Any) -> dict[str, Any]:
    """Command, versions and machine: what it takes to say where a figure comes from."""
    return {
        "command": " ".join(sys.argv),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "mae_et": _version("mae-et"),
        "git": _git_revision(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "packages": {name: _version(name) for name in PACKAGES},
        **facts,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """Revision of the code, with + if it has uncommitted changes; None outside a checkout or without git."""
    package = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=package, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        # A virtual environment inside someone else's checkout must not report that checkout's revision.
        if not git("ls-files", Path(__file__).name):
            return None
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
