"""WebDataset shards, tars of `key.jpg` and `key.cls`, with random access: steps need any image at any time.

The headers of the tars are read once into an index of names, offsets, sizes and labels, which is kept beside the tars,
or in the user's cache where that can't be written. Afterwards images are read at their offsets. Nothing is ever
extracted: names of members are only labels. As in WebDataset, a key is a member's name up to the first dot of its last
part, what follows is the extension, and only regular files count.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import logging
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ..files import CheckpointError, make_folder, write_text
from .folders import EXTENSIONS, TRAIN_NAMES, VAL_NAMES, has_word, is_litter, split_word
from .shards import Members, check_shard, shard_numbers
from .tars import TAR, read_small, regular_members

log = logging.getLogger(__name__)

INDEX = ".mae_et-index.json"
FORMAT = "mae_et webdataset 2"  # 2: more endings, no litter
LABEL_FIELDS = ("label", "cls", "class")  # of key.json, first match; key.cls goes before
MAX_LABEL_BYTES = 1 << 16  # what is larger is no label
MAX_CLASSES = 1 << 20
SCAN_THREADS = 8  # reading headers of remote files is mostly waiting

_MEMBER = re.compile(r"(?P<key>(?:.*/)?[^./]+)\.(?P<extension>[^/]*)", re.DOTALL)
_BRACES = re.compile(r"\{([^{}]*)\}")
_SERIES = re.compile(r"(\d+)\.\.(\d+)")


class WebDatasetSource(Members):
    """Source of the images in tars. `entries` are those of :func:`scan`, one for each of `files`."""

    def __init__(self, files: list[Path], entries: list[dict[str, Any]], classes: list[str] | None) -> None:
        def column(name: str) -> list:
            return [value for entry in entries for value in entry[name]]

        labels = None
        if classes is not None:
            number = {name: index for index, name in enumerate(classes)}
            labels = np.array([number[label] for label in column("labels")], dtype=np.int64)
        offsets, sizes = (np.array(column(name), dtype=np.int64) for name in ("offsets", "sizes"))
        super().__init__(files, shard_numbers(entries), offsets, sizes, labels, classes)
        names = [os.fsencode(name) for name in column("keys")]
        self._names, self._ends = b"".join(names), np.cumsum([0, *map(len, names)])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}  # descriptors mean nothing to another process

    def name(self, index: int) -> str:
        member = self._names[self._ends[index] : self._ends[index + 1]]
        return f"{self._files[self._shard[index]]}[{os.fsdecode(member)}]"


def open_webdataset(data_path: str, split: str) -> WebDatasetSource:
    """Open the split "train" or "val" of wds/FOLDER or wds/PATTERN, see :func:`find_shards`.

    A label is the text in key.cls, else a field of key.json. If all are numbers, classes are 0 to the largest; if not,
    they are in alphabetical order. The classes of "val" are those of "train", where there is one. If any image lacks a
    label, all count as unlabelled.

    Raises FileNotFoundError for what is missing and ValueError for what cannot be used, in one line.
    """
    where = os.path.expanduser(data_path.partition("/")[2])
    files = find_shards(where, split)
    if split == "val" and files:
        log.info("held-out images are those of %s%s", files[0], f" to {files[-1].name}" if len(files) > 1 else "")
    entries = read_entries(files)
    if not any(entry["keys"] for entry in entries):
        problem = f"no images in {len(files)} shards" if files else f"no shards of {split}"
        raise FileNotFoundError(
            f"--data_path {data_path}: {problem}; give wds/FOLDER of tars, or wds/PATTERN such as "
            "wds/FOLDER/train-{000..146}.tar; held-out shards have val, validation or test in their name"
        )
    classes = class_names(entries)
    if split == "val" and classes is not None and (train := find_shards(where, "train")):
        classes = class_names(read_entries(train))
        labels = {label for entry in entries for label in entry["labels"]}
        if unknown := sorted(labels - set(classes)) if classes is not None else []:
            raise ValueError(f"--data_path {data_path}: labels {', '.join(unknown[:5])} of val are not in train")
    return WebDatasetSource(files, entries, classes)


def class_names(entries: list[dict[str, Any]]) -> list[str] | None:
    """Names of the classes in the order of their numbers, or None without labels."""
    labels = [label for entry in entries for label in entry["labels"]]
    names = set(labels)
    if None in names:
        if len(names) > 1:
            keys = [key for entry in entries for key in entry["keys"]]
            log.warning(
                "%d of %d images have no label: all count as unlabelled; the first is %s",
                *(labels.count(None), len(labels), keys[labels.index(None)]),
            )
        return None
    if not all(name.isdecimal() for name in names):
        return sorted(names)
    largest = max(map(int, names), default=0)
    if largest >= MAX_CLASSES:
        raise ValueError(f"--data_path: label {largest} in WebDataset shards; numbers must be below {MAX_CLASSES}")
    return [str(number) for number in range(largest + 1)]


# ── which shards ──


def find_shards(where: str, split: str) -> list[Path]:
    """The tars of a split, sorted; there may be none.

    Of a folder: the tars in train/, or in val/, validation/ or test/ (the first of VAL_NAMES). Where there is no such
    sub-folder: the folder's own tars, of which those with one of these words in their name are held out. A pattern,
    such as {a,b}/train-{000..146}.tar, names training shards; the held-out ones have another word in place of `train`.
    FileNotFoundError if a tar of a pattern is missing.
    """
    if os.path.isdir(where):
        folder = Path(where)
        names = TRAIN_NAMES if split == "train" else VAL_NAMES
        inner = sorted(os.listdir(folder), reverse=True)
        folders = [folder / name for wanted in names for name in inner if name.lower() == wanted]
        inside = (_tars(path) for path in folders if path.is_dir())
        own = _tars(folder)
        if split == "train":
            by_name = [[tar for tar in own if not any(has_word(tar.name, name) for name in VAL_NAMES)]]
        else:
            by_name = [[tar for tar in own if has_word(tar.name, name)] for name in VAL_NAMES]
        return next(filter(None, itertools.chain(inside, by_name)), [])
    if split == "train":
        files = sorted({Path(file) for file in expand(where)})
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(f"--data_path wds/{where}: {file} does not exist")
        return files
    pattern = glob.escape(where)
    while _BRACES.search(pattern):
        pattern = _BRACES.sub("*", pattern)
    word = next((name for name in TRAIN_NAMES if has_word(where, name)), None)
    any_case = ("".join(f"[{letter}{letter.upper()}]" for letter in name) for name in VAL_NAMES if word)
    held_out = (split_word(word).sub(name, pattern) for name in any_case)
    return next(filter(None, (sorted(map(Path, glob.glob(each))) for each in held_out)), [])


def expand(pattern: str) -> list[str]:
    """Braces as a shell expands them: {a,b} and {008..012}."""
    braces = _BRACES.search(pattern)
    if not braces:
        return [pattern]
    if series := _SERIES.fullmatch(braces[1]):
        width = max(map(len, series.groups())) if any(end.startswith("0") for end in series.groups()) else 0
        choices = [f"{number:0{width}}" for number in range(int(series[1]), int(series[2]) + 1)]
    else:
        choices = braces[1].split(",")
    before, after = pattern[: braces.start()], pattern[braces.end() :]
    return [name for choice in choices for name in expand(before + choice + after)]


def _tars(folder: Path) -> list[Path]:
    return sorted(folder / name for name in os.listdir(folder) if TAR.fullmatch(name))


# ── what is in a shard ──


def scan(file: Path) -> dict[str, Any]:
    """Entry of one tar: its name, bytes and mtime_ns, and for each image member name, offset, size and label or None.

    Of several images under a key, the one is taken whose extension comes first in EXTENSIONS. ValueError, in one line,
    for a tar that is compressed, cut short or broken, or has a member twice.
    """
    status = file.stat()
    images: dict[str, dict[str, tuple[str, int, int]]] = {}  # key -> extension -> name, offset, size
    labels: dict[str, dict[str, str | None]] = {}  # key -> extension -> label
    for member, tar in regular_members(file):
        *folders, _ = member.name.split("/")
        parts = _MEMBER.fullmatch(member.name)
        if parts is None or any(step.strip(".") and is_litter(step) for step in folders):
            continue
        key, extension = parts["key"], parts["extension"].lower()
        if extension in images.get(key, ()) or extension in labels.get(key, ()):
            raise ValueError(f"--data_path: {file} has {member.name} twice; a key and extension must be unique")
        if f".{extension}".endswith(EXTENSIONS):
            images.setdefault(key, {})[extension] = member.name, member.offset_data, member.size
        elif extension in ("cls", "json") and member.size <= MAX_LABEL_BYTES:
            text = read_small(member, tar).decode(errors="replace")
            labels.setdefault(key, {})[extension] = _normal(text) if extension == "cls" else _field(text)
    entry = {"file": file.name, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    entry |= {"keys": [], "offsets": [], "sizes": [], "labels": []}
    for key, candidates in images.items():
        plain = [extension[1:] for extension in EXTENSIONS if extension[1:] in candidates]
        if not plain and len(candidates) > 1:
            names = " and ".join(name for name, _, _ in list(candidates.values())[:2])
            raise ValueError(f"--data_path: {file}: the key {key} has {names}; a key ends at its first dot")
        name, offset, size = candidates[plain[0]] if plain else next(iter(candidates.values()))
        label = labels.get(key, {})
        for column, value in (("keys", name), ("offsets", offset), ("sizes", size)):
            entry[column].append(value)
        entry["labels"].append(label.get("cls") or label.get("json"))
    return entry


def _normal(value: object) -> str | None:
    """A label as a text in one line, numbers without leading zeros; None for what is none, such as -1."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    text = " ".join(str(value).split())
    if re.fullmatch(r"-?[0-9]{1,18}", text):
        return str(int(text)) if int(text) >= 0 else None
    return text or None


