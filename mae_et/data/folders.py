"""Folders of image files: which files are images, which sub-folders are splits, and which are classes."""

from __future__ import annotations

import functools
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePath

import numpy as np
from PIL import Image

log = logging.getLogger(__name__)

#: Endings of image files, as many as the installed Pillow reads. Of several images of one name the first is preferred.
EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif", ".npy"),
    *(".jpe", ".jfif", ".avif", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".apng", ".pnm", ".pbm"),
    *(".tga", ".dib", ".dds", ".pcx", ".sgi", ".qoi"),
)
#: Names of splits, in any letter case. Of several held-out ones the first counts: validation before test.
TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "valid", "validation", "eval", "evaluation", "dev", "test", "testing")
_VAL_HINT = ("val", "validation", "test")

#: What operating systems and network storage leave in folders, in lower case; hidden files are skipped anyway.
_LITTER = frozenset(
    "@eadir,@tmp,@recycle,@recently-snapshot,@__thumb,#recycle,#snapshot,$recycle.bin,recycler,lost+found,__macosx,"
    "thumbs.db,desktop.ini,system volume information".split(",")
)
#: Endings that are no images and lie beside them: notes, labels, programs. All others are named if they are left out.
_NOT_DATA = frozenset(
    " .txt .md .rst .json .jsonl .ndjson .xml .csv .tsv .yaml .yml .toml .ini .cfg .html .htm .css .js .py .ipynb .sh "
    ".bat .log .cls .names .data .caption .pdf .doc .docx .xls .xlsx .bib .tex .lst .list .idx .index .db .sqlite .url "
    ".lnk .md5 .sha1 .sha256 .tmp .part .bak .xmp .aae .license".split(" ")
)
# Splits under names that are not understood: train2017, val_images, images-test
_SPLIT_LIKE = re.compile(
    r"(?:(?:images?|imgs?|data|set)[\W_]*)?"
    rf"(?:(?P<train>{'|'.join(TRAIN_NAMES)})|{'|'.join(VAL_NAMES)})"
    r"(?:[\W_]*(?:sets?|images?|imgs?|data|split))?[\W_]*\d*",
    re.IGNORECASE,
)


class FolderSource:
    """Image files under `root`. `paths` are relative to it; `labels` index `classes`, or both are None.

    why_unlabelled: the image that keeps the class folders beside it from being labels.
    """

    def __init__(
        self,
        root: Path,
        paths: list[str],
        labels: list[int] | None,
        classes: list[str] | None,
        why_unlabelled: str = "",
    ) -> None:
        self.classes, self.why_unlabelled = classes, why_unlabelled
        self.labels = None if labels is None else np.array(labels, dtype=np.int64)
        self._root = root
        self._paths = np.array([os.fsencode(path) for path in paths])  # bytes of one width, not Python strings

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int) -> tuple[bytes, int | None]:
        with open(self.name(index), "rb") as file:
            return file.read(), None if self.labels is None else int(self.labels[index])

    def name(self, index: int) -> str:
        return os.path.join(self._root, os.fsdecode(self._paths[index]))


