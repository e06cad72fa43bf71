"""Who makes no progress for longer than patience allows, and so holds the others up."""

from __future__ import annotations

import time
from collections.abc import Callable

from orchestrator.control.attempt import Attempt, Seen
from orchestrator.control.group import WorkerGroup
from orchestrator.control.stacks import Place, find_place, pick
from orchestrator.spec.messages import Death, Phase, Request
from orchestrator.spec.plan import RunPlan

# A block may take so many times as long as the slowest one that was measured.
_SLOWER = 5.0
# Stacks are asked for so long before patience ends, and awaited so long after it.
_STACKS_LEAD_S = 1.0
_STACKS_GRACE_S = 1.0
# Without a beacon for so long, a process does not run Python: beacons come once a second.
_SILENT_S = 3.0
# The supervisor looks several times a second. If it could not, nobody can be blamed for that.
_ABSENCE_S = 2.0
_SHOWN_FRAMES = 6
# The order in which a worker lives; in the loop, phases come and go at the same step.
_ORDER = {
    Phase.starting: 0,
    Phase.importing: 0,
    Phase.connecting: 1,
    Phase.loading_data: 2,
    Phase.building: 3,
    Phase.restoring: 4,
    Phase.exporting: 6,
    Phase.ending: 7,
}
_IN_THE_LOOP = 5
_BEFORE_THE_STRATEGY = (None, Phase.starting, Phase.importing, Phase.connecting)


def patience_s(seen: Seen, attempt: Attempt, plan: RunPlan) -> float:
    """Return how long a worker may make no progress in its present phase.

    Only steps come so regularly that their own time tells what is too long. All other phases
    have patience for what takes its time, and tell how far they are.
    """
    config = plan.config
    if seen.phase in _BEFORE_THE_STRATEGY:
        return config.cluster.start_timeout_s
    if seen.phase is Phase.stepping:
        longest_s = max(attempt.block_s, config.train.block_s)
        return max(config.recovery.step_patience_s, _SLOWER * longest_s)
    return config.recovery.start_patience_s


def patience_key(seen: Seen) -> str:
    """Return the key of the configuration that a worker's patience comes from."""
    if seen.phase in _BEFORE_THE_STRATEGY:
        return "cluster.start_timeout_s"
    is_stepping = seen.phase is Phase.stepping
    return "recovery.step_patience_s" if is_stepping else "recovery.start_patience_s"


def suspects(attempt: Attempt) -> list[int]:
    """Return the workers that are furthest behind: the others can only be waiting for them."""
    live = {worker: seen for worker, seen in attempt.workers.items() if seen.ended is None}
    if not live:
        return []
    behind = min(_position(seen) for seen in live.values())
    return [worker for worker, seen in live.items() if _position(seen) == behind]


def _position(seen: Seen) -> tuple[int, int]:
    phase = seen.phase or Phase.starting
    return seen.step, _ORDER.get(phase, _IN_THE_LOOP)


