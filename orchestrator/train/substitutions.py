"""What `verify` changes in a model, so that one device and many can be compared at all.

Dropout draws another mask on every replica, as it should, and BatchNorm normalises over the batch
of its replica: with either, more replicas compute something else, and nothing is wrong.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from orchestrator.train.replica import is_layer_seed

# How strongly a layer drops or disturbs, by the attribute that it reads at every call: the layers
# of keras.layers.regularization and the cells of recurrent layers (keras 3.15).
_STRENGTHS = ("rate", "stddev", "dropout", "recurrent_dropout")


def substitute(model: keras.Model) -> dict[str, tuple[str, ...]]:
    """Switch off randomness and synchronise BatchNorm; call before the step is traced.

    Matrix products keep float32: in TensorFloat-32, the default of newer GPUs, the shape of a
    batch changes the third digit.

    Returns:
        The fields of `Substituted`: names of layers under `silenced`, `synchronised`, `random`.
    """
    tf.config.experimental.enable_tensor_float_32_execution(False)
    silenced, synchronised, random = [], [], []
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.synchronized = True
            synchronised.append(layer.name)
        if _silence(layer):
            silenced.append(layer.name)
        elif any(is_layer_seed(variable) for variable in _own_variables(layer)):
            random.append(layer.name)
    return {
        "silenced": tuple(silenced),
        "synchronised": tuple(synchronised),
        "random": tuple(random),
    }


def _silence(layer: keras.layers.Layer) -> bool:
    """Set the strength of a layer that draws random numbers to nothing; tell whether it had one."""
    if getattr(layer, "seed_generator", None) is None:
        return False
    found = [name for name in _STRENGTHS if isinstance(getattr(layer, name, None), int | float)]
    for name in found:
        setattr(layer, name, 0.0)
    return bool(found)


def _own_variables(layer: keras.layers.Layer) -> list[Any]:
    """Return the seeds of a layer itself, not of the layers in it."""
    generators = getattr(layer, "_seed_generators", ())
    return [generator.state for generator in generators]
