"""Small jobs for tests."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf

from orchestrator.train.job import Batch, Job
from orchestrator.train.sources import ArraySource, Source, Split


def clusters(split: Split, n: int) -> ArraySource:
    """Return points of three classes in eight dimensions; the same for every call."""
    rng = np.random.default_rng([7, split is Split.TRAIN])
    labels = rng.integers(0, 3, n)
    centres = np.random.default_rng(3).normal(size=(3, 8)) * 2
    points = centres[labels] + rng.normal(size=(n, 8))
    arrays = {"x": points.astype("float32"), "y": labels.astype("int64")}
    return ArraySource(arrays, name="clusters", origin="generated")


class Tiny(Job):
    """A dense classifier, with batch normalisation and dropout on request."""

    def __init__(self, normalise: bool = False, dropout: float = 0.0):
        self.normalise = normalise
        self.dropout = dropout

    def model(self) -> keras.Model:
        layers = [keras.layers.Input((8,)), keras.layers.Dense(16, activation="relu")]
        if self.normalise:
            layers.append(keras.layers.BatchNormalization())
        if self.dropout:
            layers.append(keras.layers.Dropout(self.dropout))
        return keras.Sequential([*layers, keras.layers.Dense(3)])

    def source(self, split: Split) -> Source:
        return clusters(split, 96 if split is Split.TRAIN else 50)

    def loss(self, batch: Batch, outputs: tf.Tensor) -> tf.Tensor:
        return keras.losses.sparse_categorical_crossentropy(batch["y"], outputs, from_logits=True)

    def metrics(self, batch: Batch, outputs: tf.Tensor) -> dict[str, tf.Tensor]:
        hit = tf.argmax(outputs, axis=-1) == batch["y"]
        return {"accuracy": tf.cast(hit, tf.float32)}
