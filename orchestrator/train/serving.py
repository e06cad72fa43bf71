"""Whether a job can serve its model, and does so as evaluation treats it.

The first is looked at before anything is trained. The second is what a comparison of answers cannot
see: the exported model is compared with the live one, and both answer by `serve`; a `serve` that
leaves dropout on, or forgets to scale its inputs, would agree with itself.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from orchestrator.errors import ExportError, JobError, OrchestratorError
from orchestrator.train.job import Job
from orchestrator.train.report import one_line
from orchestrator.train.sources import Source

# Of the largest input: scaling once in float32 and once in float64 is the same to about 1e-7.
_TOLERANCE = 1e-3


def refuse_unservable(job: Job, source: Source, model: keras.Model) -> None:
    """Trace what the exported model answers.

    Raises:
        JobError: nothing tells what it takes, or `serve` does not take it, or does not give one
            tensor with an answer for each input.
    """
    feature = job.serving_input() or source.features.get("x")
    ways = "write serving_input() and serve() for it, or set export.enabled=false"
    if feature is None:
        raise JobError(
            f"the exported model takes the feature x, and {type(job).__name__} has "
            f"{', '.join(source.features)}: {ways}"
        )
    try:
        dtype = tf.as_dtype(feature.dtype)
        if not (dtype.is_floating or dtype.is_integer or dtype.is_bool):
            raise TypeError("no numbers")
        np.zeros(0, feature.dtype)
    except TypeError as error:
        raise JobError(
            f"the exported model takes {feature}: it is proven on numbers ({error}); {ways}"
        ) from error
    spec = tf.TensorSpec([None, *feature.shape], feature.dtype)
    served = tf.function(lambda inputs: job.serve(model, inputs), autograph=False)
    try:
        answers = served.get_concrete_function(spec).structured_outputs
    except OrchestratorError:
        raise
    except Exception as error:
        raise JobError(
            f"the exported model cannot answer: serve() of {type(job).__name__} fails on {feature} "
            f"alone, {one_line(error)}. What serve() calls, such as prepare(), gets nothing but "
            f"the input: {ways}"
        ) from error
    if not tf.is_tensor(answers) or answers.shape.rank == 0:
        raise JobError(f"serve() gave {answers}: return one tensor, [batch, ...]; {ways}")


class _Watched:
    """Stands in for a model and keeps what it is called with."""

    def __init__(self, model: keras.Model):
        self._model = model
        self.calls: list[tuple[Any, bool]] = []

    @tf.autograph.experimental.do_not_convert
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args[0] if args else None, bool(kwargs.get("training"))))
        return self._model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def check_serving(job: Job, model: keras.Model, inputs: np.ndarray, source: Source) -> None:
    """Let a job's own `serve` answer, and look at what it gives the model.

    A `serve` that asks parts of the model, or takes other inputs than evaluation, is left alone.

    Args:
        job: whose `serve` it is.
        model: the live model.
        inputs: the golden inputs, [batch, ...], which are rows of `source` from the first on.
        source: of the examples.

    Raises:
        ExportError: it calls the model with `training=True`, or with inputs that are not what
            `prepare` makes of these examples.
    """
    if type(job).serve is Job.serve:
        return
    watched = _Watched(model)
    try:
        job.serve(watched, tf.constant(inputs))
    except Exception:
        return  # it wants the real model; what is wrong with it shows there
    if any(training for _, training in watched.calls):
        raise ExportError(
            "serve() calls the model with training=True: dropout would be on, and normalisation "
            "would follow the batch; call it with training=False"
        )
    # Only these two hooks together tell what evaluation gives the model.
    if job.serving_input() is not None or type(job).losses is not Job.losses:
        return
    wanted = _prepared(job, len(inputs), source)
    for given, _ in watched.calls:
        if _is_other(given, wanted):
            raise ExportError(
                f"serve() gives the model inputs {_range(given)}, evaluation gives it "
                f"{_range(wanted)} for the same examples: let it call self.prepare(), as "
                "Job.serve does. If other inputs are meant, say so with serving_input()"
            )


def _prepared(job: Job, num_examples: int, source: Source) -> Any:
    """Return what evaluation gives the model for the golden rows; None if that cannot be told."""
    try:
        rows = source.fetch(np.arange(num_examples, dtype=np.int64) % source.num_examples)
        batch = {name: tf.constant(array) for name, array in rows.items()}
        return job.prepare(batch, training=False, seeds=None)["x"]
    except Exception:
        return None


def _is_other(given: Any, wanted: Any) -> bool:
    """Tell whether two batches of numbers of one shape differ by more than rounding."""
    if not tf.is_tensor(given) or not tf.is_tensor(wanted):
        return False
    if given.shape != wanted.shape or tf.string in (given.dtype, wanted.dtype):
        return False
    one, other = (tf.cast(values, tf.float64).numpy() for values in (given, wanted))
    largest = float(np.max(np.abs(other), initial=0.0))
    apart = float(np.max(np.abs(one - other), initial=0.0))
    return apart > _TOLERANCE * max(largest, 1e-30)


def _range(values: Any) -> str:
    numbers = tf.cast(values, tf.float64).numpy()
    return f"from {numbers.min():.4g} to {numbers.max():.4g}"
