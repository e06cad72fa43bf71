"""`make bench`: our speed against what one would write by hand, in alternating pairs.

python -m benchmarks [only=NAME,NAME] [pairs=5] [seconds=10] [fresh=true] [list=true]

Prints the tables and keeps them in benchmarks/RESULTS.md. Finished samples are kept in
benchmarks/.state.json: the same command goes on where it was interrupted.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from dataclasses import astuple, dataclass
from datetime import date
from fnmatch import fnmatch
from pathlib import Path

import numpy as np

from benchmarks.measure import Ours, Sample, Script, Side, orchestrator, run_ours, run_script
from benchmarks.report import MARK, kept_lines, ratio_line, seconds_line, tables
from benchmarks.rows import COMMANDS, Command, Row, rows
from benchmarks.spec import PROJECT
from benchmarks.state import State, commit, versions
from orchestrator.spec.host import local_host

_RESULTS = Path(__file__).with_name("RESULTS.md")
_STATE = Path(__file__).with_name(".state.json")
# Seconds that a run takes besides its measured part, on two cores; for the estimate only.
_BESIDES_S = {"train": 60.0, "bare": 5.0, "ours": 12.0}


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked on the command line.

    Attributes:
        only: names of rows, `*` allowed; empty for all.
        pairs: how often the two sides alternate.
        seconds: measured seconds of one sample.
        fresh: forget the samples of this commit.
        list: print the names of the rows and measure nothing.
    """

    only: tuple[str, ...] = ()
    pairs: int = 5
    seconds: float = 10.0
    fresh: bool = False
    list: bool = False


def parse(arguments: list[str]) -> Options:
    """Read `key=value` arguments.

    Raises:
        SystemExit: an unknown key, or a value that does not fit.
    """
    given: dict[str, object] = {}
    for argument in arguments:
        key, _, value = argument.partition("=")
        try:
            if key == "only":
                given[key] = tuple(filter(None, value.split(",")))
            elif key == "pairs":
                given[key] = int(value)
            elif key == "seconds":
                given[key] = float(value)
            elif key in ("fresh", "list"):
                given[key] = {"true": True, "false": False}[value]
            else:
                raise SystemExit(f"{argument}: only=, pairs=, seconds=, fresh= or list= is meant")
        except (ValueError, KeyError):
            raise SystemExit(f"{argument}: {value!r} does not fit {key}") from None
    options = Options(**given)  # type: ignore[arg-type]
    if options.pairs < 1 or options.seconds <= 0:
        raise SystemExit("pairs and seconds are above zero")
    return options


def chosen(only: tuple[str, ...]) -> tuple[list[Row], list[Command]]:
    """Return the rows and commands that are asked for.

    Raises:
        SystemExit: a pattern fits no row.
    """
    every = [*rows(), *COMMANDS]
    names = [row.name for row in every]
    for pattern in only:
        if not any(fnmatch(name, pattern) for name in names):
            raise SystemExit(f"only={pattern}: no such row; there are {', '.join(names)}")
    picked = [
        row for row in every if not only or any(fnmatch(row.name, pattern) for pattern in only)
    ]
    return (
        [row for row in picked if isinstance(row, Row)],
        [row for row in picked if isinstance(row, Command)],
    )


def estimate_s(asked: list[Row], options: Options, state: State) -> float:
    """Return about how long the samples take that are still missing."""

    def cost(side: Side) -> float:
        if isinstance(side, Ours):
            return _BESIDES_S["ours"] + (0.0 if side.short else 1.25 * options.seconds)
        measured = 0.0 if side.mode == "bare" else 1.2 * options.seconds
        return _BESIDES_S.get(side.mode, 8.0) + measured

    missing = {row.pair: row for row in asked}
    return sum(
        max(0, options.pairs - len(state.samples(_key(row, options))))
        * (cost(row.ours) + cost(row.other))
        for row in missing.values()
    )


