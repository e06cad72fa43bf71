"""Loss and metrics of a batch as one row of weighted sums, the only form that adds up exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from orchestrator.errors import JobError
from orchestrator.train.job import Outcome, at_least_float32

# Names of what is told of every step.
_TAKEN = {
    "loss": "the loss itself",
    "gradient_norm": "the norm of the gradient",
    "loss_scale": "the loss scale of float16",
    "learning_rate": "the learning rate",
}


@dataclass(frozen=True, slots=True)
class Layout:
    """Names and widths of the columns that follow the sum of weights; width None is a scalar."""

    names: tuple[str, ...]
    widths: tuple[int | None, ...]

    def split(self, columns: np.ndarray) -> dict[str, np.ndarray]:
        """Cut [n, columns] into [n] or [n, k] for each name."""
        sums, start = {}, 0
        for name, width in zip(self.names, self.widths, strict=True):
            stop = start + (width or 1)
            sums[name] = columns[:, start] if width is None else columns[:, start:stop]
            start = stop
        return sums


def weighted_sums(outcome: Outcome, size: int, dtype: Any, mask: Any = None) -> tuple[Layout, Any]:
    """Add up a batch.

    Args:
        outcome: what the batch costs.
        size: number of examples.
        dtype: of the sums.
        mask: float [size], zero for examples that only fill up the batch; None in training.

    Returns:
        The layout, and [sum of weights, weighted loss with its terms, weighted metrics ...].

    Raises:
        JobError: loss, a metric or the weights do not have one row an example; or a metric is
            called as what is told of every step.
    """
    loss = at_least_float32(outcome.loss)
    for name, what in _TAKEN.items():
        if name in outcome.metrics:
            raise JobError(f"a metric is called {name}, as {what} is: give it another name")
    columns = {"loss": loss + outcome.added(loss.dtype) if outcome.terms else loss}
    columns.update(outcome.metrics)
    layout = _layout(columns, size)
    if outcome.weight is not None:
        _check_weight(tf.TensorShape(tf.convert_to_tensor(outcome.weight).shape), size)
    widths = [width or 1 for width in layout.widths]
    values = tf.concat(
        [
            tf.reshape(tf.cast(columns[name], dtype), [size, width])
            for name, width in zip(layout.names, widths, strict=True)
        ],
        axis=1,
    )
    if outcome.weight is None and mask is None:
        return layout, tf.concat([tf.constant([size], dtype), tf.reduce_sum(values, axis=0)], 0)
    weights = tf.cast(outcome.weights(), dtype)
    if mask is not None:
        weights *= tf.cast(mask, dtype)
        # What only fills up may be anything, also infinite, and 0 x inf is not 0.
        values = tf.where(mask[:, None] > 0, values, tf.zeros_like(values))
    weights = weights[:, None]
    return layout, tf.reduce_sum(tf.concat([weights, weights * values], axis=1), axis=0)


def _check_weight(shape: tf.TensorShape, size: int) -> None:
    if shape.rank != 1 or shape[0] not in (size, None):
        raise JobError(
            f"the weight has shape {shape} for a batch of {size} examples: return one weight an "
            f"example, shape [{size}], in Outcome(weight=...)"
        )


def _layout(columns: Mapping[str, Any], size: int) -> Layout:
    widths: list[int | None] = []
    for name, value in columns.items():
        shape = tf.TensorShape(value.shape)
        what = "the loss" if name == "loss" else f"metric {name!r}"
        if shape.rank not in ((1,) if name == "loss" else (1, 2)) or shape[0] not in (size, None):
            raise JobError(
                f"{what} has shape {shape} for a batch of {size} examples: return one value an "
                f"example, shape [{size}]{'' if name == 'loss' else f' or [{size}, k]'}, neither "
                "their mean nor their sum"
            )
        widths.append(None if shape.rank == 1 else int(shape[1]))
    return Layout(tuple(columns), tuple(widths))
