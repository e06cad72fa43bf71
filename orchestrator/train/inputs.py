"""What a step reads: features fetched on the host, or tables that lie on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from orchestrator.train.job import Batch
from orchestrator.train.sources import Source, bucket_key


class Resident:
    """A source's arrays on each local device, gathered in graph; None keeps them on the host."""

    def __init__(self, source: Source, devices: Sequence[str]):
        arrays = source.resident()
        self.tables: list[dict[str, Any]] | None = None
        if arrays is not None:
            self.tables = []
            for device in devices:
                with tf.device(device):
                    self.tables.append({k: tf.constant(v) for k, v in arrays.items()})

    def rows(self, local: int, ids: Any, features: Batch) -> Batch:
        """Return the features of some examples on one local replica.

        In float64, floats are such: what a loss has to do with its targets needs equal types.
        """
        if self.tables is not None:
            features = {name: tf.gather(table, ids) for name, table in self.tables[local].items()}
        if keras.config.floatx() != "float64":
            return features
        return {
            name: tf.cast(rows, tf.float64) if rows.dtype.is_floating else rows
            for name, rows in features.items()
        }


def feature_spec(source: Source, size: int, *, resident: bool) -> dict[str, tf.TensorSpec]:
    """Return the signature of a replica's fetched features over a block: [None, size, ...]."""
    if resident:
        return {}
    spec = {}
    for name, feature in source.features.items():
        spec[name] = tf.TensorSpec([None, size, *feature.shape], feature.dtype)
        if feature.is_ragged:
            spec[bucket_key(name)] = tf.TensorSpec([None], tf.int32)
    return spec


def step_features(features: Mapping[str, Any], i: Any) -> Batch:
    """Return the features of one step of a block, [batch, ...] each; `i` is an int32 tensor.

    A feature of different lengths is cut to the bucket of its step. The length is a tensor, so
    there is one trace for all buckets, whichever of them a block mixes.
    """
    buckets = {bucket_key(name) for name in features} & set(features)
    rows = {name: value[i] for name, value in features.items()}
    for name in features:
        if bucket_key(name) in buckets:
            rows[name] = rows[name][:, : rows[bucket_key(name)]]
    return {name: value for name, value in rows.items() if name not in buckets}


def padded_lengths(features: Sequence[Mapping[str, Any]]) -> set[Any]:
    """Return what the steps of a block pad features to, for each local replica; on the host.

    Returns:
        (replica, length ...) for each combination; one for each replica without any length.
    """
    found: set[Any] = set()
    for local, block in enumerate(features):
        keys = sorted({bucket_key(name) for name in block} & set(block))
        lengths = np.stack([block[key] for key in keys], 1) if keys else np.zeros((1, 0))
        found |= {(local, *combination) for combination in np.unique(lengths, axis=0).tolist()}
    return found
