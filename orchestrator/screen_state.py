"""What the screen knows of a run: phases, workers, progress. Pure; nothing is drawn here."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from orchestrator.spec.messages import (
    Beacon,
    BlockDone,
    Cause,
    DataUsed,
    Death,
    Ended,
    Evaluated,
    Exported,
    Failed,
    Message,
    Notice,
    Phase,
    Ready,
    Saved,
    SaveFailed,
)
from orchestrator.terminal import duration, figure, metrics_text, size

# Speed is taken over the blocks of about this long, so that the figures are readable.
_SPEED_WINDOW_S = 5.0

_CHIEF_PHASES = {
    Phase.starting: "starting workers",
    Phase.importing: "importing TensorFlow",
    Phase.connecting: "connecting workers",
    Phase.loading_data: "loading data",
    Phase.building: "building the model",
    Phase.restoring: "restoring",
    Phase.tracing: "tracing",
    Phase.evaluating: "evaluating",
    Phase.saving: "saving",
    Phase.exporting: "exporting",
    Phase.ending: "ending",
}
# These end with a message of their own; their duration is part of it.
_TOLD_OTHERWISE = {"evaluating", "saving", "exporting"}
# Shorter phases are not worth a line.
_SHORTEST_TOLD_S = 0.1


class Tone(Enum):
    """How a line is meant; the screen turns it into a colour."""

    plain = "plain"
    good = "good"
    note = "note"
    bad = "bad"


@dataclass(frozen=True, slots=True)
class Line:
    """A line that stays on the screen."""

    text: str
    tone: Tone = Tone.plain


@dataclass(slots=True)
class TimedPhase:
    """A phase that is running."""

    name: str
    detail: str
    started: float


@dataclass(slots=True)
class WorkerRow:
    """A worker as its last messages show it."""

    worker: int
    host: str = ""
    devices: str = ""
    phase: Phase = Phase.starting
    detail: str = ""
    since: float = 0.0
    step_ms: float | None = None


@dataclass(slots=True)
class _Speed:
    """Blocks of the last seconds: how many steps in how much time."""

    blocks: deque[tuple[int, float]] = field(default_factory=deque)

    def add(self, num_steps: int, wall_s: float) -> None:
        """Count a block, and forget what is too long ago."""
        self.blocks.append((num_steps, wall_s))
        while len(self.blocks) > 1 and sum(wall for _, wall in self.blocks) > _SPEED_WINDOW_S:
            self.blocks.popleft()

    def steps_per_s(self) -> float | None:
        """Return the speed; None before anything was counted."""
        wall_s = sum(wall for _, wall in self.blocks)
        return sum(steps for steps, _ in self.blocks) / wall_s if wall_s > 0 else None


class ScreenState:
    """The state behind the screen; every event returns the lines that it adds to the record."""

    def __init__(self, total_steps: int, global_batch_size: int, clock: Callable[[], float]):
        """Start with nothing known.

        Args:
            total_steps: the last step of the run.
            global_batch_size: examples a step.
            clock: seconds from any origin.
        """
        self.total_steps = total_steps
        self.attempt = 1
        self.step = 0
        self.loss: float | None = None
        self.phases: dict[str, TimedPhase] = {}
        self.workers: dict[int, WorkerRow] = {}
        self._global_batch_size = global_batch_size
        self._clock = clock
        self._started = clock()
        self._speed = _Speed()
        self._chief_phase: str | None = None
        self._failures_told: set[bool] = set()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the screen began."""
        return self._clock() - self._started

    @property
    def examples_per_s(self) -> float | None:
        """Examples a second over the last blocks, or None before the first."""
        speed = self._speed.steps_per_s()
        return None if speed is None else speed * self._global_batch_size

    @property
    def remaining_s(self) -> float | None:
        """Seconds that the remaining steps will take at the present speed."""
        speed = self._speed.steps_per_s()
        return (self.total_steps - self.step) / speed if speed else None

    def age_s(self, since: float) -> float:
        """Seconds since a time of this clock."""
        return self._clock() - since

    def begin(self, name: str, detail: str = "") -> None:
        """Note that a phase runs; a phase that runs already only changes its detail."""
        running = self.phases.get(name)
        if running is None:
            self.phases[name] = TimedPhase(name, detail, self._clock())
        else:
            running.detail = detail

    def end(self, name: str) -> list[Line]:
        """Note that a phase is over."""
        phase = self.phases.pop(name, None)
        if phase is None or name in _TOLD_OTHERWISE:
            return []
        took_s = self.age_s(phase.started)
        return [Line(f"{name}: {duration(took_s)}")] if took_s >= _SHORTEST_TOLD_S else []

    def observe(self, message: Message) -> list[Line]:
        """Take in a message of a worker; those of earlier attempts change nothing."""
        if message.attempt < self.attempt:
            return []
        lines: list[Line] = []
        if message.attempt > self.attempt:
            self._new_attempt(message.attempt)
        match message:
            case Beacon():
                lines = self._beacon(message)
            case Ready():
                lines = self._ready(message)
            case BlockDone():
                lines = self._block(message)
            case Failed() | Death():
                lines = self._failure(message)
            case _:
                lines = [_told(message)]
        return [line for line in lines if line.text]

    def _new_attempt(self, attempt: int) -> None:
        self.attempt = attempt
        self.workers.clear()
        self._speed = _Speed()
        self._failures_told.clear()
        self.phases.pop(self._chief_phase or "", None)
        self._chief_phase = None

    def _row(self, worker: int) -> WorkerRow:
        return self.workers.setdefault(worker, WorkerRow(worker, since=self._clock()))

    def _beacon(self, beacon: Beacon) -> list[Line]:
        row = self._row(beacon.worker)
        if row.phase is not beacon.phase:
            row.since = self._clock()
        row.phase, row.detail = beacon.phase, beacon.detail
        if beacon.worker > 0:
            return []
        return self._chief_enters(_CHIEF_PHASES.get(beacon.phase), beacon.detail)

    def _chief_enters(self, name: str | None, detail: str = "") -> list[Line]:
        lines: list[Line] = []
        if self._chief_phase is not None and self._chief_phase != name:
            lines = self.end(self._chief_phase)
        if name is not None:
            self.begin(name, detail)
        self._chief_phase = name
        return lines

    def _ready(self, ready: Ready) -> list[Line]:
        row = self._row(ready.worker)
        row.host, row.devices = ready.host, _devices_text(ready.devices)
        if ready.worker > 0:
            return []
        self.step = ready.start_step
        lines = [Line(f"model: {ready.num_parameters:,} parameters")]
        if ready.restored_from:
            lines.append(Line(f"goes on from step {ready.start_step:,}: {ready.restored_from}"))
        return lines

    def _block(self, block: BlockDone) -> list[Line]:
        row = self._row(block.worker)
        row.phase, row.detail = Phase.stepping, ""
        row.step_ms = 1000 * block.wall_s / max(block.num_steps, 1)
        if block.worker > 0:
            return []
        self.step = block.last_step
        self._speed.add(block.num_steps, block.wall_s)
        if block.loss:
            self.loss = sum(block.loss) / len(block.loss)
        lines = self._chief_enters(None)
        if block.skipped_steps:
            count, first = len(block.skipped_steps), block.skipped_steps[0]
            text = f"step {first:,}: {count} step(s) skipped, their gradient was not finite"
            lines.append(Line(text, Tone.note))
        return lines

    def _failure(self, message: Failed | Death) -> list[Line]:
        """Tell the first failure of an attempt, and the first that is not another's consequence.

        The peers of a dead worker fail too, and then the group is killed: that is no news.
        """
        collateral = isinstance(message, Failed) and message.cause is Cause.collateral
        if collateral in self._failures_told or False in self._failures_told:
            return []
        self._failures_told.add(collateral)
        return [_told(message)]


