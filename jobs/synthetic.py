"""Generated images without meaning, to measure throughput: no data has to be there."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from orchestrator.train.job import Batch, Job, Source, Split
from orchestrator.train.sources import ArraySource


class Synthetic(Job):
    """A residual network of any size on noise; what it learns is of no interest.

    Args:
        num_examples: generated images, as `data.num_examples`; no split of them evaluates.
        size: height and width of an image.
        filters: of each convolution.
        depth: number of residual blocks of two convolutions.
        classes: random labels 0 to here, exclusive.
    """

    def __init__(
        self,
        num_examples: int,
        size: int = 32,
        filters: int = 32,
        depth: int = 3,
        classes: int = 10,
    ):
        self.num_examples = num_examples
        self.size, self.filters, self.depth, self.classes = size, filters, depth, classes

    def model(self) -> keras.Model:
        """Return images [batch, size, size, 3] -> logits [batch, classes]."""
        images = keras.Input((self.size, self.size, 3))
        x = layers.Conv2D(self.filters, 3, strides=2, padding="same")(images)
        for _ in range(self.depth):
            y = layers.Conv2D(self.filters, 3, padding="same", activation="relu")(x)
            x = layers.ReLU()(x + layers.Conv2D(self.filters, 3, padding="same")(y))
        return keras.Model(images, layers.Dense(self.classes)(layers.GlobalAveragePooling2D()(x)))

    def source(self, split: Split) -> Source:
        """Return noise `x` uint8 [size, size, 3] and labels `y` int64 []; the same every time."""
        rng = np.random.default_rng([0, split is Split.TRAIN])
        shape = (self.num_examples, self.size, self.size, 3)
        return ArraySource(
            {
                "x": rng.integers(0, 256, shape, np.uint8),
                "y": rng.integers(0, self.classes, self.num_examples),
            },
            name=f"synthetic noise ({split.value})",
            origin="generated at random: synthetic, not real data",
        )

    def prepare(self, batch: Batch, *, training: bool, seeds: Any) -> Batch:
        """Scale pixels to [-1, 1]."""
        return {**batch, "x": tf.cast(batch["x"], keras.config.floatx()) / 127.5 - 1}

    def loss(self, batch: Batch, outputs: Any) -> Any:
        """Return the cross-entropy of each example; log(classes) is all there is to reach."""
        return keras.losses.sparse_categorical_crossentropy(batch["y"], outputs, from_logits=True)
