"""A user's own job, in a folder outside the package: classes of points, from integers."""

import time

import keras
import numpy as np
import tensorflow as tf

from orchestrator.train.job import Job
from orchestrator.train.sources import ArraySource, Split


class Slowly(ArraySource):
    """Examples that take their time."""

    def __init__(self, arrays, delay_ms, name):
        super().__init__(arrays, name=name, resident_limit_bytes=0)
        self.delay_ms = delay_ms

    def fetch(self, indices):
        time.sleep(self.delay_ms / 1000)
        return super().fetch(indices)


class Blobs(Job):
    """A dense classifier with dropout."""

    def __init__(self, delay_ms=0.0, fail=""):
        self.delay_ms = delay_ms
        self.fail = fail

    def model(self):
        layers = keras.layers
        return keras.Sequential(
            [
                layers.Input((8,)),
                layers.Dense(16, activation="relu"),
                layers.Dropout(0.1),
                layers.Dense(3),
            ]
        )

    def source(self, split):
        count = 512 if split is Split.TRAIN else 100
        rng = np.random.default_rng([7, split is Split.TRAIN])
        labels = rng.integers(0, 3, count)
        centres = np.random.default_rng(3).normal(128, 30, (3, 8))
        points = np.clip(centres[labels] + rng.normal(0, 10, (count, 8)), 0, 255)
        arrays = {"x": points.astype("uint8"), "y": labels}
        if self.delay_ms and split is Split.TRAIN:
            return Slowly(arrays, self.delay_ms, "blobs")
        return ArraySource(arrays, name="blobs")

    def prepare(self, batch, *, training, seeds):
        return {**batch, "x": tf.cast(batch["x"], tf.float32) / 255.0}

    def loss(self, batch, outputs):
        if self.fail == "trace":
            raise ValueError("the user's own words")
        loss = keras.losses.sparse_categorical_crossentropy(batch["y"], outputs, from_logits=True)
        return loss * float("nan") if self.fail == "infinite" else loss

    def metrics(self, batch, outputs):
        hit = tf.argmax(outputs, axis=-1) == tf.cast(batch["y"], tf.int64)
        return {"accuracy": tf.cast(hit, tf.float32)}


class Faulty(Blobs):
    """Serves another model than it trains."""

    def __init__(self, fault="", delay_ms=0.0, fail=""):
        super().__init__(delay_ms, fail)
        self.fault = fault
        self.scale = tf.Variable(2.0)

    def serve(self, model, inputs):
        x = tf.cast(inputs, tf.float32) / (1.0 if self.fault == "raw" else 255.0)
        if self.fault == "dropout":
            return model(x, training=True)
        if self.fault == "frozen":
            x = tf.ensure_shape(x, [64, 8])
        if self.fault == "layers":
            for layer in model.layers:
                x = layer(x, training=True)
            return x
        return model(x, training=False) * (self.scale if self.fault == "untracked" else 1.0)
