"""Curves: all points of short ones, evenly spaced points of long ones."""

from __future__ import annotations

import pytest

from orchestrator.track.curve import Curve


@pytest.mark.parametrize(
    ("number", "kept", "stride"),
    [
        pytest.param(0, 0, 1, id="none"),
        pytest.param(1, 1, 1, id="one"),
        pytest.param(8192, 8192, 1, id="as many as fit"),
        # 8193 points were halved to 4097, the even ones; the last is odd.
        pytest.param(8194, 4098, 2, id="a few more"),
        # 100,000 / 16 = 6,250 multiples of 16, and the last one.
        pytest.param(100_000, 6251, 16, id="many"),
    ],
)
def test_the_first_the_last_and_evenly_spaced_points_are_kept(
    number: int, kept: int, stride: int
) -> None:
    curve = Curve()
    for step in range(number):
        curve.add(step, step / 2)
    points = curve.points()
    assert len(points) == kept
    steps = [step for step, _ in points]
    assert all(value == step / 2 for step, value in points)
    assert steps[-1:] == ([number - 1] if number else [])
    assert steps[:-1] == list(range(0, number - 1, stride))[: len(steps) - 1]
