"""Journal records -> metric points: means over windows of steps, each step counted once.

Window w covers the steps (w-1)*n+1 .. w*n and gives one point a metric at its last step. Block
borders play no part, because they move after a recovery; the sums run step by step, so that even
the last bit of a mean does not depend on them. The same journal always gives the same points.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from orchestrator.track.goodput import Goodput

# A metric gets at most so many points a second when tracking.log_every_steps is auto.
_MAX_POINTS_PER_S = 5.0
_CHIEF = 0
# Of more workers than these each gets a point less often, so that all together get no more.
_MAX_WORKERS = 64


class Point(NamedTuple):
    """One value of one metric; the timestamp is Unix time in ms."""

    key: str
    value: float
    timestamp_ms: int
    step: int


class Points:
    """Turns the records of one run, in order, into points; memory does not grow with the steps.

    Attributes:
        window: steps of a window; None until the first measured speed has chosen it. Whoever
            feeds the records journals the choice as `Window`, once a run.
    """

    def __init__(self, log_every_steps: str | int, global_batch_size: int):
        """Prepare for a run.

        Args:
            log_every_steps: steps of a window, or "auto".
            global_batch_size: examples a step, for examples/s, until a start tells another one.
        """
        self.window = None if log_every_steps == "auto" else int(log_every_steps)
        self._global_batch_size = global_batch_size
        self._waiting: list[Mapping[str, Any]] = []
        self._windows: dict[int, _Window] = {}
        self._last_evaluated = 0
        self._last_step = 0
        self._last_ended = 0
        self._goodput = Goodput()
        self._num_samples: dict[str, int] = {}
        self._stride = 1  # windows of the chief for one of another worker

    @property
    def is_settled(self) -> bool:
        """Whether all blocks so far have been counted: none waits for the window."""
        return self.window is not None and not self._waiting

    def feed(self, record: Mapping[str, Any]) -> list[Point]:
        """Take the next record and return the points that it completes."""
        return list(self._feed(record))

    def _feed(self, record: Mapping[str, Any]) -> Iterator[Point]:
        self._goodput.feed(record)
        match record.get("kind"):
            case "RunStarted":
                self._start(record.get("facts", {}))
            case "Window":
                # The choice in the journal stands, even when another one was made since.
                self.window = int(record["log_every_steps"])
                yield from self._catch_up()
            case "AttemptStarted":
                self._stride = -(-record.get("num_workers", 1) // _MAX_WORKERS)
            case "BlockDone":
                yield from self._block(record)
            case "Evaluated":
                yield from self._evaluated(record)
            case "NodeSampled":
                yield from self._sampled(record)
            case "RunEnded":
                if self._waiting:
                    self._choose(self._waiting[-1])
                yield from self._catch_up()
                if record["status"] == "FINISHED":
                    for window in self._windows.values():
                        yield from window.close()
                # Otherwise it goes on, when it is resumed, with the window it was stopped in.
                yield from self._ended(record)

    def _start(self, facts: Mapping[str, Any]) -> None:
        """Count with the examples a step of this start, also in the window that it goes on with."""
        self._global_batch_size = facts.get("global_batch_size", self._global_batch_size)
        for window in self._windows.values():
            window.global_batch_size = self._global_batch_size

    def _ended(self, record: Mapping[str, Any]) -> Iterator[Point]:
        """Tell where the time went, once for each step at which the run has ended."""
        if self._last_step <= self._last_ended:
            return
        self._last_ended, stamp = self._last_step, _milliseconds(record)
        for use, seconds in self._goodput.seconds().items():
            yield Point(f"goodput/{use}_s", seconds, stamp, self._last_step)
        yield Point("goodput/fraction", self._goodput.fraction, stamp, self._last_step)

    def _block(self, record: Mapping[str, Any]) -> Iterator[Point]:
        self._last_step = max(self._last_step, record["first_step"] + record["num_steps"])
        if self.window is None:
            self._waiting.append(record)
            # An attempt's first block holds the tracing: the chief's second one tells the speed.
            if record["worker"] != _CHIEF or self._num_waiting_of_chief() < 2:
                return
            self._choose(record)
            yield from self._catch_up()
            return
        worker = record["worker"]
        if worker not in self._windows:
            steps = self.window * (1 if worker == _CHIEF else self._stride)
            self._windows[worker] = _Window(worker, steps, self._global_batch_size)
        yield from self._windows[worker].add(record)

    def _num_waiting_of_chief(self) -> int:
        return sum(record["worker"] == _CHIEF for record in self._waiting)

    def _choose(self, record: Mapping[str, Any]) -> None:
        self.window = auto_window(record["num_steps"] / max(record["wall_s"], 1e-9))

    def _catch_up(self) -> Iterator[Point]:
        waiting, self._waiting = self._waiting, []
        for record in waiting:
            yield from self._block(record)

    def _evaluated(self, record: Mapping[str, Any]) -> Iterator[Point]:
        step = record["step"]
        if step <= self._last_evaluated:
            return
        self._last_evaluated = step
        for name, value in record["metrics"].items():
            yield Point(f"eval/{name}", value, _milliseconds(record), step)

    def _sampled(self, record: Mapping[str, Any]) -> Iterator[Point]:
        """Tell how busy a node is; here a step is a sample, counted over all attempts.

        MLflow's own monitor counts in the same way (mlflow 3.17, system_metrics_monitor.py).
        """
        node = record["node"]
        number = self._num_samples.get(node, 0)
        self._num_samples[node] = number + 1
        for name, value in record["values"].items():
            yield Point(f"system/{node}/{name}", value, _milliseconds(record), number)


def auto_window(steps_per_s: float) -> int:
    """Return the smallest of 1, 2, 5, 10, 20, 50, ... that gives at most 5 points a second."""
    scale = 1
    while True:
        for digit in (1, 2, 5):
            if steps_per_s / (digit * scale) <= _MAX_POINTS_PER_S:
                return digit * scale
        scale *= 10


class _Window:
    """The window that one worker is in."""

    def __init__(self, worker: int, num_steps: int, global_batch_size: int):
        self._worker = worker
        self._num_steps = num_steps
        self.global_batch_size = global_batch_size
        self._last_step = 0
        self._timestamp_ms = 0
        self._clear()

    def _clear(self) -> None:
        self._steps = 0
        self._wall_s = 0.0
        self._data_wait_s = 0.0
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, block: Mapping[str, Any]) -> Iterator[Point]:
        """Count the steps of a block that were not counted yet."""
        first, total = block["first_step"], block["num_steps"]
        position, end = max(first, self._last_step), first + total
        while position < end:
            border = (position // self._num_steps + 1) * self._num_steps
            if self._steps and self._last_step // self._num_steps != position // self._num_steps:
                yield from self.close()  # steps are missing from the journal
            stop = min(border, end)
            self._count(block, position - first, stop - first)
            self._last_step = position = stop
            self._timestamp_ms = _milliseconds(block)
            if stop == border:
                yield from self.close()

    def _count(self, block: Mapping[str, Any], start: int, stop: int) -> None:
        """Add the steps of a block from index `start` up to `stop`."""
        steps = stop - start
        self._steps += steps
        self._wall_s += block["wall_s"] * steps / block["num_steps"]
        self._data_wait_s += block["data_wait_s"] * steps / block["num_steps"]
        if self._worker != _CHIEF:
            return
        # A skipped step changed nothing: its loss, which is not finite, says nothing either.
        skipped = {step - block["first_step"] - 1 for step in block["skipped_steps"]}
        series = {"train/loss": block["loss"], "train/learning_rate": block["learning_rate"]}
        series |= {f"train/{name}": values for name, values in block["metrics"].items()}
        for key, values in series.items():
            total, count = self._sums.get(key, (0.0, 0))
            for index, value in enumerate(values[start:stop], start):
                if index not in skipped:
                    total, count = total + value, count + 1
            self._sums[key] = total, count

    def close(self) -> Iterator[Point]:
        """Give the points of the steps counted so far, at the last of them."""
        if not self._steps:
            return
        stamp, step = self._timestamp_ms, self._last_step
        step_ms = 1000 * self._wall_s / self._steps
        yield Point(f"worker/{self._worker}/step_ms", step_ms, stamp, step)
        if self._worker == _CHIEF:
            for key, (total, count) in self._sums.items():
                yield Point(key, total / count if count else math.nan, stamp, step)
            wall_s = max(self._wall_s, 1e-9)
            examples_per_s = self.global_batch_size * self._steps / wall_s
            yield Point("perf/examples_per_s", examples_per_s, stamp, step)
            yield Point("perf/step_ms", step_ms, stamp, step)
            yield Point("perf/data_wait_fraction", self._data_wait_s / wall_s, stamp, step)
        self._clear()


def _milliseconds(record: Mapping[str, Any]) -> int:
    return round(record["time"] * 1000)
