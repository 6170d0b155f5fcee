"""Classes by name: the numbers of a data set's labels mean nothing outside of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..data.sources import Source
from .config import FinetuneConfig

MAX_NAMED = 5
"""Names that a message lists."""


def classes_of(config: FinetuneConfig, source: Source, data_path: str) -> list[str]:
    """Names of a data set's classes. ValueError if --nb_classes disagrees."""
    if config.nb_classes not in (None, len(source.classes)):
        raise ValueError(f"--nb_classes {config.nb_classes}, but {data_path} has {len(source.classes)} classes")
    return list(source.classes)


def with_classes(source: Source, classes: Sequence[str], data_path: str, of: str) -> Source:
    """The source with labels that are places in `classes`, matched by name; classes that it lacks are fine.

    of: whose classes they are. ValueError that names classes of the source's images which `classes` doesn't have.
    """
    if list(source.classes) == list(classes):
        return source
    for names, whose in ((classes, of), (source.classes, f"--data_path {data_path}")):
        if twice := [name for name, times in Counter(names).items() if times > 1]:
            raise ValueError(f"class(es) {_some(twice)} are there twice in {whose}: which is meant can't be told")
    number = {name: i for i, name in enumerate(classes)}
    used = [source.classes[label] for label in np.unique(source.labels)]
    if unknown := [name for name in used if name not in number]:
        raise ValueError(
            f"--data_path {data_path}: class(es) {_some(unknown)} are unknown to {of}, which has {_some(classes)}"
        )
    return Relabelled(source, [number.get(name, -1) for name in source.classes], list(classes))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


class Relabelled:
    """Another source, its label n replaced by labels[n]."""

    def __init__(self, source: Source, labels: list[int], classes: list[str]) -> None:
        self._source, self._number, self.classes = source, labels, classes
        self.labels = np.asarray(labels, dtype=np.int64)[source.labels]

    def __len__(self) -> int:
        return len(self._source)

    def read(self, index: int) -> tuple[Any, int]:
        item, label = self._source.read(index)
        return item, self._number[label]

    def name(self, index: int) -> str:
        return self._source.name(index)
