"""Torch files: written atomically, checked when read, and read without running code from them.

What torch.save writes carries a CRC-32 of each of its records, which torch itself doesn't look at; it is checked here.
"""

from __future__ import annotations

import argparse
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..files import CheckpointError, CorruptCheckpoint, write

#: What torch raises on corrupt, cut or foreign files besides UnpicklingError (no dedicated exception type).
NOT_A_CHECKPOINT = (
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    struct.error,
)


def save(state: Mapping, path: Path, keep: int | None = 1) -> None:
    """Write plain dicts, tensors and numbers, atomically. keep: as `files.write` has it.

    Raises CheckpointError; the previous file then survives.
    """
    write(Path(path), lambda file: torch.save(state, file), keep)


def save_safetensors(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, atomically. Raises CheckpointError; the previous file then survives."""
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    content = safetensors.torch.save(tensors, {"format": "pt", **(metadata or {})})
    write(Path(path), lambda file: file.write(content))


def load(path: Path, map_location: str | torch.device = "cpu") -> dict:
    """Read a file of `torch.save`, checked, without running any code from it (`weights_only=True`).

    `argparse.Namespace`, a plain holder of values, is let through: checkpoints of facebookresearch/mae hold one.
    Raises FileNotFoundError; CorruptCheckpoint if the file is cut short or altered; CheckpointError if it is something
    else, or would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path}: no such file")
    try:
        _verify(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise CheckpointError(f"{path}: refused, since it could run code ({refused[1]})") from error
        raise CorruptCheckpoint(f"{path}: not a checkpoint of torch.save, or cut short") from error
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror or error}") from error
    except CheckpointError:
        raise
    except NOT_A_CHECKPOINT as error:
        raise CorruptCheckpoint(f"{path}: not a checkpoint of torch.save, or cut short") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a dict")
    return content


def _verify(path: Path) -> None:
    """CorruptCheckpoint unless every record of a zip file has its checksum; torch.save never compresses any."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\3\4":
            return  # the format before torch 1.6 has no checksums
    try:
        with zipfile.ZipFile(path) as archive:
            if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                raise CheckpointError(f"{path}: refused: its records are compressed, as torch.save never does")
            wrong = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise CorruptCheckpoint(f"{path}: not a checkpoint of torch.save, or cut short") from error
    if wrong:
        raise CorruptCheckpoint(f"{path}: damaged: the checksum of its record {wrong} is wrong")
