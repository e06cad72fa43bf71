"""Proves an export in a process without the project's code, and packages it for MLflow.

Run by path with the export folder as argument. Whoever serves the model has TensorFlow and MLflow
and nothing of the project; so does this process, and it imports nothing of it.

It compares the packaged model's answers with those of the live model, kept in `golden.npz`, and
writes `proof.json` beside it. Only a model that passes is left in `mlflow_model/`.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np

# Where all answers are smaller, what they were summed from may be larger than they are, and so is
# its rounding: no more than float32's, 1e-7 of one, is asked for.
_SMALLEST = 1e-3
_BATCH_SIZES = (1, 7, 64)
_WHOLE = 64
_TIMED_SIZES = (1, 64)
_TIMED_CALLS = 11
_INPUT, _OUTPUT = "inputs", "outputs"


class Refused(Exception):
    """The exported model is not what it should be."""


def main(argv: list[str]) -> int:
    """Prove and package the export in the folder `argv[0]`; the proof says how it went."""
    export_dir = Path(argv[0])
    proof: dict[str, Any] = {"passed": False}
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
    gc.disable()  # nothing of it is garbage, and to look for some takes a fifth of the time
    import mlflow
    import tensorflow as tf

    _ = (mlflow.pyfunc.load_model, mlflow.tensorflow.save_model)  # loaded when first used
    gc.enable()

    with np.load(export_dir / "golden.npz") as golden:
        inputs, outputs = golden["inputs"], golden["outputs"]
        tolerance = float(golden["tolerance"])
    saved_model = export_dir / "saved_model"
    loaded = tf.saved_model.load(str(saved_model))
    signature = loaded.signatures["serving_default"]

    def answer(batch: np.ndarray) -> np.ndarray:
        answers: np.ndarray = signature(**{_INPUT: tf.constant(batch)})[_OUTPUT].numpy()
        return answers

    difference = _compare(answer, inputs, outputs, tolerance)
    figures = {f"latency_{size}_ms": _latency_ms(answer, inputs[:size]) for size in _TIMED_SIZES}
    _package(loaded, package, inputs, outputs)
    packaged = mlflow.pyfunc.load_model(str(package))
    difference = max(difference, _compare(packaged.predict, inputs, outputs, tolerance))
    size_bytes = sum(path.stat().st_size for path in saved_model.rglob("*") if path.is_file())
    return {
        "time": time.time(),
        "batch_sizes": _BATCH_SIZES,
        "max_difference": difference,
        "tolerance": tolerance,
        "size_bytes": size_bytes,
        **figures,
    }


def _compare(answer: Any, inputs: np.ndarray, outputs: np.ndarray, tolerance: float) -> float:
    """Return the largest difference of the answers at several batch sizes, relative to the largest.

    Args:
        answer: takes a batch.
        inputs: the golden batch.
        outputs: the live model's answers to it.
        tolerance: of the largest answer, what rounding explains.

    Raises:
        Refused: an answer has another dtype or shape, or differs by more than the tolerance.
    """
    given = {size: _ask(answer, inputs[:size]) for size in _BATCH_SIZES}
    for size, answers in given.items():
        wanted = outputs[:size]
        if answers.shape != wanted.shape:
            raise Refused(f"it answers {answers.shape} for a batch of {size}, not {wanted.shape}")
        if answers.dtype != wanted.dtype:
            raise Refused(f"it answers {answers.dtype}, the live model {wanted.dtype}")
    whole, scale = given[_WHOLE], _largest(outputs)
    again = _difference(_ask(answer, inputs[:_WHOLE]), whole, scale)
    if not again <= tolerance:
        raise Refused(
            f"asked twice, its answers differ by {again:.2g} of the largest one: something random "
            "is on, such as dropout; serve() must call the model with training=False"
        )
    for size, answers in given.items():
        apart = _difference(answers, whole[:size], scale)
        if not apart <= tolerance:
            raise Refused(
                f"its answer to an example depends on the others of its batch: by {apart:.2g} of "
                f"the largest answer between batches of {size} and {_WHOLE}; serve() must call "
                "the model with training=False, or normalisation takes the batch's statistics"
            )
    differences = {
        size: _difference(answers, outputs[:size], scale) for size, answers in given.items()
    }
    size = max(differences, key=lambda size: differences[size])
    if not differences[size] <= tolerance:
        raise Refused(
            f"at batch size {size} it differs from the live model by {differences[size]:.2g} of "
            f"the largest answer; at most {tolerance:g} is explained by rounding. It has other "
            "weights than the live model, or prepares its inputs otherwise"
        )
    return differences[size]


def _ask(answer: Any, batch: np.ndarray) -> np.ndarray:
    try:
        return np.asarray(answer(batch))
    except Exception as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise Refused(
            f"it takes no batch of {len(batch)}: the batch dimension must be free in serve() and "
            f"in the model. {said[0][:200]}"
        ) from error


def _largest(outputs: np.ndarray) -> float:
    """Return what differences are measured by: the largest answer, if it is not a tiny one."""
    finite = np.abs(outputs.astype(np.float64))
    return max(_SMALLEST, float(np.max(finite, initial=0.0, where=np.isfinite(finite))))


def _difference(given: np.ndarray, wanted: np.ndarray, scale: float) -> float:
    """Return the largest difference, in units of `scale`; NaN is equal to NaN."""
    one, other = given.astype(np.float64), wanted.astype(np.float64)
    same = (one == other) | (np.isnan(one) & np.isnan(other))
    with np.errstate(invalid="ignore"):
        apart = np.where(same, 0.0, np.abs(one - other))
    apart = np.where(np.isnan(apart), np.inf, apart)
    return float(np.max(apart, initial=0.0)) / scale


def _latency_ms(answer: Any, batch: np.ndarray) -> float:
    """Return the median time of an answer, in ms, once everything is warm."""
    times = []
    for _ in range(_TIMED_CALLS):
        start = time.perf_counter()
        answer(batch)
        times.append(time.perf_counter() - start)
    return 1000 * sorted(times)[len(times) // 2]


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
        input_example=inputs[:1],
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
