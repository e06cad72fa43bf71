"""A job whose training data is a stream, in several forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from orchestrator.train.sources import Source, Split
from orchestrator.train.streams import StreamSource
from tests.train.tiny import Tiny, clusters

NUM_EXAMPLES = 96


def plain(shard: int, num_shards: int, seed: int) -> Any:
    """Shuffle across the borders of epochs, with work in parallel: all of it can be saved."""
    arrays = clusters(Split.TRAIN, NUM_EXAMPLES).fetch(np.arange(NUM_EXAMPLES))
    examples = tf.data.Dataset.from_tensor_slices(arrays).shard(num_shards, shard)
    examples = examples.shuffle(16, seed=seed).repeat()
    return examples.map(
        lambda row: {"x": row["x"] * 2 - 1, "y": row["y"]}, num_parallel_calls=2
    ).prefetch(5)


def python(shard: int, num_shards: int, seed: int) -> Any:
    """The same with Python code in it, which TensorFlow cannot save."""

    def shifted(x: Any) -> Any:
        return np.float32(x + 1)

    return plain(shard, num_shards, seed).map(
        lambda row: {
            **row,
            "x": tf.ensure_shape(tf.numpy_function(shifted, [row["x"]], "float32"), [8]),
        }
    )


def lopsided(shard: int, num_shards: int, seed: int) -> Any:
    """The second replica has much to save, so its worker is the last to have written."""
    examples = plain(shard, num_shards, seed)
    return examples.shuffle(20_000, seed=seed) if shard else examples


def lost(shard: int, num_shards: int, seed: int) -> Any:
    """The planted fault: every replica reads the first shard."""
    return plain(0, num_shards, seed)


def finite(shard: int, num_shards: int, seed: int) -> Any:
    """An end that is not known before it is reached: 100 examples for each replica."""
    return plain(shard, num_shards, seed).take(100).filter(lambda row: True)


def empty(shard: int, num_shards: int, seed: int) -> Any:
    """As a shard of fewer files than there are replicas."""
    return plain(shard, num_shards, seed).take(100).filter(lambda row: False).repeat()


class Streamed(Tiny):
    """The dense classifier on one of these streams."""

    def __init__(self, kind: str = "plain", evaluate: str = "arrays", **options: Any):
        super().__init__(**options)
        self.kind = kind
        self.evaluate = evaluate

    def source(self, split: Split) -> Source:
        if split is Split.EVAL and self.evaluate == "arrays":
            return clusters(split, 50)
        return StreamSource(globals()[self.kind], name=f"{self.kind} clusters")
