"""The line of a run's progress: whole facts on one line of any terminal, plain lines where there is none."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tiny import tiny

from mae_et.engine import logger as module
from mae_et.engine.logger import RunLogger, fitting
from mae_et.plan.build import build_curriculum
from mae_et.plan.cost import Ledger

LINE = (
    "step 1234/284370 · loss 0.4321 · stage 1, 96 px · kNN 61.3 % · 12,345 img/s · data wait 3% · lr 1.50e-03 · "
    "1.23e+18 FLOPs, vanilla 6.54e+18"
)


@given(st.integers(0, 160))
def test_a_line_is_cut_between_facts(room):
    shown = fitting(LINE, room)
    assert (LINE + " · ").startswith(shown + " · ")
    assert len(shown) <= room or " · " not in shown
    more = LINE[: LINE.index(" · ", len(shown) + 1)] if shown != LINE and " · " in LINE[len(shown) + 1 :] else LINE
    assert shown == LINE or len(more) > room, "no fact is left out that there is room for"


@pytest.mark.parametrize(("width", "shows"), [(80, "stage 1, 96 px"), (140, "data wait 3%"), (None, "6.54e+18")])
def test_progress_is_one_line_on_a_terminal_and_plain_lines_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int | None, shows: str
) -> None:
    config = tiny(tmp_path / "data", tmp_path)
    curriculum = build_curriculum(config, 20, 1)
    ledger, out = Ledger.of(curriculum), io.StringIO()
    terminal = {"force_terminal": True, "width": width} if width else {"width": 140}
    monkeypatch.setattr(module, "console", Console(file=out, **terminal))
    with RunLogger(tmp_path, config, curriculum, 0, ledger, on=True) as logger:
        for step in range(3):
            ledger.add(0, curriculum.stages[0], train_seconds=3600.0, data_seconds=0.0)
            logger.report("pretrain", {"step": step, "loss": 0.4321}, LINE, ledger.total)
            logger.bar.refresh()
    lines = [line for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).splitlines() if "loss" in line]
    assert len(lines) >= 3 and all(shows in line and " left" in line for line in lines)
    if width:
        assert max(map(len, lines)) <= width and "…" not in out.getvalue()
    else:
        assert lines[0].startswith(LINE) and "\x1b" not in out.getvalue()


def test_a_damaged_record_is_named_before_later_ones_are_lost(tmp_path: Path) -> None:
    config = tiny(tmp_path / "data", tmp_path / "run", log_to=[])
    curriculum, metrics = build_curriculum(config, 40), tmp_path / "metrics.jsonl"
    text = '{"step": 0}\n{"st\n\n{"step": 2}\n{"step": 3}\n{"ste'
    metrics.write_text(text)
    with pytest.raises(ValueError, match=rf"^{metrics}: line 2 is damaged; mend or remove it$"):
        RunLogger(tmp_path, config, curriculum, 3, Ledger.of(curriculum), on=True)
    assert metrics.read_text() == text
    metrics.write_text(text.replace('{"st\n', '{"step": 1}\n', 1))
    RunLogger(tmp_path, config, curriculum, 3, Ledger.of(curriculum), on=True)
    assert metrics.read_text() == '{"step": 0}\n{"step": 1}\n{"step": 2}\n'


def test_what_start_epoch_skips_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, out = tiny(tmp_path / "data", tmp_path), io.StringIO()
    curriculum = build_curriculum(config, 20, 1)
    last, ledger = curriculum.total_steps - 2, Ledger.of(curriculum)
    monkeypatch.setattr(module, "console", Console(file=out, force_terminal=True, width=140))
    with RunLogger(tmp_path, config, curriculum, last, ledger, on=True) as logger:
        ledger.add(1, curriculum.at(last), train_seconds=3600.0, data_seconds=0.0)
        logger.report("pretrain", {"step": last, "loss": 0.4321}, LINE, ledger.total)
        logger.bar.refresh()
    share = curriculum.position(last + 1)
    assert f"{share:.0%} · 1:00:00 left" in out.getvalue(), "one more step like this one"
