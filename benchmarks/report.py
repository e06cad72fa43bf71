"""Ratios, verdicts, and the table that keeps them: pure text in, pure text out."""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections.abc import Iterable, Sequence

MARK = "<!-- measured: everything below is written by `make bench` -->"
_RATIOS = [
    "| row | ratio | goal | median (range) | met | ours | other | A/A ours | A/A other | when |",
    "|---|---|---|---|---|---|---|---|---|---|",
]
_SECONDS = [
    "| row | command | goal, s | median (range), s | met | A/A | when |",
    "|---|---|---|---|---|---|---|",
]
_LINE = re.compile(r"^\| `([\w-]+)` \|")
_DIGITS = 3  # significant ones of a median


def spread(numbers: Sequence[float], unit: str = "") -> str:
    """Return median and range, the number alone if there is one, a dash if there is none."""
    if not numbers:
        return "–"
    median = statistics.median(numbers)
    size = math.floor(math.log10(median)) if median > 0 else 0
    digits = max(0, _DIGITS - 1 - size)
    text = f"{median:,.{digits}f}"
    if len(numbers) > 1:
        text += f" ({min(numbers):,.{digits}f} to {max(numbers):,.{digits}f})"
    return f"{text} {unit}".rstrip()


def paired(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Return the ratio of each pair of two sides that alternated."""
    return [a / b for a, b in zip(above, below, strict=True)]


def noise(same: Sequence[float]) -> list[float]:
    """Return the ratios of one side to itself, from one run to the next."""
    return [b / a for a, b in itertools.pairwise(same)]


def verdict(goal: str, measured: Sequence[float], *sides: Sequence[float]) -> str:
    """Return whether a goal is met by more than the noise: yes, no, or within noise.

    The noise is how far a side is from itself, from one run to the next: the median over its
    neighbours, of the side that moves more. With a single run there is none, and no verdict.

    Args:
        goal: `≥`, `≤` or `<`, and a number.
        measured: what is compared with it: its median counts.
        sides: the runs of each side.
    """
    sign, limit = goal.split()
    moves = [[abs(ratio - 1) for ratio in noise(side)] for side in sides]
    if not all(moves):
        return "–"
    margin = statistics.median(measured) / float(limit) - 1
    if sign != "≥":
        margin = -margin
    if abs(margin) <= max(map(statistics.median, moves)):
        return "within noise"
    return "yes" if margin > 0 else "no"


def ratio_line(
    name: str,
    text: str,
    goal: str,
    ours: Sequence[float],
    other: Sequence[float],
    *,
    unit: str,
    when: str,
) -> str:
    """Return a row of the table of ratios."""
    ratios = paired(ours, other)
    cells = [
        *(f"`{name}`", text, goal, spread(ratios), verdict(goal, ratios, ours, other)),
        *(spread(ours, unit), spread(other, unit), spread(noise(ours)), spread(noise(other))),
        f"{when}, {_pairs(len(ours))}",
    ]
    return f"| {' | '.join(cells)} |"


def seconds_line(name: str, text: str, goal: str, seconds: Sequence[float], when: str) -> str:
    """Return a row of the table of commands."""
    cells = [f"`{name}`", text, goal, spread(seconds), verdict(goal, seconds, seconds)]
    return f"| {' | '.join([*cells, spread(noise(seconds)), when])} |"


def _pairs(count: int) -> str:
    return "1 pair" if count == 1 else f"{count} pairs"


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