class Watchdog:
    """Judges one attempt by what its workers tell, on the supervisor's clock.

    Only the workers that are furthest behind are judged, and only when each of them has used up
    the patience of its phase: a worker that waits for another is never blamed.
    """

    def __init__(self, plan: RunPlan, group: WorkerGroup, clock: Callable[[], float]):
        """Make a watchdog.

        Args:
            plan: of the run.
            group: is asked for stacks.
            clock: seconds from any origin; a suspended machine must not count, which holds for
                `time.monotonic` on Linux.
        """
        self._plan = plan
        self._group = group
        self._clock = clock
        self._looked: float | None = None
        self._asked: float | None = None

    def look(self, attempt: Attempt) -> Death | None:
        """Return the end of the worker that holds the others up, if one does."""
        now = self._clock()
        self._forgive_absence(attempt, now)
        blamed = suspects(attempt)
        over_s = min(
            (
                now - seen.moved - patience_s(seen, attempt, self._plan)
                for seen in (attempt.workers[worker] for worker in blamed)
            ),
            default=float("-inf"),
        )
        if over_s < -_STACKS_LEAD_S:
            self._asked = None
            return None
        if self._asked is None:
            self._asked = now
            for seen in attempt.workers.values():
                seen.stacks = None
            self._group.request(Request.STACKS)
        if over_s < 0:
            return None
        live = [seen for seen in attempt.workers.values() if seen.ended is None]
        missing = any(seen.stacks is None for seen in live)
        if missing and now < self._asked + _STACKS_LEAD_S + _STACKS_GRACE_S:
            return None
        self._asked = None
        return self._stall(attempt, blamed, now)

    def _forgive_absence(self, attempt: Attempt, now: float) -> None:
        """Count the time in which the supervisor itself could not listen as nobody's silence."""
        if self._looked is not None and now - self._looked > _ABSENCE_S:
            for seen in attempt.workers.values():
                seen.heard += now - self._looked
                seen.moved += now - self._looked
        self._looked = now

    def _stall(self, attempt: Attempt, blamed: list[int], now: float) -> Death:
        places = {
            worker: find_place(seen.stacks or "", is_silent=now - seen.heard > _SILENT_S)
            for worker, seen in attempt.workers.items()
            if seen.ended is None
        }
        worker = pick({worker: places[worker] for worker in blamed})
        paths, number = self._plan.paths, attempt.number
        all_stacks = paths.worker_stacks(number, worker).with_name("worker-*.stacks")
        place = places[worker]
        shown = [str(frame) for frame in place.stack[:_SHOWN_FRAMES]] if place else []
        error = describe_stall(worker, attempt, places, now)
        return Death(
            worker=worker,
            attempt=number,
            time=time.time(),
            error=error,
            exit_status=None,
            log_path=str(paths.worker_log(number, worker)),
            log_tail="\n".join([*shown, f"Python stacks of all workers: {all_stacks}"]),
        )


def describe_stall(
    worker: int, attempt: Attempt, places: dict[int, Place | None], now: float
) -> str:
    """Return one sentence, without its subject, about a worker that holds the others up."""
    seen = attempt.workers[worker]
    phase = seen.phase or Phase.starting
    quiet_s = now - seen.moved
    since = time.strftime("%H:%M:%S", time.localtime(time.time() - quiet_s))
    where = f" on {seen.host}" if seen.host else ""
    step = f" after step {seen.step:,}" if seen.step else ""
    text = (
        f"it is stuck{where} while {phase.value}{step}, since {since} ({quiet_s:.0f} s, "
        f"{patience_key(seen)})"
    )
    place = places[worker]
    if place is None:
        text += "; it could not write its Python stack"
    elif place.is_in_runtime and len(places) > 1 and _all_in_runtime(places):
        text += ", inside TensorFlow like all others: a collective does not return"
    elif place.is_in_runtime:
        text += ", inside TensorFlow"
    else:
        text += f", at {place.frame}"
    if seen.phase is None:
        text += "; it has told nothing since it was started"
    elif now - seen.heard > _SILENT_S:
        text += (
            f"; it has told nothing for {now - seen.heard:.0f} s: a call holds Python's "
            "interpreter lock, or the process gets no processor"
        )
    is_in_loop = _position(seen)[1] == _IN_THE_LOOP
    waiting = [
        str(other)
        for other, theirs in places.items()
        if other != worker and (not is_in_loop or theirs is None or theirs.is_in_runtime)
    ]
    if waiting and not _all_in_runtime(places):
        noun, verb = ("worker", "waits") if len(waiting) == 1 else ("workers", "wait")
        what = "in the all-reduce" if is_in_loop else "for it"
        text += f"; {noun} {_listed(waiting)} {verb} {what}"
    return text


def _all_in_runtime(places: dict[int, Place | None]) -> bool:
    return all(place is not None and place.is_in_runtime for place in places.values())


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
