"""The trained model as a SavedModel with one raw input, and the live model's answers as proof."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from orchestrator.errors import ExportError, RestoreError, StorageError
from orchestrator.spec.paths import RunPaths
from orchestrator.train.averages import Averages
from orchestrator.train.checkpoint import model_variables, read_section, restore
from orchestrator.train.job import Job
from orchestrator.train.rename import put_in_place
from orchestrator.train.saver import require_staging
from orchestrator.train.serving import check_serving
from orchestrator.train.sources import Feature, Source
from orchestrator.train.store import step_of

# The proof compares answers at batch sizes up to this.
_GOLDEN_EXAMPLES = 64
# What rounding explains, of the largest answer, by what the model computes in. Other batch sizes
# take other kernels, which sum in another order: some hundred roundings of float32's 1.2e-7 each.
# Of bfloat16's 4e-3 and float16's 5e-4 only the last few are left in an answer.
_TOLERANCES = {"float64": 1e-4, "float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-3}
_UNTRACKED = re.compile(r"Trackable referencing this tensor = <?([^>]*)")


@dataclass(frozen=True, slots=True)
class Signature:
    """Dtype and shape, batch first and free, of the served input and output."""

    input_dtype: str
    input_shape: tuple[int | None, ...]
    output_dtype: str
    output_shape: tuple[int | None, ...]


class _Served(tf.Module):
    """What the SavedModel holds: one function of raw inputs and the variables it reads."""

    def __init__(self, job: Job, model: keras.Model, spec: tf.TensorSpec):
        super().__init__()
        # Only the variables are tracked: Keras layers would bring functions of their own along.
        self.state = [variable.value for variable in model.variables]
        # An attribute, because a method of the class could not have this job's signature.
        self.__call__ = tf.function(
            lambda inputs: _plain_float(job.serve(model, inputs)), input_signature=[spec]
        )


def _plain_float(answers: tf.Tensor) -> tf.Tensor:
    """Return half-precision answers as float32: JSON, NumPy and MLflow know no bfloat16."""
    if tf.is_tensor(answers) and answers.dtype in (tf.bfloat16, tf.float16):
        return tf.cast(answers, tf.float32)
    return answers


def export_model(
    job: Job,
    model: keras.Model,
    source: Source,
    paths: RunPaths,
    staging_dir: Path,
    *,
    checkpoint: Path | None = None,
    averages: Averages | None = None,
    variables: Mapping[str, keras.Variable] | None = None,
) -> Signature:
    """Write the SavedModel and the golden batch.

    The SavedModel is made of a second model outside the strategy, so that it is the same whatever
    the strategy was. The golden answers are the live model's, which takes the weights of a
    checkpoint or the averages by the ways that training has for them: what goes wrong on one way
    is seen by the other.

    Args:
        job: whose `serve` the SavedModel answers with.
        model: the live model; with a checkpoint it has that one's weights afterwards.
        source: where golden inputs come from when `serve` takes feature `x`.
        paths: of the run.
        staging_dir: where it is written first. The driver has made it, and takes it away from an
            attempt that is over.
        checkpoint: whose weights are exported; None for those of this moment.
        averages: export these, of the checkpoint or of this moment, instead of the weights.
        variables: everything that a checkpoint restores, by key; goes with `checkpoint`.

    Raises:
        ExportError: the checkpoint cannot be read, or `serve` does not take one tensor and give
            one tensor with a free batch, treats the model as evaluation does not, or needs what
            a SavedModel would not hold.
        StorageError: it cannot be written.
    """
    twin = job.model()
    if checkpoint is None:
        for copy, original in zip(twin.variables, model.variables, strict=True):
            copy.assign(tf.convert_to_tensor(original.value))
    else:
        _load(checkpoint, twin)
        _go_back(checkpoint, variables or {})
    if averages is not None:
        _take_averages(twin, model, averages, checkpoint)
    feature, inputs = _golden_inputs(job, source)
    with averages.in_place() if averages is not None else nullcontext():
        check_serving(job, model, inputs, source)
        answers = _plain_float(job.serve(model, tf.constant(inputs)))
    if not tf.is_tensor(answers) or answers.shape.rank == 0 or answers.shape[0] != len(inputs):
        found = getattr(answers, "shape", type(answers).__name__)
        raise ExportError(
            f"serve() gave {found} for {len(inputs)} inputs: return one tensor, [batch, ...]"
        )
    spec = tf.TensorSpec([None, *feature.shape], feature.dtype, name="inputs")
    try:
        staged = RunPaths(staging_dir)
        staged.export_dir.mkdir()
        _save(_Served(job, twin, spec), spec, staged.saved_model_dir)
        tolerance = _TOLERANCES[keras.config.dtype_policy().compute_dtype]
        np.savez(staged.golden, inputs=inputs, outputs=answers.numpy(), tolerance=tolerance)
        require_staging(staging_dir)
        put_in_place(staged.export_dir, paths.export_dir)
    except (OSError, tf.errors.OpError) as error:
        raise StorageError(
            f"cannot write the export {paths.export_dir}: {error}; the checkpoints are whole: "
            "make room and resume the run"
        ) from error
    return Signature(
        input_dtype=feature.dtype,
        input_shape=(None, *feature.shape),
        output_dtype=answers.dtype.name,
        output_shape=(None, *answers.shape[1:].as_list()),
    )


def _save(served: _Served, spec: tf.TensorSpec, folder: Path) -> None:
    """Write the SavedModel.

    Raises:
        ExportError: it would lack something that `serve` needs.
    """
    signature = tf.function(
        lambda inputs: {"outputs": served.__call__(inputs)}, input_signature=[spec]
    )
    signature.get_concrete_function()  # what fails here is the job's own code
    try:
        tf.saved_model.save(served, str(folder), {"serving_default": signature})
    except AssertionError as error:  # tensorflow 2.21, saved_model/save.py, untracked resources
        if "untracked" not in str(error):
            raise
        found = _UNTRACKED.search(str(error))
        raise ExportError(
            f"serve() uses {found[1] if found else 'a resource'}, which is none of the model's "
            "variables: neither checkpoints nor the exported model hold it. Make it a weight of "
            "the model or of one of its layers (add_weight), or a constant"
        ) from error


def _load(checkpoint: Path, twin: keras.Model) -> None:
    """Give the twin of the trained model the weights that a checkpoint holds."""
    try:
        restore(checkpoint, model_variables(twin), model_only=True)
    except RestoreError as error:
        raise _unreadable(error) from error


def _take_averages(
    twin: keras.Model, model: keras.Model, averages: Averages, checkpoint: Path | None
) -> None:
    """Give the twin the averages of a checkpoint, or of this moment, for weights."""
    if checkpoint is not None:
        values: list[Any] = read_section(checkpoint, "averages")
    else:
        values = [tf.convert_to_tensor(variable.value) for variable in averages.variables]
    place = {id(variable): index for index, variable in enumerate(model.variables)}
    for weight, value in zip(averages.weights, values[1:], strict=True):  # the first one counts
        twin.variables[place[id(weight)]].assign(value)


def _go_back(checkpoint: Path, variables: Mapping[str, keras.Variable]) -> None:
    """Give the live model, and the averages, what a checkpoint holds: as a resumed run does."""
    try:
        step = restore(checkpoint, variables)
    except RestoreError as error:
        raise _unreadable(error) from error
    if step != step_of(checkpoint):
        raise ExportError(f"{checkpoint} holds step {step:,}: the folder was renamed or replaced")


def _unreadable(error: RestoreError) -> ExportError:
    return ExportError(
        f"export.weights=best: {error}\nexport the last ones with export.weights=last"
    )


def _golden_inputs(job: Job, source: Source) -> tuple[Feature, np.ndarray]:
    """Return what `serve` takes and a batch of it: rows of the data, else noise."""
    feature = job.serving_input()
    if feature is None:
        indices = np.arange(_GOLDEN_EXAMPLES, dtype=np.int64) % source.num_examples
        return source.features["x"], source.fetch(indices)["x"]
    shape = [_GOLDEN_EXAMPLES, *(size or 1 for size in feature.shape)]
    noise = np.random.default_rng(0).standard_normal(shape)
    return feature, noise.astype(feature.dtype)
