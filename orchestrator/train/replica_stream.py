"""The stream of one replica: read ahead, saved, and continued where a checkpoint left it.

A checkpoint of step s holds, for each replica, the state of its iterator and the examples that
were read ahead of s. Where TensorFlow cannot save an iterator (Python code in the pipeline), it
holds the number of used examples instead, and that many are read again and left out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from orchestrator.errors import JobError, RestoreError
from orchestrator.train.sources import Feature
from orchestrator.train.streams import as_bytes, example_ids

_ROWS = "rows/"
# Examples that are read again at once: bounds memory and the time between signs of life.
_READ_AGAIN = 4096


class ReplicaStream:
    """The stream of one replica, and what was read of it and not used yet."""

    def __init__(
        self, name: str, dataset: Any, features: Mapping[str, Feature], replica: int, size: int
    ):
        """Begin a stream.

        Args:
            name: what people call the data.
            dataset: tf.data.Dataset of single examples.
            features: of an example.
            replica: who reads it, among all replicas of the run.
            size: examples of a step.
        """
        self._name = name
        self._features = features
        self._replica = replica
        self._size = size
        self._used = 0
        self._ids = np.empty(0, np.int64)
        self._rows = {
            key: np.empty((0, *_sizes(feature)), tf.as_dtype(feature.dtype).as_numpy_dtype)
            for key, feature in features.items()
        }
        self._cannot_save = ""
        self._dataset = dataset
        self._begin(size)

    def _begin(self, batch: int) -> None:
        """Stand at the beginning; `batch` examples are read at once."""
        self._batch = batch
        with tf.device("CPU:0"):
            self._iterator = iter(self._dataset.batch(batch, drop_remainder=True))
        self._pull: Any = None

    def read(self, num_steps: int) -> None:
        """Read on until so many steps lie ready, or the stream ends."""
        missing = num_steps * self._size - len(self._ids)
        if missing > 0:
            rows = self._read_rows(-(-missing // self._batch))
            self._rows = {key: _joined(self._rows[key], rows[key]) for key in rows}
            self._ids = _joined(self._ids, example_ids(rows))

    def take(self, first_step: int, num_steps: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return ids [steps, batch] and features [steps, batch, ...] of the next steps."""
        count = num_steps * self._size
        if self._used + len(self._ids) == 0:
            raise JobError(
                f"source {self._name!r}: the stream of replica {self._replica} gives no batch of "
                f"{self._size} examples at all: look whether its shard has any, such as one file "
                "or more for each replica, and add .repeat()"
            )
        if len(self._ids) < count:
            raise JobError(
                f"source {self._name!r}: the stream of replica {self._replica} ended at step "
                f"{first_step + len(self._ids) // self._size + 1}, after "
                f"{self._used + len(self._ids)} examples in batches of {self._size}; a stream is "
                "endless: add .repeat() behind its shuffle()"
            )
        shape = (num_steps, self._size)
        ids = self._ids[:count].reshape(shape)
        features = {
            key: array[:count].reshape(*shape, *array.shape[1:])
            for key, array in self._rows.items()
        }
        self._drop(count)
        self._used += count
        return ids, features

    def save(self, folder: Path) -> str:
        """Write the stream's files; return why the iterator's state is not among them, or ""."""
        prefix = folder / f"stream-{self._replica}"
        if not self._cannot_save:
            try:
                tf.train.Checkpoint(iterator=self._iterator).write(str(prefix))
            except (tf.errors.FailedPreconditionError, tf.errors.UnimplementedError) as error:
                self._cannot_save = _told_by(error)
        content: dict[str, Any] = {
            "used": self._used,
            "batch": self._batch,
            "has_iterator": not self._cannot_save,
        }
        if not self._cannot_save:
            content |= {f"{_ROWS}{key}": as_bytes(array) for key, array in self._rows.items()}
        np.savez(prefix.with_suffix(".npz"), **content)
        for path in folder.glob(f"{prefix.name}.*"):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        return self._cannot_save

    def restore(self, kept_dir: Path, progress: Callable[[str], None]) -> None:
        """Go on as the stream went on that a checkpoint was made of."""
        prefix = kept_dir / f"stream-{self._replica}"
        with np.load(prefix.with_suffix(".npz"), allow_pickle=False) as kept:
            content = {key: kept[key] for key in kept.files}
        used = int(content["used"])
        if not content["has_iterator"]:
            self._read_again(used, progress)
            return
        self._used = used
        # TensorFlow keeps whole batches in the state, so they are read as they were.
        self._begin(int(content["batch"]))
        try:
            tf.train.Checkpoint(iterator=self._iterator).read(str(prefix)).assert_consumed()
            for key, array in self._rows.items():
                rows = content[f"{_ROWS}{key}"].view(array.dtype)
                self._rows[key] = rows.reshape(-1, *array.shape[1:])
        except (tf.errors.OpError, AssertionError, KeyError, ValueError) as error:
            raise RestoreError(
                f"checkpoint {kept_dir}: the stream of replica {self._replica} cannot go on: "
                f"{error}\nresume with the pipeline it was made with, or start a new run with "
                f"train.init_from={kept_dir}"
            ) from error
        self._ids = example_ids(self._rows)

    def _read_again(self, used: int, progress: Callable[[str], None]) -> None:
        while self._used < used:
            progress(f"reading again {self._used:,} of {used:,} examples")
            self.read(max(1, min(_READ_AGAIN, used - self._used) // self._size))
            count = min(len(self._ids), used - self._used)
            if count == 0:
                raise JobError(
                    f"source {self._name!r}: the stream of replica {self._replica} ended after "
                    f"{self._used} examples, of which {used} were used before: it does not give "
                    "the same examples each time"
                )
            self._drop(count)
            self._used += count

    def _drop(self, count: int) -> None:
        self._ids = self._ids[count:]
        self._rows = {key: array[count:] for key, array in self._rows.items()}

    def _read_rows(self, num_batches: int) -> dict[str, np.ndarray]:
        """Return the features of the next batches, fewer at the stream's end: [rows, ...]."""
        if self._pull is None:
            function = tf.function(
                self._pull_batches, input_signature=[tf.TensorSpec([], tf.int32)], autograph=False
            )
            # Concrete: TensorFlow 2.21 would take the functions of many replicas for retracing.
            self._pull = function.get_concrete_function()
        count, arrays = self._pull(tf.constant(num_batches))
        rows = {}
        for key, array in arrays.items():
            batches = array.numpy()[: int(count)]
            rows[key] = batches.reshape(-1, *_sizes(self._features[key]))
        return rows

    def _pull_batches(self, num_batches: Any) -> Any:
        """Take batches from the iterator, in graph: one call for a block, without Python's lock."""
        with tf.device("CPU:0"):
            arrays = {
                key: tf.TensorArray(
                    feature.dtype, num_batches, element_shape=[self._batch, *_sizes(feature)]
                )
                for key, feature in self._features.items()
            }

            def one_batch(i: Any, more: Any, arrays: Any) -> Any:
                batch = self._iterator.get_next_as_optional()

                def write() -> Any:
                    rows = batch.get_value()
                    return i + 1, True, {key: a.write(i, rows[key]) for key, a in arrays.items()}

                return tf.cond(batch.has_value(), write, lambda: (i, False, arrays))

            count, _, arrays = tf.while_loop(
                lambda i, more, arrays: (i < num_batches) & more,
                one_batch,
                (tf.constant(0), tf.constant(True), arrays),
            )
            return count, {key: array.stack() for key, array in arrays.items()}


def _sizes(feature: Feature) -> list[int]:
    """Return the shape of a feature of a stream, of which every size is known."""
    return [size or 0 for size in feature.shape]


def _joined(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return right if len(left) == 0 else np.concatenate([left, right])


def _told_by(error: Exception) -> str:
    """Return what an op said: `{{node ...}} PyFunc is stateful. [Op:...] name:`, the middle."""
    return re.sub(r"\{\{.*?\}\}|\[Op:.*", "", str(error), flags=re.DOTALL).strip().rstrip(".")
