"""The control loop of a run: attempts, messages, stalls, decisions."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable

from orchestrator.control.attempt import Attempt
from orchestrator.control.group import WorkerGroup
from orchestrator.control.policy import Failure, GiveUp, Retry, decide
from orchestrator.control.story import first_failure, start_failure, tell, tells_all
from orchestrator.control.watch import Watchdog
from orchestrator.errors import ClusterError, JobError, StartFailed
from orchestrator.spec.messages import Cause, Message, Outcome, Request
from orchestrator.spec.plan import RunPlan
from orchestrator.spec.schema import ClusterName

_POLL_S = 0.2
# After the first failure: how long the other workers may take to tell their story.
_STORY_S = 1.5


class Interrupted(Exception):
    """The user asked twice to stop: everything was ended at once."""


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
        self._stop_sent = False
        self._history: list[Failure] = []

    def stop(self) -> None:
        """Save and stop; when called again, end everything now. Safe in signal handlers."""
        self._stops += 1

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
            try:
                outcome = self._attempt(attempt, found[1] if found else None)
            finally:
                self._group.kill()
            if outcome is not None:
                return outcome
            self._bury(number)
            self._recover(attempt)

    def _attempt(self, attempt: Attempt, restore_from: str | None) -> Outcome | None:
        """Run one attempt; None if it failed."""
        self._stop_sent = False
        try:
            self._group.start(self._plan, attempt.number, restore_from)
        except (ClusterError, StartFailed) as error:
            cause = Cause.start if isinstance(error, StartFailed) else Cause.cluster
            failure = start_failure(attempt, cause, str(error))
            attempt.failures.append(failure)
            if cause is Cause.start:
                self._observe(failure)
            return None
        attempt.reset(self._clock())
        for worker, seen in attempt.workers.items():
            seen.host = self._group.where(worker)
        watchdog = Watchdog(self._plan, self._group, self._clock)
        while not attempt.failures:
            if self._stops and not attempt.ready:
                return Outcome.stopped  # there is nothing to save yet
            self._pass_on_stop()
            self._listen(attempt)
            if attempt.outcome is not None:
                self._end_well(attempt.outcome)
                return attempt.outcome
            self._watch(attempt, watchdog)
        self._hear_the_others(attempt)
        return None

    def _listen(self, attempt: Attempt) -> None:
        for message in self._group.poll(_POLL_S):
            attempt.observe(message, self._clock())
            self._observe(message)

    def _pass_on_stop(self) -> None:
        if self._stops > 1:
            raise Interrupted
        if self._stops and not self._stop_sent:
            self._stop_sent = True
            self._group.request(Request.SAVE_AND_STOP)

    def _end_well(self, outcome: Outcome) -> None:
        if outcome is Outcome.completed and self._plan.config.export.enabled:
            # Workers that have ended wait to be ended; the proof needs their memory.
            self._group.kill()
            self._group.prove_export()

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
        deadline = self._clock() + _STORY_S
        while self._clock() < deadline:
            spoken = {failure.worker for failure in attempt.failures}
            if len(spoken) == self._plan.num_workers or tells_all(attempt.failures):
                return
            if self._stops > 1:
                raise Interrupted
            self._listen(attempt)

    def _bury(self, number: int) -> None:
        """Take the staging folder from a dead attempt: what it still writes can appear nowhere."""
        staging = self._plan.paths.staging_dir(number)
        if staging.exists():
            grave = staging.with_name(f".dead-{number}")
            staging.rename(grave)
            shutil.rmtree(grave, ignore_errors=True)

    def _recover(self, attempt: Attempt) -> None:
        """Ask the policy; return to retry, raise to give up."""
        found = self._newest_checkpoint()
        failure = first_failure(attempt, self._plan.paths, found[0] if found else None)
        self._history.append(failure)
        decision = decide(self._history, self._plan.config.recovery)
        if self._stops and isinstance(decision, Retry):
            is_jobs = failure.cause is Cause.job
            decision = GiveUp(JobError if is_jobs else ClusterError, "it failed while stopping")
        if isinstance(decision, GiveUp):
            story = tell(failure, decision.reason)
            if failure.checkpoint_step:
                story += (
                    f"\nit can go on from step {failure.checkpoint_step:,}: resume={self._plan.run}"
                )
            raise decision.error(story)
        step = failure.checkpoint_step or 0
        self._notice(f"retry {decision.number} of {decision.limit} from step {step:,}")
