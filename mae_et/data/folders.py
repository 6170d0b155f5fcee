"""Folders of image files: which files are images, which sub-folders are splits, and which are classes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif", ".npy")
VAL_NAMES = ("val", "validation", "test")  # what holds the split "val", first match


class FolderSource:
    """Image files under `root`. `paths` are relative to it; `labels` index `classes`, or both are None."""

    def __init__(self, root: Path, paths: list[str], labels: list[int] | None, classes: list[str] | None) -> None:
        self.classes = classes
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
    train = root / "train"
    folder = train if train.is_dir() else root
    if split == "val":
        folder = val_sibling(train, "", str(root))
    paths = find_images(folder)
    if not paths:
        raise FileNotFoundError(
            f"--data_path {root}: no images in {folder}; looked for {' '.join(e[1:] for e in EXTENSIONS)} in any folder"
            "; tars of a WebDataset are wds/FOLDER"
        )
    if folder is root or not all(os.sep in path for path in paths):
        return FolderSource(folder, paths, labels=None, classes=None)
    # class numbers come from train/, so that both splits agree whatever val/ lacks
    classes = _class_folders(train if train.is_dir() else folder)
    number = {name: index for index, name in enumerate(classes)}
    names = [path.partition(os.sep)[0] for path in paths]
    if unknown := sorted(set(names) - set(number)):
        raise ValueError(f"--data_path {root}: class folders {', '.join(unknown[:5])} of {folder} are not in {train}")
    return FolderSource(folder, paths, [number[name] for name in names], classes)


def val_sibling(train: Path, suffix: str, data_path: str) -> Path:
    for name in VAL_NAMES:
        if (path := train.with_name(name + suffix)).exists():
            return path
    wanted = " or ".join(name + (suffix or "/") for name in VAL_NAMES)
    raise FileNotFoundError(f"--data_path {data_path} has no held-out images: {wanted} is missing in {train.parent}")


def find_images(folder: str | os.PathLike[str]) -> list[str]:
    """Relative paths of all image files under `folder`, sorted folder by folder.

    By extension, in any letter case. Hidden files and __MACOSX are skipped; links are followed, except back up.
    """
    return _find_images(os.fspath(folder), "", ())


def _find_images(folder: str, prefix: str, above: tuple[tuple[int, int], ...]) -> list[str]:
    status = os.stat(folder)
    identity = status.st_dev, status.st_ino
    if identity in above:
        return []
    paths = []
    with os.scandir(folder) as entries:
        in_order = sorted(entries, key=lambda entry: entry.name)
    for entry in in_order:
        if _is_skipped(entry.name):
            continue
        if entry.is_dir():
            paths += _find_images(entry.path, os.path.join(prefix, entry.name), (*above, identity))
        elif entry.name.lower().endswith(EXTENSIONS) and entry.is_file():  # a broken link is no file
            paths.append(os.path.join(prefix, entry.name))
    return paths


def _class_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not _is_skipped(entry.name))


def _is_skipped(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"
