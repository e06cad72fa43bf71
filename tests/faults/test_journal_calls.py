"""A journal whose writer is killed, or whose disk fails, at every call it makes."""

from __future__ import annotations

from pathlib import Path

from orchestrator.track.journal import Journal, read
from tests.faults.strace import Call, needs_strace, trace

pytestmark = needs_strace
SCRIPT = Path(__file__).with_name("journals.py")


def begun(path: Path) -> Path:
    """Make a journal of two records and half a third."""
    path.parent.mkdir()
    journal = Journal(path)
    for number in (1, 2):
        journal.append({"kind": "Notice", "number": number})
    journal.close()
    with path.open("ab") as file:
        file.write(b'{"n":3,"crc"')
    return path


def numbers(path: Path) -> list[int]:
    return [record["number"] for record in read(path)]


def writing(calls: list[Call]) -> list[Call]:
    """Return the calls that write the journal."""
    return [call for call in calls if "journal.jsonl>" in call.text and call.name != "openat"]


def test_a_kill_at_any_call_loses_no_record_that_was_taken(tmp_path: Path) -> None:
    calls = writing(trace(SCRIPT, str(begun(tmp_path / "whole" / "journal.jsonl"))).calls)
    # Cutting off the half, then twice: cutting off what a failed append left, writing, flushing.
    assert [call.name for call in calls] == ["ftruncate", *2 * ("ftruncate", "pwrite64", "fsync")]
    for index, call in enumerate(calls):
        path = begun(tmp_path / f"kil{index:02}" / "journal.jsonl")
        killed = trace(SCRIPT, str(path), inject=[f"{call.name}:signal=SIGKILL:when={call.number}"])
        assert killed.status == -9
        taken = [1, 2, *map(int, killed.out.split())]
        found = numbers(path)
        assert found[: len(taken)] == taken and found == list(range(1, len(found) + 1))
        journal = Journal(path)
        journal.append({"kind": "Notice", "number": 9})
        journal.close()
        assert numbers(path) == [*found, 9]


def test_an_append_that_fails_is_told_and_leaves_nothing_behind(tmp_path: Path) -> None:
    calls = writing(trace(SCRIPT, str(begun(tmp_path / "whole" / "journal.jsonl"))).calls)
    for index, call in enumerate(calls):
        path = begun(tmp_path / f"eio{index:02}" / "journal.jsonl")
        failed = trace(SCRIPT, str(path), inject=[f"{call.name}:error=EIO:when={call.number}"])
        assert "StorageError: cannot write the journal" in failed.out
        journal = Journal(path)
        journal.append({"kind": "Notice", "number": 9})
        journal.close()
        # What could not be flushed may be there; what was taken is.
        found = numbers(path)
        assert found[:-1] in ([1, 2], [1, 2, 3], [1, 2, 3, 4]) and found[-1] == 9
