"""What agents answer, or whose agent did not.

Call `ray_settings.apply_ray_settings` before this module is imported.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from orchestrator.control.ray_errors import why_lost
from orchestrator.errors import OrchestratorError, StartFailed, first_line


def answers(refs: dict[int, Any], limit_s: float) -> list[Any]:
    """Return what the agents of some workers answer, in this order.

    Args:
        refs: the question to each worker's agent.
        limit_s: how long to wait for all.

    Raises:
        StartFailed: an agent or its node is gone, or silent, or fails; it names the worker.
        OrchestratorError: what an agent raised itself.
    """
    try:
        return ray.get(list(refs.values()), timeout=limit_s)
    except RayError as error:
        if isinstance(error, RayTaskError):
            cause = error.cause
            if isinstance(cause, OrchestratorError) and not isinstance(cause, StartFailed):
                raise cause from None
            is_told = isinstance(cause, StartFailed)
            told = str(cause) if is_told else f"an agent failed: {first_line(cause)}"
        elif isinstance(error, GetTimeoutError):
            told = f"an agent did not answer within {limit_s:g} s (cluster.start_timeout_s)"
        else:
            told = f"an agent could not start: {why_lost(error)}"
        failed = StartFailed(told)
        failed.worker = _first_without_answer(refs)
        raise failed from error


def _first_without_answer(refs: dict[int, Any]) -> int:
    """Return the first worker whose agent has raised an error, else the first silent one."""
    workers = {ref: worker for worker, ref in refs.items()}
    done, pending = ray.wait(list(workers), num_returns=len(workers), timeout=0)
    for ref in done:
        try:
            ray.get(ref)
        except RayError:
            return workers[ref]
    return workers[pending[0]] if pending else min(refs)
