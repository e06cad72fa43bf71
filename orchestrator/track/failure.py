"""What failed first in a run; what came after it may be its consequence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.spec.messages import Cause
from orchestrator.spec.secrets import mask_text

_LONGEST = 300


class FirstFailure:
    """The first failure of a run, over all attempts and resumes.

    Attributes:
        error: its first line; empty if nothing has failed.
        where: the attempt and the worker that it happened to; empty if it was the driver.
        time: Unix seconds.
    """

    def __init__(self) -> None:
        self.error = ""
        self.where = ""
        self.time = 0.0
        self._attempt = 0
        self._is_settled = False

    def feed(self, record: Mapping[str, Any]) -> None:
        """Take the next record of the journal."""
        match record.get("kind"):
            case "Failed" | "Death":
                if not self.error and record.get("cause") != Cause.collateral.value:
                    self._take(record)
            case "Decided" if "error" in record and not self._is_settled:
                self._is_settled = True
                # Of several workers that failed it tells the one which explains the others.
                if not self.error or record["attempt"] == self._attempt:
                    self._take(record)
            case "RunEnded" if record["status"] == "FAILED" and not self.error:
                self.error = _line(record["cause"])

    def _take(self, record: Mapping[str, Any]) -> None:
        self._attempt, self.error = record.get("attempt", 0), _line(record["error"])
        self.time = record.get("time", 0.0)
        self.where = f"attempt {self._attempt}, worker {record['worker']}"

    @property
    def text(self) -> str:
        """Both in one line."""
        return f"{self.where}: {self.error}" if self.where else self.error


def _line(text: str) -> str:
    """Return the first line of a text, without credentials, of a length that can be read."""
    line = next(iter(mask_text(text).strip().splitlines()), "")
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."
