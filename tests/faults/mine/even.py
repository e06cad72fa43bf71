"""A job that computes the same on any number of workers, as fast or slow as a test wants."""

import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from orchestrator.train.job import Job
from orchestrator.train.sources import ArraySource, Split


class Paced(ArraySource):
    """Examples that take their time, a block of steps after the other, while a file is there."""

    def __init__(self, arrays, slow_while, block_ms):
        super().__init__(arrays, name="points", resident_limit_bytes=0)
        self.slow_while = Path(slow_while)
        self.block_s = block_ms / 1000

    def fetch(self, indices):
        if self.slow_while.is_file():
            time.sleep(self.block_s)
        return super().fetch(indices)


class Even(Job):
    """A dense classifier without anything random in it."""

    def __init__(self, slow_while="", block_ms=400.0, fail_at=0):
        self.slow_while = slow_while
        self.block_ms = block_ms
        self.fail_at = fail_at

    def model(self):
        layers = keras.layers
        return keras.Sequential(
            [layers.Input((8,)), layers.Dense(16, activation="relu"), layers.Dense(3)]
        )

    def source(self, split):
        count = 512 if split is Split.TRAIN else 100
        rng = np.random.default_rng([7, split is Split.TRAIN])
        labels = rng.integers(0, 3, count)
        centres = np.random.default_rng(3).normal(0, 1, (3, 8))
        points = (centres[labels] + rng.normal(0, 1, (count, 8))).astype("float32")
        return Paced({"x": points, "y": labels}, self.slow_while, self.block_ms)

    def on_block(self, progress):
        if self.fail_at and progress.step >= self.fail_at:
            raise ValueError("the user's own words")

    def loss(self, batch, outputs):
        return keras.losses.sparse_categorical_crossentropy(batch["y"], outputs, from_logits=True)

    def metrics(self, batch, outputs):
        hit = tf.argmax(outputs, axis=-1) == tf.cast(batch["y"], tf.int64)
        return {"accuracy": tf.cast(hit, tf.float32)}
