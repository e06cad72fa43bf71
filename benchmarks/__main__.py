"""`make bench`: our speed against what one would write by hand, in alternating pairs.

python -m benchmarks [only=NAME,NAME] [pairs=5] [seconds=6] [fresh=true] [list=true]

Prints the tables and keeps them in benchmarks/RESULTS.md. Finished samples are kept in
benchmarks/.state.json: the same command goes on where it was interrupted.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from dataclasses import dataclass
from datetime import date
from fnmatch import fnmatch
from pathlib import Path

from benchmarks.bench import Bench
from benchmarks.report import MARK, kept_lines, ratio_line, seconds_line, tables
from benchmarks.rows import COMMANDS, Command, Row, rows
from benchmarks.state import State, commit, versions
from orchestrator.spec.host import local_host

_RESULTS = Path(__file__).with_name("RESULTS.md")
_STATE = Path(__file__).with_name(".state.json")
_UNITS = {"steps_per_s": "steps/s", "start_s": "s", "stall_s": "s"}


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked on the command line.

    Attributes:
        only: names of rows, `*` allowed; empty for all.
        pairs: how often the two sides alternate.
        seconds: measured seconds of one sample; None for what each row says.
        fresh: forget the samples of this commit.
        list: print the names of the rows and measure nothing.
    """

    only: tuple[str, ...] = ()
    pairs: int = 5
    seconds: float | None = None
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
    if options.pairs < 1 or (options.seconds is not None and options.seconds <= 0):
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


def _write(lines: dict[str, str]) -> str:
    """Put new rows into RESULTS.md beside those of other days; return what is below the mark."""
    before = _RESULTS.read_text() if _RESULTS.exists() else ""
    text, _, old = before.partition(MARK)
    gpus = local_host().num_gpus
    cores = f"{os.cpu_count()} CPU cores ({platform.machine()})"
    gpu = f"GPU: {gpus} present." if gpus else "GPU: none was present."
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
    lines: dict[str, str] = {}
    when = f"{date.today()} {measured_commit}"
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        bench = Bench(options.pairs, options.seconds, state, Path(name))
        print(f"about {bench.estimate_s(ratios, commands) / 60:.0f} minutes", flush=True)
        for group in bench.groups(ratios):
            bench.measure(group)
            lines |= {row.name: _ratio(bench, row, when) for row in group}
            measured = _write(lines)
        for command in commands:
            seconds = bench.seconds(command)
            lines[command.name] = seconds_line(
                command.name, command.text, command.goal, seconds, when
            )
            measured = _write(lines)
    print(measured)


def _ratio(bench: Bench, row: Row, when: str) -> str:
    ours, other = (
        [getattr(sample, row.figure) for sample in samples] for samples in bench.pairs(row)
    )
    return ratio_line(row.name, row.text, row.goal, ours, other, unit=_UNITS[row.figure], when=when)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the samples that are there")
        sys.exit(130)
