"""The durable log of a run: one JSON record a line, numbered, checksummed and fsynced.

The journal is the truth about a run; MLflow is a projection of it. A line is
`{"n": number, "crc": CRC-32 of number and record, "record": {...}}`. A crash can only tear the
last line, so reading stops before the first line that is not whole and right.
"""

from __future__ import annotations

import json
import os
import re
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.errors import StorageError
from orchestrator.spec.secrets import mask_text

# Series of BlockDone hold one float32 a step; 7 significant digits keep them at half the size.
_SERIES = ("loss", "learning_rate")
_DIGITS = 7
_LINE = re.compile(rb'\{"n":(\d+),"crc":"([0-9a-f]{8})","record":(.*)\}\n', re.DOTALL)


class Journal:
    """Appends records to the journal of one run; safe to use from several threads.

    The holder of the run's lease is the only writer. A torn last line is cut off on opening.
    """

    def __init__(self, path: Path):
        """Open or create the journal.

        Args:
            path: of the journal; its folder must exist.

        Raises:
            StorageError: it cannot be opened, or it is damaged before its last line.
        """
        self._path = path
        self._lock = threading.Lock()
        reader = Reader(path)
        for _ in reader.new():
            pass
        self._number, self._end = reader.number, reader.offset
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            self._refuse_damage()
            os.ftruncate(self._file, self._end)
            _sync_folder(path.parent)
        except OSError as error:
            raise StorageError(f"cannot write the journal {path}: {error.strerror}") from error

    def append(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Write one record and wait until it is on the disk.

        Returns:
            The record as it was written, with series rounded.

        Raises:
            StorageError: it could not be written; the journal is as it was before.
        """
        kept = _compact(record)
        self.extend([kept])
        return kept

    def extend(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write records and wait until all are on the disk, which takes as long as for one.

        Raises:
            StorageError: they could not be written; the journal is as it was before.
        """
        with self._lock:
            numbered = enumerate(map(_compact, records), self._number + 1)
            lines = b"".join(_encode(number, record) for number, record in numbered)
            try:
                # A failed append may have left half a line behind.
                os.ftruncate(self._file, self._end)
                _write_all(self._file, lines, self._end)
                os.fsync(self._file)
            except OSError as error:
                raise StorageError(
                    f"cannot write the journal {self._path}: {error.strerror}"
                ) from error
            self._number, self._end = self._number + len(records), self._end + len(lines)

    def close(self) -> None:
        """Close the file; every record is on the disk already."""
        with self._lock:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1

    def _refuse_damage(self) -> None:
        """Refuse to cut off whole records that follow a broken one: that is no torn tail."""
        size = os.fstat(self._file).st_size
        tail = os.pread(self._file, size - self._end, self._end) if size > self._end else b""
        if any(_decode(line) is not None for line in tail.splitlines(keepends=True)):
            os.close(self._file)
            raise StorageError(
                f"the journal {self._path} is damaged after record {self._number}, with whole "
                "records behind; restore it from a copy, or move it away and start a new run"
            )


class Reader:
    """Reads a journal that may still grow, from where it stopped the last time.

    Attributes:
        number: of the last whole record read.
        offset: where the next record begins, bytes.
    """

    def __init__(self, path: Path):
        """Begin at the first record of `path`, which need not exist yet."""
        self._path = path
        self.number = 0
        self.offset = 0

    def new(self) -> Iterator[dict[str, Any]]:
        """Yield the records that have become whole since the last call.

        Raises:
            StorageError: the journal exists but cannot be read.
        """
        try:
            with self._path.open("rb") as file:
                file.seek(self.offset)
                for line in file:
                    found = _decode(line)
                    if found is None or found[0] != self.number + 1:
                        return
                    self.number, self.offset = found[0], self.offset + len(line)
                    yield found[1]
        except FileNotFoundError:
            return
        except OSError as error:
            raise StorageError(f"cannot read the journal {self._path}: {error.strerror}") from error


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a journal up to its last whole one; none if there is no such file."""
    return Reader(path).new()


def _encode(number: int, record: Mapping[str, Any]) -> bytes:
    body = json.dumps(record, separators=(",", ":"), default=_plain).encode()
    return b'{"n":%d,"crc":"%08x","record":%s}\n' % (number, _checksum(number, body), body)


def _decode(line: bytes) -> tuple[int, dict[str, Any]] | None:
    """Return number and record of a line; None unless it is whole and right."""
    match = _LINE.fullmatch(line)
    if match is None:
        return None
    number, checksum, body = int(match[1]), int(match[2], 16), match[3]
    return (number, json.loads(body)) if checksum == _checksum(number, body) else None


def _checksum(number: int, body: bytes) -> int:
    return zlib.crc32(body, zlib.crc32(b"%d" % number))


def _compact(record: Mapping[str, Any]) -> dict[str, Any]:
    compact: dict[str, Any] = {
        key: _told(value) if isinstance(value, str) else value for key, value in record.items()
    }
    if compact.get("kind") != "BlockDone":
        return compact
    for name in _SERIES:
        compact[name] = _rounded(compact.get(name, ()))
    compact["metrics"] = {
        name: _rounded(values) for name, values in compact.get("metrics", {}).items()
    }
    return compact


def _told(text: str) -> str:
    """Return a text as it may be kept and shown: no credentials, and nothing but Unicode.

    What a job raises may hold the address of its database, or the name of a file in whatever bytes.
    """
    return mask_text(text.encode("utf-8", "backslashreplace").decode())


def _rounded(values: Any) -> list[float]:
    return [float(f"{value:.{_DIGITS}g}") for value in values]


def _plain(value: Any) -> Any:
    """Turn what json does not know, such as NumPy's numbers and paths, into what it does."""
    return value.item() if hasattr(value, "item") else str(value)


def _write_all(file: int, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
