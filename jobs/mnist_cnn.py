"""Digits again, with convolutions and dropout."""

from typing import Any

import keras
import tensorflow as tf
from keras import layers

from orchestrator.train.datasets import mnist
from orchestrator.train.job import Batch, Job, Source, Split


class MnistCnn(Job):
    """Two convolutions; about 99 % of the test images after three epochs.

    Dropout needs no attention: the step gives each replica masks of its own, and the same masks
    again when a step is repeated after a failure.

    Args:
        dropout: fraction of the features that a training step leaves out, in [0, 1).
    """

    def __init__(self, dropout: float = 0.4):
        self.dropout = dropout

    def model(self) -> keras.Model:
        """Return a Sequential model; its Input makes the variables at once."""
        return keras.Sequential(
            [
                layers.Input((28, 28, 1)),
                layers.Conv2D(24, 5, strides=2, activation="relu"),
                layers.Conv2D(48, 3, activation="relu"),
                layers.MaxPooling2D(2),
                layers.Flatten(),
                layers.Dropout(self.dropout),
                layers.Dense(10),
            ]
        )

    def source(self, split: Split) -> Source:
        """Return the images: `x` uint8 [28, 28], `y` int64 []."""
        return mnist(split, path=self.data_path, cache_dir=self.data_dir)

    def prepare(self, batch: Batch, *, training: bool, seeds: Any) -> Batch:
        """Scale pixels to [0, 1] and add the axis of channels."""
        scaled = tf.cast(batch["x"], keras.config.floatx()) / 255
        return {**batch, "x": scaled[..., tf.newaxis]}

    def loss(self, batch: Batch, outputs: Any) -> Any:
        """Return the cross-entropy of each example."""
        return keras.losses.sparse_categorical_crossentropy(batch["y"], outputs, from_logits=True)

    def metrics(self, batch: Batch, outputs: Any) -> dict[str, Any]:
        """Return whether each digit was found."""
        return {"accuracy": keras.metrics.sparse_categorical_accuracy(batch["y"], outputs)}