def _told(message: Message) -> Line:
    """Return the line for a message that is news by itself; empty for the others."""
    match message:
        case Evaluated():
            took = f"({message.num_examples:,} examples in {duration(message.wall_s)})"
            told = metrics_text("eval/", message.metrics)
            return Line(f"step {message.step:,}  {told}  {took}", Tone.good)
        case Saved():
            what = f"{size(message.num_bytes)} in {duration(message.wall_s)}"
            return Line(f"step {message.step:,}  checkpoint saved, {what}")
        case SaveFailed():
            last = f" of {message.limit}" if message.limit is not None else ""
            text = f"DEGRADED: no checkpoint of step {message.step:,} ({message.num_failed}{last} "
            return Line(f"{text}in a row): {message.error}; training goes on", Tone.bad)
        case DataUsed():
            parts = [f"{message.num_examples:,} examples", message.name, message.placement]
            return Line(f"{message.split}: {', '.join(filter(None, parts))}")
        case Exported():
            return Line(f"step {message.step:,}  SavedModel written in {duration(message.wall_s)}")
        case Notice():
            return Line(f"note: {message.text}", Tone.note)
        case Failed():
            where = f"worker {message.worker} failed at step {message.step:,}"
            return Line(f"{where} while {message.phase.value}: {message.error}", Tone.bad)
        case Death():
            return Line(f"worker {message.worker} is lost: {message.error}", Tone.bad)
        case Ended() | _:
            return Line("")


def progress_text(state: ScreenState) -> str:
    """Return step, share, loss, speed and remaining time in one line."""
    share = state.step / state.total_steps if state.total_steps else 1.0
    parts = [f"step {state.step:,}/{state.total_steps:,}", f"{100 * share:.0f} %"]
    if state.loss is not None:
        parts.append(f"loss {figure(state.loss)}")
    if state.examples_per_s is not None:
        parts.append(f"{state.examples_per_s:,.0f} examples/s")
    if state.remaining_s is not None and state.step < state.total_steps:
        parts.append(f"{duration(state.remaining_s)} left")
    return "  ".join(parts)


def _devices_text(devices: tuple[str, ...]) -> str:
    """Return `CPU:0`, or `8 × GPU` for several."""
    if len(devices) == 1:
        return devices[0]
    return f"{len(devices)} × {devices[0].split(':')[0]}" if devices else ""
