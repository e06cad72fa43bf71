"""Who has been silent for too long, and so is a stall."""

from __future__ import annotations

from orchestrator.control.attempt import Attempt, Seen
from orchestrator.spec.schema import RecoveryConfig


def stalled(attempt: Attempt, recovery: RecoveryConfig, now: float) -> int | None:
    """Return the worker that holds the others up, when one was silent beyond patience."""
    patience = recovery.step_patience_s if attempt.made_steps else recovery.start_patience_s
    silent = {
        worker: seen
        for worker, seen in attempt.workers.items()
        if seen.ended is None and now - seen.heard > patience
    }
    if not silent:
        return None
    return min(silent, key=lambda worker: (silent[worker].step, silent[worker].heard))


def describe_stall(seen: Seen, now: float) -> str:
    """Return what is known of a worker that tells nothing, as the end of a sentence."""
    phase = seen.phase.value if seen.phase else "starting"
    return f"it has told nothing for {now - seen.heard:.0f} s while {phase}"