def open_folder(root: Path, split: str) -> FolderSource:
    """Open the split "train" or "val" of a folder.

    Raises FileNotFoundError if there are no such images, ValueError if it isn't clear which are meant.
    """
    train, val = split_folders(root)
    if split == "val":
        if val is None:
            raise FileNotFoundError(no_held_out_images(root, str(root), "/"))
        log.info("held-out images are those of %s", val)
        folder = val
    else:
        if train is None and val is not None:
            raise ValueError(
                f"--data_path {root}: {val.name}/ looks like held-out images, and there is no train/; give the folder "
                f"of the training images, or rename {val.name}/ if its images are meant, too"
            )
        folder = train or root
    paths, left_out = find_images(folder)
    if not paths:
        known = " ".join(extension[1:] for extension in EXTENSIONS)
        raise FileNotFoundError(
            f"--data_path {root}: no images in {folder}; looked for {known} in any folder"
            f"{f', not for {left_out}' if left_out else ''}; tars of a WebDataset are wds/FOLDER"
        )
    if left_out:
        log.warning("--data_path %s: left out %s, which can't be read as images", folder, left_out)
    if folder is root:
        warn_of_inner_splits(str(root), paths)
        return FolderSource(folder, paths, labels=None, classes=None)
    loose = [path for path in paths if os.sep not in path]
    if loose:
        why = ""
        if len(loose) < len(paths):
            why = f"{loose[0]} lies in {folder} itself, beside its class folders" + _and_more(loose)
            log.warning("--data_path %s: %s; so its images have no labels", root, why)
        return FolderSource(folder, paths, labels=None, classes=None, why_unlabelled=why)
    # class numbers come from train/, so that both splits agree whatever val/ lacks
    classes = _sub_folders(train or folder)
    names = [path.partition(os.sep)[0] for path in paths]
    return FolderSource(folder, paths, class_numbers(names, classes, str(root), folder, train), classes)


def class_numbers(names: list[str], classes: list[str], data_path: str, folder: Path, train: Path | None) -> list[int]:
    """The number of each image's class. ValueError for classes of `folder` that `train` lacks."""
    number = {name: index for index, name in enumerate(classes)}
    if unknown := sorted(set(names) - set(number)):
        classes_text = ", ".join(unknown[:5])
        raise ValueError(f"--data_path {data_path}: class folders {classes_text} of {folder} are not in {train}")
    return [number[name] for name in names]


def _and_more(paths: list[str]) -> str:
    return f" (and {len(paths) - 1} more)" if len(paths) > 1 else ""


# ── splits ──


def split_folders(root: Path) -> tuple[Path | None, Path | None]:
    """(training, held-out) sub-folders of a folder, by their names; both None if it is no folder of splits.

    ValueError where names look like splits and aren't, or like classes as well.
    """
    names = _sub_folders(root)
    train = [name for name in names if name.lower() in TRAIN_NAMES]
    val = sorted((name for name in names if name.lower() in VAL_NAMES), key=lambda name: VAL_NAMES.index(name.lower()))
    if len(train) > 1:
        raise ValueError(f"--data_path {root}: {train[0]}/ and {train[1]}/ both look like training images; keep one")
    similar = {name: match for name in names if (match := _SPLIT_LIKE.fullmatch(name))}
    if not train and len(kinds := {bool(match["train"]): name for name, match in similar.items()}) == 2:
        raise ValueError(
            f"--data_path {root}: {kinds[True]}/ and {kinds[False]}/ look like splits; call them train/ and val/, or "
            "give the one to train on"
        )
    if train and (beside := [name for name in names if name not in similar and _holds_images(root / name)]):
        if not val and _holds_images(root / train[0], itself=True):
            raise ValueError(
                f"--data_path {root}: {train[0]}/ is the training images, or a class like {beside[0]}/ beside it"
                f"{_and_more(beside)}? give {root / train[0]} for the one, or put all classes into one folder train/"
            )
        log.warning("--data_path %s: training images are those of %s/; not %s/", root, train[0], "/, ".join(beside[:5]))
    return (root / train[0] if train else None), (root / val[0] if val else None)


def warn_of_inner_splits(data_path: str, paths: Iterable[str]) -> None:
    """Warn if folders inside are called as splits are, since images of all of them are taken."""
    inner: dict[str, dict[bool, str]] = {}
    for folder in {PurePath(path).parent for path in paths}:
        for place in (folder, *folder.parents):  # members of a tar may be absolute
            if place.name.lower() in (*TRAIN_NAMES, *VAL_NAMES):
                inner.setdefault(str(place.parent), {})[place.name.lower() in TRAIN_NAMES] = place.name
    for parent, names in sorted(inner.items()):
        if len(names) == 2:
            place = os.path.join(data_path, parent)
            log.warning("--data_path %s: images of %s/ and of %s/ in %s are taken", data_path, *names.values(), place)
            return


