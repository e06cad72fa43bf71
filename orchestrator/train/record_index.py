"""Where the records of TFRecord files lie: found once, every byte proven, and kept.

A record is its length (8 bytes, little-endian), a checksum of that (4), the data, and a checksum
of the data (4). The file itself has no table, so without an index it can only be read in order.

Source: tensorflow/core/lib/io/record_writer.h (TensorFlow 2.21).
"""

from __future__ import annotations

import hashlib
import os
import struct
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow as tf

from orchestrator.errors import JobError
from orchestrator.train.cache import locked, tell_progress

HEADER_BYTES = 12
FRAME_BYTES = HEADER_BYTES + 4
_FOLDER = "record-index"
_FORMAT = 1
# Few enough that a batch of large records fits into memory, many enough to hide the call.
_RECORDS_AT_ONCE = 64
_READ_BYTES = 8 * 2**20
# Between two signs of life while a large file is read.
_PROGRESS_S = 1.0
_COMPRESSED = {b"\x1f\x8b": "GZIP", b"\x78\x01": "ZLIB", b"\x78\x9c": "ZLIB", b"\x78\xda": "ZLIB"}


@dataclass(frozen=True, slots=True)
class FileIndex:
    """The records of one file.

    Attributes:
        path: absolute.
        offsets: int64 [n], the byte at which each record's header begins.
        lengths: int64 [n], bytes of data of each record.
        checksums: uint32 [n], CRC-32 (zlib's) of the data of each record.
        sha256: of the data and lengths of all records, hexadecimal.
    """

    path: Path
    offsets: np.ndarray
    lengths: np.ndarray
    checksums: np.ndarray
    sha256: str


def index_files(paths: Sequence[Path], cache_dir: Path, title: str) -> list[FileIndex]:
    """Return the index of each file; those that are not kept yet are made by one process.

    Making one reads the whole file and checks every record's own checksums. What is kept is found
    by the file's path, size and time of change, so a changed file is read again.

    Args:
        paths: absolute.
        cache_dir: `data.cache_dir`.
        title: what people call the data.

    Raises:
        JobError: a file is damaged, compressed, or cannot be read; or the index cannot be kept.
    """
    folder = cache_dir / _FOLDER
    found = {path: _read(path, folder) for path in paths}
    if all(index is not None for index in found.values()):
        return [index for path in paths if (index := found[path]) is not None]
    lock = hashlib.sha256("\n".join(map(str, paths)).encode()).hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / f".{lock}.lock", f"index of {title}"):
            # Another worker may have made it while this one waited for the lock.
            return [
                _read(path, folder) or _make(path, folder, f"{title}, file {i + 1}/{len(paths)}")
                for i, path in enumerate(paths)
            ]
    except OSError as error:
        raise JobError(
            f"the index of {title} cannot be kept in {folder}: {error}; set data.cache_dir to a "
            "folder that can be written"
        ) from error


def _kept_path(path: Path, folder: Path) -> Path:
    """Return where the index of a file as it is at present is kept."""
    try:
        status = path.stat()
    except OSError as error:
        raise JobError(f"{path} cannot be read: {error.strerror}") from error
    key = f"{_FORMAT}\n{path}\n{status.st_size}\n{status.st_mtime_ns}"
    return folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"


def _read(path: Path, folder: Path) -> FileIndex | None:
    """Return what is kept of a file; None if there is nothing, or it is damaged."""
    try:
        # Each member of the archive has a checksum, which is checked in reading.
        with np.load(_kept_path(path, folder), allow_pickle=False) as kept:
            arrays = {name: kept[name] for name in kept.files}
        return FileIndex(path=path, sha256=str(arrays.pop("sha256")), **arrays)
    except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile, zlib.error):
        return None


