"""Any `tf.data.Dataset` as training data."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from orchestrator.errors import JobError
from orchestrator.train.sources import Feature, Source

MakeDataset = Callable[[int, int, int], Any]

_STREAM_PLACEMENT = "stream, not elastic"


class StreamSource(Source):
    """Examples that come in the order in which a `tf.data.Dataset` gives them.

    Each replica reads a stream of its own, so the number of replicas decides which examples a step
    sees: it cannot change when a run is resumed. Subclass it and write `dataset`, or give a
    function to the constructor.
    """

    name = "stream"
    origin = "tf.data"
    num_examples = 0
    digest = ""

    def __init__(
        self, make: MakeDataset | None = None, *, name: str = "stream", origin: str = "tf.data"
    ):
        """Take what makes the stream; nothing is read yet.

        Args:
            make: called as `dataset` is; None where a subclass has its own.
            name: what people call the data.
            origin: where it comes from: a path, an address, a sentence.
        """
        self.name = name
        self.origin = origin
        self._make = make

    def dataset(self, shard: int, num_shards: int, seed: int) -> Any:
        """Return the stream of one replica.

        Args:
            shard: the replica, among all replicas of the run, from 0.
            num_shards: replicas of the run.
            seed: `train.seed`. It is TensorFlow's global seed too while this is called.

        Returns:
            A tf.data.Dataset of single examples, each a dict of feature name -> tensor of a fixed
            shape; endless, and not batched: each replica has a batch size of its own.
        """
        make = getattr(self, "_make", None)
        if make is None:
            raise JobError(
                f"source {self.name!r} has no stream: write dataset(self, shard, num_shards, "
                "seed), or give such a function to StreamSource(...)"
            )
        return make(shard, num_shards, seed)

    def open(self, replicas: range, num_replicas: int, seed: int, num_examples: int) -> None:
        """Make the streams of some replicas.

        Args:
            replicas: those of this worker.
            num_replicas: of the whole run.
            seed: `train.seed`.
            num_examples: examples of an epoch: `data.num_examples`, as a stream has no number.

        Raises:
            JobError: a stream is not what `dataset` must return.
        """
        self.num_examples = num_examples
        self._shards = (num_replicas, seed)
        self.datasets = [self._checked(replica) for replica in replicas]
        described = "".join(f"{key} {value}\n" for key, value in sorted(self.features.items()))
        content = f"stream {self.name}\n{self.origin}\n{described}"
        # Of what it says it is: nobody can read an endless stream to its end.
        self.digest = hashlib.sha256(content.encode()).hexdigest()

    @property
    def features(self) -> dict[str, Feature]:
        """The features of every example, by name; known once the stream is open."""
        spec = self.datasets[0].element_spec
        return {key: Feature(part.dtype.name, tuple(part.shape)) for key, part in spec.items()}

    @property
    def placement(self) -> str:
        """Where a step takes its examples from, in words."""
        return _STREAM_PLACEMENT

    def fetch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return examples by their place in the stream of replica 0, read from its beginning.

        Only the proof of an export asks for some of the first.
        """
        first = self._checked(0).take(int(indices.max()) + 1)
        rows = list(first.as_numpy_iterator())
        return {key: np.stack([rows[i][key] for i in indices.tolist()]) for key in self.features}

    def _checked(self, shard: int) -> Any:
        num_shards, seed = self._shards
        tf.random.set_seed(seed)  # a shuffle without a seed is then the same at every start
        with tf.device("CPU:0"):
            dataset = self.dataset(shard, num_shards, seed)
        where = f"source {self.name!r}: dataset({shard}, {num_shards}, {seed})"
        if not isinstance(dataset, tf.data.Dataset):
            raise JobError(
                f"{where} returned {type(dataset).__name__}; return a tf.data.Dataset of single "
                "examples"
            )
        _check_elements(where, dataset.element_spec)
        if hasattr(self, "datasets") and dataset.element_spec != self.datasets[0].element_spec:
            raise JobError(f"{where} has other features than that of another replica")
        cardinality = int(dataset.cardinality())
        if cardinality >= 0:
            raise JobError(
                f"{where} ends after {cardinality} examples; a stream is endless: add .repeat() "
                "behind its shuffle()"
            )
        return dataset


def _check_elements(where: str, spec: Any) -> None:
    """Refuse examples that are not a dict of fixed-size numbers."""
    if not isinstance(spec, Mapping) or not spec:
        raise JobError(
            f"{where} gives {spec}; give a dict by feature name: end with "
            ".map(lambda x, y: {'x': x, 'y': y})"
        )
    for key, part in spec.items():
        if not isinstance(part, tf.TensorSpec):
            raise JobError(
                f"{where} gives feature {key!r} as {type(part).__name__}; features are plain "
                "tensors: pad them with .to_tensor(shape=...) or tf.sparse.to_dense"
            )
        if not part.shape.is_fully_defined():
            raise JobError(
                f"{where} gives feature {key!r} with the shape {part.shape}; every size must be "
                "known: use tf.ensure_shape, pad, and do not batch, which is done for you"
            )
        if not (part.dtype.is_floating or part.dtype.is_integer or part.dtype.is_bool):
            raise JobError(
                f"{where} gives feature {key!r} as {part.dtype.name}; features are numbers or "
                "booleans: decode it in the dataset, such as with tf.io.decode_raw"
            )


def example_ids(rows: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return a 63-bit hash of each example's bytes, the features in the order of their names.

    Args:
        rows: for each feature an array [n, ...].

    Returns:
        int64 [n], never negative.
    """
    parts = [as_bytes(rows[name]) for name in sorted(rows)]
    if len(parts[0]) == 0:
        return np.empty(0, np.int64)
    digests = []
    for i in range(len(parts[0])):
        digest = hashlib.blake2b(digest_size=8)
        for part in parts:
            digest.update(part[i])
        digests.append(digest.digest())
    return (np.frombuffer(b"".join(digests), "<u8") >> np.uint64(1)).astype(np.int64)


def as_bytes(array: np.ndarray) -> np.ndarray:
    """Return the bytes of each row: uint8 [n, bytes of a row]."""
    row_bytes = array.itemsize * int(np.prod(array.shape[1:], dtype=np.int64))
    return np.ascontiguousarray(array).view(np.uint8).reshape(len(array), row_bytes)
