"""Random access over TFRecord files."""

from __future__ import annotations

import functools
import glob
import hashlib
import math
import os
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from orchestrator.errors import JobError
from orchestrator.train.record_index import FRAME_BYTES, HEADER_BYTES, FileIndex, index_files
from orchestrator.train.sources import Feature, Source, declared

Parse = Callable[[Any], Mapping[str, Any]]

# Files that stay open; beyond these the least recently read one is closed.
_OPEN_FILES = 256
# What one list of a tf.train.Example holds, by the dtype of the feature.
_LISTS = {"float32": "float_list", "int64": "int64_list", "uint8": "bytes_list"}
_KINDS = {"float_list": "float32", "int64_list": "int64", "bytes_list": "bytes"}


class RecordSource(Source):
    """The records of TFRecord files in any order.

    The first start reads every file once: it checks all checksums and keeps an index of 16 bytes a
    record in `cache_dir`. After that only the records that are asked for are read, and each is
    compared with a checksum in the index.
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        features: Mapping[str, Feature],
        *,
        cache_dir: str | Path,
        parse: Parse | None = None,
        name: str = "records",
    ):
        """Find the files and their records.

        Args:
            paths: a file, a pattern such as `data/train-*.tfrecord` (its files are taken in the
                order of their names), or several of these. Not compressed.
            features: what an example consists of: its dtype and shape, nothing of it free. Without
                `parse` the records are `tf.train.Example`s; int64 and float32 are stored as such,
                uint8 as one string of raw bytes.
            cache_dir: `data_dir` of the job, where the index is kept.
            parse: turns serialized records, string [n], into tensors [n, ...] by feature name;
                called in graph. None for `tf.io.parse_example`.
            name: what people call the data.

        Raises:
            JobError: there are no files or records, a file is damaged or compressed, or its
                examples do not have these features.
        """
        self.name = name
        self._features = _checked(name, features, any_dtype=parse is not None)
        self._is_example = parse is None
        found = _find(name, paths)
        self.origin = _shown(paths, found)
        self._files = index_files(found, Path(cache_dir).expanduser().absolute(), name)
        self.num_examples = sum(len(file.offsets) for file in self._files)
        if self.num_examples == 0:
            raise JobError(
                f"source {name!r}: there are no records in {self.origin}; write some, or name "
                "other files"
            )
        self._ends = np.cumsum([len(file.offsets) for file in self._files])
        self._opened = functools.lru_cache(maxsize=_OPEN_FILES)(_Opened)
        self._parse = tf.function(
            parse or functools.partial(_parse_examples, self._features),
            input_signature=[tf.TensorSpec([None], tf.string)],
        )
        self.digest = _digest(self._features, self._files)
        self.fetch(np.zeros(1, np.int64))  # what does not fit is refused before the first step

    @property
    def features(self) -> dict[str, Feature]:
        """The features of every example, by name."""
        return dict(self._features)

    def fetch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return the examples at some indices.

        Raises:
            JobError: a file was truncated, altered or removed since it was indexed, or a record
                does not have the features; with the file and the byte offset.
        """
        records = self.read(indices)
        with tf.device("CPU:0"):
            serialized = tf.constant(records, tf.string, shape=[len(records)])
            try:
                rows = self._parse(serialized)
            except tf.errors.OpError as error:
                raise self._unfit(indices, records, error) from error
        return declared(f"source {self.name!r}: parse()", self._features, rows, len(records))

    def read(self, indices: np.ndarray) -> list[bytes]:
        """Return the serialized records at some indices, as they were written."""
        files = np.searchsorted(self._ends, indices, side="right")
        starts = self._ends - [len(file.offsets) for file in self._files]
        rows = indices - starts[files]
        return [
            self._record(file, row) for file, row in zip(files.tolist(), rows.tolist(), strict=True)
        ]

    def _record(self, file: int, row: int) -> bytes:
        index = self._files[file]
        offset, length = int(index.offsets[row]), int(index.lengths[row])
        where = f"source {self.name!r}: {index.path}: the record at byte {offset}"
        again = "it has changed since it was indexed: restore it, or start again with what it is"
        try:
            frame = self._opened(index.path).read(length + FRAME_BYTES, offset)
        except OSError as error:
            raise JobError(f"{where} cannot be read: {error.strerror}") from error
        if len(frame) < length + FRAME_BYTES:
            raise JobError(
                f"{where} is cut short: {len(frame)} of its {length + FRAME_BYTES} bytes are "
                f"there; {again}"
            )
        data = frame[HEADER_BYTES : HEADER_BYTES + length]
        told = struct.unpack_from("<Q", frame)[0]
        if told != length:
            raise JobError(f"{where} says it has {told} bytes instead of {length}; {again}")
        if zlib.crc32(data) != int(index.checksums[row]):
            raise JobError(f"{where} does not have the content that was indexed; {again}")
        return data

    def _unfit(self, indices: np.ndarray, records: list[bytes], error: Exception) -> JobError:
        """Find the first record that cannot be parsed, and say why."""
        for index, record in zip(indices.tolist(), records, strict=True):
            try:
                self._parse(tf.constant([record]))
            except tf.errors.OpError as alone:
                file = int(np.searchsorted(self._ends, index, side="right"))
                row = index - int(self._ends[file] - len(self._files[file].offsets))
                place = self._files[file]
                reason = _difference(record, self._features) if self._is_example else ""
                return JobError(
                    f"source {self.name!r}: {place.path}: the record at byte "
                    f"{int(place.offsets[row])} {reason or f'cannot be parsed: {alone.message}'}"
                )
        return JobError(f"source {self.name!r}: {self.origin} cannot be parsed: {error}")


