"""How late a flight arrives: a table with categories and numbers, and embeddings."""

from typing import Any

import keras
import tensorflow as tf
from keras import layers

from orchestrator.train.datasets import flights, flights_scaling
from orchestrator.train.job import Batch, Job, Source, Split

AIRPORTS, DAYS = 229, 182


class Flights(Job):
    """Embeddings of airports, days and hours, and two dense layers.

    Args:
        width: numbers that an airport or a day is embedded in.
        hidden: units of each dense layer.
        earliest: delays are clipped to this from below, in minutes.
        latest: and to this from above: a few flights are a day late.
        delta: errors up to this many minutes are squared, larger ones count linearly.
    """

    def __init__(
        self,
        width: int = 16,
        hidden: int = 128,
        earliest: int = -60,
        latest: int = 240,
        delta: float = 5.0,
    ):
        self.width, self.hidden, self.delta = width, hidden, delta
        self.earliest, self.latest = earliest, latest

    def model(self) -> keras.Model:
        """Return columns [batch, 5], as they are in the table -> minutes [batch]."""
        scaling = flights_scaling(path=self.data_path, cache_dir=self.data_dir)
        columns = keras.Input((5,), dtype="int32")
        origin, destination, day, minute = (columns[:, i] for i in range(4))
        hour = minute // 60
        numbers = layers.Normalization(mean=scaling.mean, variance=scaling.variance)(columns)
        parts = [
            layers.Embedding(AIRPORTS, self.width, name="origin")(origin),
            layers.Embedding(AIRPORTS, self.width, name="destination")(destination),
            layers.Embedding(DAYS * 24, self.width, name="day_and_hour")(day * 24 + hour),
            # Weather keeps flights of a day on the ground at an airport, not everywhere.
            layers.Embedding(AIRPORTS * DAYS, self.width, name="day_there")(origin * DAYS + day),
            layers.Embedding(AIRPORTS * DAYS, self.width, name="day_here")(
                destination * DAYS + day
            ),
            numbers[:, 2:],
        ]
        x = layers.Concatenate()(parts)
        for _ in range(2):
            x = layers.Dense(self.hidden, "relu")(x)
        return keras.Model(columns, layers.Dense(1)(x)[:, 0])

    def source(self, split: Split) -> Source:
        """Return `x` int16 [5], the columns, and `y` int16 [], the delay in minutes."""
        return flights(split, path=self.data_path, cache_dir=self.data_dir)

    def prepare(self, batch: Batch, *, training: bool, seeds: Any) -> Batch:
        """Widen the columns: airport x day does not fit into 16 bits."""
        return {**batch, "x": tf.cast(batch["x"], tf.int32)}

    def loss(self, batch: Batch, outputs: Any) -> Any:
        """Return the Huber loss of each flight: its optimum lies near the median."""
        return keras.losses.huber(self.delay(batch), outputs[:, None], delta=self.delta)

    def metrics(self, batch: Batch, outputs: Any) -> dict[str, Any]:
        """Return by how many minutes each prediction is off."""
        return {"mae": tf.abs(self.delay(batch) - outputs[:, None])[:, 0]}

    def delay(self, batch: Batch) -> Any:
        """Return the clipped delay in minutes, float [batch, 1]."""
        clipped = tf.clip_by_value(batch["y"], self.earliest, self.latest)
        return tf.cast(clipped, keras.config.floatx())[:, None]