def _make(path: Path, folder: Path, title: str) -> FileIndex:
    kept_path = _kept_path(path, folder)
    index = _scan(path, title)
    if _kept_path(path, folder) != kept_path:
        raise JobError(f"{path} was changed while it was read; let its writer finish, then start")
    aside = kept_path.with_suffix(f".{os.getpid()}.aside")
    with aside.open("wb") as file:
        np.savez(
            file,
            offsets=index.offsets,
            lengths=index.lengths,
            checksums=index.checksums,
            sha256=index.sha256,
        )
        file.flush()
        os.fsync(file.fileno())
    aside.replace(kept_path)
    return index


def _scan(path: Path, title: str) -> FileIndex:
    """Read a file from beginning to end; TensorFlow checks the checksums of each record."""
    digest = hashlib.sha256()
    lengths: list[np.ndarray] = []
    checksums: list[np.ndarray] = []
    num_bytes, told = 0, 0.0
    try:
        with tf.device("CPU:0"):
            records = tf.data.TFRecordDataset(str(path), buffer_size=_READ_BYTES)
            for batch in records.batch(_RECORDS_AT_ONCE).as_numpy_iterator():
                lengths.append(np.array([len(data) for data in batch], np.int64))
                checksums.append(np.array([zlib.crc32(data) for data in batch], np.uint32))
                for data in batch:
                    digest.update(data)
                num_bytes += int(lengths[-1].sum())
                if time.monotonic() - told > _PROGRESS_S:
                    told = time.monotonic()
                    tell_progress(f"indexing {title}: {num_bytes / 1e6:,.0f} MB")
    except tf.errors.OpError as error:
        raise _damage(path) from error
    all_lengths = np.concatenate([np.empty(0, np.int64), *lengths])
    # A header that is cut short is an end of the file to TensorFlow 2.21.
    if int((all_lengths + FRAME_BYTES).sum()) != path.stat().st_size:
        raise _damage(path)
    digest.update(all_lengths.astype("<i8").tobytes())
    ends = np.cumsum(all_lengths + FRAME_BYTES)
    return FileIndex(
        path=path,
        offsets=ends - all_lengths - FRAME_BYTES,
        lengths=all_lengths,
        checksums=np.concatenate([np.empty(0, np.uint32), *checksums]),
        sha256=digest.hexdigest(),
    )


def _damage(path: Path) -> JobError:
    """Find the first record that TensorFlow refuses, and say what is wrong with it."""
    num_good = 0
    try:
        for _ in tf.data.TFRecordDataset(str(path)):
            num_good += 1
    except tf.errors.DataLossError:
        pass
    except tf.errors.OpError as error:
        return JobError(f"{path} cannot be read: {error.message}")
    size = path.stat().st_size
    with path.open("rb") as file:
        compression = _COMPRESSED.get(file.read(2))
        if num_good == 0 and compression is not None:
            return JobError(
                f"{path} is compressed ({compression}): a record in the middle of it cannot be "
                "read alone. Write it again without compression (TFRecordOptions('')), or read it "
                "in order with a StreamSource"
            )
        offset = _walk(file.seek, file.read, num_good)
        file.seek(offset)
        header = file.read(HEADER_BYTES)
    where = f"{path}: the record at byte {offset} (the {num_good + 1}. of the file)"
    length = struct.unpack("<Q", header[:8])[0] if len(header) == HEADER_BYTES else None
    if length is None or offset + FRAME_BYTES + length > size:
        what = f"is cut short, or its length is damaged: the file ends at byte {size}"
    else:
        what = "does not have the checksum that was written with it"
    if num_good == 0:
        what += "; perhaps this is no TFRecord file"
    return JobError(f"{where} {what}. Copy the file again, or leave it out of the pattern")


def _walk(seek: Callable[[int], int], read: Callable[[int], bytes], num_records: int) -> int:
    """Return the byte at which the record after `num_records` good ones begins."""
    offset = 0
    for _ in range(num_records):
        seek(offset)
        offset += FRAME_BYTES + struct.unpack("<Q", read(8))[0]
    return offset
