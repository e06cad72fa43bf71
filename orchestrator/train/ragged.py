"""Examples of different lengths, padded to the smallest of a few lengths. No TensorFlow."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from orchestrator.errors import JobError
from orchestrator.train.sources import ArraySource, Feature, Source


class RaggedSource(Source):
    """Rows of different lengths, such as sentences.

    A batch is padded with zeros to the smallest bucket that holds its longest row. One trace of
    the step serves all buckets; only XLA compiles for each. What is padding follows from the
    feature `length`: masking it is the job's matter, and a job that does so computes the same with
    any buckets and any number of replicas.
    """

    def __init__(
        self,
        rows: Sequence[Any],
        *,
        buckets: Sequence[int],
        feature: str = "x",
        fixed: Mapping[str, Any] | None = None,
        name: str = "rows",
        origin: str = "made in memory",
    ):
        """Store the rows one behind the other.

        Args:
            rows: n arrays [length, ...] of numbers, alike but for their lengths.
            buckets: lengths that batches are padded to; the largest holds every row.
            feature: name of the rows.
            fixed: features of one shape, by name, each [n, ...], such as labels.
            name: what people call the data.
            origin: where it comes from.

        Raises:
            JobError: no rows, rows that do not fit together, or one that is too long; or a
                feature is called as the rows, or `length`.
        """
        self.name = name
        self.origin = origin
        self.buckets = tuple(sorted(set(buckets)))
        self._feature = feature
        self._refuse_names(fixed or {})
        arrays = [np.asarray(row) for row in rows]
        lengths = np.array([len(row) if row.ndim else 0 for row in arrays], np.int32)
        self._check_lengths(lengths)
        try:
            flat = np.concatenate(arrays)
        except ValueError as error:
            raise JobError(
                f"source {name!r}: rows of {feature!r} differ in more than length ({error})"
            ) from error
        self._flat = ArraySource({feature: flat}, name=name)
        self._fixed = ArraySource({"length": lengths, **(fixed or {})}, name=name)
        self._starts = np.cumsum(lengths, dtype=np.int64) - lengths
        self._lengths = lengths
        self.num_examples = len(lengths)
        parts = f"{self._flat.digest} {self._fixed.digest} {self.buckets}"
        self.digest = hashlib.sha256(parts.encode()).hexdigest()

    @property
    def features(self) -> dict[str, Feature]:
        """The rows with a free first axis, `length` int32 [], and the fixed features."""
        row = self._flat.features[self._feature]
        return {self._feature: Feature(row.dtype, (None, *row.shape)), **self._fixed.features}

    def fetch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return rows, padded with zeros to the bucket that holds the longest of them."""
        lengths = self._lengths[indices]
        assert self.buckets is not None
        reach = np.arange(bucket_lengths(lengths[None], self.buckets)[0])
        inside = reach < lengths[:, None]
        places = np.where(inside, self._starts[indices][:, None] + reach, 0)
        rows = self._flat.fetch(places)[self._feature]
        rows[~inside] = 0
        return {self._feature: rows, **self._fixed.fetch(indices)}

    def _refuse_names(self, fixed: Mapping[str, Any]) -> None:
        for name, what in (("length", "the length of each row"), (self._feature, "the rows")):
            if name in fixed or (name == self._feature == "length"):
                raise JobError(
                    f"source {self.name!r}: the feature {name!r} is {what}: give yours another name"
                )

    def _check_lengths(self, lengths: np.ndarray) -> None:
        if not len(lengths) or lengths.min() < 1:
            raise JobError(f"source {self.name!r}: give at least one row, and none that is empty")
        if not self.buckets or lengths.max() > self.buckets[-1]:
            longest = int(lengths.argmax())
            raise JobError(
                f"source {self.name!r}: row {longest} has length {lengths[longest]}, which none "
                f"of buckets={self.buckets} holds; add a larger one or cut the row"
            )


def bucket_lengths(lengths: np.ndarray, buckets: Sequence[int]) -> np.ndarray:
    """Return the smallest bucket that holds the longest row of each batch.

    Args:
        lengths: int [steps, batch].
        buckets: ascending.

    Returns:
        int32 [steps].
    """
    sizes = np.array(buckets, np.int32)
    return sizes[np.searchsorted(sizes, lengths.max(axis=1))]
