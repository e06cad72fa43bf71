"""Successive halving without waiting: which children are stopped for being behind. Pure.

A child is judged when it passes a rung, by what the others had at the same rung so far; nobody
waits for a child that has not come so far. Source: the stopping form of ASHA (Li et al., A System
for Massively Parallel Hyperparameter Tuning, 2020), as Ray Tune's AsyncHyperBandScheduler has it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from orchestrator.spec.schema import BestMode


def rungs(factor: float, first: float) -> list[float]:
    """Return the rungs as parts of a run: `first`, then each `factor` times as far as the last."""
    found = []
    while first < 1:
        found.append(first)
        first *= factor
    return found


def value_at(
    rung: float, evaluated: Mapping[int, Mapping[str, float]], metric: str, total_steps: int
) -> float | None:
    """Return what the first evaluation at or after a rung says; None before it.

    Args:
        rung: part of the run.
        evaluated: metrics of each evaluation, by step.
        metric: which of them.
        total_steps: of the run. Its last evaluation counts for no rung: there is nothing to save.
    """
    for step in sorted(evaluated):
        if rung * total_steps <= step < total_steps and metric in evaluated[step]:
            return evaluated[step][metric]
    return None


def is_behind(value: float, others: Sequence[float], factor: float, mode: BestMode) -> bool:
    """Tell whether a child is not among the best of those that have passed its rung.

    One in `factor` goes on, rounded up; the first one always does, and so do equals.
    """
    num_kept = math.ceil((len(others) + 1) / factor)
    return rank(value, others, mode) > num_kept


def rank(value: float, others: Sequence[float], mode: BestMode) -> int:
    """Return the place of a value among others, from 1; what is not a number is behind all."""
    return 1 + sum(_cost(other, mode) < _cost(value, mode) for other in others)


def _cost(value: float, mode: BestMode) -> float:
    if math.isnan(value):
        return math.inf
    return value if mode is BestMode.min else -value
