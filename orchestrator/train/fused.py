"""Keras's Adam and AdamW with the update of a variable in one kernel.

Keras writes an update as a dozen element-wise operations, each a pass over memory: three quarters
of a step of a small dense model (measured: MLP 784-128-10 on a CPU, as a graph). TensorFlow's own
kernel computes the same formula in one pass. XLA fuses Keras's operations by itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf


class _FusedAdam(keras.optimizers.Adam):
    """What the fused optimizers share.

    Keras's `update_step` is in keras 3.15, optimizers/adam.py; the kernel in TensorFlow 2.21,
    core/kernels/training_ops.cc:ApplyAdam. Both:

        m += (g - m)(1 - b1),  v += (g^2 - v)(1 - b2),
        w -= m lr sqrt(1 - b2^t) / (1 - b1^t) / (sqrt(v) + epsilon)

    In float32 the kernel rounds 1 - b2 as it rounds 1 - b2^t, and the two cancel; Keras's v is up
    to 5e-5 smaller, a rate that is up to 2e-5 higher. In float64 they agree to 1e-12.
    """

    is_fused = True

    def _backend_update_step(
        self, grads: Sequence[Any], trainable_variables: Sequence[Any], learning_rate: Any
    ) -> None:
        """Take the step's number along with the rate, so that it is read once for all."""
        if self.is_fused:
            learning_rate = (tf.convert_to_tensor(learning_rate), self.iterations + 1)
        super()._backend_update_step(grads, trainable_variables, learning_rate)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Update one variable on one device, and the two moments of its gradient."""
        if not self.is_fused:
            super().update_step(gradient, variable, learning_rate)
            return
        rate, step = learning_rate
        dtype = variable.dtype
        index = self._get_variable_index(variable)

        def power(beta: float) -> Any:
            return keras.ops.power(keras.ops.cast(beta, dtype), tf.cast(step, dtype))

        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=self._momentums[index].value.handle,
            v=self._velocities[index].value.handle,
            beta1_power=power(self.beta_1),
            beta2_power=power(self.beta_2),
            lr=tf.cast(rate, dtype),
            beta1=tf.constant(self.beta_1, dtype),
            beta2=tf.constant(self.beta_2, dtype),
            epsilon=tf.constant(self.epsilon, dtype),
            grad=tf.cast(gradient, dtype),
        )


class Adam(_FusedAdam):
    """Keras's Adam, fused."""


class AdamW(_FusedAdam, keras.optimizers.AdamW):
    """Keras's AdamW, fused but for the weight decay before it."""


@contextlib.contextmanager
def unfused(optimizer: Any) -> Iterator[None]:
    """Let an optimizer compute as Keras wrote it: for XLA, and where assignments are watched."""
    if not isinstance(optimizer, _FusedAdam):
        yield
        return
    object.__setattr__(optimizer, "is_fused", False)
    try:
        yield
    finally:
        object.__setattr__(optimizer, "is_fused", True)
