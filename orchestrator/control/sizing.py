"""How many workers the next attempt gets, and whether the present one could have more."""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.control.group import WorkerGroup
from orchestrator.control.policy import (
    Failure,
    GiveUp,
    Place,
    Retry,
    Situation,
    Wait,
    Workers,
    decide,
    larger,
    place_workers,
)
from orchestrator.spec.plan import RunPlan

# How often room for more workers is looked for, and how long it must have lasted: a node that has
# just come may go again.
_LOOK_S = 2.0
_STEADY_S = 5.0
# How long the hosts may take to get ready, while training goes on: about six imports of TensorFlow.
_READY_S = 60.0


class Sizing:
    """The plan that attempts follow, as large as there is room for.

    Attributes:
        plan: of the present attempt, or of the next one.
        avoid: hosts that get no worker.
        workers: how many the run may have.
        history: the failures so far.
    """

    def __init__(
        self,
        group: WorkerGroup,
        plan: RunPlan,
        replan: Callable[[int], RunPlan] | None,
        clock: Callable[[], float],
    ):
        """Begin with the whole plan.

        Args:
            group: tells what room there is.
            plan: with all workers.
            replan: returns the plan with another number of workers.
            clock: seconds from any origin.
        """
        self.plan = plan
        self.avoid: frozenset[str] = frozenset()
        self.history: list[Failure] = []
        most = plan.num_workers
        least = plan.config.strategy.min_workers
        self.workers = Workers(least if least is not None and replan is not None else most, most)
        self._group = group
        self._replan = replan
        self._clock = clock
        self._next_look = self._clock()
        self._larger_since: float | None = None

    def decide(self, failure: Failure | None, waited_s: float) -> Retry | Place | Wait | GiveUp:
        """Decide what follows a failure, or with how many workers to begin if there was none."""
        situation = self.situation(waited_s)
        config = self.plan.config.recovery
        return place_workers(situation, config) if failure is None else decide(situation, config)

    def situation(self, waited_s: float = 0.0) -> Situation:
        """Return what decisions are made from."""
        room = self._group.capacity(self.plan)
        return Situation(room, self.workers, tuple(self.history), waited_s)

    def use(self, place: Place) -> None:
        """Make the plan for the next attempt."""
        self.avoid = place.avoid
        if place.num_workers != self.plan.num_workers:
            assert self._replan is not None
            self.plan = self._replan(place.num_workers)
        self._larger_since = None

    def look(self) -> int | None:
        """Return how many workers the run could have, once there has been room for a while."""
        now = self._clock()
        is_whole = self.plan.num_workers >= self.workers.most
        if is_whole or now < self._next_look:
            return None
        self._next_look = now + _LOOK_S
        number = larger(self.situation(), self.plan.num_workers)
        if number is None:
            self._larger_since = None
            return None
        if self._larger_since is None:
            self._larger_since = now
        lasted_s = now - self._larger_since
        is_ready = self._group.prepare(self.plan)
        if lasted_s < _STEADY_S or not (is_ready or lasted_s >= _READY_S):
            return None
        return number
