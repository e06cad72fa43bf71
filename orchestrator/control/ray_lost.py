"""What follows from an agent that is lost: what is told of it, and when its worker is gone.

Call `ray_settings.apply_ray_settings` before this module is imported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from orchestrator.control.ray_errors import why_lost
from orchestrator.control.ray_listener import Drained, Lost, Seat
from orchestrator.spec.messages import Cause, Death, Draining

_KILL_TIMEOUT_S = 5.0
# What an agent may take, once the driver has been silent for too long, to end its worker.
_FENCE_MARGIN_S = 0.5
_LOOK_INTERVAL_S = 0.05


class Fences:
    """Ends the workers of an attempt, those of lost agents included.

    An agent that answers has seen the end of its worker. One that does not has ended it by itself
    `cluster.driver_silence_s` after it last heard from the driver: that time is waited out.
    """

    def __init__(self, driver_silence_s: float, *, is_local: bool):
        """Begin with no agent lost.

        Args:
            driver_silence_s: after which an agent ends its worker.
            is_local: whether the workers are on this machine, where their end can be seen.
        """
        self._driver_silence_s = driver_silence_s
        self._is_local = is_local
        # Agents that were lost: nothing has proven yet that their workers are gone.
        self._unproven: list[Seat] = []

    def lose(self, seat: Seat) -> None:
        """Remember an agent that has just been told nothing more."""
        self._unproven.append(seat)

    def forget(self) -> None:
        """Begin an attempt: agents that were lost before it have no worker."""
        self._unproven = []

    def end_all(self, seats: Iterable[Seat], give_up: Callable[[Seat], None]) -> None:
        """End all workers; returns when they are proven gone.

        Args:
            seats: of the agents that are listened to.
            give_up: called with an agent that does not answer; it makes it one that is lost.
        """
        killing = [(seat, seat.actor.kill.remote()) for seat in seats]
        for seat, killed in killing:
            if not _is_done(seat, killed):
                give_up(seat)
        lost, self._unproven = self._unproven, []
        for seat in lost:
            self._await(seat)

    def _await(self, seat: Seat) -> None:
        """Wait until the worker of a lost agent is gone: seen here, or ended there by its agent."""
        deadline = seat.heard + self._driver_silence_s + _FENCE_MARGIN_S
        while time.monotonic() < deadline:
            # Without its agent a worker ends at once; on this machine that can be seen.
            if self._is_local and not Path(f"/proc/{seat.pid}").exists():
                return
            time.sleep(_LOOK_INTERVAL_S)


def _is_done(seat: Seat, answer: Any) -> bool:
    """Wait until an agent has done something; not longer than it can be heard."""
    deadline = time.monotonic() + _KILL_TIMEOUT_S
    while not seat.is_lost and time.monotonic() < deadline:
        if ray.wait([answer], timeout=_LOOK_INTERVAL_S)[0]:
            try:
                ray.get(answer)
            except RayError:
                return False
            return True
    return False


def death_of(lost: Lost, attempt: int, log: Path, cause: Cause) -> Death:
    """Return what is told of a worker whose agent is lost."""
    reason = f": {why_lost(lost.error)}" if lost.error is not None else ""
    return Death(
        worker=lost.seat.worker,
        attempt=attempt,
        time=time.time(),
        error=f"its agent on {lost.seat.node.get('host', '?')} {lost.why}{reason}",
        exit_status=None,
        log_path=str(log),
        log_tail="",
        cause=cause,
    )


def told_to_leave(drained: Drained, seats: Iterable[Seat], attempt: int) -> list[Draining]:
    """Return what each worker on a node that is being drained is told."""
    return [
        Draining(
            worker=seat.worker,
            attempt=attempt,
            time=time.time(),
            host=seat.node["host"],
            deadline=drained.deadline,
        )
        for seat in seats
        if seat.node.get("node_id") == drained.node_id
    ]
