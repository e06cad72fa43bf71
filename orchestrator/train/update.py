"""What a step does to the variables, once everything is reduced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from orchestrator.spec.plan import RunPlan
from orchestrator.spec.schema import Precision
from orchestrator.train.job import flatten_groups
from orchestrator.train.optimizer import Optimizers
from orchestrator.train.replica import Share


class Update:
    """Updates all variables from reduced values, and knows how those are scaled.

    Reduced are, in this order, the gradient of each variable, the state that layers moved, and the
    sums [sum of weights, weighted loss, weighted metrics ...].

    Attributes:
        variables: what is trained, in the order of the gradients.
    """

    def __init__(self, plan: RunPlan, optimizers: Optimizers, strategy: tf.distribute.Strategy):
        """Prepare; `factor` and `apply` need to `learn` first."""
        self.variables = flatten_groups(optimizers.groups)
        self._config = plan.config.optimizer
        self._batch = plan.config.train.global_batch_size
        self._divisor = _divisor(plan)
        self._optimizers = optimizers
        self._strategy = strategy
        self._moving: list[keras.Variable] = []
        self._is_unweighted = False

    def learn(self, share: Share) -> None:
        """Learn, while a step is traced, what its shares hold."""
        self._moving = [variable for variable, _ in share.moved]
        self._is_unweighted = share.is_unweighted

    def scale(self) -> Any:
        """Return s over the divisor: a plain number, which loses no bits, unless s changes."""
        scale = self._optimizers.loss_scale
        return 1.0 / self._divisor if scale is None else scale.value / self._divisor

    def factor(self, sums: Any) -> Any:
        """Return what makes the reduced gradient that of the mean: 1 / (scale sum w), or 1."""
        scale = self._optimizers.loss_scale
        if self._is_unweighted:
            factor = self._divisor / self._batch  # 1.0, but for halves
            if scale is not None:
                return tf.cast(factor / scale.value, sums.dtype)
            return 1.0 if factor == 1.0 else tf.constant(factor, sums.dtype)
        whole = self.scale()
        whole = tf.cast(whole, sums.dtype) if tf.is_tensor(whole) else whole
        return tf.math.divide_no_nan(tf.ones_like(sums[0]), whole * sums[0])

    def apply(self, reduced: Sequence[Any], norm: Any, ok: Any = None) -> Any:
        """Update all variables, on every replica; with `ok` only if it is true.

        Args:
            reduced: as `strategy.run` returns it.
            norm: of the reduced gradients, a scalar.
            ok: whether everything is finite, a scalar.

        Returns:
            The number of the first bad gradient, as `block.first_bad` counts them: none.
        """
        self._strategy.run(self._apply, (reduced, norm, ok))
        if self._optimizers.averages is not None:
            self._optimizers.averages.update(ok)
        return tf.constant(0, tf.int64)

    def _apply(self, reduced: Sequence[Any], norm: Any, ok: Any) -> None:
        """Update the variables of one replica."""
        count = len(self.variables)
        factor = self.factor(reduced[-1])
        if self._config.clip_global_norm is not None:
            limit = tf.constant(self._config.clip_global_norm, norm.dtype)
            factor *= limit / tf.maximum(norm * factor, limit)
        scaled = reduced[:count]
        if tf.is_tensor(factor):
            scaled = [gradient * tf.cast(factor, gradient.dtype) for gradient in scaled]
        if (bound := self._config.clip_value) is not None:
            scaled = [tf.clip_by_value(gradient, -bound, bound) for gradient in scaled]
        flat, groups = iter(scaled), self._optimizers.groups
        grouped = {name: [next(flat) for _ in group] for name, group in groups.items()}
        if ok is None:
            self._optimizers.apply(grouped)
        else:
            self._optimizers.apply_if(ok, grouped)
        for variable, value in zip(self._moving, reduced[count:-1], strict=True):
            new = tf.cast(value, variable.dtype)
            variable.value.assign(new if ok is None else tf.where(ok, new, variable.value))


def _divisor(plan: RunPlan) -> int:
    """Return what sums over examples are divided by before they are differentiated.

    The global batch size; with halves the power of two from there on, as 1 / 100 in bfloat16 is
    0.1 % too large. The reduced gradient, in float32, is multiplied by what is missing.
    """
    batch = plan.config.train.global_batch_size
    is_half = plan.precision in (Precision.mixed_bfloat16, Precision.mixed_float16)
    return 1 << (batch - 1).bit_length() if is_half else batch
