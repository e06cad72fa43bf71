"""Random numbers for augmentation: one set for each example, computed from its seed."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

# 2^64 / golden ratio, and the multipliers of the finalizer below, as int64.
_STEP = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64
_MANTISSA = 24  # bits of a float32 in [0, 1)


def uniform(seeds: Any, num: int) -> Any:
    """Draw numbers in [0, 1) for each example.

    `tf.random.stateless_uniform` takes one seed for a whole tensor; drawing a batch from one seed
    would change with how the batch is split over replicas. This hashes (seed, column) instead: a
    dozen element-wise operations for the batch, the same on every device.

    Args:
        seeds: int64 [batch, 2], as `Job.prepare` gets them.
        num: how many numbers for each example; columns are independent.

    Returns:
        float32 [batch, num].

    Source: the finalizer of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number
        generators", 2014).
    """
    example = _mixed(_mixed(seeds[:, 1:] + _STEP) + seeds[:, :1])
    columns = tf.range(1, num + 1, dtype=tf.int64) * _STEP
    bits = _shifted(_mixed(example + columns), 64 - _MANTISSA)
    return tf.cast(bits, tf.float32) / 2.0**_MANTISSA


def _mixed(x: Any) -> Any:
    x = tf.bitwise.bitwise_xor(x, _shifted(x, 30)) * _FIRST
    x = tf.bitwise.bitwise_xor(x, _shifted(x, 27)) * _SECOND
    return tf.bitwise.bitwise_xor(x, _shifted(x, 31))


def _shifted(x: Any, bits: int) -> Any:
    """Shift right and fill with zeros; on int64 TensorFlow's own shift fills with the sign."""
    bits_kept = tf.constant(2 ** (64 - bits) - 1, tf.int64)
    return tf.bitwise.bitwise_and(tf.bitwise.right_shift(x, tf.constant(bits, tf.int64)), bits_kept)
