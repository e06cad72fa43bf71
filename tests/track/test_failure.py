"""Which of many failures is told as the first."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.track.failure import FirstFailure


def failed(attempt: int, worker: int, error: str, **other: Any) -> dict[str, Any]:
    record = {"kind": "Failed", "attempt": attempt, "worker": worker, "error": error}
    return record | {"cause": "worker"} | other


def decided(attempt: int, worker: int, error: str) -> dict[str, Any]:
    return failed(attempt, worker, error, kind="Decided", decision="retry")


GROWN = {"kind": "Decided", "attempt": 1, "decision": "grow", "num_workers": 2}
VICTIM = failed(1, 0, "Connection reset", cause="collateral")
DIED = failed(1, 0, "it exited", kind="Death")
ENDED = {"kind": "RunEnded", "status": "FAILED", "cause": "the journal could not be written\nmore"}


@pytest.mark.parametrize(
    ("records", "text"),
    [
        ([], ""),
        ([GROWN, VICTIM], ""),
        ([VICTIM, failed(1, 1, "cut"), failed(2, 0, "no room")], "attempt 1, worker 1: cut"),
        # Heard first, and yet what the other one died of.
        ([DIED, failed(1, 1, "no room"), decided(1, 1, "no room")], "1, worker 1: no room"),
        # The driver was killed before it decided about the first attempt.
        ([failed(1, 1, "cut"), failed(2, 0, "again"), decided(2, 0, "again")], "1, worker 1: cut"),
        ([VICTIM, decided(1, 0, "Connection reset")], "attempt 1, worker 0: Connection reset"),
        ([ENDED], "the journal could not be written"),
        ([failed(1, 1, "cut"), ENDED], "attempt 1, worker 1: cut"),
        ([ENDED | {"status": "KILLED", "cause": "stopped"}], ""),
    ],
)
def test_what_failed_first_is_told(records: list[dict[str, Any]], text: str) -> None:
    found = FirstFailure()
    for record in records:
        found.feed(record)
    assert found.text.endswith(text) and bool(found.text) == bool(text)


def test_a_long_error_is_cut_to_a_line_that_can_be_read() -> None:
    found = FirstFailure()
    found.feed(failed(1, 1, "x" * 1000))
    assert len(found.error) == 300 and found.error.endswith("...")
