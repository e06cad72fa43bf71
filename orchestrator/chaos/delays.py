"""Whether something held up a run's blocks: the time each took, against the pace of all."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any


def delays(records: Iterable[Mapping[str, Any]], attempt: int) -> list[tuple[float, float]]:
    """Return how much longer than the others each block of the chief took.

    A block counts from the end of the one before it, so that a wait between the two shows too. One
    that an evaluation came before is left out, and so is the first, which was traced.

    Args:
        records: of the journal, in order.
        attempt: whose blocks are meant.

    Returns:
        For each block the Unix seconds of its end, and how many seconds it was late against the
        median pace.
    """
    found: list[tuple[float, float, int]] = []
    last: float | None = None
    for record in records:
        if record.get("attempt") != attempt or record.get("worker") != 0:
            continue
        if record["kind"] == "Evaluated":
            last = None
        elif record["kind"] == "BlockDone":
            if last is not None:
                found.append((record["time"], record["time"] - last, record["num_steps"]))
            last = record["time"]
    if not found:
        return []
    pace_s = statistics.median(seconds / steps for _, seconds, steps in found)
    return [(end, seconds - steps * pace_s) for end, seconds, steps in found]


def longest(delays: Iterable[tuple[float, float]], since: float, until: float) -> float:
    """Return the longest delay, in seconds, of the blocks that ended between two moments; or 0."""
    return max((late for end, late in delays if since <= end <= until), default=0.0)
