"""The control loop of a run: attempts, messages, stalls, decisions."""

from __future__ import annotations

import time
from collections.abc import Callable

from orchestrator.control.attempt import Attempt
from orchestrator.control.folders import bury, prepare
from orchestrator.control.group import WorkerGroup
from orchestrator.control.policy import Failure, GiveUp, Retry, decide
from orchestrator.control.story import first_failure, start_failure, story_s, tell, tells_all
from orchestrator.control.watch import Watchdog
from orchestrator.errors import ClusterError, Interrupted, JobError, StartFailed
from orchestrator.spec.messages import Cause, Draining, Message, Outcome, Phase, Request
from orchestrator.spec.plan import RunPlan
from orchestrator.spec.schema import ClusterName

_POLL_S = 0.2
# How long a stop waits for the first block of an attempt, which may compile for minutes.
_FIRST_BLOCK_S = 15.0


class Supervisor:
    """Runs attempts of a group until the plan is done, stopped, or given up."""

    def __init__(
        self,
        group: WorkerGroup,
        plan: RunPlan,
        *,
        observe: Callable[[Message], None],
        began: Callable[[int, str | None], None],
        notice: Callable[[str], None],
        newest_checkpoint: Callable[[], tuple[int, str] | None],
        first_attempt: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Make a supervisor.

        Args:
            group: where the workers run.
            plan: what they run.
            observe: called with every message, in the order they came.
            began: called with number and checkpoint when an attempt begins.
            notice: shown to the user.
            newest_checkpoint: step and path of the newest valid checkpoint.
            first_attempt: number of the first attempt; later than 1 for a resumed run.
            clock: seconds from any origin.
        """
        self._group = group
        self._plan = plan
        self._observe = observe
        self._began = began
        self._notice = notice
        self._newest_checkpoint = newest_checkpoint
        self._next_attempt = first_attempt
        self._clock = clock
        self._stops = 0
        self._stop_sent_at: float | None = None
        self._listening = False
        self._is_moving = False
        self._history: list[Failure] = []

    def stop(self) -> None:
        """Save and stop; when called again, end everything now. Safe in signal handlers."""
        self._stops += 1

    @property
    def can_save(self) -> bool:
        """Whether there are workers that a stop is passed on to; else it need not wait."""
        return self._listening

    def run(self) -> Outcome:
        """Run to the end.

        Raises:
            OrchestratorError: the run was given up; the message tells the first failure.
            Interrupted: `stop` was called twice.
        """
        while True:
            number = self._next_attempt
            self._next_attempt += 1
            found = self._newest_checkpoint()
            attempt = Attempt.begin(
                number, found[0] if found else 0, self._plan.num_workers, self._clock()
            )
            self._began(number, found[1] if found else None)
            prepare(self._plan.paths, number)
            try:
                outcome = self._attempt(attempt, found[1] if found else None)
            finally:
                self._listening = False
                self._group.kill()
                bury(self._plan.paths, number)
            if outcome is Outcome.stopped and self._is_moving and not self._stops:
                continue
            if outcome is not None:
                return outcome
            if self._recover(attempt) is Outcome.stopped:
                return Outcome.stopped

    def _attempt(self, attempt: Attempt, restore_from: str | None) -> Outcome | None:
        """Run one attempt; None if it failed."""
        self._stop_sent_at = None
        try:
            self._group.start(self._plan, attempt.number, restore_from)
        except (ClusterError, StartFailed) as error:
            if self._is_moving and not isinstance(error, StartFailed):
                self._is_moving = False
                self._notice(f"there is no room elsewhere: {error}")
                return Outcome.stopped
            cause = Cause.start if isinstance(error, StartFailed) else Cause.cluster
            failure = start_failure(attempt, cause, str(error))
            attempt.failures.append(failure)
            if cause is Cause.start:
                self._observe(failure)
            return None
        self._is_moving = False
        attempt.reset(self._clock())
        for worker, seen in attempt.workers.items():
            seen.host = self._group.where(worker)
        watchdog = Watchdog(self._plan, self._group, self._clock)
        self._listening = True
        while not attempt.failures:
            if self._stops and self._has_nothing_to_save(attempt):
                return Outcome.stopped
            self._pass_on_stop()
            self._listen(attempt)
            if attempt.outcome is not None:
                return self._end_well(attempt.outcome)
            self._watch(attempt, watchdog)
        self._listening = False
        self._hear_the_others(attempt)
        return None

    def _listen(self, attempt: Attempt) -> None:
        for message in self._group.poll(_POLL_S):
            if isinstance(message, Draining):
                self._leave(message)
            else:
                attempt.observe(message, self._clock())
            self._observe(message)

    def _leave(self, message: Draining) -> None:
        """Save and stop an attempt with a worker on a node that goes: the next is elsewhere."""
        if self._is_moving or self._stops:
            return
        self._is_moving = True
        at = time.strftime(" until %H:%M:%S", time.localtime(message.deadline or 0))
        self._notice(
            f"{message.host} is to be left{at if message.deadline else ''}: saving, then going on "
            "elsewhere"
        )
        self._group.request(Request.SAVE_AND_STOP)

    def _pass_on_stop(self) -> None:
        if self._stops > 1:
            raise Interrupted
        if self._stops and self._stop_sent_at is None:
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

    def _end_well(self, outcome: Outcome) -> Outcome:
        """Prove the export of a completed run, unless a stop cannot wait for that."""
        self._listening = False
        if outcome is Outcome.completed and self._plan.config.export.enabled:
            if self._stops:
                return Outcome.stopped
            # Workers that have ended wait to be ended; the proof needs their memory.
            self._group.kill()
            self._group.prove_export()
        return outcome

    def _watch(self, attempt: Attempt, watchdog: Watchdog) -> None:
        """Turn a worker that makes no progress beyond patience into one that is lost."""
        if attempt.failures or self._plan.config.cluster.name is ClusterName.inline:
            return  # inline, a debugger may hold it
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
            if self._stops > 1:
                raise Interrupted
            self._listen(attempt)

    def _recover(self, attempt: Attempt) -> Outcome | None:
        """Ask the policy; return to retry, or that the run has stopped; raise to give up."""
        found = self._newest_checkpoint()
        failure = first_failure(attempt, self._plan.paths, found[0] if found else None)
        self._history.append(failure)
        decision = decide(self._history, self._plan.config.recovery)
        step = failure.checkpoint_step or 0
        if self._stops and isinstance(decision, Retry):
            if failure.cause is not Cause.job:
                # What ends a host ends workers and driver in any order.
                told = tell(failure, f"it failed while stopping; the newest checkpoint is {step:,}")
                self._notice(told)
                return Outcome.stopped
            decision = GiveUp(JobError, "it failed while stopping")
        if isinstance(decision, GiveUp):
            story = tell(failure, decision.reason)
            if failure.checkpoint_step:
                story += (
                    f"\nit can go on from step {failure.checkpoint_step:,}: resume={self._plan.run}"
                )
            raise decision.error(story)
        self._notice(f"retry {decision.number} of {decision.limit} from step {step:,}")
        return None
