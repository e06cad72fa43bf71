"""Runs the samples that are missing, and tells how long that takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

import numpy as np

from benchmarks.measure import (
    Ours,
    Sample,
    Script,
    Side,
    fastest_rate,
    run_command,
    run_ours,
    run_script,
    train,
)
from benchmarks.rows import Command, Row
from benchmarks.spec import PROJECT
from benchmarks.state import State

# Seconds that a run takes besides its measured part, on two cores; for the estimate only.
_OURS_S, _SHORT_S = 8.0, 12.0
_SCRIPT_S = {"train": 45.0, "bare": 5.0, "save": 8.0}
_OTHER_SCRIPT_S = 5.0
_COMMAND_S = {"train": 10.0}
_UNCOUNTED_S = 15.0
# Seconds until MLflow is imported beside the first steps and has the run.
_MLFLOW_S = 5.0
_FEWEST_STEPS = 20


class Bench:
    """Rows to samples, each kept as soon as it is there."""

    def __init__(self, pairs: int, seconds: float | None, state: State, folder: Path):
        """Prepare.

        Args:
            pairs: how often the two sides of a row alternate.
            seconds: measured seconds of a sample; None for what each row says.
            state: keeps the samples.
            folder: where runs are made.
        """
        self._pairs = pairs
        self._seconds = seconds
        self._state = state
        self._folder = folder
        self._data = folder / "mnist.npz"

    def estimate_s(self, rows: Sequence[Row], commands: Sequence[Command]) -> float:
        """Return about how long the missing samples take."""
        total = 0.0
        rates = set()
        for group in self.groups(rows):
            for number in range(self._pairs):
                missing = self._missing(group, number)
                sides = {side.key: side for row in missing for side in (row.ours, row.other)}
                seconds = self._seconds_of(group[0])
                total += sum(_cost_s(side, seconds) for side in sides.values())
                rates |= {key for key, side in sides.items() if isinstance(side, Ours)}
        total += sum(not self._state.samples(_rate_key(key)) for key in rates) * _UNCOUNTED_S
        for key, verb in {command.key: command.arguments[0] for command in commands}.items():
            count = max(0, self._pairs - len(self._state.samples(key)))
            total += count * _COMMAND_S.get(verb, 1.0)
        return total

    def groups(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Return the rows in groups that share our side or the other one, in their order."""
        groups: list[list[Row]] = []
        for row in rows:
            for group in groups:
                first = group[0]
                shares = row.ours.key == first.ours.key or row.other.key == first.other.key
                if shares and self._seconds_of(row) == self._seconds_of(first):
                    group.append(row)
                    break
            else:
                groups.append([row])
        return groups

    def measure(self, group: Sequence[Row]) -> None:
        """Make the missing samples of rows that share a side: rounds in which each side runs once.

        The sides of a row alternate, with those of other rows between them.
        """
        seconds = self._seconds_of(group[0])
        for number in range(self._pairs):
            taken: dict[str, Sample] = {}
            for row in self._missing(group, number):
                for side in (row.ours, row.other):
                    if side.key not in taken:
                        taken[side.key] = self._sample(side, seconds)
                if self._state.samples(self._key(row))[number:]:
                    continue  # another row has the same pair
                ours, other = taken[row.ours.key], taken[row.other.key]
                self._state.add(self._key(row), [*astuple(ours), *astuple(other)])
                told = f"pair {number + 1} of {self._pairs}: {ours}, {other}"
                print(f"{row.name}: {told}", flush=True)

    def pairs(self, row: Row) -> tuple[list[Sample], list[Sample]]:
        """Return the samples of our side and of the other one, in the order they were made."""
        kept = self._state.samples(self._key(row))[: self._pairs]
        half = len(kept[0]) // 2
        return [Sample(*both[:half]) for both in kept], [Sample(*both[half:]) for both in kept]

    def seconds(self, command: Command) -> list[float]:
        """Return how long a command, or its ending, took, once for each pair."""
        key = command.key
        fetches = {"train", "doctor"} & set(command.arguments)
        if fetches and not self._state.samples(f"uncounted {key}"):
            # It may have to fetch the data first.
            self._state.add(f"uncounted {key}", [*run_command(command.arguments, self._folder)])
        while len(self._state.samples(key)) < self._pairs:
            self._state.add(key, [*run_command(command.arguments, self._folder)])
            count = len(self._state.samples(key))
            print(f"{command.name}: {count} of {self._pairs}", flush=True)
        kept = self._state.samples(key)[: self._pairs]
        return [ending if command.ending else wall for wall, ending in kept]

    def _missing(self, group: Sequence[Row], number: int) -> list[Row]:
        """Return the rows of a group that have no pair of this number, counted from 0."""
        return [row for row in group if len(self._state.samples(self._key(row))) <= number]

    def _seconds_of(self, row: Row) -> float:
        return row.seconds if self._seconds is None else max(self._seconds, row.least_seconds)

    def _key(self, row: Row) -> str:
        return f"{row.pair} {self._seconds_of(row):g} s"

    def _sample(self, side: Side, seconds: float) -> Sample:
        if isinstance(side, Script):
            if side.mode == "bare" and not self._data.exists():
                write_arrays(self._data)
            return run_script(side, seconds, self._data)
        return run_ours(side, self._num_steps(side, seconds), self._folder)

    def _num_steps(self, side: Ours, seconds: float) -> int:
        """Return how many steps fill a sample: from a run that does not count.

        That run also downloads the data and fills the caches, so rows about the start have one.
        """
        key = _rate_key(side.key)
        if not self._state.samples(key):
            records = train(side, side.trial_steps, self._folder)
            self._state.add(key, [fastest_rate(records)])
        rate = self._state.samples(key)[0][0]
        if side.short:
            return side.trial_steps
        # A fifth is not counted, and nothing before MLflow is there.
        return max(_FEWEST_STEPS, round((_MLFLOW_S + 1.25 * seconds) * rate))


def _rate_key(side_key: str) -> str:
    return f"rate of {side_key}"


def _cost_s(side: Side, seconds: float) -> float:
    if isinstance(side, Ours):
        return _SHORT_S if side.short else _OURS_S + _MLFLOW_S + 1.25 * seconds
    measured = 0.0 if side.mode in ("bare", "save") else 1.2 * seconds
    return _SCRIPT_S.get(side.mode, _OTHER_SCRIPT_S) + measured


def write_arrays(path: Path) -> None:
    """Write the training images for the plain script: both sides read the same files."""
    from orchestrator.train.datasets import mnist
    from orchestrator.train.sources import Split

    source = mnist(Split.TRAIN, path=None, cache_dir=str(PROJECT / "data"))
    arrays = source.fetch(np.arange(source.num_examples))
    np.savez(path, images=arrays["x"], labels=arrays["y"])
