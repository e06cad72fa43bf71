"""The journal: what was appended is read back, whatever a crash does to its tail."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path

import pytest

from orchestrator.errors import StorageError
from orchestrator.spec.messages import BlockDone, to_record
from orchestrator.track.journal import Journal, Reader, read


def _write(path: Path, *records: dict[str, object]) -> None:
    journal = Journal(path)
    for record in records:
        journal.append(record)
    journal.close()


def _noted(number: int) -> dict[str, object]:
    return {"kind": "Notice", "worker": 0, "attempt": 1, "time": 1.5, "text": f"notice {number}"}


def test_what_was_appended_is_read_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    _write(path, _noted(1), _noted(2))
    _write(path, _noted(3))
    assert list(read(path)) == [_noted(1), _noted(2), _noted(3)]
    assert [json.loads(line)["n"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_a_missing_journal_reads_as_empty(tmp_path: Path) -> None:
    assert list(read(tmp_path / "journal.jsonl")) == []


def test_a_tail_torn_at_any_byte_is_cut_off_and_the_next_record_follows(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    _write(path, _noted(1))
    whole = path.stat().st_size
    _write(path, _noted(2))
    data = path.read_bytes()
    for size in range(whole, len(data)):
        path.write_bytes(data[:size])
        assert list(read(path)) == [_noted(1)], size
        _write(path, _noted(3))
        assert list(read(path)) == [_noted(1), _noted(3)], size


def test_a_flipped_bit_anywhere_in_the_last_line_loses_that_record_only(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    _write(path, _noted(1))
    whole = path.stat().st_size
    _write(path, _noted(2))
    data = path.read_bytes()
    for place in range(whole, len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert list(read(path)) == [_noted(1)], place


def test_damage_before_whole_records_is_refused_instead_of_cutting_them_off(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    _write(path, _noted(1), _noted(2), _noted(3))
    data = path.read_bytes()
    path.write_bytes(data.replace(b"notice 2", b"notice 9"))
    with pytest.raises(StorageError, match="damaged after record 1"):
        Journal(path)
    assert len(path.read_bytes()) == len(data)


def test_series_keep_seven_digits_and_values_that_are_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    loss = (0.123456789, math.inf, -math.inf, math.nan)
    block = BlockDone(
        worker=0,
        attempt=1,
        time=1700000000.123456,
        first_step=0,
        num_steps=4,
        wall_s=0.5,
        data_wait_s=0.25,
        ledger=2**64 - 1,
        loss=loss,
        metrics={"accuracy": (1 / 3,)},
    )
    _write(path, to_record(block))
    (found,) = read(path)
    assert found["loss"][:3] == [0.1234568, math.inf, -math.inf]
    assert math.isnan(found["loss"][3])
    assert found["metrics"] == {"accuracy": [0.3333333]}
    assert (found["time"], found["ledger"]) == (1700000000.123456, 2**64 - 1)


def test_texts_are_kept_without_credentials_and_as_unicode(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    error = "cannot connect to postgresql://me:hunter2@db/x: caf\udce9.png"
    journal.append({"kind": "Failed", "error": error, "worker": 0})
    journal.close()
    (record,) = read(tmp_path / "journal.jsonl")
    assert record["error"] == "cannot connect to postgresql://***@db/x: caf\\udce9.png"


def test_a_reader_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    reader = Reader(path)
    assert list(reader.new()) == []
    _write(path, _noted(1))
    assert list(reader.new()) == [_noted(1)]
    with path.open("ab") as file:
        file.write(b'{"n":2,"crc"')
    assert list(reader.new()) == []
    _write(path, _noted(2))
    assert list(reader.new()) == [_noted(2)]


def test_a_failed_append_leaves_the_journal_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.append(_noted(1))
    pwrite = os.pwrite

    def disk_is_full(file: int, data: bytes, offset: int) -> int:
        pwrite(file, data[:20], offset)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", disk_is_full)
        with pytest.raises(StorageError, match="No space left"):
            journal.append(_noted(2))
    journal.append({"kind": "N"})
    journal.close()
    assert list(read(path)) == [_noted(1), {"kind": "N"}]


def test_a_folder_that_is_not_there_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file"):
        Journal(tmp_path / "missing" / "journal.jsonl")


def test_records_that_are_written_together_are_read_one_by_one(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append({"kind": "A"})
    journal.extend([{"kind": "B"}, {"kind": "C"}])
    journal.append({"kind": "D"})
    journal.close()
    kinds = [record["kind"] for record in read(tmp_path / "journal.jsonl")]
    assert kinds == ["A", "B", "C", "D"]
