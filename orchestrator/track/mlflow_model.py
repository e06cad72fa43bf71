"""Proves an export in a process without the project's code, and packages it for MLflow.

Run by path with the export folder as argument. Whoever serves the model has TensorFlow and MLflow
and nothing of the project; so does this process, and it imports nothing of it.

It compares the packaged model's answers with those of the live model, kept in `golden.npz`, and
writes `proof.json` beside it. Only a model that passes is left in `mlflow_model/`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np

# Of the largest answer. Other batch sizes take other kernels, which sum in another order: some
# hundred float32 roundings of 1.2e-7 each.
TOLERANCE = 1e-4
_BATCH_SIZES = (1, 7, 64)
_INPUT, _OUTPUT = "inputs", "outputs"


class Refused(Exception):
    """The exported model is not what it should be."""


def main(argv: list[str]) -> int:
    """Prove and package the export in the folder `argv[0]`; the proof says how it went."""
    export_dir = Path(argv[0])
    proof: dict[str, Any] = {"passed": False, "tolerance": TOLERANCE}
    package = export_dir / "mlflow_model"
    shutil.rmtree(package, ignore_errors=True)
    try:
        proof |= _prove(export_dir, package)
        proof["passed"] = True
    except Refused as error:
        proof["error"] = str(error)
    except Exception as error:
        traceback.print_exc()
        proof["error"] = f"{type(error).__name__}: {error}"
    if not proof["passed"]:
        shutil.rmtree(package, ignore_errors=True)
    _write(export_dir / "proof.json", proof)
    return 0 if proof["passed"] else 1


def _prove(export_dir: Path, package: Path) -> dict[str, Any]:
    import tensorflow as tf

    with np.load(export_dir / "golden.npz") as golden:
        inputs, outputs = golden["inputs"], golden["outputs"]
    loaded = tf.saved_model.load(str(export_dir / "saved_model"))
    signature = loaded.signatures["serving_default"]

    def answer(batch: np.ndarray) -> np.ndarray:
        answers: np.ndarray = signature(**{_INPUT: tf.constant(batch)})[_OUTPUT].numpy()
        return answers

    difference = _compare(answer, inputs, outputs)
    _package(loaded, package, inputs, outputs)

    import mlflow

    packaged = mlflow.pyfunc.load_model(str(package))
    difference = max(difference, _compare(packaged.predict, inputs, outputs))
    return {"max_difference": difference, "batch_sizes": _BATCH_SIZES}


def _compare(answer: Any, inputs: np.ndarray, outputs: np.ndarray) -> float:
    """Return the largest difference of the answers at several batch sizes, relative to the largest.

    Raises:
        Refused: an answer has another shape, or differs by more than the tolerance.
    """
    scale = max(1.0, float(np.max(np.abs(outputs.astype(np.float64)), initial=0.0)))
    largest = 0.0
    for size in _BATCH_SIZES:
        given = np.asarray(answer(inputs[:size]))
        wanted = outputs[:size]
        if given.shape != wanted.shape:
            raise Refused(f"it answers {given.shape} for a batch of {size}, not {wanted.shape}")
        apart = np.abs(given.astype(np.float64) - wanted.astype(np.float64))
        # What is not a number in the live model's answer may be none here either.
        apart = np.where(np.isnan(wanted) & np.isnan(given), 0.0, apart)
        difference = float(np.max(apart, initial=0.0)) / scale
        if not difference <= TOLERANCE:
            raise Refused(
                f"at batch size {size} it differs from the live model by {difference:.2g} of the "
                f"largest answer; at most {TOLERANCE:g} is explained by rounding"
            )
        largest = max(largest, difference)
    return largest


def _package(loaded: Any, package: Path, inputs: np.ndarray, outputs: np.ndarray) -> None:
    """Write the MLflow model: the SavedModel with a tensor signature for raw inputs."""
    import mlflow
    import tensorflow as tf
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    def schema(array: np.ndarray, name: str | None) -> Schema:
        return Schema([TensorSpec(array.dtype, (-1, *array.shape[1:]), name)])

    # MLflow takes a tf.Module; what TensorFlow loads is none.
    module = tf.Module()
    module.loaded = loaded
    module.__call__ = loaded.__call__
    mlflow.tensorflow.save_model(
        module,
        str(package),
        signature=ModelSignature(inputs=schema(inputs, None), outputs=schema(outputs, None)),
        # Given, because finding them out loads the model once more and takes 9 s.
        pip_requirements=[f"mlflow=={mlflow.__version__}", f"tensorflow=={tf.__version__}"],
        saved_model_kwargs={"signatures": dict(loaded.signatures)},
    )


def _write(path: Path, proof: dict[str, Any]) -> None:
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(proof, indent=1))
    os.replace(beside, path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
