"""Failures and room on the cluster -> decision. Pure: it does nothing."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

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
# The key under `recovery` that holds the budget of a cause; the others share `max_restarts`.
_BUDGETS = {
    Cause.start: "max_start_restarts",
    Cause.node: "max_node_restarts",
    Cause.preemption: "max_preemptions",
}
# Causes that may be the fault of the machine; a preempted one was a good one.
_BLAMED = (Cause.start, Cause.worker, Cause.node)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why an attempt ended: its first failure, the story that is told.

    Attributes:
        host: where the worker was; empty if it is not known.
        checkpoint_step: step of the newest checkpoint when the attempt had ended, or None.
        began_at: the step the attempt began at.
        made_steps: whether any step was finished in the attempt.
        also: a line for each other failure of the attempt.
        place: the host as it is told: with its address until the worker has its model.
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
    also: tuple[str, ...] = ()
    place: str = ""


@dataclass(frozen=True, slots=True)
class Room:
    """How many workers fit on each living host, those that run there included.

    Attributes:
        hosts: workers by name of the host.
        worker: what one worker takes, in words.
        is_one_host: whether all workers must be on the same host.
    """

    hosts: Mapping[str, int]
    worker: str = ""
    is_one_host: bool = False

    def fits(self, avoid: frozenset[str] = frozenset()) -> int:
        """Return how many workers fit together without some hosts."""
        counts = [count for host, count in self.hosts.items() if host not in avoid]
        return max(counts, default=0) if self.is_one_host else sum(counts)


@dataclass(frozen=True, slots=True)
class Workers:
    """How many workers a run may have: `strategy.min_workers` and `strategy.num_workers`."""

    least: int
    most: int

    @property
    def is_elastic(self) -> bool:
        """Whether the number may change within the run."""
        return self.least < self.most


@dataclass(frozen=True, slots=True)
class Place:
    """Start with so many workers, on none of the hosts to avoid."""

    num_workers: int
    avoid: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Retry:
    """Start the group again; `number` of `limit` without a new checkpoint in between.

    Attributes:
        limit: None if there is none.
        place: with how many workers, and where not.
        pause_s: to wait before, at most: the caller takes a random part of it off.
    """

    number: int
    limit: int | None
    place: Place
    pause_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Wait:
    """Too few workers fit: look again a little later."""

    needed: int
    fitting: int


@dataclass(frozen=True, slots=True)
class GiveUp:
    """End the run with this error; `reason` is said besides the story."""

    error: type[OrchestratorError]
    reason: str


@dataclass(frozen=True, slots=True)
class Situation:
    """What a decision is made from, besides the configuration.

    Attributes:
        history: failures of this start of the run, oldest first.
        room: what the cluster offers now.
        waited_s: for how long too few workers have fitted.
    """

    room: Room
    workers: Workers
    history: Sequence[Failure] = field(default_factory=tuple)
    waited_s: float = 0.0


def decide(situation: Situation, config: RecoveryConfig) -> Retry | Wait | GiveUp:
    """Decide what follows the last failure of a history.

    The job's own errors are retried once, if the run has ever made a step: the same code on the
    same data fails again, unless the machine was to blame. Everything that is not the job's fault
    is retried until the budget of its cause has brought no new checkpoint.
    """
    history = situation.history
    hopeless = _hopeless(history)
    if hopeless is not None:
        return hopeless
    last = history[-1]
    key = _BUDGETS.get(last.cause, "max_restarts")
    limit: int | None = getattr(config, key)
    barren = _without_progress(history)
    number = sum(_BUDGETS.get(failure.cause, "max_restarts") == key for failure in barren)
    if limit is not None and number > limit:
        return _spent(history, f"recovery.{key}", limit)
    place = place_workers(situation, config)
    if not isinstance(place, Place):
        return place
    return Retry(number, limit, place, _pause_s(len(barren), config))


def place_workers(situation: Situation, config: RecoveryConfig) -> Place | Wait | GiveUp:
    """Decide with how many workers an attempt begins, and where not."""
    workers, room = situation.workers, situation.room
    avoid = avoided(situation)
    fitting = room.fits(avoid)
    if fitting >= workers.least:
        return Place(min(fitting, workers.most), avoid)
    if situation.waited_s < config.capacity_timeout_s:
        return Wait(workers.least, fitting)
    return GiveUp(
        ClusterError,
        f"{want(situation)}, not within {config.capacity_timeout_s:g} s "
        "(recovery.capacity_timeout_s)",
    )


def avoided(situation: Situation) -> frozenset[str]:
    """Return the hosts that two failures in a row are blamed on, while enough others remain.

    Where they do not, the host that failed first is tried again.
    """
    bad: dict[str, None] = {}  # in the order in which they failed
    for earlier, later in itertools.pairwise(situation.history):
        is_blamed = {earlier.cause, later.cause} <= set(_BLAMED)
        same = earlier.host == later.host != ""
        if is_blamed and same and earlier.checkpoint_step == later.checkpoint_step:
            bad.pop(later.host, None)
            bad[later.host] = None
    hosts = list(bad)
    while hosts and situation.room.fits(frozenset(hosts)) < situation.workers.least:
        hosts.pop(0)
    return frozenset(hosts)


def larger(situation: Situation, num_workers: int) -> int | None:
    """Return with how many workers a smaller attempt could go on; None if with no more."""
    fitting = min(situation.room.fits(avoided(situation)), situation.workers.most)
    return fitting if fitting > num_workers else None


def want(situation: Situation) -> str:
    """Say what is needed and what there is."""
    room, workers = situation.room, situation.workers
    key = "strategy.min_workers" if workers.is_elastic else "strategy.num_workers"
    each = f" of {room.worker} each" if room.worker else ""
    there = ", ".join(f"{count} on {host}" for host, count in sorted(room.hosts.items()) if count)
    return (
        f"{workers.least} worker(s){each} ({key}) are needed, there is room for {there or 'none'}"
    )


def _hopeless(history: Sequence[Failure]) -> GiveUp | None:
    """Give up what a restart would not mend."""
    last = history[-1]
    if last.cause in _FATAL:
        return GiveUp(_FATAL[last.cause], "a restart would not help")
    if last.cause is not Cause.job:
        return None
    # An attempt that goes on from a checkpoint runs code that has made steps before.
    if last.began_at == 0 and not any(failure.made_steps for failure in history):
        return GiveUp(JobError, "it failed before its first step: a restart would not help")
    if any(_same(last, earlier) for earlier in history[:-1]):
        return GiveUp(JobError, "it failed twice in the same way at the same step")
    return None


def _spent(history: Sequence[Failure], key: str, limit: int) -> GiveUp:
    if history[-1].cause is Cause.job:
        return GiveUp(JobError, f"no more than {limit} restarts are allowed ({key})")
    never = not any(failure.made_steps for failure in history)
    reason = f"{limit} restarts ({key}) brought no new checkpoint"
    return GiveUp(StartFailed if never else BudgetSpent, reason)


def _pause_s(failures: int, config: RecoveryConfig) -> float:
    """Return 0 for the first failure without a new checkpoint, then 1, 2, 4 … times the first."""
    if failures < 2:
        return 0.0
    # The exponent is kept small: 2.0**1100 would overflow.
    return min(config.max_backoff_s, config.backoff_s * 2.0 ** min(failures - 2, 60))


def _same(left: Failure, right: Failure) -> bool:
    """Tell whether the job fell over the same stone twice.

    The step of a failure is the end of the block before; an attempt has blocks of its own, so
    from the same checkpoint on the same error may be told with another step.
    """
    if left.cause is not right.cause:
        return False
    if left.error != right.error and not (left.user_frame and left.user_frame == right.user_frame):
        return False
    return left.step == right.step or left.checkpoint_step == right.checkpoint_step


def _without_progress(history: Sequence[Failure]) -> list[Failure]:
    """Return the last failures between which no new checkpoint appeared."""
    newest = history[-1].checkpoint_step
    return list(
        itertools.takewhile(lambda failure: failure.checkpoint_step == newest, reversed(history))
    )
