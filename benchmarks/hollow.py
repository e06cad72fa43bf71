"""Workers that do everything but train: they tell what a worker tells, as often as one does."""

from __future__ import annotations

import heapq
import random
import time
from collections.abc import Iterator, Mapping

from orchestrator.control.policy import Room
from orchestrator.spec.messages import (
    Beacon,
    BlockDone,
    Death,
    Ended,
    Message,
    Outcome,
    Phase,
    Ready,
    Request,
)
from orchestrator.spec.plan import RunPlan

# As train.block_s aims at, at 20 ms a step; workers of a group end a block at about the same time.
BLOCK_S = 0.5
_STEPS = 25
_JITTER_S = 0.01
BEACON_S = 1.0


class Voice:
    """What one worker tells, and when."""

    def __init__(self, worker: int, attempt: int):
        self.worker = worker
        self.attempt = attempt
        self.step = 0
        self._chance = random.Random(worker)

    def ready(self) -> Ready:
        """Return the first message."""
        return Ready(
            **self._common(),
            host=f"host-{self.worker}",
            pid=1,
            devices=("CPU:0",),
            cpu_threads=1,
            replica_batch_sizes=(32,),
            num_parameters=100_000,
            start_step=0,
            restored_from=None,
            versions={"tensorflow": "2.21.0"},
        )

    def delays(self) -> tuple[float, float]:
        """Return seconds to the first block's end and the first beacon."""
        return BLOCK_S + self._chance.random() * _JITTER_S, self._chance.random() * BEACON_S

    def block(self) -> BlockDone:
        """Return the next block."""
        first, self.step = self.step, self.step + _STEPS
        series = tuple(1.0 / (step + 1) for step in range(first, self.step))
        is_chief = self.worker == 0
        return BlockDone(
            **self._common(),
            first_step=first,
            num_steps=_STEPS,
            wall_s=BLOCK_S,
            data_wait_s=0.001,
            ledger=self.step,
            loss=series if is_chief else (),
            learning_rate=series if is_chief else (),
            metrics={"accuracy": series, "gradient_norm": series} if is_chief else {},
        )

    def beacon(self) -> Beacon:
        """Return a sign of life."""
        return Beacon(**self._common(), phase=Phase.stepping, step=self.step, begins=False)

    def ended(self) -> Ended:
        """Return the last message."""
        return Ended(**self._common(), step=self.step, outcome=Outcome.completed)

    def death(self) -> Death:
        """Return what the group tells of a worker that was killed."""
        common = self._common()
        return Death(**common, error="was killed", exit_status=-9, log_path="", log_tail="")

    def _common(self) -> dict[str, object]:
        return {"worker": self.worker, "attempt": self.attempt, "time": time.time()}

    def events(self, now: float) -> Iterator[tuple[float, int, str]]:
        """Yield what it tells first: when, by whom, and what."""
        block, beacon = self.delays()
        yield now + block, self.worker, "block"
        yield now + beacon, self.worker, "beacon"


class Crowd:
    """A WorkerGroup of hollow workers in this process, in real time.

    Attributes:
        started: `time.monotonic()` of the start of each attempt.
        told: messages handed out.
    """

    def __init__(self, lives_s: list[float]):
        """Make a group whose attempts live so long; all but the last end by a death."""
        self._lives_s = lives_s
        self.started: list[float] = []
        self.told = 0
        self._voices: list[Voice] = []
        self._due: list[tuple[float, int, str]] = []
        self._over: set[int] = set()

    def start(
        self,
        plan: RunPlan,
        attempt: int,
        restore_from: str | None,
        avoid: frozenset[str] = frozenset(),
    ) -> None:
        """Let all workers be ready."""
        now = time.monotonic()
        self.started.append(now)
        self._over = set()
        self._voices = [Voice(worker, attempt) for worker in range(plan.num_workers)]
        end = now + self._lives_s[len(self.started) - 1]
        last = "end" if len(self.started) == len(self._lives_s) else "death"
        self._due = [event for voice in self._voices for event in voice.events(now)]
        self._due += [(now, voice.worker, "ready") for voice in self._voices]
        self._due += [(end, voice.worker, last) for voice in self._voices]
        heapq.heapify(self._due)

    def poll(self, timeout_s: float) -> list[Message]:
        """Wait for what is due next; hand out all that is."""
        wait_s = self._due[0][0] - time.monotonic() if self._due else timeout_s
        if wait_s > 0:
            time.sleep(min(wait_s, timeout_s))
        now, messages = time.monotonic(), list[Message]()
        while self._due and self._due[0][0] <= now:
            when, worker, what = heapq.heappop(self._due)
            voice = self._voices[worker]
            if worker in self._over:
                continue
            if what == "block":
                messages.append(voice.block())
                heapq.heappush(self._due, (when + BLOCK_S, worker, "block"))
            elif what == "beacon":
                messages.append(voice.beacon())
                heapq.heappush(self._due, (when + BEACON_S, worker, "beacon"))
            elif what == "ready":
                messages.append(voice.ready())
            else:
                messages.append(voice.ended() if what == "end" else voice.death())
                self._over.add(worker)
        self.told += len(messages)
        return messages

    def capacity(self, plan: RunPlan) -> Room:
        """Tell that there is room for all."""
        return Room({"here": plan.num_workers}, "1 CPU")

    def hosts(self) -> Mapping[int, str]:
        """Return no names."""
        return {}

    def prepare(self, plan: RunPlan) -> bool:
        """Tell that everything is ready."""
        return True

    def request(self, request: Request) -> None:
        """Ignore what is asked."""

    def where(self, worker: int) -> str:
        """Return the name of a worker's host."""
        return f"host-{worker}"

    def prove_export(self) -> None:
        """Prove nothing."""

    def kill(self) -> None:
        """End everything."""
        self._due = []

    def close(self) -> None:
        """Give nothing back."""
