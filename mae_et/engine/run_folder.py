"""What a run leaves behind. The folder is the only link between training and any claim about it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from . import storage

CHECKPOINT, CONFIG, ENVIRONMENT = "checkpoint.pt", "config.yaml", "environment.json"
SHARDED = "checkpoint.dcp"
METRICS, LEDGER, ENCODER, PICTURE = "metrics.jsonl", "ledger.json", "encoder.safetensors", "reconstruction.png"
PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow")


def prepare(path: Path, keep: bool, overwrite: bool) -> None:
    """Make the folder. Without `keep` (a resumed run) or `overwrite`, refuse one that already holds a run."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"--output_dir {path} cannot be made: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise PermissionError(f"--output_dir {path} is not writable")
    older = [old.name for name in (CHECKPOINT, SHARDED) for old in storage.kept(path / name)]
    held = [name for name in (CHECKPOINT, SHARDED, METRICS, *older) if (path / name).exists()]
    if held and not (keep or overwrite):
        raise FileExistsError(
            f"--output_dir {path} already holds a run ({held[0]}): go on with --resume auto, replace it with "
            "--overwrite, or choose another folder"
        )
    if overwrite:
        for old in (*older, CHECKPOINT, SHARDED, METRICS, LEDGER, ENCODER, PICTURE, *path.glob("eval-*.json")):
            storage.remove(path / old)
        for old in (*path.glob("events.out.tfevents.*"), *path.glob("reconstruction-*.png")):
            old.unlink()


def checkpoint_of(path: Path) -> Path:
    """Where the newest checkpoint of a run folder is, if it holds one; a checkpoint's own path is returned as it is."""
    if not path.is_dir() or path.suffix == Path(SHARDED).suffix:
        return path
    sharded = path / SHARDED  # newer than checkpoint.pt: see drop_shards
    return sharded if sharded.exists() or storage.kept(sharded) else path / CHECKPOINT


def drop_shards(path: Path) -> None:
    """Remove the sharded checkpoints of a run folder, whose checkpoint.pt has just become the newest."""
    for old in (*storage.kept(path / SHARDED)[::-1], path / SHARDED):
        storage.remove(old)


def write_text(path: Path, text: str) -> None:
    """Write atomically: a reader, or a crash, never sees half a file. Raises CheckpointError."""
    storage.write(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


class Metrics:
    """metrics.jsonl: one JSON object a line, appended. On resume, lines from `first_step` on are dropped."""

    def __init__(self, path: Path, first_step: int = 0) -> None:
        kept = [line for line in read_metrics(path) if line["step"] < first_step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", buffering=1)

    def append(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, in order; none if there is no such file."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break  # the last line of a killed run may be half a line
    return lines


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
    rt = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=rt, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        # A virtual environment inside someone else's checkout must not report that checkout's revision.
        if not git("ls-files", Path(__file__).name):
            return None
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
