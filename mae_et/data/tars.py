"""Tars: what is in one, read at offsets and never extracted; and FILE.tar, whose folders are classes."""

from __future__ import annotations

import logging
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .folders import EXTENSIONS, class_numbers, is_litter, warn_of_inner_splits

log = logging.getLogger(__name__)

TAR = re.compile(r"[^.].*\.(tar|tar\.(gz|bz2|xz|zst)|tgz|tbz2|txz)", re.IGNORECASE)
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")


class TarSource:
    """Images in one tar, in the natural order of their paths. A class is called as the folder an image lies in.

    Where a tar holds tars, as ImageNet's does, each of those is a folder. Images that lie in no folder have no labels,
    and then none has. `train`: the tar whose classes and numbers count, where this is the held-out one.

    Raises ValueError, in one line, for what is no complete tar, FileNotFoundError if there are no images in it.
    """

    def __init__(self, file: Path, train: TarSource | None = None) -> None:
        images = sorted(_images(file), key=lambda image: _natural_key(image[0]))
        if not images:
            raise FileNotFoundError(f"--data_path {file}: no images in it; tars of a WebDataset are wds/FOLDER")
        paths, folders, offsets, sizes = zip(*images, strict=True)
        warn_of_inner_splits(str(file), paths)
        self.labels: np.ndarray | None = None
        self.classes: list[str] | None = None
        self.why_unlabelled = ""
        if all(folders):
            names = sorted(set(folders), key=_natural_key)
            self.classes = train.classes if train is not None and train.classes is not None else names
            parent = train.file if train is not None else file
            self.labels = np.array(class_numbers(folders, self.classes, str(parent), file, parent), dtype=np.int64)
        elif any(folders):
            self.why_unlabelled = f"{paths[folders.index('')]} of {file} lies in no folder, unlike others"
            log.warning("--data_path %s: %s; so its images have no labels", file, self.why_unlabelled)
        self.file = file
        self._names = np.array([os.fsencode(path) for path in paths])  # bytes of one width, not Python strings
        self._offsets, self._sizes = (np.array(column, dtype=np.int64) for column in (offsets, sizes))

    def __len__(self) -> int:
        return len(self._sizes)

    def read(self, index: int) -> tuple[bytes, int | None]:
        size = int(self._sizes[index])
        with open(self.file, "rb") as file:  # anew, so that forked workers don't share (and move) one position
            file.seek(int(self._offsets[index]))
            data = file.read(size)
        if len(data) != size:
            raise OSError(f"{self.name(index)} ends after {len(data)} of {size} bytes")
        return data, None if self.labels is None else int(self.labels[index])

    def name(self, index: int) -> str:
        return f"{self.file}[{os.fsdecode(self._names[index])}]"


def _images(file: Path) -> Iterator[tuple[str, str, int, int]]:
    """(path, folder's name, offset, size) of each image; the folder of those directly in an inner tar is that tar."""
    for member, tar in regular_members(file):
        if any(map(is_litter, _steps(member.name))):
            continue
        if member.name.lower().endswith(".tar"):
            with tar.extractfile(member) as inner:
                for image, _ in _members(inner, f"{file}[{member.name}]"):
                    if _is_image(image):
                        folder = [Path(member.name).stem, *_steps(image.name)[:-1]][-1]
                        yield image.name, folder, member.offset_data + image.offset_data, image.size
        elif _is_image(member):
            yield member.name, ["", *_steps(member.name)[:-1]][-1], member.offset_data, member.size


def _is_image(member: tarfile.TarInfo) -> bool:
    extension = os.path.splitext(member.name)[1].lower()
    return member.isreg() and extension in EXTENSIONS and not any(map(is_litter, _steps(member.name)))


def _steps(path: str) -> list[str]:
    """Folders and file of a member's path, without . and ..: they are only names here."""
    return [step for step in path.split("/") if step.strip(".")]


def _natural_key(text: str) -> list[str | int]:
    """For an order in which 9 comes before 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", text.lower())]


def regular_members(file: Path) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """Members of a tar that are files, in order. ValueError unless it is whole, uncompressed and not sparse."""
    with file.open("rb") as raw:
        yield from _members(raw, str(file))


def _members(raw: BinaryIO, name: str) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """As `regular_members`, of an open file."""
    head = raw.read(512)
    if head.startswith(_COMPRESSED):
        raise ValueError(f"--data_path: {name} is compressed, and images are read at offsets; unpack it to a .tar")
    raw.seek(0)
    try:
        with tarfile.open(fileobj=raw, mode="r:") as tar:
            # At 0 the archive has no member, and next() of Python 3.10 fails.
            while tar.offset and (member := tar.next()) is not None:
                tar.members.clear()  # or tarfile keeps every header in memory
                if tar.offset <= member.offset or member.issparse():
                    raise tarfile.ReadError(f"{member.name} is sparse or has a negative size")
                if member.isreg():
                    yield member, tar
            # tarfile takes any broken header for the end, which is really a block of zeros
            raw.seek(tar.offset)
            if raw.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no end mark at byte {tar.offset}")
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        what = _kind(head) or str(error)
        raise ValueError(f"--data_path: {name} is no complete tar ({what})") from error


def read_small(member: tarfile.TarInfo, tar: tarfile.TarFile) -> bytes:
    """A member's bytes; fewer where the tar is cut short, which the step to the next member finds."""
    tar.fileobj.seek(member.offset_data)
    return tar.fileobj.read(member.size)


def _kind(head: bytes) -> str:
    """What a file is that is no tar, by its first bytes; "" if they don't tell."""
    start = head.lstrip().lower()
    if not head:
        return "it is empty"
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "it is a web page, as failed downloads leave it"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; fetch the file itself with git lfs pull"
    if head.startswith(b"PK\3\4"):
        return "it is a zip file"
    return ""
