"""Tables lose no figure, however narrow the terminal."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mae_et.console import WideTable

HEADS = ("arm", *(f"measured {i}" for i in range(8)))
ROWS = [(f"arm {i}", *(f"{i}{j},456.78" for j in range(8))) for i in range(3)]
TABLE = WideTable("Cost", HEADS, ROWS, ("total", *(f"9{j}.5%" for j in range(8))), "a caption", left=HEADS[:1])


def printed(table: WideTable, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(table)
    return console.file.getvalue()


@given(st.integers(40, 200), st.sampled_from([1, 2]))
def test_every_figure_is_whole_at_any_width(width, keys):
    text = printed(replace(TABLE, keys=keys), width)
    cells = [cell.strip() for cell in re.split(r"[│┃\n]", text)]
    assert max(map(len, text.splitlines())) <= width
    for row in (*ROWS, TABLE.total):
        assert all(cells.count(cell) == 1 for cell in row[keys:])
        assert {cells.count(key) for key in row[:keys]} == {text.count("arm 0")}  # each part says what its rows are of
    assert (text.count("Cost"), text.count("a caption")) == (1, 1)


@pytest.mark.parametrize(("width", "parts"), [(200, 1), (80, 2), (24, 8)])
def test_it_is_cut_only_where_it_must_be(width, parts):
    assert printed(TABLE, width).count("arm 0") == parts