def held_out_sibling(file: Path) -> Path | None:
    """The file of held-out images beside one of training images: val.tar beside train.tar, in any letter case."""
    stem = file.name.lower()
    word = next((name for name in reversed(TRAIN_NAMES) if has_word(stem, name)), None)
    siblings = {name.lower(): name for name in sorted(os.listdir(file.parent), reverse=True)}
    for name in VAL_NAMES:
        wanted = split_word(word).sub(name, stem) if word else name + file.suffix.lower()
        if wanted in siblings and wanted != stem:
            return file.with_name(siblings[wanted])
    return None


def no_held_out_images(folder: Path, data_path: str, suffix: str) -> str:
    wanted = " or ".join(name + suffix for name in _VAL_HINT)
    similar = [name for name in sorted(os.listdir(folder)) if name.lower() not in TRAIN_NAMES]
    similar = [name for name in similar if (match := _SPLIT_LIKE.fullmatch(name)) and not match["train"]]
    hint = f" ({similar[0]} isn't one of these names)" if similar else ""
    return f"--data_path {data_path} has no held-out images: {wanted} is missing in {folder}{hint}"


def split_word(word: str) -> re.Pattern[str]:
    """The name of a split within another name: train in Imagenet1k-train-00.tar, but not in trainer.tar."""
    return re.compile(rf"(?<![a-z]){word}(?![a-z])", re.IGNORECASE)


def has_word(text: str, word: str) -> bool:
    return split_word(word).search(text) is not None


# ── files ──


def find_images(folder: str | os.PathLike[str]) -> tuple[list[str], str]:
    """Relative paths of all image files under `folder`, sorted folder by folder; and what was left out, in words.

    By extension, in any letter case. Hidden files and litter are skipped; links are followed, except back up.
    """
    paths: list[str] = []
    left_out: Counter[str] = Counter()
    _find_images(os.fspath(folder), "", (), paths, left_out)
    return paths, ", ".join(f"{count} {ending}" for ending, count in left_out.most_common(8))


def _find_images(
    folder: str, prefix: str, above: tuple[tuple[int, int], ...], paths: list[str], left_out: Counter[str]
) -> None:
    status = os.stat(folder)
    identity = status.st_dev, status.st_ino
    if identity in above:
        return
    with os.scandir(folder) as entries:
        in_order = sorted(entries, key=lambda entry: entry.name)
    extensions = readable_extensions()
    for entry in in_order:
        if is_litter(entry.name):
            continue
        extension = os.path.splitext(entry.name)[1].lower()
        if _is_dir(entry):
            _find_images(entry.path, os.path.join(prefix, entry.name), (*above, identity), paths, left_out)
        elif extension in extensions:
            if os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file():
                paths.append(os.path.join(prefix, entry.name))
            elif entry.is_symlink():
                left_out["broken links"] += 1
        elif extension not in _NOT_DATA:
            left_out[extension] += 1


@functools.cache
def readable_extensions() -> frozenset[str]:
    """Those of EXTENSIONS that the installed Pillow knows, and .npy."""
    formats = Image.registered_extensions()
    return frozenset(name for name in EXTENSIONS if name == ".npy" or formats.get(name) in Image.OPEN)


def is_litter(name: str) -> bool:
    """Whether a file or folder is hidden, or what operating systems and network storage leave behind."""
    return name.startswith(".") or name.lower() in _LITTER


def _is_dir(entry: os.DirEntry) -> bool:
    """A link to itself is none; it makes `entry.is_dir` fail."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _sub_folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if _is_dir(entry) and not is_litter(entry.name))


def _holds_images(folder: Path, itself: bool = False) -> bool:
    """Whether there is an image in a folder; `itself`: not only in its sub-folders."""
    for _, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not itself and not is_litter(name)]
        if any(os.path.splitext(n)[1].lower() in readable_extensions() and not is_litter(n) for n in files):
            return True
    return False
