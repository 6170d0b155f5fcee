"""Standard output, for people: one console, and the package's log messages on it. No torch."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions
from rich.logging import RichHandler
from rich.measure import Measurement
from rich.table import Table

#: Piped, it is as wide as its tables need. Text is printed as it is: names of files may hold brackets.
console = Console(width=None if Console().is_terminal else 140, markup=False, emoji=False, highlight=False)


@dataclass
class WideTable:
    """A table of figures that loses none in a narrow terminal: columns that don't fit go on below, after the keys."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    total: Sequence[str] = ()
    """A last row, below a line."""
    caption: str = ""
    left: Sequence[str] = ()
    """Heads of columns that are words; figures are aligned at the right."""
    keys: int = 1
    """Columns from the left that say what a row is of: each part begins with them."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        begin, last = self.keys, len(self.heads)
        while begin < last:
            end = begin + 1
            while end < last and self._width(begin, end + 1, console, options) <= options.max_width:
                end += 1
            title, caption = self.title if begin == self.keys else "", self.caption if end == last else ""
            yield self._part(begin, end, title, caption)
            begin = end

    def _part(self, begin: int, end: int, title: str = "", caption: str = "") -> Table:
        table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
        for head in (*self.heads[: self.keys], *self.heads[begin:end]):
            table.add_column(head, justify="left" if head in self.left else "right", overflow="fold")
        for row in self.rows:
            table.add_row(*row[: self.keys], *row[begin:end])
        if self.total:
            table.add_section()
            table.add_row(*self.total[: self.keys], *self.total[begin:end])
        return table

    def _width(self, begin: int, end: int, console: Console, options: ConsoleOptions) -> int:
        """Columns of text that a part needs where no cell is broken into lines."""
        return Measurement.get(console, options.update(max_width=10_000), self._part(begin, end)).maximum


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
