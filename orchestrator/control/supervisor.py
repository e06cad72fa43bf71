"""The control loop of a run: attempts, messages, stalls, decisions."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from orchestrator.control.attempt import Attempt
from orchestrator.control.folders import bury, prepare
from orchestrator.control.group import WorkerGroup
from orchestrator.control.next_attempt import NextAttempt
from orchestrator.control.policy import Failure
from orchestrator.control.sizing import Sizing
from orchestrator.control.story import (
    first_failure,
    growth_record,
    start_failure,
    story_s,
    tells_all,
)
from orchestrator.control.watch import Watchdog
from orchestrator.errors import ClusterError, Interrupted
from orchestrator.spec.messages import Cause, Draining, Message, Outcome, Phase, Request
from orchestrator.spec.plan import RunPlan
from orchestrator.spec.schema import ClusterName

_POLL_S = 0.2
# Looking at every worker each time any of many tells something would be all that is done.
_WATCH_S = 0.1
# How long a stop waits for the first block of an attempt, which may compile for minutes.
_FIRST_BLOCK_S = 15.0
# How often an export is proven by a process that dies before it has written down what it found.
_PROOFS = 2


class Supervisor:
    """Runs attempts of a group until the plan is done, stopped, or given up."""

    def __init__(
        self,
        group: WorkerGroup,
        plan: RunPlan,
        *,
        observe: Callable[[Message], None],
        began: Callable[[int, str | None, int], None],
        notice: Callable[[str], None],
        newest_checkpoint: Callable[[], tuple[int, str] | None],
        journal: Callable[[Mapping[str, Any]], None] = lambda record: None,
        together: Callable[[], AbstractContextManager[None]] = nullcontext,
        replan: Callable[[int], RunPlan] | None = None,
        first_attempt: int = 1,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        rng: random.Random | None = None,
    ):
        """Make a supervisor.

        Args:
            group: where the workers run.
            plan: what they run.
            observe: called with every message, in the order they came.
            began: called with number, checkpoint and number of workers when an attempt begins.
            notice: shown to the user.
            newest_checkpoint: step and path of the newest valid checkpoint.
            journal: takes records of what was decided and of what was waited for.
            together: the messages that are heard at once are observed within it.
            replan: returns the same plan with another number of workers; an elastic run needs it.
            first_attempt: number of the first attempt; later than 1 for a resumed run.
            clock: seconds from any origin.
            sleep: waits for so many seconds.
            rng: takes a random part off pauses, so that many runs do not start again at once.
        """
        self._group = group
        self._observe = observe
        self._began = began
        self._notice = notice
        self._newest_checkpoint = newest_checkpoint
        self._journal = journal
        self._together = together
        self._number = self._first_number = first_attempt
        self._clock = clock
        self._stops = 0
        self._stop_sent_at: float | None = None
        self._listening = False
        self._watched_at = -math.inf
        # Whether the attempt was asked to save and stop for the sake of the next one, and whether
        # that is because a node is to be left.
        self._makes_way = False
        self._is_drained = False
        self._sizing = Sizing(group, plan, replan, clock)
        self._next = NextAttempt(
            self._sizing,
            notice=notice,
            journal=journal,
            is_stopped=self._is_stopped,
            clock=clock,
            sleep=sleep,
            rng=rng or random.Random(),
        )

    def stop(self) -> None:
        """Save and stop; when called again, end everything now. Safe in signal handlers."""
        self._stops += 1

    @property
    def can_save(self) -> bool:
        """Whether there are workers that a stop is passed on to; else it need not wait."""
        return self._listening

    def _is_stopped(self) -> bool:
        """Tell whether the user wants it to stop.

        Raises:
            Interrupted: at once.
        """
        if self._stops > 1:
            raise Interrupted
        return self._stops > 0

    @property
    def _plan(self) -> RunPlan:
        return self._sizing.plan

    def run(self) -> Outcome:
        """Run to the end.

        Raises:
            OrchestratorError: the run was given up; the message tells the first failure.
            Interrupted: `stop` was called twice.
        """
        # Without a choice the group itself tells, with all figures, what does not fit.
        goes_on = not self._sizing.workers.is_elastic or self._next.settle(None)
        while goes_on:
            failure, outcome = self._run_attempt()
            makes_way = self._makes_way and outcome is Outcome.stopped
            if outcome is not None and (self._stops or not makes_way):
                return outcome
            # A node that goes may be the driver's own: there is no time to wait for others.
            goes_on = self._next.settle(failure, waits=not self._is_drained)
        return Outcome.stopped

    def _run_attempt(self) -> tuple[Failure | None, Outcome | None]:
        """Run one attempt from the newest checkpoint; return why it failed, or how it ended."""
        number = self._number
        self._number += 1
        found = self._newest_checkpoint()
        step, path = found if found else (0, None)
        attempt = Attempt.begin(number, step, self._plan.num_workers, self._clock())
        self._began(number, path, self._plan.num_workers)
        if not self._next.make_folders(
            lambda: prepare(self._plan.paths, number), waits=number > self._first_number
        ):
            return None, Outcome.stopped
        try:
            outcome = self._attempt(attempt, path)
        finally:
            self._listening = False
            self._group.kill()
            bury(self._plan.paths, number)
        if outcome is not None:
            return None, outcome
        found = self._newest_checkpoint()
        failure = first_failure(attempt, self._plan.paths, found[0] if found else None)
        self._sizing.history.append(failure)
        return failure, None

    def _attempt(self, attempt: Attempt, restore_from: str | None) -> Outcome | None:
        """Start the workers and listen to them until they have ended; None if they failed."""
        self._stop_sent_at = None
        self._makes_way = self._is_drained = False
        try:
            self._group.start(self._plan, attempt.number, restore_from, self._sizing.avoid)
        except ClusterError as error:
            self._fail(attempt, error)
            return None
        finally:
            attempt.name_hosts(self._group.hosts())
        attempt.reset(self._clock())
        for worker, seen in attempt.workers.items():
            seen.host = self._group.where(worker)
        watchdog = Watchdog(self._plan, self._group, self._clock)
        self._listening = True
        while not attempt.failures:
            if self._stops and self._has_nothing_to_save(attempt):
                return Outcome.stopped
            self._pass_on_stop()
            self._grow(attempt)
            self._listen(attempt)
            if attempt.outcome is not None:
                return self._end_well(attempt, attempt.outcome)
            self._watch(attempt, watchdog)
        self._listening = False
        self._hear_the_others(attempt)
        return None

    def _fail(self, attempt: Attempt, error: ClusterError) -> None:
        """Note that an agent did not do what it was asked to."""
        failed = start_failure(attempt, error)
        attempt.failures.append(failed)
        if failed.cause is Cause.start:
            self._observe(failed)

    def _listen(self, attempt: Attempt) -> None:
        messages = self._group.poll(_POLL_S)
        with self._together():
            for message in messages:
                if isinstance(message, Draining):
                    self._leave(message)
                else:
                    attempt.observe(message, self._clock())
                self._observe(message)

    def _leave(self, message: Draining) -> None:
        """Save and stop an attempt with a worker on a node that goes: the next is elsewhere."""
        self._is_drained = True
        if self._makes_way or self._stops:
            return
        at = time.strftime(" until %H:%M:%S", time.localtime(message.deadline or 0))
        self._notice(
            f"{message.host} is to be left{at if message.deadline else ''}: saving, then going on "
            "elsewhere"
        )
        self._make_way()

    def _make_way(self) -> None:
        self._makes_way = True
        self._group.request(Request.SAVE_AND_STOP)

    def _pass_on_stop(self) -> None:
        if self._is_stopped() and self._stop_sent_at is None:
            self._stop_sent_at = self._clock()
            self._group.request(Request.SAVE_AND_STOP)

    def _has_nothing_to_save(self, attempt: Attempt) -> bool:
        """Tell whether all that an attempt has made is in a checkpoint already, or nothing yet."""
        if not attempt.ready or attempt.workers[0].phase is Phase.exporting:
            return True
        asked = self._stop_sent_at
        return (
            not attempt.made_steps
            and asked is not None
            and self._clock() - asked > _FIRST_BLOCK_S
            and attempt.workers[0].phase is Phase.tracing
        )

    def _grow(self, attempt: Attempt) -> None:
        """Save and stop an attempt that is smaller than it could be: the next one is larger."""
        if self._stops or self._makes_way or not attempt.made_steps:
            return
        number = self._sizing.look()
        if number is None:
            return
        self._notice(
            f"there is room for {number} workers: saving, then going on with {number} instead of "
            f"{self._plan.num_workers}"
        )
        self._journal(growth_record(attempt, number))
        self._make_way()

    def _end_well(self, attempt: Attempt, outcome: Outcome) -> Outcome | None:
        """Prove the export of a completed run, unless a stop cannot wait for that.

        A proof that was killed is made again; with its agent gone the attempt has failed, and the
        next one exports again from the last checkpoint.
        """
        self._listening = False
        if outcome is Outcome.completed and self._plan.config.export.enabled:
            if self._stops:
                return Outcome.stopped
            # Workers that have ended wait to be ended; the proof needs their memory.
            self._group.kill()
            try:
                self._prove()
            except ClusterError as error:
                self._fail(attempt, error)
                return None
        return outcome

    def _prove(self) -> None:
        for _ in range(_PROOFS):
            self._group.prove_export()
            if self._plan.paths.proof.exists():
                return
            self._is_stopped()

    def _watch(self, attempt: Attempt, watchdog: Watchdog) -> None:
        """Turn a worker that makes no progress beyond patience into one that is lost."""
        if attempt.failures or self._plan.config.cluster.name is ClusterName.inline:
            return  # inline, a debugger may hold it
        if self._clock() - self._watched_at < _WATCH_S:
            return
        self._watched_at = self._clock()
        stall = watchdog.look(attempt)
        if stall is not None:
            attempt.failures.append(stall)
            self._observe(stall)

    def _hear_the_others(self, attempt: Attempt) -> None:
        """Wait a little: the first to be heard may be the victim of another's failure."""
        began = self._clock()
        while self._clock() - began < story_s(attempt.failures):
            spoken = {failure.worker for failure in attempt.failures}
            if len(spoken) == self._plan.num_workers or tells_all(attempt.failures):
                return
            self._is_stopped()
            self._listen(attempt)