class _Opened:
    """A file that is open for reading as long as somebody holds this."""

    def __init__(self, path: Path):
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, num_bytes: int, offset: int) -> bytes:
        """Return so many bytes, fewer at the end of the file; callable from any thread."""
        data = os.pread(self._descriptor, num_bytes, offset)
        while 0 < len(data) < num_bytes:
            more = os.pread(self._descriptor, num_bytes - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


def _find(source: str, paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return the files that are meant, absolute."""
    found: list[Path] = []
    for given in [paths] if isinstance(paths, str | Path) else paths:
        path = Path(given).expanduser().absolute()
        # A file may have characters in its name that would be a pattern.
        matching = [path] if path.is_file() else [Path(p) for p in sorted(glob.glob(str(path)))]
        files = [match for match in matching if match.is_file()]
        if not files:
            what = "is a folder: name its files, such as" if path.is_dir() else "matches no file on"
            rest = f"{path}/*.tfrecord" if path.is_dir() else "this host"
            raise JobError(
                f"source {source!r}: {path} {what} {rest}"
                + ("" if path.is_dir() else "; correct it, or mount the data on every host")
            )
        found += files
    if not found:
        raise JobError(f"source {source!r}: no paths are given; name TFRecord files")
    return found


def _shown(paths: str | Path | Sequence[str | Path], found: Sequence[Path]) -> str:
    if len(found) == 1:
        return str(found[0])
    if isinstance(paths, str | Path):
        return f"{Path(paths).expanduser().absolute()} ({len(found)} files)"
    return f"{len(found)} files, the first is {found[0]}"


def _checked(
    source: str, features: Mapping[str, Feature], *, any_dtype: bool
) -> dict[str, Feature]:
    if not features:
        raise JobError(f"source {source!r}: no features are given; name those of an example")
    for key, feature in features.items():
        if None in feature.shape:
            raise JobError(
                f"source {source!r}: feature {key!r} is {feature}; records of a RecordSource have "
                "one fixed shape: pad it in parse()"
            )
        if not any_dtype and feature.dtype not in _LISTS:
            raise JobError(
                f"source {source!r}: feature {key!r} is {feature}; a tf.train.Example holds "
                f"{', '.join(_LISTS)} (raw bytes): declare one of these, or give parse="
            )
    return dict(features)


def _parse_examples(features: Mapping[str, Feature], serialized: Any) -> dict[str, Any]:
    """Parse a batch of tf.train.Examples, in graph."""
    raw = [key for key, feature in features.items() if feature.dtype == "uint8"]
    spec = {
        key: tf.io.FixedLenFeature([], tf.string)
        if key in raw
        else tf.io.FixedLenFeature(feature.shape, feature.dtype)
        for key, feature in features.items()
    }
    rows = tf.io.parse_example(serialized, spec)
    for key in raw:
        shape = [tf.shape(serialized)[0], *features[key].shape]
        rows[key] = tf.reshape(tf.io.decode_raw(rows[key], tf.uint8), shape)
    return dict(rows)


def _difference(record: bytes, features: Mapping[str, Feature]) -> str:
    """Return in which way a record is not an example with these features; "" if it is one."""
    try:
        held = tf.train.Example.FromString(record).features.feature
    except Exception:  # protobuf's DecodeError has no public place of its own here
        return "is no tf.train.Example; give parse= to say what it is"
    shown = {key: _held(value) for key, value in sorted(held.items())}
    has = ", ".join(f"{key} ({text})" for key, text in shown.items()) or "none"
    for key, feature in features.items():
        count = math.prod(size or 0 for size in feature.shape)
        wanted = f"bytes of {count}" if feature.dtype == "uint8" else f"{feature.dtype} [{count}]"
        if key not in shown:
            return f"has no feature {key!r}; it has {has}"
        if shown[key] != wanted:
            return f"has feature {key!r} as {shown[key]}; {feature} takes {wanted}"
    return ""


def _held(value: Any) -> str:
    kind = value.WhichOneof("kind")
    if kind is None:
        return "nothing"
    values = getattr(value, kind).value
    if kind == "bytes_list" and len(values) == 1:
        return f"bytes of {len(values[0])}"
    return f"{_KINDS[kind]} [{len(values)}]"


def _digest(features: Mapping[str, Feature], files: Sequence[FileIndex]) -> str:
    described = "".join(f"{key} {features[key]}\n" for key in sorted(features))
    content = "".join(file.sha256 for file in files)
    return hashlib.sha256((described + content).encode()).hexdigest()
