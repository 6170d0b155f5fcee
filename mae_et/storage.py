"""Files that are whole or not there: written atomically, with the ones before kept, and read back without running code.

A file is written beside its target, forced to disk and renamed: a crash or a full disk leaves the previous file whole.
What torch.save writes carries a CRC-32 of each of its records, which torch itself doesn't look at; it is checked here.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import pickle
import re
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import safetensors.torch
import torch
from torch import Tensor

log = logging.getLogger(__name__)

#: What torch raises on damaged, cut or foreign files besides UnpicklingError: it has no error of its own for them.
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
#: Only writing fails like this.
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG})


class CheckpointError(RuntimeError):
    """A file that can't be written, or is not what it should be. One line that names the file and the reason."""


class DamagedCheckpoint(CheckpointError):
    """A file that is cut short, or whose checksum is wrong: an older one may be whole."""


def save(state: Mapping, path: Path, keep: int = 1) -> None:
    """Write plain dicts, tensors and numbers, atomically; `keep` files stay: this one and those before it.

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
    Raises FileNotFoundError; DamagedCheckpoint if the file is cut short or altered; CheckpointError if it is something
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
        raise DamagedCheckpoint(f"{path}: not a checkpoint of torch.save, or cut short") from error
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror or error}") from error
    except CheckpointError:
        raise
    except NOT_A_CHECKPOINT as error:
        raise DamagedCheckpoint(f"{path}: not a checkpoint of torch.save, or cut short") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a dict")
    return content


def load_newest(path: Path, load: Callable[[Path], dict] = load) -> tuple[dict, Path]:
    """Read `path` or, where it is damaged or missing, the newest of those kept from before it; says so in a warning.

    Returns the content and the file it is from. Raises as `load` does of `path` where none is whole.
    """
    first: CheckpointError | FileNotFoundError | None = None
    for candidate in [path, *kept(path)]:
        try:
            content = load(candidate)
        except (DamagedCheckpoint, FileNotFoundError) as error:
            first = first or error
            continue
        if first is not None:
            log.warning("%s; going on from the one before, %s", first, candidate)
        return content, candidate
    assert first is not None
    raise first


def kept(path: Path) -> list[Path]:
    """Older files that :func:`save` has kept, newest first: checkpoint.prev1.pt, checkpoint.prev2.pt …"""
    pattern = re.compile(re.escape(path.stem) + r"\.prev(\d+)" + re.escape(path.suffix))
    found = (pattern.fullmatch(file.name) for file in path.parent.glob("*"))
    numbers = sorted(int(match[1]) for match in found if match)
    return [_older(path, number) for number in numbers]


def write(path: Path, content: Callable[[BinaryIO], object], keep: int = 1) -> None:
    """Write beside `path`, force to disk, rename over it, and force the renaming to disk.

    Raises CheckpointError if that can't be done; then `path` is what it was and nothing is left beside it.
    """
    temporary = path.with_name(f".{path.name}.tmp")  # one name, so that what a killed run left is written over
    try:
        with open(temporary, "wb") as file:
            content(file)
            file.flush()
            os.fsync(file.fileno())
        _keep(path, keep)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        # torch.save hides an error of the file behind one of its own.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise CheckpointError(f"{path}: can't be written: {cause.strerror or cause}") from error
    finally:
        with suppress(OSError):  # after the renaming there is nothing left to remove
            temporary.unlink(missing_ok=True)


def replace_folder(new: Path, path: Path, keep: int = 1) -> None:
    """Rename a folder, whose files are on the disk, to `path`; `keep` stay: this one and those before it.

    Raises CheckpointError. A folder can't take the name of another at once: between two renamings `path` is missing,
    and the newest is number 1, where :func:`load_newest` finds it.
    """
    try:
        _sync_folder(new)
        _keep(path, max(2, keep))
        os.replace(new, path)
        _sync_folder(path.parent)
        for old in kept(path)[keep - 1 :]:
            remove(old)
    except OSError as error:
        raise CheckpointError(f"{path}: can't be written: {error.strerror or error}") from error


def promote(older: Path, path: Path) -> None:
    """Put an older file or folder in the place of a damaged `path`, which would else be kept before it."""
    if path.is_dir():
        remove(path)
    os.replace(older, path)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all it holds, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """The folder, with those above it. Raises CheckpointError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: can't be created: {error.strerror or error}") from error


@contextmanager
def naming_folder(folder: Path) -> Iterator[None]:
    """A full disk, a quota or a read-only file system stops a run with one line that names the folder."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        message = f"{folder}: can't be written: {error.strerror}; the last checkpoint is intact"
        raise CheckpointError(message) from error


def _verify(path: Path) -> None:
    """DamagedCheckpoint unless every record of a zip file has its checksum; torch.save never compresses any."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\3\4":
            return  # the format before torch 1.6 has no checksums
    try:
        with zipfile.ZipFile(path) as archive:
            if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                raise CheckpointError(f"{path}: refused: its records are compressed, as torch.save never does")
            wrong = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise DamagedCheckpoint(f"{path}: not a checkpoint of torch.save, or cut short") from error
    if wrong:
        raise DamagedCheckpoint(f"{path}: damaged: the checksum of its record {wrong} is wrong")


def _older(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}.prev{number}{path.suffix}")


def _keep(path: Path, keep: int) -> None:
    """Make room for a new `path`: what it holds becomes number 1, and so on; `path` stays until it is replaced."""
    for file in kept(path)[max(0, keep - 1) :]:
        remove(file)
    if keep < 2 or not path.exists():
        return
    if path.is_dir():  # a folder can't be renamed over another
        remove(_older(path, keep - 1))
    for number in range(keep - 2, 0, -1):
        if _older(path, number).exists():
            os.replace(_older(path, number), _older(path, number + 1))
    # Linked and then renamed over the old number 1, so that neither name is ever without a whole file.
    link = path.with_name(f".{path.name}.link")
    try:
        link.unlink(missing_ok=True)
        os.link(path, link)
        os.replace(link, _older(path, 1))
        link.unlink(missing_ok=True)  # it stays where both names were the same file already, after a crash
    except OSError:  # a folder, or a file system without links
        os.replace(path, _older(path, 1))


def _sync_folder(folder: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):  # Windows can't open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
