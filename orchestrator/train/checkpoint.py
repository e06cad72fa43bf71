"""Variables <-> store: everything a run needs to go on as if it had never stopped.

Saved are the model's variables and all optimizer state. Not saved are the seeds of layers and the
position in the data: both follow from the step.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from orchestrator.errors import RestoreError
from orchestrator.train import store
from orchestrator.train.names import stable_paths
from orchestrator.train.optimizer import Optimizers
from orchestrator.train.replica import is_layer_seed

BUNDLE = "variables"
_MODEL = "model/"
# What Keras counts over the whole process, in paths and names of slots: `dense_1_kernel_momentum`.
_COUNTER = re.compile(r"_\d+(?=[_/]|$)")


def named_variables(model: keras.Model, optimizers: Optimizers) -> dict[str, keras.Variable]:
    """Return everything to save, by key.

    Keras paths alone do not identify a variable (they contain counters of the process), so the
    key is `<section>/<index>:<path>`; paths of the model's own variables are without counters.
    """
    keys = model_variables(model)
    for section, variables in optimizers.variables.items():
        for index, variable in enumerate(variables):
            keys[f"{section}/{index}:{variable.path}"] = variable
    return keys


def model_variables(model: keras.Model) -> dict[str, keras.Variable]:
    """Return what is saved of a model, by key."""
    paths = zip(stable_paths(model), model.variables, strict=True)
    saved = [(path, variable) for path, variable in paths if not is_layer_seed(variable)]
    return {f"{_MODEL}{index}:{path}": v for index, (path, v) in enumerate(saved)}


def write_bundle(folder: Path, values: Mapping[str, tf.Tensor]) -> dict[str, Any]:
    """Write values as a tensor bundle; return what a manifest says of them.

    Raises:
        tf.errors.OpError: it cannot be written.
    """
    with tf.device("CPU:0"):
        tf.raw_ops.SaveV2(
            prefix=str(folder / BUNDLE),
            tensor_names=list(values),
            shape_and_slices=[""] * len(values),
            tensors=list(values.values()),
        )
    return {
        key: {"shape": value.shape.as_list(), "dtype": value.dtype.name}
        for key, value in values.items()
    }


def read_model(
    path: Path, progress: Callable[[str], None] = lambda text: None
) -> dict[str, np.ndarray]:
    """Return the model's variables in a checkpoint, by path without counters.

    Args:
        path: the checkpoint's folder.
        progress: takes a short text, often.

    Raises:
        ValueError: the checkpoint is damaged.
    """
    store.verify(path, progress)
    keys = store.read_manifest(path)["variables"]
    reader = tf.train.load_checkpoint(str(path / BUNDLE))
    return {key.split(":", 1)[1]: reader.get_tensor(key) for key in keys if key.startswith(_MODEL)}


def read_section(path: Path, section: str) -> list[np.ndarray]:
    """Return the values of a section besides the model, such as `averages`, in their order.

    Raises:
        ValueError: the checkpoint is damaged.
    """
    store.verify(path)
    keys = [k for k in store.read_manifest(path)["variables"] if k.startswith(f"{section}/")]
    reader = tf.train.load_checkpoint(str(path / BUNDLE))
    return [reader.get_tensor(key) for key in keys]


def restore(
    path: Path,
    variables: Mapping[str, keras.Variable],
    *,
    model_only: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> int:
    """Set all variables to a checkpoint's values, under any strategy.

    Args:
        path: the checkpoint's folder.
        variables: what to set, by key.
        model_only: whether `variables` are those of the model alone.
        progress: takes a short text, often.

    Returns:
        The step of the checkpoint.

    Raises:
        RestoreError: the checkpoint is damaged, or its variables are not those of this model and
            optimizer: the message lists what is missing, extra or of another shape.
    """
    try:
        store.verify(path, progress)
        manifest = store.read_manifest(path)
    except (OSError, ValueError) as error:
        raise RestoreError(f"checkpoint {path}: {error}") from error
    saved = {
        place_of(key): (key, entry)
        for key, entry in manifest.get("variables", {}).items()
        if not model_only or key.startswith(_MODEL)
    }
    wanted = {place_of(key): (key, variable) for key, variable in variables.items()}
    differences = _differences(saved, wanted)
    if differences:
        shown = "\n".join(f"  {line}" for line in differences[:12])
        more = f"\n  and {len(differences) - 12} more" if len(differences) > 12 else ""
        names = ({_name(key) for key, _ in side.values()} for side in (saved, wanted))
        odd = set.symmetric_difference(*names)
        is_rate = bool(odd) and all(name.endswith("/learning_rate") for name in odd)
        hint = "; a constant learning rate is saved, a schedule is not: look at schedule.*"
        raise RestoreError(
            f"checkpoint {path} does not fit this model and optimizer:\n{shown}{more}\n"
            "resume with the configuration and job it was made with, or start a new run"
            f"{hint if is_rate else ''}"
        )
    reader = tf.train.load_checkpoint(str(path / BUNDLE))
    for number, (position, (_, variable)) in enumerate(wanted.items(), 1):
        variable.assign(reader.get_tensor(saved[position][0]))
        progress(f"{number:,} of {len(wanted):,} variables read")
    return int(manifest["step"])


def place_of(key: str) -> str:
    """Return the part of a key that does not depend on the process: section and index."""
    return key.split(":", 1)[0]


def _name(key: str) -> str:
    """Return what a key calls its variable, without what is counted over the process."""
    return _COUNTER.sub("", key.partition(":")[2])


def _differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """List what does not fit: momenta, say, are of the shapes that squared means have."""
    lines = []
    for position in sorted(saved.keys() | wanted.keys()):
        if position not in wanted:
            lines.append(f"only in the checkpoint: {saved[position][0]}")
        elif position not in saved:
            lines.append(f"only in the model: {wanted[position][0]}")
        else:
            entry, variable = saved[position][1], wanted[position][1]
            shape, dtype = list(variable.shape), tf.as_dtype(variable.dtype).name
            if _name(saved[position][0]) != _name(wanted[position][0]):
                lines.append(f"{saved[position][0]} in the checkpoint, {wanted[position][0]} here")
            elif (entry["shape"], entry["dtype"]) != (shape, dtype):
                lines.append(
                    f"{saved[position][0]}: {entry['dtype']} {entry['shape']} in the checkpoint, "
                    f"{dtype} {shape} in the model"
                )
    return lines


def local_value(variable: keras.Variable) -> tf.Tensor:
    """Return the value of a variable on this worker's first replica."""
    return tf.convert_to_tensor(variable.value)
