"""An exponential moving average of the weights, often better than the last weights themselves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf


class Averages:
    """Averages `a <- d a + (1 - d) w` after every update, with `d = min(decay, (1+n) / (10+n))`.

    The bound on d after n updates keeps the first weights, which are noise, from lasting
    (tf.train.ExponentialMovingAverage with num_updates).
    """

    def __init__(self, decay: float, variables: Sequence[keras.Variable]):
        """Start at the present weights; call inside `strategy.scope()`."""
        self._decay = decay
        self._strategy = tf.distribute.get_strategy()
        self._weights = list(variables)
        self._averages = [
            keras.Variable(
                tf.convert_to_tensor(v.value), dtype=v.dtype, trainable=False, name=f"average_{i}"
            )
            for i, v in enumerate(variables)
        ]
        self._updates = keras.Variable(0, dtype="int64", trainable=False, name="average_updates")

    @property
    def variables(self) -> list[keras.Variable]:
        """What a checkpoint keeps."""
        return [self._updates, *self._averages]

    @property
    def weights(self) -> list[keras.Variable]:
        """What is averaged, in the order of the averages."""
        return list(self._weights)

    def restart(self) -> None:
        """Begin again at the present weights; eager, on every worker alike."""
        self._updates.assign(0)
        for average, weight in zip(self._averages, self._weights, strict=True):
            average.assign(tf.convert_to_tensor(weight.value))

    def update(self, applied: Any = None) -> None:
        """Follow the weights after an update; call in cross-replica context.

        Args:
            applied: bool scalar, False leaves the averages; None for an update known to be made.
        """
        count = tf.convert_to_tensor(self._updates.value)
        n = tf.cast(count, tf.float32)
        keep = tf.minimum(self._decay, (1.0 + n) / (10.0 + n))
        step = tf.ones_like(count)
        if applied is not None:
            keep = tf.where(applied, keep, 1.0)
            step = tf.cast(applied, count.dtype)
        self._updates.value.assign(count + step)

        def follow(average: Any, weight: Any, keep: Any) -> Any:
            keep = tf.cast(keep, average.dtype)
            return average.assign(average * keep + tf.cast(weight, average.dtype) * (1 - keep))

        for average, weight in zip(self._averages, self._weights, strict=True):
            self._strategy.extended.update(
                average.value, follow, args=(weight.value, keep), group=False
            )

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model have the averages for weights; eager, on every worker alike."""
        trained = [tf.identity(tf.convert_to_tensor(v.value)) for v in self._weights]
        for weight, average in zip(self._weights, self._averages, strict=True):
            weight.assign(tf.convert_to_tensor(average.value))
        try:
            yield
        finally:
            for weight, value in zip(self._weights, trained, strict=True):
                weight.assign(value)
