"""What is known of one attempt, as its messages come."""

from __future__ import annotations

from dataclasses import dataclass, field

from orchestrator.spec.messages import (
    Beacon,
    BlockDone,
    Death,
    Ended,
    Failed,
    Message,
    Outcome,
    Phase,
    Ready,
)


@dataclass(slots=True)
class Seen:
    """What is known of one worker in one attempt; `heard` is a time of the supervisor's clock."""

    heard: float
    host: str = ""
    phase: Phase | None = None
    step: int = 0
    ended: Outcome | None = None


@dataclass(slots=True)
class Attempt:
    """What is known of one attempt.

    Attributes:
        number: 1, 2, 3 …
        began_at: the step of the checkpoint it was restored from; 0 without.
        workers: by index in TF_CONFIG.
        made_steps: whether any block was finished.
        ready: whether any worker has its model.
        failures: in the order they were heard.
    """

    number: int
    began_at: int
    workers: dict[int, Seen]
    made_steps: bool = False
    ready: bool = False
    failures: list[Failed | Death] = field(default_factory=list)

    @classmethod
    def begin(cls, number: int, began_at: int, num_workers: int, now: float) -> Attempt:
        """Return an attempt of which nothing was heard yet."""
        workers = {worker: Seen(heard=now, step=began_at) for worker in range(num_workers)}
        return cls(number, began_at, workers)

    def observe(self, message: Message, now: float) -> None:
        """Take note of what a worker told."""
        seen = self.workers[message.worker]
        seen.heard = now
        if isinstance(message, Ready):
            seen.host, seen.step, self.ready = message.host, message.start_step, True
        elif isinstance(message, Beacon):
            # A beacon that was on its way while a block ended knows less.
            seen.phase, seen.step = message.phase, max(seen.step, message.step)
        elif isinstance(message, BlockDone):
            seen.step = message.first_step + message.num_steps
            self.made_steps = True
        elif isinstance(message, Ended):
            seen.ended = message.outcome
        elif isinstance(message, Failed | Death):
            self.failures.append(message)

    @property
    def outcome(self) -> Outcome | None:
        """How the attempt ended, when every worker has ended well."""
        outcomes = {seen.ended for seen in self.workers.values()}
        if None in outcomes:
            return None
        return Outcome.stopped if Outcome.stopped in outcomes else Outcome.completed
