"""mnist without its input: what a run could reach if examples cost nothing."""

import time
from typing import Any

import numpy as np
import tensorflow as tf

from jobs.mnist import Mnist
from orchestrator.train.job import Batch, Source, Split
from orchestrator.train.sources import ArraySource


class Constant(Mnist):
    """Every step trains on the first examples; the gathered ones are dropped from the graph.

    They lie in a tensor made outside the graph, so that scaling them is not folded into a
    constant: it is paid by both sides. Which examples are next is computed on both sides too, by
    the thread that prepares blocks.
    """

    def source(self, split: Split) -> Source:
        """Return the images, and keep the first of them."""
        source = super().source(split)
        arrays = source.resident()
        assert arrays is not None
        if split is Split.TRAIN:
            self._first = {name: tf.constant(array[:1024]) for name, array in arrays.items()}
        return source

    def prepare(self, batch: Batch, *, training: bool, seeds: Any) -> Batch:
        """Scale the constant batch instead of the one that came."""
        if training:
            size = batch["x"].shape[0]
            batch = {name: self._first[name][:size] for name in batch}
        return super().prepare(batch, training=training, seeds=seeds)


_SLOW_S = 0.2e-3 / 32  # an example


class _SlowSource(ArraySource):
    """Waits for each example, as one does for a disk or a network."""

    def fetch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return the examples at some indices, late."""
        time.sleep(len(indices) * _SLOW_S)
        return super().fetch(indices)


class Fetched(Mnist):
    """The images stay on the host and are fetched row by row, as data too large for a device is."""

    kind = ArraySource

    def source(self, split: Split) -> Source:
        """Return the images as a source that is never resident."""
        source = super().source(split)
        arrays = source.resident()
        assert arrays is not None
        return self.kind(
            arrays,
            name=source.name,
            origin=source.origin,
            digest=source.digest,
            resident_limit_bytes=0,
        )


class Slow(Fetched):
    """The images come slowly: 0.2 ms for the 32 of a step."""

    kind = _SlowSource
