"""`python -m orchestrator.train.convert`: weights between a checkpoint and Keras's own file.

Everything must fit: a conversion that leaves something out would be found much later.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from orchestrator.errors import OrchestratorError, RestoreError, StorageError
from orchestrator.train import store
from orchestrator.train.checkpoint import local_value, model_variables, restore, write_bundle
from orchestrator.train.loading import make_job
from orchestrator.train.rename import flush, remove

_KERAS_FILE = ".weights.h5"


def main(argv: list[str]) -> int:
    """Convert as an order in JSON says; return the exit code."""
    order = json.loads(argv[0])
    try:
        print(_convert(order))
    except OrchestratorError as error:
        print(error)
        return int(error.exit_code)
    return 0


def _convert(order: dict[str, Any]) -> str:
    """Return what was done.

    Raises:
        RestoreError: the weights do not fit the model.
        StorageError: they cannot be written.
    """
    source, target = Path(order["source"]), Path(order["target"])
    keras.config.set_dtype_policy(order["policy"])
    job = make_job(order["class_name"], order["args"], order["data_path"], order["data_dir"])
    model = job.model()
    # A folder that is named after a step must hold it.
    step = store.step_of(target) if store.is_checkpoint_name(target.name) else 0
    if source.name.endswith(_KERAS_FILE):
        try:
            model.load_weights(str(source))
        except (OSError, ValueError, KeyError) as error:
            raise RestoreError(
                f"{source} does not fit the model of {order['class_name']}: {error}"
            ) from error
    else:
        found = restore(source, model_variables(model), model_only=True)
        step = step or found
    try:
        _write(model, source, target, step)
    except (OSError, tf.errors.OpError) as error:
        raise StorageError(f"cannot write {target}: {error}") from error
    return (
        f"{target}: {len(model_variables(model))} variables, {model.count_params():,} parameters "
        f"of {source}"
    )


def _write(model: keras.Model, source: Path, target: Path, step: int) -> None:
    """Write aside, flush, rename."""
    aside = target.with_name(f".{os.getpid()}-{target.name}")
    if target.name.endswith(_KERAS_FILE):
        try:
            model.save_weights(str(aside))
            flush(aside)
            aside.rename(target)
            flush(target.parent)
        finally:
            remove(aside)
        return
    try:
        aside.mkdir()
        values = {key: local_value(variable) for key, variable in model_variables(model).items()}
        manifest = {
            "step": step,
            "converted_from": str(source),
            "time": time.time(),
            "variables": write_bundle(aside, values),
        }
        store.commit(aside, target, manifest)
    finally:
        remove(aside)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
