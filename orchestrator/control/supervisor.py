"""The control loop of a run: attempts, messages, stalls, decisions."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.control.group import WorkerGroup
from orchestrator.control.policy import Failure, GiveUp, Retry, decide
from orchestrator.control.worker_process import log_tail
from orchestrator.errors import ClusterError, JobError, StartFailed
from orchestrator.spec.messages import (
    Beacon,
    BlockDone,
    Cause,
    Death,
    Ended,
    Failed,
    Message,
    Outcome,
    Phase,
    Ready,
    Request,
)
from orchestrator.spec.plan import RunPlan
from orchestrator.spec.schema import ClusterName

_POLL_S = 0.2
# After the first failure: how long the other workers may take to tell their story.
_STORY_S = 1.5
# Lines of a worker's log that are told after an error of its own, which ends with them.
_TOLD_LINES = 4
# How long dumping Python stacks may take before the stalled group is ended.
_STACKS_S = 0.5


class Interrupted(Exception):
    """The user asked twice to stop: everything was ended at once."""


@dataclass(slots=True)
class _Seen:
    """What is known of one worker in one attempt."""

    heard: float
    host: str = ""
    phase: Phase | None = None
    step: int = 0
    ended: Outcome | None = None


@dataclass(slots=True)
class _Attempt:
    """What is known of one attempt."""

    number: int
    began_at: int
    workers: dict[int, _Seen]
    made_steps: bool = False
    ready: bool = False
    failures: list[Failed | Death] = field(default_factory=list)

    def observe(self, message: Message, now: float) -> None:
        """Take note of what a worker told."""
        seen = self.workers[message.worker]
        seen.heard = now
        if isinstance(message, Ready):
            seen.host, seen.step, self.ready = message.host, message.start_step, True
        elif isinstance(message, Beacon):
            # A beacon that was on its way while a block ended knows less.
            seen.phase, seen.step = message.phase, max(seen.step, message.step)
        elif isinstance(message, BlockDone):
            seen.step = message.first_step + message.num_steps
            self.made_steps = True
        elif isinstance(message, Ended):
            seen.ended = message.outcome
        elif isinstance(message, Failed | Death):
            self.failures.append(message)

    @property
    def outcome(self) -> Outcome | None:
        """How the attempt ended, when every worker has ended well."""
        outcomes = {seen.ended for seen in self.workers.values()}
        if None in outcomes:
            return None
        return Outcome.stopped if Outcome.stopped in outcomes else Outcome.completed


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
            attempt = self._new_attempt(number, found[0] if found else 0)
            self._began(number, found[1] if found else None)
            try:
                outcome = self._attempt(attempt, found[1] if found else None)
            finally:
                self._group.kill()
            if outcome is not None:
                return outcome
            self._bury(number)
            self._recover(attempt)

    def _new_attempt(self, number: int, began_at: int) -> _Attempt:
        now = self._clock()
        workers = {
            worker: _Seen(heard=now, step=began_at) for worker in range(self._plan.num_workers)
        }
        return _Attempt(number, began_at, workers)

    def _attempt(self, attempt: _Attempt, restore_from: str | None) -> Outcome | None:
        """Run one attempt; None if it failed."""
        self._stop_sent = False
        try:
            self._group.start(self._plan, attempt.number, restore_from)
        except (ClusterError, StartFailed) as error:
            cause = Cause.start if isinstance(error, StartFailed) else Cause.cluster
            failure = self._start_failure(attempt, cause, str(error))
            attempt.failures.append(failure)
            if cause is Cause.start:
                self._observe(failure)
            return None
        now = self._clock()
        for seen in attempt.workers.values():
            seen.heard = now
        while not attempt.failures:
            if self._stops and not attempt.ready:
                return Outcome.stopped  # there is nothing to save yet
            self._pass_on_stop()
            self._listen(attempt)
            if attempt.outcome is not None:
                self._end_well(attempt.outcome)
                return attempt.outcome
            self._watch(attempt)
        self._hear_the_others(attempt)
        return None

    def _listen(self, attempt: _Attempt) -> None:
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

    def _watch(self, attempt: _Attempt) -> None:
        """Turn silence beyond patience into a death of the worker that is behind."""
        if self._plan.config.cluster.name is ClusterName.inline:
            return  # a debugger may hold it
        recovery = self._plan.config.recovery
        patience = recovery.step_patience_s if attempt.made_steps else recovery.start_patience_s
        now = self._clock()
        silent = {
            worker: seen
            for worker, seen in attempt.workers.items()
            if seen.ended is None and now - seen.heard > patience
        }
        if not silent or attempt.failures:
            return
        worker = min(silent, key=lambda w: (silent[w].step, silent[w].heard))
        self._group.request(Request.STACKS)
        deadline = self._clock() + _STACKS_S
        while self._clock() < deadline and not attempt.failures:
            self._listen(attempt)
        seen = attempt.workers[worker]
        if attempt.failures or seen.heard > now:
            return  # it was slow, and has spoken meanwhile
        paths, number = self._plan.paths, attempt.number
        phase = seen.phase.value if seen.phase else "starting"
        stall = Death(
            worker=worker,
            attempt=number,
            time=time.time(),
            error=f"it has told nothing for {now - seen.heard:.0f} s while {phase}",
            exit_status=None,
            log_path=str(paths.worker_log(number, worker)),
            log_tail=log_tail(paths.worker_stacks(number, worker)),
        )
        attempt.failures.append(stall)
        self._observe(stall)

    def _hear_the_others(self, attempt: _Attempt) -> None:
        """Wait a little: the first to be heard may be the victim of another's failure."""
        deadline = self._clock() + _STORY_S
        while self._clock() < deadline:
            spoken = {failure.worker for failure in attempt.failures}
            if len(spoken) == self._plan.num_workers or _tells_all(attempt.failures):
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

    def _recover(self, attempt: _Attempt) -> None:
        """Ask the policy; return to retry, raise to give up."""
        failure = self._failure(attempt)
        self._history.append(failure)
        decision = decide(self._history, self._plan.config.recovery)
        if self._stops and isinstance(decision, Retry):
            is_jobs = failure.cause is Cause.job
            decision = GiveUp(JobError if is_jobs else ClusterError, "it failed while stopping")
        if isinstance(decision, GiveUp):
            story = _story(failure, decision.reason)
            if failure.checkpoint_step:
                story += (
                    f"\nit can go on from step {failure.checkpoint_step:,}: resume={self._plan.run}"
                )
            raise decision.error(story)
        step = failure.checkpoint_step or 0
        self._notice(f"retry {decision.number} of {decision.limit} from step {step:,}")

    def _failure(self, attempt: _Attempt) -> Failure:
        first = min(attempt.failures, key=lambda item: (_rank(item), item.time))
        seen = attempt.workers[first.worker]
        found = self._newest_checkpoint()
        story: dict[str, Any] = {
            "attempt": attempt.number,
            "worker": first.worker,
            "host": seen.host,
            "error": first.error,
            "began_at": attempt.began_at,
            "made_steps": attempt.made_steps,
            "checkpoint_step": found[0] if found else None,
            "log_path": str(self._plan.paths.worker_log(attempt.number, first.worker)),
        }
        if isinstance(first, Death):
            return Failure(
                cause=Cause.worker,
                phase=seen.phase,
                step=seen.step,
                log_tail=first.log_tail,
                **story,
            )
        tail = log_tail(Path(story["log_path"])).splitlines()[-_TOLD_LINES:]
        return Failure(
            cause=first.cause,
            phase=first.phase,
            step=first.step,
            user_frame=first.user_frame,
            log_tail="\n".join(tail),
            **story,
        )

    def _start_failure(self, attempt: _Attempt, cause: Cause, error: str) -> Failed:
        return Failed(
            worker=0,
            attempt=attempt.number,
            time=time.time(),
            step=attempt.began_at,
            phase=Phase.starting,
            cause=cause,
            error=error,
            user_frame="",
            traceback="",
        )


def _rank(failure: Failed | Death) -> int:
    """Order failures by how much of the story they tell."""
    if isinstance(failure, Death):
        return 1
    return 2 if failure.cause is Cause.collateral else 0


def _tells_all(failures: list[Failed | Death]) -> bool:
    return any(_rank(failure) == 0 for failure in failures)


def _who(failure: Failure) -> str:
    where = f" on {failure.host}" if failure.host else ""
    phase = f" while {failure.phase.value}" if failure.phase else ""
    return f"worker {failure.worker}{where} failed at step {failure.step:,}{phase}"


def _story(failure: Failure, reason: str) -> str:
    """Tell a failure: the user's own line first, then the error, then where to look."""
    if failure.phase is Phase.starting and failure.cause in (Cause.cluster, Cause.start):
        return failure.error  # no worker was started: there is no log to look at
    lines = [_who(failure)]
    if failure.user_frame:
        lines.append(f"  {failure.user_frame}")
    lines.append(f"  {failure.error}")
    if failure.log_tail:
        lines += [f"  | {line}" for line in failure.log_tail.splitlines()]
    lines.append(f"log: {failure.log_path}")
    lines.append(reason)
    return "\n".join(lines)