def _field(text: str) -> str | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # no JSON, no label: pretraining needs none
        return None
    fields = value if isinstance(value, dict) else {}
    return next((_normal(fields[name]) for name in LABEL_FIELDS if name in fields), None)


# ── index ──


def read_entries(files: list[Path]) -> list[dict[str, Any]]:
    """What :func:`scan` says of each file, from the index where size and mtime of the file are still the same."""
    entries = []
    for folder, group in itertools.groupby(files, key=lambda file: file.parent):
        shards = list(group)
        indices = [_read_index(place) for place in _places(folder)]
        current = {file.name: entry for file in shards for index in indices if (entry := _current(index, file))}
        if new := [file for file in shards if file.name not in current]:
            log.info("indexing %d of %d shards in %s, once", len(new), len(shards), folder)
            with ThreadPoolExecutor(SCAN_THREADS) as pool:
                current |= {entry["file"]: entry for entry in pool.map(scan, new)}
            present = set(os.listdir(folder))
            other_shards = {name: entry for index in indices for name, entry in index.items() if name in present}
            _write_index(folder, list((other_shards | current).values()))
        entries += [current[file.name] for file in shards]
    return entries


def _places(folder: Path) -> tuple[Path, Path]:
    """Beside the shards, or else in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "mae_et"
    digest = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
    return folder / INDEX, cache / f"{digest}.json"


def _read_index(place: Path) -> dict[str, dict[str, Any]]:
    """Entries by file name; none if there is no index that this version has written: it will be written again."""
    try:
        index = json.loads(place.read_text())
        return {entry["file"]: entry for entry in index["shards"]} if index["format"] == FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _current(index: dict[str, dict[str, Any]], file: Path) -> dict[str, Any] | None:
    """The entry of a file if it is sound and the file hasn't changed."""
    try:
        entry = index[file.name]
        check_shard(file.parent, entry)
        is_text = all(isinstance(key, str) for key in entry["keys"])
        is_text &= all(label is None or isinstance(label, str) for label in entry["labels"])
        return entry if is_text and entry["mtime_ns"] == file.stat().st_mtime_ns else None
    except (KeyError, TypeError, ValueError):
        return None


def _write_index(folder: Path, shards: list[dict[str, Any]]) -> None:
    text = json.dumps({"format": FORMAT, "shards": shards})
    for place in _places(folder):
        try:
            make_folder(place.parent)
            write_text(place, text)
            return
        except CheckpointError as error:
            log.info("the index of %s can't be kept as %s (%s)", folder, place, error)
    log.warning("the index of %s can't be kept anywhere: its shards will be read through at every start", folder)
