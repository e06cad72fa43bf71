"""Failures -> decision. Pure: it does nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.errors import (
    BudgetSpent,
    ClusterError,
    ExportError,
    JobError,
    OrchestratorError,
    RestoreError,
    StartFailed,
    StorageError,
)
from orchestrator.spec.messages import Cause, Phase
from orchestrator.spec.schema import RecoveryConfig

_FATAL: dict[Cause, type[OrchestratorError]] = {
    Cause.restore: RestoreError,
    Cause.storage: StorageError,
    Cause.export: ExportError,
    Cause.cluster: ClusterError,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why an attempt ended: its first failure, the story that is told.

    Attributes:
        checkpoint_step: step of the newest checkpoint when the attempt had ended, or None.
        began_at: the step the attempt began at.
        made_steps: whether any step was finished in the attempt.
    """

    attempt: int
    worker: int
    host: str
    cause: Cause
    error: str
    phase: Phase | None
    step: int
    began_at: int
    made_steps: bool
    checkpoint_step: int | None
    user_frame: str = ""
    log_path: str = ""
    log_tail: str = ""


@dataclass(frozen=True, slots=True)
class Retry:
    """Start the group again; `number` of `limit` without a new checkpoint in between."""

    number: int
    limit: int


@dataclass(frozen=True, slots=True)
class GiveUp:
    """End the run with this error; `reason` is said besides the story."""

    error: type[OrchestratorError]
    reason: str


def decide(history: Sequence[Failure], config: RecoveryConfig) -> Retry | GiveUp:
    """Decide what follows the last failure of a history.

    The job's own errors are retried once, if a step was made before: the same code on the same
    data fails again, unless the machine was to blame. Everything that is not the job's fault is
    retried until `recovery.max_restarts` restarts have brought no new checkpoint.
    """
    last = history[-1]
    if last.cause in _FATAL:
        return GiveUp(_FATAL[last.cause], "a restart would not help")
    if last.cause is Cause.job:
        if not last.made_steps:
            return GiveUp(JobError, "it failed before its first step: a restart would not help")
        if any(_same(last, earlier) for earlier in history[:-1]):
            return GiveUp(JobError, "it failed twice in the same way at the same step")
    failures = _without_progress(history)
    if failures > config.max_restarts:
        if last.cause is Cause.job:
            return GiveUp(JobError, "no restart is allowed (recovery.max_restarts)")
        never = not any(failure.made_steps for failure in history)
        reason = f"{config.max_restarts} restarts (recovery.max_restarts) brought no new checkpoint"
        return GiveUp(StartFailed if never else BudgetSpent, reason)
    return Retry(failures, config.max_restarts)


def _same(left: Failure, right: Failure) -> bool:
    return (left.cause, left.step, left.error) == (right.cause, right.step, right.error)


def _without_progress(history: Sequence[Failure]) -> int:
    """Count the last failures between which no new checkpoint appeared."""
    newest = history[-1].checkpoint_step
    count = 0
    for failure in reversed(history):
        if failure.checkpoint_step != newest:
            break
        count += 1
    return count
