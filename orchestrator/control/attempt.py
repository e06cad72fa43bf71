"""What is known of one attempt, as its messages come."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from orchestrator.spec.messages import (
    NO_ATTEMPT,
    Beacon,
    BlockDone,
    Death,
    Ended,
    Failed,
    Message,
    Outcome,
    Phase,
    Ready,
    Saved,
    Stacks,
)

_COUNTED_BLOCKS = 200


@dataclass(slots=True)
class BlockTimes:
    """How long blocks take, by the last ones of all workers."""

    traced_s: float = 0.0
    last_s: deque[float] = field(default_factory=lambda: deque(maxlen=_COUNTED_BLOCKS))
    _slow_s: float | None = None  # as long as nothing is added

    def add(self, wall_s: float, *, traced: bool) -> None:
        """Count a block; one that traced or compiled tells little about the others."""
        if traced:
            self.traced_s = wall_s
        else:
            self.last_s.append(wall_s)
            self._slow_s = None

    @property
    def slow_s(self) -> float:
        """The 99th percentile; of blocks that traced as long as there is no other."""
        if not self.last_s:
            return self.traced_s
        if self._slow_s is None:
            self._slow_s = sorted(self.last_s)[math.ceil(0.99 * len(self.last_s)) - 1]
        return self._slow_s


@dataclass(slots=True)
class Seen:
    """What is known of one worker in one attempt; times are of the supervisor's clock.

    Attributes:
        heard: when it last told anything.
        moved: when it last told something else than before.
        stacks: its Python stacks, since they were asked for.
    """

    heard: float
    moved: float = 0.0
    host: str = ""
    phase: Phase | None = None
    step: int = 0
    detail: str = ""
    stacks: str | None = None
    ended: Outcome | None = None


@dataclass(slots=True)
class Attempt:
    """What is known of one attempt.

    Attributes:
        number: 1, 2, 3 …
        began_at: the step of the checkpoint it was restored from; 0 without.
        workers: by index in TF_CONFIG.
        made_steps: whether any block was finished.
        block_s: how long the slowest 1 % of the last blocks took, without those that traced.
        ready: whether any worker has its model.
        failures: in the order they were heard.
        hosts: the group's names for the hosts of workers, which are unique; of some, maybe.
    """

    number: int
    began_at: int
    workers: dict[int, Seen]
    made_steps: bool = False
    ready: bool = False
    failures: list[Failed | Death] = field(default_factory=list)
    hosts: dict[int, str] = field(default_factory=dict)
    _blocks: BlockTimes = field(default_factory=BlockTimes)
    _num_ended: int = 0

    @classmethod
    def begin(cls, number: int, began_at: int, num_workers: int, now: float) -> Attempt:
        """Return an attempt of which nothing was heard yet."""
        workers = {
            worker: Seen(heard=now, moved=now, step=began_at) for worker in range(num_workers)
        }
        return cls(number, began_at, workers)

    def name_hosts(self, hosts: Mapping[int, str]) -> None:
        """Take note of where workers are."""
        self.hosts = dict(hosts)

    def observe(self, message: Message, now: float) -> None:
        """Take note of what a worker told."""
        if message.attempt == NO_ATTEMPT:
            return  # it is a node that tells, not the worker
        seen = self.workers[message.worker]
        if isinstance(message, Stacks):
            seen.stacks = message.text  # it is the agent that tells
            return
        seen.heard = now
        # Checkpoints are written beside the steps: they are no progress of these.
        if not isinstance(message, Saved | Beacon):
            seen.moved = now
        if isinstance(message, Ready):
            seen.host = self.hosts.get(message.worker, message.host)
            seen.step, self.ready = message.start_step, True
        elif isinstance(message, Beacon):
            # A beacon that was on its way while a block ended knows less.
            told = (message.phase, max(seen.step, message.step), message.detail)
            if told != (seen.phase, seen.step, seen.detail):
                seen.moved = now
            seen.phase, seen.step, seen.detail = told
        elif isinstance(message, BlockDone):
            self._blocks.add(message.wall_s, traced=seen.phase is Phase.tracing)
            seen.phase, seen.detail = Phase.stepping, ""
            seen.step = message.last_step
            self.made_steps = True
        elif isinstance(message, Ended):
            self._num_ended += seen.ended is None
            seen.ended = message.outcome
        elif isinstance(message, Failed | Death):
            self.failures.append(message)

    def reset(self, now: float) -> None:
        """Begin to count silence, as the workers have just been started."""
        for seen in self.workers.values():
            seen.heard = seen.moved = now

    @property
    def block_s(self) -> float:
        """Seconds that a slow block takes; 0 before any was made."""
        return self._blocks.slow_s

    @property
    def outcome(self) -> Outcome | None:
        """How the attempt ended, when every worker has ended well."""
        if self._num_ended < len(self.workers):
            return None
        outcomes = {seen.ended for seen in self.workers.values()}
        return Outcome.stopped if Outcome.stopped in outcomes else Outcome.completed
