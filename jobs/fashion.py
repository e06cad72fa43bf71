"""Kinds of clothes: convolutions with batch normalisation, dropout and augmentation."""

from typing import Any

import keras
import tensorflow as tf
from keras import layers

from orchestrator.train.datasets import fashion_mnist
from orchestrator.train.draws import uniform
from orchestrator.train.job import Batch, Job, Source, Split

SIZE = 28


class Fashion(Job):
    """Three convolutions; about 91 % of the test images after six epochs.

    Args:
        shift: pixels that a training image moves by at most, in each direction.
        dropout: fraction of the features that a training step leaves out, in [0, 1).
        synchronized: normalise over the global batch instead of each replica's own. Any number of
            replicas then computes the same, at some collectives more.
    """

    def __init__(self, shift: int = 2, dropout: float = 0.3, synchronized: bool = False):
        self.shift = shift
        self.dropout = dropout
        self.synchronized = synchronized

    def model(self) -> keras.Model:
        """Return images [batch, 28, 28, 1] -> logits [batch, 10]."""
        stack: list[Any] = [layers.Input((SIZE, SIZE, 1))]
        for filters in (32, 64, 64):
            stack += [
                layers.Conv2D(filters, 3, padding="same", use_bias=False),
                layers.BatchNormalization(synchronized=self.synchronized),
                layers.ReLU(),
                layers.MaxPooling2D(2),
            ]
        return keras.Sequential(
            [*stack, layers.Flatten(), layers.Dropout(self.dropout), layers.Dense(10)]
        )

    def source(self, split: Split) -> Source:
        """Return the 60,000 or the 10,000 images: `x` uint8 [28, 28], `y` int64 []."""
        return fashion_mnist(split, path=self.data_path, cache_dir=self.data_dir)

    def prepare(self, batch: Batch, *, training: bool, seeds: Any) -> Batch:
        """Scale pixels to [0, 1]; in training mirror and shift each image by its own seed."""
        images = tf.cast(batch["x"], keras.config.floatx()) / 255
        if training:
            images = self.moved(images, seeds)
        return {**batch, "x": images[..., tf.newaxis]}

    def moved(self, images: Any, seeds: Any) -> Any:
        """Mirror every other image and shift each, with black where nothing was."""
        draws = uniform(seeds, 3)
        down, right = tf.split(tf.cast(draws[:, :2] * (2 * self.shift + 1), tf.int32), 2, axis=1)
        places = tf.range(SIZE)
        rows = places + down
        columns = tf.where(draws[:, 2:] < 0.5, places, SIZE - 1 - places) + right
        padded = tf.pad(images, [[0, 0], [self.shift] * 2, [self.shift] * 2])
        return tf.gather(tf.gather(padded, rows, batch_dims=1), columns, axis=2, batch_dims=1)

    def loss(self, batch: Batch, outputs: Any) -> Any:
        """Return the cross-entropy of each example."""
        return keras.losses.sparse_categorical_crossentropy(batch["y"], outputs, from_logits=True)

    def metrics(self, batch: Batch, outputs: Any) -> dict[str, Any]:
        """Return whether each garment was recognised."""
        return {"accuracy": keras.metrics.sparse_categorical_accuracy(batch["y"], outputs)}
