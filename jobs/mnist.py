"""The smallest job: classify handwritten digits with two dense layers."""

from typing import Any

import keras
import tensorflow as tf

from orchestrator.train.datasets import mnist
from orchestrator.train.job import Batch, Job, Source, Split


class Classifier(keras.Model):
    """Image [batch, 28, 28] -> logits [batch, 10]."""

    def __init__(self, hidden: int):
        super().__init__()
        self.flatten = keras.layers.Flatten()
        self.hidden = keras.layers.Dense(hidden, activation="relu")
        self.logits = keras.layers.Dense(10)

    def call(self, images: Any) -> Any:
        """Return the logits of images."""
        return self.logits(self.hidden(self.flatten(images)))


class Mnist(Job):
    """Two dense layers; about 98 % of the test images after two epochs.

    Args:
        hidden: units of the hidden layer.
    """

    def __init__(self, hidden: int = 128):
        self.hidden = hidden

    def model(self) -> keras.Model:
        """Return the model with its variables made: calling it on an Input does that."""
        model = Classifier(self.hidden)
        model(keras.Input((28, 28)))
        return model

    def source(self, split: Split) -> Source:
        """Return the 60,000 or the 10,000 images: `x` uint8 [28, 28], `y` int64 []."""
        return mnist(split, path=self.data_path, cache_dir=self.data_dir)

    def prepare(self, batch: Batch, *, training: bool, seeds: Any) -> Batch:
        """Scale pixels to [0, 1]; the served model does it too, so it answers raw images."""
        return {**batch, "x": tf.cast(batch["x"], keras.config.floatx()) / 255}

    def loss(self, batch: Batch, outputs: Any) -> Any:
        """Return the cross-entropy of each example. No mean: replicas may differ in size."""
        return keras.losses.sparse_categorical_crossentropy(batch["y"], outputs, from_logits=True)

    def metrics(self, batch: Batch, outputs: Any) -> dict[str, Any]:
        """Return 1 for each image whose digit was found, else 0: the mean is the accuracy."""
        return {"accuracy": keras.metrics.sparse_categorical_accuracy(batch["y"], outputs)}
