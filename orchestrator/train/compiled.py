"""What is done for XLA: a replica's share by itself, a sum in its best form, refusals in words."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from orchestrator.train.replica import Share

_FOLDED_ROWS = 16
_ADDED_IN_TURN = 8_192


class CannotCompile(Exception):
    """What XLA cannot compile, in words; nothing of the block has run."""


def compiled_share(trace: Callable[[], Share]) -> Share:
    """Return a share whose tensors are computed by one XLA program.

    A block of several replicas cannot be compiled as a whole: the reduction and the decision lie
    between two `strategy.run`s. Nor should one whose features are fetched, as XLA compiles for each
    length. What a replica does alone in a step can be.

    Args:
        trace: computes the share; called once, in a graph of its own that sees the outer one.
    """
    traced: list[Share] = []

    @tf.function(jit_compile=True, autograph=False)
    def compute() -> Any:
        share = trace()
        traced.append(share)
        return share.gradients, [value for _, value in share.moved], share.sums

    gradients, moved, sums = compute()
    inner = traced[-1]
    return dataclasses.replace(
        inner,
        gradients=[
            _with_known_shape(outer, known)
            for outer, known in zip(gradients, inner.gradients, strict=True)
        ],
        moved=[(variable, value) for (variable, _), value in zip(inner.moved, moved, strict=True)],
        sums=sums,
    )


def _with_known_shape(outer: Any, inner: Any) -> Any:
    """Give slices their dense shape back as a constant: whether to send them depends on it."""
    if not isinstance(outer, tf.IndexedSlices):
        return outer
    shape = tf.get_static_value(inner.dense_shape)
    return tf.IndexedSlices(
        outer.values, outer.indices, outer.dense_shape if shape is None else tf.constant(shape)
    )


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Tell what XLA cannot compile from all other errors.

    Raises:
        CannotCompile: it cannot.
    """
    try:
        yield
    except (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError) as error:
        if reason := _refused(str(error)):
            raise CannotCompile(reason) from error
        raise


def _refused(text: str) -> str:
    """Return in words what XLA cannot compile; empty for an error of another kind."""
    if found := re.search(r"\bop (\w+) must be a compile-time constant", text):
        return (
            f"XLA needs shapes that do not depend on the data, and those of {found[1]} do: give "
            "a length that is known, such as maxlen= of tf.sequence_mask"
        )
    if "unsupported operations" not in text:
        return ""
    names = dict.fromkeys(re.findall(r"No registered '(\w+)'", text))
    return f"XLA has no {', '.join(names)}" if names else f"XLA refuses it: {text.splitlines()[0]}"


def folded_square_sum(values: Any) -> Any:
    """Return the sum of squares of an array, in the form that XLA on CPUs computes fast.

    It adds the elements of one sum one after another, but sums beside each other in vectors: long
    arrays are folded into a few long rows first (measured, 100,352 elements, XLA of TensorFlow
    2.21: 130 us as one sum, 41 us as 784 rows, 10 to 16 us as 8 to 28 rows). The abs, which changes
    nothing, keeps it from making one sum of two again.
    """
    squares = tf.square(tf.reshape(values, [-1]))
    while squares.shape[0] > _ADDED_IN_TURN:
        length = squares.shape[0] // _FOLDED_ROWS * _FOLDED_ROWS
        rows = tf.reshape(squares[:length], [_FOLDED_ROWS, -1])
        squares = tf.concat([tf.abs(tf.reduce_sum(rows, 0)), squares[length:]], 0)
    return tf.reduce_sum(squares)
