"""Files written in a thread while training goes on: what is in memory goes to the disk without the loop waiting."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

log = logging.getLogger(__name__)


class Writer:
    """One thread, which writes in the order of submission. At most one task of a kind is outstanding.

    What a task raises is raised where its kind is next submitted or waited for, or at the end of `with`, which waits
    for all.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "writer")  # starts with the first task
        self._outstanding: dict[str, Future] = {}

    def submit(self, kind: str, task: Callable[[], object]) -> None:
        """Have a task done, after the last one of its kind has been."""
        self.wait(kind)
        self._outstanding[kind] = self._pool.submit(task)

    def wait(self, *kinds: str) -> None:
        """Wait for the outstanding tasks of these kinds, by default all, and raise what one raised."""
        for kind in kinds or tuple(self._outstanding):
            if task := self._outstanding.pop(kind, None):
                task.result()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown()
        if error is None:
            self.wait()
        for task in self._outstanding.values():  # the error that ends the run is not replaced by another
            if failure := task.exception():
                log.error("%s", failure)
