"""The course of one metric in bounded memory: all points, or evenly spaced ones and the last."""

from __future__ import annotations

_MAX_POINTS = 8192


class Curve:
    """Points as they come; of too many, evenly spaced ones are kept."""

    def __init__(self) -> None:
        self._kept: list[tuple[int, float]] = []
        self._stride = 1
        self._number = 0
        self._last: tuple[int, float] | None = None

    def add(self, step: int, value: float) -> None:
        """Take the next point."""
        self._last = step, value
        if self._number % self._stride == 0:
            self._kept.append(self._last)
            if len(self._kept) > _MAX_POINTS:
                del self._kept[1::2]
                self._stride *= 2
        self._number += 1

    def points(self) -> list[tuple[int, float]]:
        """Return (step, value) of the points that are kept, the first and the last among them."""
        if self._last is None or self._kept[-1] == self._last:
            return list(self._kept)
        return [*self._kept, self._last]
