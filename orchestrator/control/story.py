"""What is told of an attempt that failed: its first failure, with the others as its victims."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

from orchestrator.control.attempt import Attempt
from orchestrator.control.policy import Failure, GiveUp, Retry, Workers
from orchestrator.control.worker_process import log_tail
from orchestrator.errors import ClusterError, StartFailed
from orchestrator.spec.messages import Cause, Death, Failed, Phase
from orchestrator.spec.paths import RunPaths

# Lines of a worker's log that are told after an error of its own, which ends with them.
_TOLD_LINES = 4
# Failures that are told besides the first one.
_TOLD_OTHERS = 3
# After the first failure: how long the others may take to tell their story, and how long if a
# worker was killed, whose story that is.
_STORY_S = 1.5
_KILLED_STORY_S = 0.3


def start_failure(attempt: Attempt, error: ClusterError) -> Failed:
    """Return the failure of an attempt whose workers could not be started."""
    is_start = isinstance(error, StartFailed)
    worker = error.worker if isinstance(error, StartFailed) else None
    return Failed(
        worker=worker or 0,
        attempt=attempt.number,
        time=time.time(),
        step=attempt.began_at,
        phase=Phase.starting,
        cause=Cause.start if is_start else Cause.cluster,
        error=str(error),
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
        "host": attempt.hosts.get(first.worker, seen.host),
        "place": seen.host,
        "error": first.error,
        "began_at": attempt.began_at,
        "made_steps": attempt.made_steps,
        "checkpoint_step": checkpoint_step,
        "log_path": str(paths.worker_log(attempt.number, first.worker)),
        "also": _others(attempt, first),
    }
    if isinstance(first, Death):
        return Failure(
            cause=first.cause,
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
        # No worker was started: there is no log to look at.
        where = f"worker {failure.worker} on {failure.host}: " if failure.host else ""
        return where + failure.error + (f"\n{reason}" if failure.cause is Cause.start else "")
    lines = [_who(failure)]
    if failure.user_frame:
        lines.append(f"  {failure.user_frame}")
    lines.append(f"  {failure.error}")
    if failure.log_tail:
        lines += [f"  | {line}" for line in failure.log_tail.splitlines()]
    lines += [f"also: {line}" for line in failure.also]
    lines.append(f"log: {failure.log_path}")
    lines.append(reason)
    return "\n".join(lines)


def tell_retry(retry: Retry, failure: Failure, workers: Workers, pause_s: float) -> str:
    """Say what follows a failure: which retry, from where, on how many workers, without whom."""
    number = f"{retry.number}" if retry.limit is None else f"{retry.number} of {retry.limit}"
    text = f"retry {number} from step {failure.checkpoint_step or 0:,}"
    if retry.place.num_workers < workers.most:
        text += f" with {retry.place.num_workers} of {workers.most} workers"
    if retry.place.avoid:
        text += f", not on {', '.join(sorted(retry.place.avoid))}: it failed twice in a row"
    return text + (f", in {pause_s:.1f} s" if pause_s else "")


def decision_record(failure: Failure, decision: Retry | GiveUp, pause_s: float) -> dict[str, Any]:
    """Return what the journal keeps of a failure and of what was decided about it."""
    record: dict[str, Any] = {
        "kind": "Decided",
        "time": time.time(),
        "attempt": failure.attempt,
        "worker": failure.worker,
        "host": failure.host,
        "cause": failure.cause.value,
        "step": failure.step,
        "checkpoint_step": failure.checkpoint_step,
        "error": failure.error,
        "also": list(failure.also),
    }
    if isinstance(decision, GiveUp):
        return record | {"decision": "give up", "reason": decision.reason}
    return record | {
        "decision": "retry",
        "number": decision.number,
        "limit": decision.limit,
        "num_workers": decision.place.num_workers,
        "avoid": sorted(decision.place.avoid),
        "pause_s": round(pause_s, 3),
    }


def growth_record(attempt: Attempt, num_workers: int) -> dict[str, Any]:
    """Return what the journal keeps of an attempt that makes way for a larger one."""
    return {
        "kind": "Decided",
        "time": time.time(),
        "attempt": attempt.number,
        "decision": "grow",
        "num_workers": num_workers,
    }


def waiting_record(reason: str, seconds: float) -> dict[str, Any]:
    """Return what the journal keeps of time without workers.

    Args:
        reason: `capacity` or `storage`, which were waited for, or `back-off`.
        seconds: for how long.
    """
    return {"kind": "Waiting", "time": time.time(), "reason": reason, "seconds": round(seconds, 3)}


def _others(attempt: Attempt, first: Failed | Death) -> tuple[str, ...]:
    """Return a line for each kind of failure besides the first: who, and what they said."""
    said: dict[str, list[int]] = {}
    for failure in attempt.failures:
        if failure.worker != first.worker:
            said.setdefault(failure.error, []).append(failure.worker)
    lines = []
    for error, workers in list(said.items())[:_TOLD_OTHERS]:
        who = f"worker {workers[0]}" if len(workers) == 1 else f"{len(workers)} workers"
        lines.append(f"{who}: {error}")
    if len(said) > _TOLD_OTHERS:
        lines.append(f"and {len(said) - _TOLD_OTHERS} more")
    return tuple(lines)


def _rank(failure: Failed | Death) -> int:
    """Order failures by how much of the story they tell."""
    if isinstance(failure, Death):
        # Processes whose peer is lost with its machine may die of that, and be heard before.
        return 2 if failure.cause is Cause.worker else 1
    return 3 if failure.cause is Cause.collateral else 0


def _who(failure: Failure) -> str:
    place = failure.place or failure.host
    where = f" on {place}" if place else ""
    phase = f" while {failure.phase.value}" if failure.phase else ""
    return f"worker {failure.worker}{where} failed at step {failure.step:,}{phase}"
