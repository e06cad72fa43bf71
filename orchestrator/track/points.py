"""Journal records -> metric points. Pure: the same journal always gives the same points."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

_POINTS_PER_S = 4.0
_ROUND_FACTORS = (1, 2, 5)


@dataclass(frozen=True, slots=True)
class Point:
    """One value of one metric, as MLflow keeps it."""

    key: str
    value: float
    timestamp_ms: int
    step: int


@dataclass(slots=True)
class _Window:
    """Sums of the metrics of steps not yet reported."""

    totals: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, value: float, count: int = 1) -> None:
        self.totals[name] = self.totals.get(name, 0.0) + value
        self.counts[name] = self.counts.get(name, 0) + count

    def means(self) -> dict[str, float]:
        return {name: total / self.counts[name] for name, total in self.totals.items()}


class Points:
    """Turns the records of a run, in the order of its journal, into points.

    A point is the mean over a window of steps; windows end at multiples of `log_every_steps`, never
    at the borders of blocks, which fall elsewhere after a recovery. The steps of an attempt that
    were done already by an earlier one are passed over: a replay repeats them.
    """

    def __init__(self, log_every_steps: str, global_batch_size: int):
        """Begin.

        Args:
            log_every_steps: a number, or `auto` to wait for the journal's `Window` record.
            global_batch_size: examples a step.
        """
        self._every = None if log_every_steps == "auto" else int(log_every_steps)
        self._examples = global_batch_size
        self._window = _Window()
        self._done: dict[int, int] = {}  # worker -> the last step counted
        self._evaluated = 0
        self._time_ms = 0

    def feed(self, record: Mapping[str, Any]) -> Iterator[Point]:
        """Take in the next record and yield the points that are complete with it."""
        kind = record.get("kind")
        if kind == "Window":
            self._every = int(record["log_every_steps"])
        elif kind == "BlockDone":
            yield from self._block(record)
        elif kind == "Evaluated" and int(record["step"]) > self._evaluated:
            self._evaluated = int(record["step"])
            for name, value in record["metrics"].items():
                yield Point(f"eval/{name}", value, _ms(record), self._evaluated)
        elif kind == "RunEnded":
            yield from self._close(self._done.get(0, 0))

    def _block(self, record: Mapping[str, Any]) -> Iterator[Point]:
        worker = int(record["worker"])
        first, count = int(record["first_step"]), int(record["num_steps"])
        done = self._done.get(worker, 0)
        step_ms = 1000 * float(record["wall_s"]) / count
        skip = max(0, done - first)
        if skip >= count:
            return
        self._done[worker] = first + count
        if worker != 0:
            # Its own point a block: the windows follow the chief's steps.
            yield Point(f"worker/{worker}/step_ms", step_ms, _ms(record), first + count)
            return
        series = {"train/loss": record["loss"], "train/learning_rate": record["learning_rate"]}
        series |= {f"train/{name}": values for name, values in record["metrics"].items()}
        self._time_ms = _ms(record)
        wait = float(record["data_wait_s"]) / max(float(record["wall_s"]), 1e-9)
        for index in range(skip, count):
            for name, values in series.items():
                if index < len(values):
                    self._window.add(name, values[index])
            self._window.add("perf/step_ms", step_ms)
            self._window.add("perf/data_wait_fraction", wait)
            step = first + index + 1
            if self._every is not None and step % self._every == 0:
                yield from self._close(step)

    def _close(self, step: int) -> Iterator[Point]:
        means, self._window = self._window.means(), _Window()
        if "perf/step_ms" in means:
            means["worker/0/step_ms"] = means["perf/step_ms"]
            means["perf/examples_per_s"] = 1000 * self._examples / max(means["perf/step_ms"], 1e-9)
        for name, value in means.items():
            yield Point(name, value, self._time_ms, step)


class WindowChoice:
    """Chooses, once a run, how many steps a point stands for.

    The choice is journaled before the block it was made from, so that whoever reads the journal
    cuts the same windows.
    """

    def __init__(self, log_every_steps: str):
        """Begin; a number leaves nothing to choose."""
        self._open = log_every_steps == "auto"
        self._traced = False

    def look_at(self, record: Mapping[str, Any]) -> int | None:
        """Return the window if this record decides it: the chief's second block of an attempt.

        The first block is not looked at, since its time is that of tracing.
        """
        kind = record.get("kind")
        if kind == "Window":
            self._open = False
        elif kind == "AttemptStarted":
            self._traced = False
        elif kind == "BlockDone" and record["worker"] == 0 and self._open:
            if self._traced:
                self._open = False
                steps_per_s = record["num_steps"] / max(record["wall_s"], 1e-9)
                return round_window(steps_per_s / _POINTS_PER_S)
            self._traced = True
        return None


def round_window(steps: float) -> int:
    """Return the largest of 1, 2, 5, 10, 20, 50 ... that is not above `steps`; at least 1."""
    best, scale = 1, 1
    while scale <= steps:
        best = max([best, *(scale * f for f in _ROUND_FACTORS if scale * f <= steps)])
        scale *= 10
    return best


def _ms(record: Mapping[str, Any]) -> int:
    return int(float(record["time"]) * 1000)
