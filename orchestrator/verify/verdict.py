"""What two runs told and saved -> whether they computed the same, and where they first did not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from orchestrator.spec.messages import BlockDone, Message, Substituted
from orchestrator.spec.variants import Comparison

# step -> variable -> "largest" and "relative", as orchestrator/train/difference.py finds them
Differences = Mapping[int, Mapping[str, Mapping[str, float]]]

# A variable that moves by less than this share of the most moved has no gradient but rounding.
_STILL = 1e-9


@dataclass(slots=True)
class Trace:
    """What the workers of one run told, by step.

    Attributes:
        loss: of each step.
        norm: of each step's gradient, before clipping.
        ledger: which examples were used up to a step, summed over all workers.
        substituted: what was changed in the model.
    """

    loss: dict[int, float] = field(default_factory=dict)
    norm: dict[int, float] = field(default_factory=dict)
    ledger: dict[int, int] = field(default_factory=dict)
    substituted: Substituted | None = None

    def observe(self, message: Message) -> None:
        """Take note of what a worker told."""
        if isinstance(message, Substituted) and message.worker == 0:
            self.substituted = message
        if not isinstance(message, BlockDone):
            return
        steps = range(message.first_step + 1, message.first_step + message.num_steps + 1)
        if message.worker == 0:
            self.loss |= dict(zip(steps, message.loss, strict=True))
            self.norm |= dict(zip(steps, message.metrics["gradient_norm"], strict=True))
        end = steps[-1]
        self.ledger[end] = (self.ledger.get(end, 0) + message.ledger) % 2**64

    def used_until(self, step: int) -> int:
        """Return the ledger of all blocks up to a step, at which a block must have ended."""
        return sum(value for end, value in self.ledger.items() if end <= step) % 2**64

    def clear(self) -> None:
        """Forget everything: the run begins again."""
        self.loss.clear()
        self.norm.clear()
        self.ledger.clear()


@dataclass(frozen=True, slots=True)
class Verdict:
    """How far a run is from its reference.

    Attributes:
        loss: the largest difference over all steps.
        norm: that of the gradient's norm.
        variables: the largest difference of a variable over all checkpoints.
        same_examples: every step used the same examples.
        step: the first step that differs, or None: the runs agree.
        what: what differs there.
        variable: the variable that differs most at `variable_step`, the first checkpoint at which
            one differs; empty if none does.
    """

    loss: float
    norm: float
    variables: float
    same_examples: bool
    step: int | None = None
    what: str = ""
    variable: str = ""
    variable_step: int = 0
    variable_error: float = 0.0

    @property
    def agrees(self) -> bool:
        """Tell whether the runs computed the same."""
        return self.step is None

    @property
    def story(self) -> str:
        """Where they first differ, in words."""
        lines = f"first at step {self.step}: {self.what}"
        if self.variable:
            lines += (
                f"; after step {self.variable_step} the variable {self.variable} is "
                f"{self.variable_error:.1e} off"
            )
        return lines


def judge(
    comparison: Comparison,
    reference: Trace,
    other: Trace,
    differences: Differences,
    still: frozenset[str] = frozenset(),
) -> Verdict:
    """Compare a run with its reference.

    Args:
        comparison: what counts as equal.
        reference: what the reference told.
        other: what the run told.
        differences: of the variables that both have saved.
        still: variables whose gradient is rounding noise; left out.
    """
    loss = _series(reference.loss, other.loss, comparison)
    norm = _series(reference.norm, other.norm, comparison)
    measure = "relative" if comparison.relative else "largest"
    variables = {
        step: {
            key: e[measure]
            for key, e in found.items()
            if not _is_still(key, still) and not (comparison.loss_scale and _is_scale(key))
        }
        for step, found in differences.items()
    }
    other_examples = [
        step for step in sorted(differences) if reference.used_until(step) != other.used_until(step)
    ]
    worst = {step: max(errors.values(), default=math.inf) for step, errors in variables.items()}
    nothing = [] if loss and differences else [(0, 0, "a run told or saved nothing")]
    firsts = [
        *nothing,
        *((step, 0, "other examples were used") for step in other_examples[:1]),
        *_first(worst, 1, "the variables", comparison.limit),
        *_first(norm, 2, "the norm of the gradient", comparison.limit),
        *_first(loss, 3, "the loss", comparison.limit),
    ]
    step, _, what = min(firsts, default=(None, 0, ""))
    off = [s for s in sorted(worst) if not worst[s] <= comparison.limit]
    errors = variables[off[0]] if off else {}
    variable = max(errors, key=errors.__getitem__, default="")
    return Verdict(
        loss=max(loss.values(), default=math.inf),
        norm=max(norm.values(), default=math.inf),
        variables=max(worst.values(), default=math.inf),
        same_examples=not other_examples,
        step=step,
        what=what,
        variable=variable,
        variable_step=off[0] if off else 0,
        variable_error=errors.get(variable, 0.0),
    )


def still_variables(movements: Mapping[str, float]) -> frozenset[str]:
    """Return the variables that training does not move, but for rounding."""
    most = max(movements.values(), default=0.0)
    return frozenset(key for key, moved in movements.items() if moved < _STILL * most)


def _is_scale(key: str) -> bool:
    """Tell whether a key is the loss scale's own state."""
    return key.startswith("loss_scale/")


def _is_still(key: str, still: frozenset[str]) -> bool:
    """Tell whether a key is such a variable, or an optimizer's state for it.

    Keras names the latter `<optimizer>/<path of the variable, with _ for />_<what>`.
    """
    name = key.split(":", 1)[1]
    paths = [item.split(":", 1)[1] for item in still]
    if key.startswith("model/"):
        return name in paths
    return any(f"/{path.replace('/', '_')}_" in f"/{name.split('/', 1)[-1]}_" for path in paths)


def _series(
    left: Mapping[int, float], right: Mapping[int, float], comparison: Comparison
) -> dict[int, float]:
    """Return how far two values of each step lie apart; infinite where one is missing."""
    found = {}
    for step in sorted(left.keys() | right.keys()):
        a, b = left.get(step, math.nan), right.get(step, math.nan)
        scale = abs(a) if comparison.relative else max(1.0, abs(a))
        error = 0.0 if a == b else abs(a - b) / scale if scale else math.inf
        found[step] = error if math.isfinite(error) else math.inf
    return found


def _first(
    errors: Mapping[int, float], rank: int, what: str, limit: float
) -> list[tuple[int, int, str]]:
    """Return the first step beyond the limit with what is off there, or nothing."""
    off = [step for step in sorted(errors) if not errors[step] <= limit]
    return [(off[0], rank, f"{what} differ{'' if rank == 1 else 's'}")] if off else []
