"""Files: written atomically with the ones before kept, and lines of JSON. No torch.

A file is written beside its target, forced to disk and renamed: a crash or a full disk leaves the previous file intact.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

log = logging.getLogger(__name__)

#: Errors that only writing raises.
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG})


class CheckpointError(RuntimeError):
    """A file that can't be written, or is not what it should be. One line that names the file and the reason."""


class CorruptCheckpoint(CheckpointError):
    """A file that is cut short, or whose checksum is wrong: an older one may be intact."""


def write(path: Path, content: Callable[[BinaryIO], object], keep: int | None = 1) -> None:
    """Write beside `path`, force to disk, rename over it, and force the renaming to disk.

    keep: files that stay, this one and those before it; None: the new one takes the place of `path` alone.

    Raises CheckpointError if that can't be done; then `path` is what it was and nothing is left beside it.
    """
    temporary = path.with_name(f".{path.name}.tmp")  # one name, so that what a killed run left is written over
    try:
        with open(temporary, "wb") as file:
            content(file)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None:
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


def write_text(path: Path, text: str) -> None:
    """Write text, atomically. Raises CheckpointError."""
    write(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_json_lines(path: Path, records: Iterable[Any]) -> None:
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def append_json_line(path: Path, record: Any) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def read_json_lines(path: Path) -> list[Any]:
    """The records of a file of JSON lines, in order; none if there is no such file. ValueError names a damaged line."""
    try:
        return parse_json_lines(path.read_text()) if path.exists() else []
    except ValueError as error:
        raise ValueError(f"{path}: {error}; mend or remove it") from error


def parse_json_lines(text: str) -> list[Any]:
    """The records of a text of JSON lines, in order. ValueError for a damaged line.

    Half a last line is none: a killed process may leave it.
    """
    records, lines = [], {number: line for number, line in enumerate(text.splitlines(), 1) if line.strip()}
    for number, line in lines.items():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if number != max(lines):
                raise ValueError(f"line {number} is damaged") from None
    return records


def crc32(path: Path) -> int:
    """CRC-32 of a file."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(2**20):
            crc = zlib.crc32(block, crc)
    return crc


# ── older files, kept beside the newest ──


def kept(path: Path) -> list[Path]:
    """Older files that :func:`write` has kept, newest first: checkpoint.prev1.pt, checkpoint.prev2.pt …"""
    pattern = re.compile(re.escape(path.stem) + r"\.prev(\d+)" + re.escape(path.suffix))
    found = (pattern.fullmatch(file.name) for file in path.parent.glob("*"))
    numbers = sorted(int(match[1]) for match in found if match)
    return [_older(path, number) for number in numbers]


def load_newest(path: Path, load: Callable[[Path], Any]) -> tuple[Any, Path]:
    """Read `path` or, where it is damaged or missing, the newest of those kept from before it; says so in a warning.

    Returns the content and the file it is from. Raises as `load` does of `path` where none is intact.
    """
    return load_intact([path, *kept(path)], load)


def load_intact(candidates: Iterable[Path], load: Callable[[Path], Any]) -> tuple[Any, Path]:
    """As :func:`load_newest`, of the first candidate that is neither damaged nor missing."""
    first: CheckpointError | FileNotFoundError | None = None
    for candidate in candidates:
        try:
            content = load(candidate)
        except (CorruptCheckpoint, FileNotFoundError) as error:
            first = first or error
            continue
        if first is not None:
            log.warning("%s; going on from %s", first, candidate)
        return content, candidate
    assert first is not None
    raise first


def promote(older: Path, path: Path) -> None:
    """Replace a corrupt file or folder by an intact older one."""
    if path.is_dir():
        remove(path)
    os.replace(older, path)


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


# ── folders ──


def make_folder(folder: Path, flag: str = "") -> None:
    """The folder, with those above it. flag: that chooses it. CheckpointError if it can't be made or written to."""
    name = f"{flag} {folder}".strip()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{name}: can't be created: {error.strerror or error}") from error
    if not os.access(folder, os.W_OK):
        raise CheckpointError(f"{name}: is not writable")


def remove(path: Path) -> None:
    """Remove a file, or a folder with all it holds, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace_folder(new: Path, path: Path, keep: int = 1) -> None:
    """Rename a folder, whose files are on the disk, to `path`; `keep` stay: this one and those before it.

    Raises CheckpointError. Replacing a folder is not atomic: between two renames only number 1 exists, where
    :func:`load_newest` finds it.
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


@contextmanager
def disk_full_errors(folder: Path) -> Iterator[None]:
    """Raise a full disk, a quota or a read-only file system as a CheckpointError that names the folder."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        message = f"{folder}: can't be written: {error.strerror}; the last checkpoint is intact"
        raise CheckpointError(message) from error


def _sync_folder(folder: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):  # Windows can't open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
