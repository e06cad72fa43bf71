"""When something is due, and how many steps the next block may run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from orchestrator.spec.plan import RunPlan

_FIRST_BLOCK_STEPS = 1
_GROWTH = 16
# Shares of a length within which another one is not worth it.
_FITS = (0.8, 1.25)


@dataclass(frozen=True, slots=True)
class Period:
    """Something due every so many steps, possibly a fraction: an epoch that does not divide.

    The k-th time it is due is step `ceil(k * steps)`.
    """

    steps: Fraction | None

    def is_due(self, step: int) -> bool:
        """Tell whether it is due after `step` steps are done."""
        if self.steps is None or step <= 0:
            return False
        return math.floor(step / self.steps) > math.floor((step - 1) / self.steps)

    def next_due(self, step: int) -> int | None:
        """Return the first due step after `step`, or None if it is never due."""
        if self.steps is None:
            return None
        return math.ceil((math.floor(step / self.steps) + 1) * self.steps)


class Schedule:
    """The due points of one plan."""

    def __init__(self, plan: RunPlan):
        self.total_steps = plan.total_steps
        self._evaluation = Period(plan.eval_period)
        every = plan.config.checkpoint.every_steps
        self._checkpoint = Period(None if every is None else Fraction(every))
        self._has_evaluation = plan.eval_steps > 0
        audit = plan.config.train.audit_every_steps if plan.num_replicas > 1 else None
        self._audit = Period(None if audit is None else Fraction(audit))
        first, last = plan.profile_steps or (1, plan.total_steps)
        self._borders = (first - 1, last)

    def evaluation_due(self, step: int) -> bool:
        """Tell whether to evaluate after `step` steps; always at the end."""
        at_end = step == self.total_steps
        return self._has_evaluation and (at_end or self._evaluation.is_due(step))

    def checkpoint_due(self, step: int) -> bool:
        """Tell whether to save after `step` steps; always at the end."""
        return step == self.total_steps or self._checkpoint.is_due(step)

    def audit_due(self, step: int) -> bool:
        """Tell whether to compare the replicas after `step` steps."""
        return self._audit.is_due(step)

    def clip(self, step: int, num_steps: int) -> int:
        """Shorten a block that begins after `step` so that it does not pass a due point."""
        periods = (self._evaluation, self._checkpoint, self._audit)
        dues = [self.total_steps, *(period.next_due(step) for period in periods)]
        dues += [border for border in self._borders if border > step]
        return max(0, min([num_steps, *(due - step for due in dues if due is not None)]))


class BlockLength:
    """How many steps fill a block of the wanted duration, learned from the blocks before.

    The first block is one step: it traces, and a result is seen early. Lengths then grow by at
    most a factor of 16 a block, because the first measurements are noisy. One that fits about stays
    as it is, so that the input prepared for the next block is just what that takes.
    """

    def __init__(self, block_s: float, max_steps: int):
        self._block_s = block_s
        self._max_steps = max_steps
        self._steps = _FIRST_BLOCK_STEPS
        self._warm = False

    @property
    def steps(self) -> int:
        """The wanted length of the next block."""
        return self._steps

    def agreed(self, num_steps: int) -> None:
        """Take over what the chief wants, so that every worker prepares as much input."""
        self._steps = num_steps

    def measured(self, num_steps: int, wall_s: float) -> None:
        """Learn from a finished block. The first one is not learned from: it traced."""
        if not self._warm:
            self._warm = True
            self._steps = min(self._max_steps, _GROWTH) if wall_s < 30 * self._block_s else 1
            return
        fitting = int(self._block_s * num_steps / max(wall_s, 1e-9))
        if not _FITS[0] * self._steps <= fitting <= _FITS[1] * self._steps:
            self._steps = max(1, min(self._max_steps, fitting, self._steps * _GROWTH))
