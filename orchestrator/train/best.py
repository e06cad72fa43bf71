"""The best evaluation so far: what is kept, and when training ends early. No TensorFlow.

Its state travels in the manifest of every checkpoint, so a run that is resumed judges the next
evaluation as the undisturbed run would.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import JobError
from orchestrator.spec.schema import BestConfig, BestMode

MANIFEST_KEY = "best"


@dataclass(frozen=True, slots=True)
class Best:
    """What the evaluations so far amount to.

    Attributes:
        metric: name of the metric, without `eval/`.
        mode: min or max.
        step: of the best evaluation; None while every value was NaN.
        value: of the metric there.
        num_worse: evaluations in a row, up to now, that were not better.
    """

    metric: str
    mode: str
    step: int | None = None
    value: float | None = None
    num_worse: int = 0

    def facts(self) -> dict[str, Any]:
        """Return the state as a manifest holds it."""
        return {MANIFEST_KEY: dataclasses.asdict(self)}


class BestEvaluation:
    """Judges evaluations one after another."""

    def __init__(self, config: BestConfig, manifest: Mapping[str, Any] | None):
        """Begin, or go on from the manifest of the checkpoint that training resumes from."""
        assert config.metric is not None
        self._config = config
        self._patience = config.patience
        self.state = Best(config.metric, config.mode.value)
        known = (manifest or {}).get(MANIFEST_KEY)
        # Values of another metric, or read the other way round, say nothing about this one.
        if known is not None and (known["metric"], known["mode"]) == (
            self.state.metric,
            self.state.mode,
        ):
            self.state = Best(**known)

    @property
    def is_exhausted(self) -> bool:
        """Tell whether patience is at its end: training ends early."""
        return self._patience is not None and self.state.num_worse >= self._patience

    def observe(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Judge the evaluation at `step`; return whether it is the best so far.

        Raises:
            JobError: the evaluation has no such metric.
        """
        state = self.state
        require_metric(state.metric, metrics)
        value = metrics[state.metric]
        if self._is_better(value):
            self.state = dataclasses.replace(state, step=step, value=value, num_worse=0)
            return True
        self.state = dataclasses.replace(state, num_worse=state.num_worse + 1)
        return False

    def _is_better(self, value: float) -> bool:
        if math.isnan(value):
            return False
        if self.state.value is None:
            return True
        gain = value - self.state.value
        if self._config.mode is BestMode.min:
            gain = -gain
        return gain > self._config.min_delta


def require_metric(metric: str, names: Mapping[str, Any]) -> None:
    """Refuse a metric that the evaluation does not give.

    Raises:
        JobError: with the names that it gives.
    """
    if metric not in names:
        raise JobError(
            f"best.metric={metric}: the evaluation has no such metric; it has "
            f"{', '.join(sorted(names))}"
        )
