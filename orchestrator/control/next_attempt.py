"""From one attempt to the next: what is decided, waited for and told in between."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from typing import Any

from orchestrator.control.policy import Failure, GiveUp, Place, Retry, Wait, want
from orchestrator.control.sizing import Sizing
from orchestrator.control.story import decision_record, tell, tell_retry, waiting_record
from orchestrator.errors import BudgetSpent, ClusterError, JobError, StartFailed, StorageError
from orchestrator.spec.messages import Cause

# While too few workers fit: how often that is looked at, and how often it is said.
_LOOK_S = 1.0
_TELL_S = 30.0
# A stop is honoured within so long.
_NAP_S = 0.2
_OF_GOING_ON = (BudgetSpent, StartFailed, ClusterError)


class NextAttempt:
    """Settles whether there is another attempt, when, and with which workers."""

    def __init__(
        self,
        sizing: Sizing,
        *,
        notice: Callable[[str], None],
        journal: Callable[[Mapping[str, Any]], None],
        is_stopped: Callable[[], bool],
        clock: Callable[[], float],
        sleep: Callable[[float], None],
        rng: random.Random,
    ):
        """Make one; the arguments are those of the supervisor.

        Args:
            sizing: holds the plan and the failures so far.
            notice: shown to the user.
            journal: takes records.
            is_stopped: tells whether the user wants the run to stop; may raise to end it at once.
            clock: seconds from any origin.
            sleep: waits for so many seconds.
            rng: takes a random part off pauses.
        """
        self._sizing = sizing
        self._notice = notice
        self._journal = journal
        self._is_stopped = is_stopped
        self._clock = clock
        self._sleep = sleep
        self._rng = rng

    def settle(self, failure: Failure | None, *, waits: bool = True) -> bool:
        """Choose the workers of the next attempt; wait until they fit, and before a retry.

        Args:
            failure: of the last attempt; None where the next one follows for another reason.
            waits: False ends the run where too few workers fit at this moment.

        Returns:
            False if the run was stopped meanwhile.

        Raises:
            OrchestratorError: the run is given up.
        """
        decision = self._decide(failure, waits)
        if decision is None:
            return False
        pause_s = 0.0
        if isinstance(decision, Retry):
            pause_s = decision.pause_s * self._rng.uniform(0.5, 1.0)
        if failure is not None and not isinstance(decision, Place):
            self._journal(decision_record(failure, decision, pause_s))
        if isinstance(decision, GiveUp):
            told = self._last_words(failure, decision.reason) if failure else decision.reason
            raise decision.error(told)
        if isinstance(decision, Place):
            self._use(decision)
            return True
        assert failure is not None
        self._notice(tell_retry(decision, failure, self._sizing.workers, pause_s))
        self._sizing.use(decision.place)
        return self._pause(pause_s, "back-off")

    def _decide(self, failure: Failure | None, waits: bool) -> Retry | Place | GiveUp | None:
        """Decide, as late as there is room; None if the run was stopped before."""
        decision = self._sizing.decide(failure, 0.0)
        # Budgets and room are for going on, which nobody wants any more.
        is_given_up = isinstance(decision, GiveUp) and decision.error not in _OF_GOING_ON
        if failure is not None and self._is_stopped() and not is_given_up:
            if failure.cause is Cause.job:
                return GiveUp(JobError, "it failed while stopping")
            # What ends a host ends workers and driver in any order.
            step = failure.checkpoint_step or 0
            told = tell(failure, f"it failed while stopping; the newest checkpoint is {step:,}")
            self._notice(told)
            return None
        if not isinstance(decision, Wait):
            return decision
        if not waits:
            self._notice(f"there is no room elsewhere: {want(self._sizing.situation())}")
            return None
        return self._wait(failure)

    def _use(self, place: Place) -> None:
        """Take the workers of an attempt that follows no failure."""
        most = self._sizing.workers.most
        if place.num_workers < most:
            self._notice(
                f"there is room for {place.num_workers} of {most} workers: training with "
                f"{place.num_workers} (strategy.min_workers={self._sizing.workers.least})"
            )
        self._sizing.use(place)

    def _last_words(self, failure: Failure, reason: str) -> str:
        story, step = tell(failure, reason), failure.checkpoint_step
        if step:
            story += f"\nit can go on from step {step:,}: resume={self._sizing.plan.run}"
        return story

    def _wait(self, failure: Failure | None) -> Retry | Place | GiveUp | None:
        """Wait until enough workers fit, or for too long; None if the run was stopped."""
        began = self._clock()
        last_told = -math.inf
        try:
            while True:
                waited_s = self._clock() - began
                decision = self._sizing.decide(failure, waited_s)
                if not isinstance(decision, Wait):
                    return decision
                if waited_s - last_told >= _TELL_S:
                    last_told = waited_s
                    self._notice(
                        f"waiting for capacity since {waited_s:.0f} s, at most {self._limit_s:g} s "
                        f"(recovery.capacity_timeout_s): {want(self._sizing.situation())}"
                    )
                if not self._pause(_LOOK_S):
                    return None
        finally:  # a stop may come as an exception
            self._journal(waiting_record("capacity", self._clock() - began))

    def make_folders(self, make: Callable[[], None], *, waits: bool) -> bool:
        """Make the folders of an attempt; wait for room on a disk that was full meanwhile.

        Args:
            make: makes them, or raises StorageError.
            waits: False where nothing has been trained yet.

        Returns:
            False if the run was stopped meanwhile.

        Raises:
            StorageError: they cannot be made.
        """
        began, is_told = self._clock(), False
        try:
            while True:
                try:
                    make()
                    return True
                except StorageError as error:
                    if not waits or self._clock() - began >= self._limit_s:
                        raise
                    if not is_told:
                        is_told = True
                        self._notice(
                            f"DEGRADED: {error}; waiting for room, at most {self._limit_s:g} s "
                            "(recovery.capacity_timeout_s)"
                        )
                if not self._pause(_LOOK_S):
                    return False
        finally:
            if is_told:
                self._journal(waiting_record("storage", self._clock() - began))

    @property
    def _limit_s(self) -> float:
        """How long is waited for what a run needs, in seconds."""
        return self._sizing.plan.config.recovery.capacity_timeout_s

    def _pause(self, seconds: float, reason: str = "") -> bool:
        """Wait; return False as soon as the run is stopped."""
        began = self._clock()
        try:
            while not self._is_stopped() and (left_s := began + seconds - self._clock()) > 0:
                self._sleep(min(left_s, _NAP_S))
        finally:
            if reason and seconds:
                self._journal(waiting_record(reason, self._clock() - began))
        return not self._is_stopped()
