"""What is told of an attempt that failed: its first failure, with the others as its victims."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

from orchestrator.control.attempt import Attempt
from orchestrator.control.policy import Failure
from orchestrator.control.worker_process import log_tail
from orchestrator.spec.messages import Cause, Death, Failed, Phase
from orchestrator.spec.paths import RunPaths

# Lines of a worker's log that are told after an error of its own, which ends with them.
_TOLD_LINES = 4
_STORY_S = 1.5
_KILLED_STORY_S = 0.3


def start_failure(attempt: Attempt, cause: Cause, error: str) -> Failed:
    """Return the failure of an attempt whose workers could not be started."""
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


def tells_all(failures: list[Failed | Death]) -> bool:
    """Tell whether one of the failures explains the others."""
    return any(_rank(failure) == 0 for failure in failures)


def story_s(failures: list[Failed | Death]) -> float:
    """Return how long the other workers may take to tell their story.

    A process that was killed is nobody's victim: what came before it is on its way already.
    """
    was_killed = any(
        isinstance(failure, Death) and failure.exit_status == -signal.SIGKILL
        for failure in failures
    )
    return _KILLED_STORY_S if was_killed else _STORY_S


def first_failure(attempt: Attempt, paths: RunPaths, checkpoint_step: int | None) -> Failure:
    """Return the failure that explains an attempt's end."""
    first = min(attempt.failures, key=lambda item: (_rank(item), item.time))
    seen = attempt.workers[first.worker]
    story: dict[str, Any] = {
        "attempt": attempt.number,
        "worker": first.worker,
        "host": seen.host,
        "error": first.error,
        "began_at": attempt.began_at,
        "made_steps": attempt.made_steps,
        "checkpoint_step": checkpoint_step,
        "log_path": str(paths.worker_log(attempt.number, first.worker)),
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


def tell(failure: Failure, reason: str) -> str:
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


def _rank(failure: Failed | Death) -> int:
    """Order failures by how much of the story they tell."""
    if isinstance(failure, Death):
        return 1
    return 2 if failure.cause is Cause.collateral else 0


def _who(failure: Failure) -> str:
    where = f" on {failure.host}" if failure.host else ""
    phase = f" while {failure.phase.value}" if failure.phase else ""
    return f"worker {failure.worker}{where} failed at step {failure.step:,}{phase}"
