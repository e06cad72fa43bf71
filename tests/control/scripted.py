"""A WorkerGroup that plays scripts on a clock of its own: no process, no Ray, no waiting."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.control.policy import Room
from orchestrator.spec.messages import (
    Beacon,
    BlockDone,
    Cause,
    Death,
    Draining,
    Ended,
    Failed,
    Message,
    Outcome,
    Phase,
    Ready,
    Request,
    Saved,
    Stacks,
)
from orchestrator.spec.plan import RunPlan

# Nobody may wait for so long in a script: whoever does waits for ever.
_FOR_EVER_S = 10_000.0


@dataclass(frozen=True, slots=True)
class Silence:
    """Polls that hear nothing for so long."""

    seconds: float


# What one poll brings: one message, several, nothing, or something that happens meanwhile.
Line = Message | list[Message] | Silence | Callable[[], object]
# What one attempt brings: a line a poll and silence after the last, or an error in `start`.
Script = Sequence[Line] | Exception


class ScriptedGroup:
    """Plays one script an attempt and notes what it was asked for.

    Attributes:
        now: what `clock` returns; polls move it.
        starts: plan, attempt and checkpoint of every start.
        requests: everything asked of the workers.
        calls: every call but `poll`, in order, in words.
        avoided: the hosts to avoid of every start.
        room: what `capacity` returns at a time of the clock; None for all workers on one host.
        places: what `hosts` returns.
        is_ready: what `prepare` returns at a time of the clock.
        on_sleep: called with the time after every nap of the supervisor.
        proofs: what becomes of the next proofs of an export: an error is raised, a word leaves
            nothing behind, as one does that was killed; without one they succeed.
    """

    def __init__(self, *scripts: Script):
        self.now = 1000.0
        self.starts: list[tuple[RunPlan, int, str | None]] = []
        self.requests: list[Request] = []
        self.calls: list[str] = []
        self.avoided: list[frozenset[str]] = []
        self.room: Callable[[float], Mapping[str, int]] | None = None
        self.places: dict[int, str] = {}
        self.is_ready: Callable[[float], bool] = lambda now: True
        self.on_sleep: Callable[[float], object] = lambda now: None
        self.proofs: list[Exception | str] = []
        self._scripts = list(scripts)
        self._lines: list[Line] = []
        self._attempt = 0

    def clock(self) -> float:
        return self.now

    def start(
        self,
        plan: RunPlan,
        attempt: int,
        restore_from: str | None,
        avoid: frozenset[str] = frozenset(),
    ) -> None:
        self.starts.append((plan, attempt, restore_from))
        self.avoided.append(avoid)
        self.calls.append(f"start {attempt} from {restore_from}")
        assert self._scripts, f"nobody expected attempt {attempt}"
        script = self._scripts.pop(0)
        if isinstance(script, Exception):
            raise script
        self._attempt, self._lines = attempt, list(script)

    def sleep(self, seconds: float) -> None:
        assert self.now < _FOR_EVER_S, "the supervisor waits for ever"
        self.now += seconds
        self.on_sleep(self.now)

    def capacity(self, plan: RunPlan) -> Room:
        hosts = {"here": plan.num_workers} if self.room is None else self.room(self.now)
        return Room(hosts, "1 CPU")

    def hosts(self) -> Mapping[int, str]:
        return self.places

    def prepare(self, plan: RunPlan) -> bool:
        return self.is_ready(self.now)

    def poll(self, timeout_s: float) -> list[Message]:
        assert self.now < _FOR_EVER_S, "the supervisor waits for ever"
        line = self._lines.pop(0) if self._lines else Silence(timeout_s)
        if isinstance(line, Silence):
            spent = min(line.seconds, timeout_s)
            self.now += spent
            if line.seconds - spent > 1e-9:
                self._lines.insert(0, Silence(line.seconds - spent))
            return []
        self.now += timeout_s
        if isinstance(line, Message):
            line = [line]
        if isinstance(line, list):
            return [dataclasses.replace(message, attempt=self._attempt) for message in line]
        line()
        return []

    def request(self, request: Request) -> None:
        self.requests.append(request)
        self.calls.append(f"request {request.value}")

    def where(self, worker: int) -> str:
        return ""

    def prove_export(self) -> None:
        self.calls.append("prove_export")
        error = self.proofs.pop(0) if self.proofs else None
        if isinstance(error, Exception):
            raise error
        if error is None:
            paths = self.starts[-1][0].paths
            paths.export_dir.mkdir(parents=True, exist_ok=True)
            paths.proof.write_text("{}")

    def kill(self) -> None:
        self.calls.append("kill")

    def close(self) -> None:
        self.calls.append("close")


# Messages with what a test does not care about filled in; the group fills in the attempt.


def ready(worker: int = 0, start_step: int = 0) -> Ready:
    return Ready(
        worker=worker,
        attempt=0,
        time=0.0,
        host=f"host-{worker}",
        pid=1,
        devices=("CPU:0",),
        cpu_threads=1,
        replica_batch_sizes=(16,),
        num_parameters=1,
        start_step=start_step,
        restored_from=None,
        versions={},
    )


def beacon(
    worker: int = 0, phase: Phase = Phase.stepping, step: int = 0, detail: str = ""
) -> Beacon:
    return Beacon(worker=worker, attempt=0, time=0.0, phase=phase, step=step, detail=detail)


def block(worker: int = 0, first_step: int = 0, num_steps: int = 4) -> BlockDone:
    return BlockDone(
        worker=worker,
        attempt=0,
        time=0.0,
        first_step=first_step,
        num_steps=num_steps,
        wall_s=0.1,
        data_wait_s=0.0,
        ledger=0,
    )


def stacks(worker: int = 0, text: str = "") -> Stacks:
    return Stacks(worker=worker, attempt=0, time=0.0, text=text)


def saved(step: int) -> Saved:
    return Saved(
        worker=0,
        attempt=0,
        time=0.0,
        step=step,
        path=f"step-{step}",
        num_bytes=1,
        wall_s=0.1,
        stall_s=0.0,
    )


def ended(worker: int = 0, outcome: Outcome = Outcome.completed) -> Ended:
    return Ended(worker=worker, attempt=0, time=0.0, step=12, outcome=outcome)


def failed(worker: int = 0, cause: Cause = Cause.job, **changes: Any) -> Failed:
    values: dict[str, Any] = {
        "time": 0.0,
        "step": 4,
        "phase": Phase.stepping,
        "error": f"{cause.value} error of worker {worker}",
        "user_frame": "",
        "traceback": "",
    }
    return Failed(worker=worker, attempt=0, cause=cause, **(values | changes))


def death(worker: int = 0, **changes: Any) -> Death:
    values: dict[str, Any] = {
        "time": 0.0,
        "error": f"death of worker {worker}",
        "exit_status": -9,
        "log_path": "",
        "log_tail": "",
    }
    return Death(worker=worker, attempt=0, **(values | changes))


def draining(worker: int = 0, deadline: float | None = None) -> Draining:
    return Draining(worker=worker, attempt=0, time=0.0, host=f"host-{worker}", deadline=deadline)
