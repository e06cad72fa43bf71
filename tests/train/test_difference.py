"""How far variables lie apart is told in a way that no difference hides in."""

from __future__ import annotations

import math

import numpy as np
import pytest

from orchestrator.train.difference import difference, typical_sizes


def test_a_difference_is_told_by_element_and_by_norm() -> None:
    left, right = np.array([3.0, 4.0]), np.array([3.0, 4.5])
    # 0.5 of the largest element 4, and of the norm 5.
    assert difference(left, right) == {"largest": 0.125, "relative": 0.1}


def test_small_elements_do_not_magnify_a_difference() -> None:
    found = difference(np.array([1e-3]), np.array([1e-3 + 1e-9]))
    assert found["largest"] == pytest.approx(1e-9)
    found = difference(np.array([1e-3]), np.array([1e-3 + 1e-9]), typical=0.1)
    assert found["relative"] == pytest.approx(1e-8)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (np.zeros(2), np.zeros(3)),
        (np.zeros(2), None),
        (None, np.zeros(2)),
        (np.array([np.nan]), np.array([np.nan])),
        (np.array([1.0]), np.array([np.inf])),
    ],
)
def test_what_cannot_be_compared_is_infinitely_far_apart(
    left: np.ndarray | None, right: np.ndarray | None
) -> None:
    assert set(difference(left, right).values()) == {math.inf}


def test_counters_must_be_equal() -> None:
    assert difference(np.int64(7), np.int64(7)) == {"largest": 0.0, "relative": 0.0}
    assert difference(np.int64(7), np.int64(8))["largest"] == pytest.approx(1 / 7)


def test_like_variables_share_a_typical_size() -> None:
    sizes = typical_sizes(
        {
            "model/0": ("model/0:dense/kernel", np.array([3.0, 3.0, 3.0])),
            "model/1": ("model/1:dense/bias", np.array([0.0])),
            "optimizer/all/2": ("optimizer/all/2:adam/dense_kernel_momentum", np.array([0.5])),
            "optimizer/all/3": ("optimizer/all/3:adam/dense_bias_momentum", np.array([0.5])),
        }
    )
    assert sizes["model"] == pytest.approx(math.sqrt(27 / 4))
    assert sizes["optimizer/all/momentum"] == 0.5
