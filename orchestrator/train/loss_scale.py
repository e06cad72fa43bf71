"""Dynamic loss scale for float16: small gradients would vanish, large ones overflow.

The loss is multiplied by the scale before it is differentiated, the reduced gradient divided by it.
A step whose reduced gradient is not finite is not applied, on any replica, and halves the scale;
2000 good steps in a row double it (Micikevicius et al. 2018, section 3.2).
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

_GROW_AFTER_STEPS = 2000
_FACTOR = 2.0
# float16 ends at 65504; a larger scale only makes the next overflow certain.
_LARGEST = 2.0**24


class LossScale:
    """The scale and the number of good steps since it changed; both are state of the run."""

    def __init__(self, initial: float):
        """Make the variables; call inside `strategy.scope()`."""
        self._scale = keras.Variable(initial, dtype="float32", trainable=False, name="loss_scale")
        self._good = keras.Variable(0, dtype="int32", trainable=False, name="good_steps")

    @property
    def variables(self) -> list[keras.Variable]:
        """What a checkpoint keeps."""
        return [self._scale, self._good]

    @property
    def value(self) -> Any:
        """The scale of this step, float32 scalar."""
        return tf.convert_to_tensor(self._scale.value)

    def update(self, finite: Any) -> None:
        """Learn how a step went; call in cross-replica context.

        Args:
            finite: bool scalar, whether its reduced gradient was finite.
        """
        scale, good = self.value, tf.convert_to_tensor(self._good.value) + 1
        grows = good >= _GROW_AFTER_STEPS
        larger = tf.minimum(tf.where(grows, scale * _FACTOR, scale), _LARGEST)
        # Below 1 the gradient itself is beyond float16: no scale can help.
        smaller = tf.maximum(scale / _FACTOR, 1.0)
        self._scale.value.assign(tf.where(finite, larger, smaller))
        self._good.value.assign(tf.where(finite & ~grows, good, 0))
