"""A job whose every step takes its time, and that can linger wherever a stop may find it."""

import time

import keras
import numpy as np
import tensorflow as tf

from orchestrator.train.job import Job
from orchestrator.train.sources import ArraySource, Split


class Slowly(ArraySource):
    """Examples that take their time."""

    def __init__(self, arrays, delay_s, name):
        super().__init__(arrays, name=name, resident_limit_bytes=0)
        self.delay_s = delay_s

    def fetch(self, indices):
        time.sleep(self.delay_s)
        return super().fetch(indices)


class Paced(Job):
    """A dense classifier with dropout; `linger` names what takes a second, besides the steps."""

    def __init__(self, step_ms=20.0, linger="", linger_s=1.0, num_eval=96):
        self.step_s = step_ms / 1000
        self.num_eval = num_eval
        self.linger, self.linger_s = linger, linger_s

    def model(self):
        self._linger("building")
        layers = keras.layers
        return keras.Sequential(
            [
                layers.Input((8,)),
                layers.Dense(32, activation="relu"),
                layers.Dropout(0.2),
                layers.Dense(3),
            ]
        )

    def source(self, split):
        self._linger("loading data")
        count = 512 if split is Split.TRAIN else self.num_eval
        rng = np.random.default_rng([11, split is Split.TRAIN])
        labels = rng.integers(0, 3, count)
        points = np.eye(3, 8)[labels] + rng.normal(0, 0.4, (count, 8))
        arrays = {"x": points.astype("float32"), "y": labels}
        if split is Split.TRAIN:
            return Slowly(arrays, self.step_s, "paced")
        return Slowly(arrays, self.linger_s if self.linger == "evaluating" else 0.0, "paced")

    def loss(self, batch, outputs):
        self._linger("tracing")
        return keras.losses.sparse_categorical_crossentropy(batch["y"], outputs, from_logits=True)

    def serve(self, model, inputs):
        self._linger("exporting")
        return tf.nn.softmax(model(inputs, training=False))

    def _linger(self, where):
        if self.linger == where:
            time.sleep(self.linger_s)