class Bench:
    """Runs what is missing."""

    def __init__(self, options: Options, state: State, folder: Path):
        self._options = options
        self._state = state
        self._folder = folder
        self._data = folder / "mnist.npz"

    def pairs(self, row: Row) -> list[tuple[Sample, Sample]]:
        """Return the samples of a row's two sides, other first."""
        key = _key(row, self._options)
        while len(self._state.samples(key)) < self._options.pairs:
            ours, other = self._sample(row.ours), self._sample(row.other)
            self._state.add(key, [*astuple(ours), *astuple(other)])
            count = len(self._state.samples(key))
            print(f"{row.name}: pair {count} of {self._options.pairs}: {ours}, {other}", flush=True)
        kept = self._state.samples(key)[: self._options.pairs]
        return [(Sample(*four[:2]), Sample(*four[2:])) for four in kept]

    def seconds(self, command: Command) -> list[float]:
        """Return how long a command took, once for each pair."""
        arguments = list(command.arguments)
        if "train" in arguments:
            arguments.append(f"data.cache_dir={PROJECT / 'data'}")
        while len(self._state.samples(command.name)) < self._options.pairs:
            self._state.add(command.name, [orchestrator(*arguments, folder=self._folder)])
        return [kept[0] for kept in self._state.samples(command.name)[: self._options.pairs]]

    def _sample(self, side: Side) -> Sample:
        if isinstance(side, Script):
            if side.mode == "bare" and not self._data.exists():
                write_arrays(self._data)
            return run_script(side, self._options.seconds, self._data)
        return run_ours(side, self._num_steps(side), self._folder)

    def _num_steps(self, side: Ours) -> int:
        """Return how many steps fill a sample: from a run that does not count.

        That run also downloads the data and fills the caches, so rows about the start have one.
        """
        key = f"rate of {side.key}"
        if not self._state.samples(key):
            trial = run_ours(side, side.trial_steps, self._folder)
            self._state.add(key, [trial.steps_per_s])
        rate = self._state.samples(key)[0][0]
        if side.short:
            return side.trial_steps
        if not rate:
            raise SystemExit(f"{side.key}: {side.trial_steps} steps are too few to see a rate")
        return max(side.trial_steps, round(1.25 * self._options.seconds * rate))


def _key(row: Row, options: Options) -> str:
    return f"{row.pair} {options.seconds:g} s"


def write_arrays(path: Path) -> None:
    """Write the training images for the plain script: both sides read the same files."""
    from orchestrator.train.datasets import mnist
    from orchestrator.train.sources import Split

    source = mnist(Split.TRAIN, path=None, cache_dir=str(PROJECT / "data"))
    arrays = source.fetch(np.arange(source.num_examples))
    np.savez(path, images=arrays["x"], labels=arrays["y"])


def _write(lines: dict[str, str]) -> str:
    """Put new rows into RESULTS.md beside those of other days; return what is below the mark."""
    before = _RESULTS.read_text() if _RESULTS.exists() else ""
    text, _, old = before.partition(MARK)
    gpus = local_host().num_gpus
    cores = f"{os.cpu_count()} CPU cores ({platform.machine()})"
    gpu = f"GPU: {gpus} present." if gpus else "GPU: not measured, no GPU on this machine."
    head = f"Last run: {date.today()}, {cores}, {versions()}.\n\n{gpu}"
    names = [row.name for row in rows()]
    measured = tables(kept_lines(old) | lines, names, [row.name for row in COMMANDS], head)
    _RESULTS.write_text(f"{text}{MARK}\n\n{measured}")
    return measured


def main(arguments: list[str]) -> None:
    """Measure, print and keep."""
    options = parse(arguments)
    ratios, commands = chosen(options.only)
    if options.list:
        print("\n".join(row.name for row in [*ratios, *commands]))
        return
    measured_commit = commit()
    identity = f"{measured_commit}; {versions()}; {platform.node()} {os.cpu_count()}"
    state = State(_STATE, identity, fresh=options.fresh)
    print(f"about {estimate_s(ratios, options, state) / 60:.0f} minutes", flush=True)
    when = f"{date.today()} {measured_commit}"
    lines: dict[str, str] = {}
    measured = ""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        bench = Bench(options, state, Path(name))
        for row in ratios:
            pairs = bench.pairs(row)
            ours = [getattr(sample, row.figure) for sample, _ in pairs]
            other = [getattr(sample, row.figure) for _, sample in pairs]
            lines[row.name] = ratio_line(row.name, row.text, row.goal, ours, other, when)
            measured = _write(lines)
        for command in commands:
            seconds = bench.seconds(command)
            lines[command.name] = seconds_line(
                command.name, command.text, command.goal, seconds, when
            )
            measured = _write(lines)
    print(measured)


if __name__ == "__main__":
    main(sys.argv[1:])
