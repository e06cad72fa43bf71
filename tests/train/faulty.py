"""Jobs that go wrong at a chosen step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from orchestrator.train.job import Batch, Progress
from orchestrator.train.sources import ArraySource, Source, Split
from orchestrator.train.streams import StreamSource
from tests.train.tiny import Tiny


class Poisoned(Tiny):
    """Has an infinite loss for one example of some steps, counted from 1.

    Args:
        steps: which.
        batch: the global batch size.
        place: of the example in the batch.
        hidden: the loss is finite, and its gradient is not: that of a square root at 0.
    """

    def __init__(
        self, steps: Sequence[int] = (), batch: int = 16, place: int = 0, hidden: bool = False
    ):
        super().__init__(normalise=True)
        self.positions = [(step - 1) * batch + place for step in steps]
        self.hidden = hidden

    def prepare(self, batch: Batch, *, training: bool, seeds: Any) -> Batch:
        bad = tf.zeros(tf.shape(batch["x"])[:1], tf.bool)
        if training and self.positions:
            bad = tf.reduce_any(seeds[:, :1] == tf.constant(self.positions, tf.int64), axis=1)
        return {**batch, "bad": bad}

    def loss(self, batch: Batch, outputs: tf.Tensor) -> tf.Tensor:
        losses = super().loss(batch, outputs)
        if self.hidden:
            zeros = 0 * outputs[:, 0]
            return losses + tf.sqrt(tf.where(batch["bad"], zeros, tf.ones_like(zeros)))
        return losses / tf.cast(~batch["bad"], losses.dtype)


class PoisonedStream(Poisoned):
    """The same, on a stream."""

    def source(self, split: Split) -> Source:
        arrays = super().source(split)
        assert isinstance(arrays, ArraySource)
        rows = arrays.fetch(np.arange(arrays.num_examples))
        return StreamSource(
            lambda shard, num_shards, seed: (
                tf.data.Dataset.from_tensor_slices(rows).shard(num_shards, shard).repeat()
            )
        )


class Drifting(Tiny):
    """Changes a weight of its second replica behind everybody's back."""

    def model(self) -> keras.Model:
        self.built = super().model()
        return self.built

    def on_block(self, progress: Progress) -> None:
        copies = self.built.trainable_variables[1].value.values  # of the MirroredVariable
        # The smallest change there is: one bit of one element.
        if progress.step >= 5:
            bits = tf.bitcast(copies[1], tf.int32).numpy()
            bits[3] ^= 1
            copies[1].assign(tf.bitcast(bits, tf.float32))
