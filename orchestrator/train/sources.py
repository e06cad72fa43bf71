"""Where examples come from: random access to named arrays. No TensorFlow."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np

from orchestrator.errors import JobError

_RESIDENT_LIMIT_BYTES = 512 * 2**20


class Split(Enum):
    """What the examples are used for."""

    TRAIN = "train"
    EVAL = "eval"


@dataclass(frozen=True, slots=True)
class Feature:
    """The type of one feature of one example, such as `uint8 [28, 28]`.

    Attributes:
        dtype: NumPy's name of the type.
        shape: without the batch; None where examples differ from batch to batch.
    """

    dtype: str
    shape: tuple[int | None, ...] = ()

    @property
    def is_ragged(self) -> bool:
        """Whether examples differ in length: the first axis is free."""
        return bool(self.shape) and self.shape[0] is None

    def __str__(self) -> str:
        sizes = ", ".join("?" if size is None else str(size) for size in self.shape)
        return f"{self.dtype} [{sizes}]"


def bucket_key(feature: str) -> str:
    """Return under which key a block holds the length that each step pads a feature to."""
    return f"{feature}/bucket"


class Source(ABC):
    """A set of examples with random access, on the host.

    Every worker fetches only the rows that its own replicas use, so `fetch` must give the same
    row for the same index in every process.

    Attributes:
        name: what people call the data.
        origin: where it comes from: a path, an address, a sentence.
        num_examples: indices run from 0 to here, exclusive.
        digest: SHA-256 of the content in hexadecimal; equal digests mean equal examples.
        buckets: lengths, ascending, that batches are padded to, for a source with features whose
            first axis is free; it then has a feature `length` too. None for other sources.
    """

    name: str
    origin: str
    num_examples: int
    digest: str
    buckets: tuple[int, ...] | None = None

    @property
    @abstractmethod
    def features(self) -> Mapping[str, Feature]:
        """The features of every example, by name."""

    @abstractmethod
    def fetch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return the examples at some indices.

        Called from a thread while the previous block of steps runs, once at a time. An evaluation
        calls it of its own split meanwhile: two splits that share a file need a lock.

        Args:
            indices: int64 [n], each in [0, num_examples), in any order, repeats allowed.

        Returns:
            For each feature an array [n, ...]; a free first axis is as long as the bucket that
            holds the longest of these examples.
        """

    def resident(self) -> dict[str, np.ndarray] | None:
        """Return all examples if they fit on every device, so that steps gather them in graph.

        Called more than once.
        """
        return None

    @property
    def placement(self) -> str:
        """Where a step takes its examples from, in words."""
        return "fetched from host" if self.resident() is None else "resident on device"


class ArraySource(Source):
    """Examples held in arrays of equal length.

    Small ones are resident: they are copied to each device once, and a step then receives
    indices only.
    """

    def __init__(
        self,
        arrays: Mapping[str, Any],
        *,
        name: str = "arrays",
        origin: str = "made in memory",
        digest: str | None = None,
        resident_limit_bytes: int = _RESIDENT_LIMIT_BYTES,
    ):
        """Check the arrays.

        Args:
            arrays: by feature name; each [n, ...], numbers or booleans, all with the same n.
            name: what people call the data.
            origin: where it comes from.
            digest: SHA-256 of the content if it is known already; computed from the bytes if not.
            resident_limit_bytes: together larger arrays stay on the host and are fetched row by
                row; 0 keeps any arrays there.

        Raises:
            JobError: no arrays, no examples, lengths that differ, or values that are not numbers.
        """
        self.name = name
        self.origin = origin
        self._arrays = {key: _numeric(name, key, value) for key, value in arrays.items()}
        self.num_examples = _common_length(name, self._arrays)
        self.digest = digest if digest is not None else _digest(self._arrays)
        self._resident_limit_bytes = resident_limit_bytes

    @property
    def features(self) -> dict[str, Feature]:
        """The features of every example, by name."""
        return {
            key: Feature(array.dtype.name, array.shape[1:]) for key, array in self._arrays.items()
        }

    def fetch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return the examples at some indices."""
        return {key: array.take(indices, axis=0) for key, array in self._arrays.items()}

    def resident(self) -> dict[str, np.ndarray] | None:
        """Return all arrays if together they do not exceed the limit."""
        num_bytes = sum(array.nbytes for array in self._arrays.values())
        return dict(self._arrays) if num_bytes <= self._resident_limit_bytes else None


def _numeric(source: str, key: str, value: Any) -> np.ndarray:
    """Return the value as a contiguous array of numbers in this machine's byte order."""
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise JobError(
            f"source {source!r}: feature {key!r} is ragged ({error}); "
            "give every example the same shape, by padding or cutting"
        ) from error
    if array.dtype.kind not in "biufc":
        raise JobError(
            f"source {source!r}: feature {key!r} has dtype {array.dtype}; "
            "features are numbers or booleans, so turn it into a numeric array first"
        )
    if array.ndim == 0:
        raise JobError(
            f"source {source!r}: feature {key!r} is a single value; "
            "its first axis must run over the examples"
        )
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))


def _common_length(source: str, arrays: Mapping[str, np.ndarray]) -> int:
    if not arrays:
        raise JobError(f"source {source!r} has no arrays; give at least one, by feature name")
    lengths = {key: len(array) for key, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{key}: {length}" for key, length in lengths.items())
        raise JobError(
            f"source {source!r}: its arrays differ in length ({shown}); "
            "row i of every array belongs to example i"
        )
    length = next(iter(lengths.values()))
    if length == 0:
        raise JobError(f"source {source!r} is empty: its arrays have no rows")
    return length


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for key in sorted(arrays):
        array = arrays[key]
        digest.update(f"{key} {array.dtype.name} {array.shape}\n".encode())
        digest.update(array.data if array.size else b"")
    return digest.hexdigest()


def declared(
    who: str, features: Mapping[str, Feature], rows: Any, num_rows: int
) -> dict[str, np.ndarray]:
    """Return rows if they are what was declared.

    Args:
        who: gives them, such as `source 'waves': fetch()`.
        features: what was declared.
        rows: an array for each feature, [num_rows, ...].
        num_rows: how many were asked for.

    Raises:
        JobError: a feature is missing, or of another dtype or shape.
    """
    fitting = {}
    for name, feature in features.items():
        if not isinstance(rows, Mapping) or name not in rows:
            given = ", ".join(rows) if isinstance(rows, Mapping) else type(rows).__name__
            raise JobError(
                f"{who} gives no feature {name!r} but {given}; return an array for each of "
                "`features`"
            )
        array = np.asarray(rows[name])
        shape = (num_rows, *feature.shape)
        fits = len(array.shape) == len(shape) and all(
            wanted in (had, None) for had, wanted in zip(array.shape, shape, strict=True)
        )
        if not fits or array.dtype.name != feature.dtype:
            raise JobError(
                f"{who} gives the feature {name!r} as {array.dtype.name} {list(array.shape)} for "
                f"{num_rows} examples, declared is {feature} each; change one of them"
            )
        fitting[name] = array
    return fitting
