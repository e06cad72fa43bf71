"""A record whose journal cannot be written: kept in memory, and never in silence."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.track.journal import read
from orchestrator.track.record import Record
from tests.track.rig import make_facts


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let the kernel refuse to make any file larger: as a full disk, for this process alone."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def noted(number: int) -> dict[str, object]:
    return {"kind": "Noted", "number": number}


def test_records_wait_in_memory_while_the_disk_is_full_and_come_in_order(tmp_path: Path) -> None:
    path, said, now = tmp_path / "journal.jsonl", [], [100.0]
    facts = make_facts(tmp_path, f"sqlite:///{tmp_path}/mlflow.db")
    record = Record(path, facts, notice=said.append, clock=lambda: now[0])
    record.add(noted(1))
    size = path.stat().st_size
    with files_of_at_most(size + 10):
        for number in (2, 3):
            record.add(noted(number))
            now[0] += 30.0
        assert record.failing_s == 60.0
        assert [r.get("number") for r in read(path)][1:] == [1]
        assert len(said) == 1 and said[0].startswith("DEGRADED: cannot write the journal")
        assert "File too large" in record.error
    record.add(noted(4))
    assert record.failing_s == 0.0
    assert [r.get("number") for r in read(path)][1:] == [1, 2, 3, 4]
    assert said[1:] == ["the journal can be written again; it has everything"]
