"""Ratios, and the table that keeps them: pure text in, pure text out."""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Iterable, Sequence

MARK = "<!-- measured: everything below is written by `make bench` -->"
_RATIOS = [
    "| row | ratio | goal | median (range) | ours | other | A/A ours | A/A other | measured |",
    "|---|---|---|---|---|---|---|---|---|",
]
_SECONDS = ["| row | command | goal, s | median (range), s | measured |", "|---|---|---|---|---|"]
_LINE = re.compile(r"^\| `([\w-]+)` \|")


def spread(numbers: Sequence[float]) -> str:
    """Return median and range, or a dash where there is nothing."""
    if not numbers:
        return "–"
    digits = 0 if statistics.median(numbers) >= 100 else 2
    parts = (statistics.median(numbers), min(numbers), max(numbers))
    return "{} ({} to {})".format(*(f"{part:.{digits}f}" for part in parts))


def paired(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Return the ratio of each pair of two sides that alternated."""
    return [a / b for a, b in zip(above, below, strict=True)]


def noise(same: Sequence[float]) -> list[float]:
    """Return the ratios of one side to itself, from one run to the next."""
    return [b / a for a, b in itertools.pairwise(same)]


def ratio_line(
    name: str, text: str, goal: str, ours: Sequence[float], other: Sequence[float], when: str
) -> str:
    """Return a row of the table of ratios."""
    cells = [
        *(f"`{name}`", text, goal, spread(paired(ours, other)), spread(ours), spread(other)),
        *(spread(noise(ours)), spread(noise(other)), f"{when}, {len(ours)} pairs"),
    ]
    return f"| {' | '.join(cells)} |"


def seconds_line(name: str, text: str, goal: str, seconds: Sequence[float], when: str) -> str:
    """Return a row of the table of commands."""
    return f"| {' | '.join([f'`{name}`', text, goal, spread(seconds), when])} |"


def kept_lines(text: str) -> dict[str, str]:
    """Return the rows of tables written before, by name."""
    found = (_LINE.match(line) for line in text.splitlines())
    return {match[1]: match.string for match in found if match}


def tables(
    lines: dict[str, str], ratio_names: Iterable[str], second_names: Iterable[str], head: str
) -> str:
    """Return everything below the mark; rows that were never measured are left out."""
    ratios = [lines[name] for name in ratio_names if name in lines]
    seconds = [lines[name] for name in second_names if name in lines]
    parts = [head]
    if ratios:
        parts.append("\n".join([*_RATIOS, *ratios]))
    if seconds:
        parts.append("\n".join([*_SECONDS, *seconds]))
    return "\n\n".join(parts) + "\n"
