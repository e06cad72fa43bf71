"""Rules between the keys that say how stubborn and how patient a run is."""

from __future__ import annotations

import math
from collections.abc import Iterator

from orchestrator.spec.schema import RunConfig

_MOST_RESTARTS = 1000
# Beacons come once a second: with less than three, one that is late would be a stall.
_LEAST_PATIENCE_S = 3.0
_BUDGETS = ("max_restarts", "max_start_restarts", "max_node_restarts", "max_preemptions")


def recovery_rules(config: RunConfig) -> Iterator[str]:
    """Yield a line for each broken rule: value, rule, key."""
    recovery = config.recovery
    for name in _BUDGETS:
        budget = getattr(recovery, name)
        if budget is not None and not 0 <= budget <= _MOST_RESTARTS:
            rule = f"at most {_MOST_RESTARTS}" if budget > 0 else "at least 0"
            yield f"recovery.{name}={budget}: must be {rule}, or null for no limit"
        elif budget is None and recovery.backoff_s == 0:
            yield (
                f"recovery.{name}=null with recovery.backoff_s=0: restarts without limit and "
                "without a pause would only keep the machines busy; set recovery.backoff_s, such "
                f"as 1, or a limit with recovery.{name}"
            )
    for name in ("backoff_s", "max_backoff_s", "capacity_timeout_s"):
        seconds = getattr(recovery, name)
        if not (seconds >= 0 and math.isfinite(seconds)):
            yield f"recovery.{name}={seconds}: must be a number, at least 0"
    for name in ("start_patience_s", "step_patience_s"):
        seconds = getattr(recovery, name)
        if not (seconds > 0 and math.isfinite(seconds)):
            yield f"recovery.{name}={seconds}: must be a number greater than 0"
        elif seconds < _LEAST_PATIENCE_S:
            yield (
                f"recovery.{name}={seconds:g} is shorter than three beacons of a worker, which "
                f"come once a second: must be at least {_LEAST_PATIENCE_S:g}"
            )
    if recovery.max_backoff_s < recovery.backoff_s:
        yield (
            f"recovery.max_backoff_s={recovery.max_backoff_s:g}, the longest pause, is shorter "
            f"than the first one, recovery.backoff_s={recovery.backoff_s:g}"
        )
