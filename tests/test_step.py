"""When a loop looks, stops, saves and reports (no clock, no device), and what it makes of the results of its steps."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mae_et.engine.step import Cadence, Due, Outcomes


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def cadence(**changes) -> tuple[Cadence, Clock]:
    clock = Clock()
    defaults = {"look_steps": 5, "save_steps": 0, "save_minutes": 10, "every_step": False, "one_rank": True}
    return Cadence(**defaults | {"any_rank": lambda holds: holds, "clock": clock} | changes), clock


def test_the_host_waits_for_the_device_only_where_it_reports_or_saves():
    each, _ = cadence(save_steps=7)
    looks = [step for step in range(1, 36) if each.after(step).look]
    assert looks == [5, 7, 10, 14, 15, 20, 21, 25, 28, 30, 35]
    assert each.after(5) == Due(look=True, stop=True, save=False, report=True)
    assert each.after(7) == Due(look=True, stop=True, save=True, report=True)
    assert each.after(8) == Due(look=False, stop=False, save=False, report=False)


def test_on_a_cpu_every_step_is_looked_at_but_not_reported():
    each, _ = cadence(every_step=True)
    assert each.after(3) == Due(look=True, stop=True, save=False, report=False)


def test_the_clock_saves_and_starts_anew():
    each, clock = cadence()
    clock.now = 600.0
    assert not each.after(3).save
    clock.now = 600.1
    assert each.after(3).save
    each.saved()
    assert not each.after(4).save


def test_a_stop_is_noticed_at_once_on_one_rank_and_by_several_at_the_same_step():
    alone, _ = cadence()
    assert alone.after(3, stopping=True).stop
    several = [cadence(one_rank=False)[0] for _ in range(2)]
    for step in range(1, 30):  # one of them was asked to stop
        assert several[0].after(step, stopping=True).stop == several[1].after(step).stop == (step % 5 == 0)


@given(st.integers(1, 40), st.integers(0, 9), st.booleans(), st.booleans(), st.booleans(), st.booleans())
def test_ranks_check_for_a_stop_at_the_same_steps_whatever_their_clocks_say(step, saves, save, report, late, other):
    ranks = []
    for is_late in (late, other):
        each, clock = cadence(save_steps=saves, one_rank=False)
        clock.now = 1000.0 if is_late else 0.0
        ranks.append(each.after(step, save=save, report=report))
    assert ranks[0].stop == ranks[1].stop
    assert all(due.look or not (due.save or due.report or due.stop) for due in ranks)


def test_a_collective_save_is_triggered_by_any_rank_where_all_look():
    asked = []

    def any_rank(late: bool) -> bool:
        asked.append(late)
        return True  # another rank's clock

    each, _ = cadence(collective_saves=True, any_rank=any_rank)
    assert [step for step in range(1, 11) if each.after(step).save] == [5, 10]
    assert asked == [False, False]  # asking is a collective: only at steps where all ranks do


def outcome(loss: float, stopping: float = 0, norm: float = 1.0) -> torch.Tensor:
    return torch.tensor([loss, stopping, norm])


def test_losses_are_averaged_between_reports_and_each_is_looked_at_once():
    outcomes = Outcomes()
    for loss in (1.0, 2.0):
        outcomes.add(outcome(loss))
    assert not outcomes.look(2)
    outcomes.add(outcome(6.0, stopping=1, norm=3.0))
    assert outcomes.look(3)
    assert outcomes.report() == (3.0, 3.0)
    outcomes.add(outcome(5.0))
    assert not outcomes.look(4)
    assert outcomes.report() == (5.0, 1.0)


@pytest.mark.parametrize("broken", [{"loss": math.nan}, {"loss": 1.0, "norm": math.inf}])
def test_a_step_that_is_not_finite_is_named(broken):
    outcomes = Outcomes()
    outcomes.add(outcome(1.0))
    outcomes.add(outcome(**broken))
    outcomes.add(outcome(2.0))
    with pytest.raises(FloatingPointError, match=r"at step 8 in stage 2; the weights were not updated.*--clip_grad 1"):
        outcomes.look(10, " in stage 2")
