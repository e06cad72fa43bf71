"""Blocks never pass a due point; their length follows the clock."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

from orchestrator.train.schedule import BlockLength, Period, Schedule
from tests.plans import tiny_plan


@pytest.mark.parametrize("steps", [Fraction(5), Fraction(15, 2), Fraction(1), Fraction(1875)])
def test_next_due_is_the_first_step_that_is_due(steps: Fraction) -> None:
    period = Period(steps)
    dues = [step for step in range(1, 60) if period.is_due(step)]
    for step in range(59):
        following = [due for due in dues if due > step]
        if following:
            assert period.next_due(step) == following[0]


def test_an_epoch_that_does_not_divide_ends_with_the_step_that_completes_it() -> None:
    # 15 examples in batches of 2: epochs end at 7.5, 15, 22.5, 30.
    assert [s for s in range(1, 31) if Period(Fraction(15, 2)).is_due(s)] == [8, 15, 23, 30]


def test_a_period_of_none_is_never_due() -> None:
    assert not Period(None).is_due(5)
    assert Period(None).next_due(5) is None


def test_blocks_stop_at_every_due_point(tmp_path: Path) -> None:
    plan = tiny_plan(
        tmp_path, train__steps=20, train__eval_every_steps=6, checkpoint__every_steps=4
    )
    schedule = Schedule(plan)
    step, stops = 0, []
    while step < 20:
        step += schedule.clip(step, 100)
        stops.append(step)
    assert stops == [4, 6, 8, 12, 16, 18, 20]
    assert [s for s in stops if schedule.evaluation_due(s)] == [6, 12, 18, 20]
    assert [s for s in stops if schedule.checkpoint_due(s)] == [4, 8, 12, 16, 20]


def test_block_length_aims_at_the_wanted_seconds_after_a_short_first_block() -> None:
    length = BlockLength(block_s=0.5, max_steps=2000)
    assert length.steps == 1
    length.measured(1, 1.7)  # traced: not learned from
    assert length.steps == 16
    length.measured(16, 0.016)  # 1 ms a step: 500 steps fit, but growth is limited to 16 x
    assert length.steps == 256
    length.measured(256, 0.256)
    assert length.steps == 500
    length.measured(500, 5.0)  # ten times slower
    assert length.steps == 50


def test_steps_longer_than_a_block_run_one_at_a_time() -> None:
    length = BlockLength(block_s=0.5, max_steps=2000)
    length.measured(1, 40.0)
    assert length.steps == 1
    length.measured(1, 3.0)
    assert length.steps == 1


def test_a_length_that_fits_about_stays_so_that_its_input_is_at_hand() -> None:
    length = BlockLength(block_s=0.5, max_steps=2000)
    length.agreed(100)  # what the chief wants, whatever was measured here
    assert length.steps == 100
    length.measured(1, 1.0)  # traced
    length.agreed(100)
    for wall_s in (0.41, 0.6):  # 121 and 83 steps would fit
        length.measured(100, wall_s)
        assert length.steps == 100
    length.measured(100, 0.25)
    assert length.steps == 200
    length.measured(200, 2.0)
    assert length.steps == 50
