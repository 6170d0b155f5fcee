"""Standard output, for people: one console, and the package's log messages on it. No torch."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from rich.console import Console
from rich.logging import RichHandler

#: Piped, it is as wide as its tables need.
console = Console(soft_wrap=False) if Console().is_terminal else Console(width=140)


@contextlib.contextmanager
def logging_to_console(verbose: bool = True) -> Iterator[None]:
    """The package's log messages on the console (on rank 0 all, elsewhere warnings), without repeating handlers."""
    log = logging.getLogger("mae_et")
    handler = RichHandler(console=console, show_path=False, show_time=False, show_level=False, markup=False)
    handler.setLevel(logging.INFO if verbose else logging.WARNING)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
