"""Where the time of a run went: every second between its starts and ends belongs to one word.

Worked out from the journal alone, on the chief's phases, so that it can be done again at any time
and holds over all attempts and resumes. The time between two commands belongs to nobody.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from orchestrator.spec.messages import DRIVER_KILLED, NO_ATTEMPT, Phase

_CHIEF = 0
# An attempt may last for months: of more blocks than that, the older half is kept in pairs.
_MAX_BLOCKS = 4096


class Use(Enum):
    """What a second of a run was used for."""

    starting = "starting"
    building = "building"  # and tracing
    productive = "productive"
    data_wait = "data_wait"
    evaluation = "evaluation"
    checkpoint_stall = "checkpoint_stall"
    export = "export"
    lost_work = "lost_work"
    recovering = "recovering"
    waiting = "waiting"  # for resources


_USE_OF_PHASE = {
    Phase.starting: Use.starting,
    Phase.importing: Use.starting,
    Phase.connecting: Use.starting,
    Phase.loading_data: Use.starting,
    Phase.building: Use.building,
    Phase.restoring: Use.building,
    Phase.tracing: Use.building,
    Phase.stepping: Use.productive,
    Phase.calling_back: Use.productive,
    Phase.evaluating: Use.evaluation,
    Phase.saving: Use.checkpoint_stall,
    Phase.exporting: Use.export,
    Phase.ending: Use.export,
}


@dataclass(slots=True)
class _Block:
    """A block of the chief: the seconds up to its end, and the steps it made."""

    first_step: int
    num_steps: int
    seconds: float
    data_wait_s: float


@dataclass(slots=True)
class _Attempt:
    """The chief's blocks in one attempt, and what was spent after the last of them."""

    blocks: list[_Block] = field(default_factory=list)
    unfinished_s: float = 0.0

    def add(self, block: _Block) -> None:
        """Take the next block; the memory for them does not grow for ever."""
        self.blocks.append(block)
        if len(self.blocks) > _MAX_BLOCKS:
            half = _MAX_BLOCKS // 2
            pairs = zip(self.blocks[0:half:2], self.blocks[1:half:2], strict=True)
            self.blocks[:half] = [_together(*pair) for pair in pairs]


def _together(one: _Block, other: _Block) -> _Block:
    return _Block(
        one.first_step,
        one.num_steps + other.num_steps,
        one.seconds + other.seconds,
        one.data_wait_s + other.data_wait_s,
    )


class Goodput:
    """Adds up the uses of a run's time from its journal's records, in order.

    Attributes:
        wall_s: seconds from each start of the run to its end, added up.
    """

    def __init__(self) -> None:
        self.wall_s = 0.0
        self._seconds = dict.fromkeys(Use, 0.0)
        self._use: Use | None = None  # None between two commands
        self._since = 0.0
        self._is_recovering = False
        self._attempt = _Attempt()

    def feed(self, record: Mapping[str, Any]) -> None:
        """Take the next record; records of other workers and without a time tell nothing here."""
        time, worker = record.get("time"), record.get("worker", _CHIEF)
        if record.get("attempt") == NO_ATTEMPT:
            return  # a node tells, whatever its workers do
        if time is None or (worker != _CHIEF and record["kind"] not in ("Failed", "Death")):
            return
        match record["kind"]:
            # A driver that was killed ended with its last record.
            case "RunEnded" if record.get("cause") == DRIVER_KILLED:
                self._leave(self._since)
            case "RunStarted":
                self._leave(self._since)
                self._use, self._since, self._is_recovering = Use.starting, time, False
            case "RunEnded":
                self._pass(time)
                self._leave(time)
            case "Waiting":
                self._pass(time)
                if self._use is not None:
                    self._move(self._use, Use.waiting, record["seconds"])
            case "AttemptStarted":
                self._pass(time)
                self._use = Use.recovering if self._is_recovering else Use.starting
            case "Beacon":
                self._enter(Phase(record["phase"]), time)
            case "Ready":
                self._pass(time)
                self._replay_from(record["start_step"])
            case "BlockDone":
                self._block(record, time)
            case "Saved":
                self._pass(time)
                self._move(Use.productive, Use.checkpoint_stall, record["stall_s"])
            case "Failed" | "Death":
                self._pass(time)
                self._use, self._is_recovering = Use.recovering, True
            case _:
                self._pass(time)

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each use, which add up to `wall_s`."""
        return {use.value: value for use, value in self._seconds.items()}

    @property
    def fraction(self) -> float:
        """The share of the time that was spent on steps which count."""
        return self._seconds[Use.productive] / self.wall_s if self.wall_s else 0.0

    def _pass(self, time: float) -> None:
        """Give the time up to now to what it is used for."""
        if self._use is None:
            return
        # Clocks of other hosts, and beacons that were late, may run a little behind.
        passed = max(0.0, time - self._since)
        self._since = max(self._since, time)
        self._seconds[self._use] += passed
        self.wall_s += passed
        if self._use is Use.productive:
            self._attempt.unfinished_s += passed

    def _enter(self, phase: Phase, time: float) -> None:
        if self._use is None:
            return
        self._pass(time)
        use = _USE_OF_PHASE[phase]
        # What an attempt after a failure does before its first step is the price of the failure.
        is_price = self._is_recovering and use in (Use.starting, Use.building)
        self._use = Use.recovering if is_price else use
        if use is Use.productive:
            self._is_recovering = False

    def _block(self, record: Mapping[str, Any], time: float) -> None:
        self._pass(time)
        if self._use is not Use.productive:
            return  # the first block of an attempt holds the tracing
        attempt = self._attempt
        waited = min(record["data_wait_s"], attempt.unfinished_s)
        self._move(Use.productive, Use.data_wait, waited)
        seconds = attempt.unfinished_s - waited
        attempt.add(_Block(record["first_step"], record["num_steps"], seconds, waited))
        attempt.unfinished_s = 0.0

    def _replay_from(self, step: int) -> None:
        """Call lost what was done after the checkpoint that a later attempt begins with."""
        lost_s = self._attempt.unfinished_s
        for block in self._attempt.blocks:
            end = block.first_step + block.num_steps
            share = min(1.0, max(0.0, (end - step) / block.num_steps))
            lost_s += block.seconds * share
        self._move(Use.productive, Use.lost_work, lost_s)
        self._attempt = _Attempt()

    def _move(self, source: Use, target: Use, seconds: float) -> None:
        moved = min(seconds, self._seconds[source])
        self._seconds[source] -= moved
        self._seconds[target] += moved

    def _leave(self, time: float) -> None:
        self._pass(time)
        self._use = None


def goodput(records: Iterable[Mapping[str, Any]]) -> Goodput:
    """Return where the time of a run went, by its journal."""
    found = Goodput()
    for record in records:
        found.feed(record)
    return found
