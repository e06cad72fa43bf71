"""Loads a job's data, builds its model and traces what a run does with it, without doing it.

Run as a process, with a pickled (RunPlan, whether the model is wanted) on standard input; the last
thing it writes to standard output is a `Rehearsal` as JSON.
"""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from orchestrator.spec.footprint import Footprint, Rehearsal, Trouble
from orchestrator.spec.footprint import Split as FoundSplit
from orchestrator.spec.plan import RunPlan, split_evenly
from orchestrator.spec.schema import Precision
from orchestrator.train.best import require_metric
from orchestrator.train.checkpoint import named_variables
from orchestrator.train.data import Shard, make_shards
from orchestrator.train.evaluate import Evaluation
from orchestrator.train.freeze import freeze
from orchestrator.train.initial import load_initial
from orchestrator.train.inputs import Resident
from orchestrator.train.job import Job, flatten_groups
from orchestrator.train.liveness import peak_bytes
from orchestrator.train.loading import checked_model, load_job, load_source
from orchestrator.train.optimizer import Optimizers
from orchestrator.train.replica import Replicas
from orchestrator.train.report import one_line, user_frame
from orchestrator.train.serving import refuse_unservable
from orchestrator.train.sources import Source, Split

# A look at a graph that was traced on a CPU: the sizes of tensors are those of a GPU's too.
_DEVICE = "/CPU:0"
_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Rehearse what standard input asks for."""
    start = time.monotonic()
    # Nobody waits for the answer when whoever asked is gone.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # What libraries print must not mix with the answer.
    answer = os.dup(1)
    os.dup2(2, 1)
    plan, with_model = pickle.load(sys.stdin.buffer)
    found: dict[str, Any] = {"splits": [], "troubles": []}
    try:
        _rehearse(plan, with_model, found)
    except BaseException as error:  # also what the user's code raises to leave
        found |= {"error": one_line(error), "user_frame": user_frame(error)}
    found = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
    rehearsal = Rehearsal(**found, wall_s=time.monotonic() - start)
    with os.fdopen(answer, "w") as file:
        json.dump(rehearsal.plain(), file)
    sys.stderr.flush()
    # Not sys.exit: TensorFlow's threads may hold the interpreter for seconds at its end.
    os._exit(0)


def _rehearse(plan: RunPlan, with_model: bool, found: dict[str, Any]) -> None:
    """Fill in what is found, as far as it goes."""
    keras.config.set_floatx("float64" if plan.precision is Precision.float64 else "float32")
    keras.config.set_dtype_policy(plan.precision.value)
    job = load_job(plan)
    source = load_source(job, plan, Split.TRAIN)
    found["splits"].append(_described(Split.TRAIN, source))
    eval_source = load_source(job, plan, Split.EVAL) if plan.eval_steps else None
    if eval_source is not None:
        found["splits"].append(_described(Split.EVAL, eval_source))
    if with_model:
        built = build(plan, job, source)
        found["footprint"] = footprint(plan, job, source, built)
        found["troubles"] += troubles(plan, job, source, eval_source, built)


def _described(split: Split, source: Source) -> FoundSplit:
    tables = source.resident() or {}
    return FoundSplit(
        split=split.value,
        name=source.name,
        origin=source.origin,
        num_examples=source.num_examples,
        digest=source.digest,
        placement=source.placement,
        resident_bytes=sum(table.nbytes for table in tables.values()),
    )


class Built(NamedTuple):
    """A model and its optimizers, on the CPU."""

    strategy: tf.distribute.Strategy
    model: keras.Model
    optimizers: Optimizers


def build(plan: RunPlan, job: Job, source: Source) -> Built:
    """Build a job's model and its optimizers as a run does.

    Raises:
        JobError: the model cannot be trained.
    """
    keras.utils.set_random_seed(plan.config.train.seed % 2**32)
    strategy = tf.distribute.OneDeviceStrategy(_DEVICE)
    with strategy.scope():
        model = checked_model(job, source)
        if plan.config.train.freeze:
            freeze(job, model, plan.config.train.freeze)
        optimizers = Optimizers(plan, job.parameter_groups(model), model)
    return Built(strategy, model, optimizers)


def footprint(plan: RunPlan, job: Job, source: Source, built: Built) -> Footprint:
    """Return what one replica of a job holds, from one trace of its largest share of a step.

    Raises:
        JobError: the losses have the wrong form.
    """
    model, optimizers = built.model, built.optimizers
    (shard,) = make_shards(plan.replica_batch_sizes, range(1))
    step_bytes, is_lower_bound = _traced(plan, job, source, shard, built)
    state = [variable for section in optimizers.variables.values() for variable in section]
    return Footprint(
        num_parameters=model.count_params(),
        model_bytes=_bytes(model.variables),
        optimizer_bytes=_bytes(state),
        gradient_bytes=_bytes(flatten_groups(optimizers.groups)),
        step_bytes=step_bytes,
        is_lower_bound=is_lower_bound,
        micro_batch_size=split_evenly(shard.size, plan.config.train.micro_batches)[0],
        checkpoint_bytes=_bytes(list(named_variables(model, optimizers).values())),
    )


def _traced(
    plan: RunPlan,
    job: Job,
    source: Source,
    shard: Shard,
    built: Built,
) -> tuple[int, bool]:
    """Trace one replica's share of a step; return the bytes its tensors hold at a time."""
    replicas = Replicas(plan, job, built.model, built.optimizers.groups, [shard])
    scale = 1.0 / plan.config.train.global_batch_size

    def share(rows: dict[str, Any]) -> Any:
        found = replicas.share(0, tf.constant(0, tf.int64), rows, scale)
        return [tf.convert_to_tensor(gradient) for gradient in found.gradients], found.sums

    def step(rows: dict[str, Any]) -> Any:
        return built.strategy.run(share, (rows,))

    traced = tf.function(step, autograph=False).get_concrete_function(
        {
            name: tf.TensorSpec([shard.size, *_longest(source, feature.shape)], feature.dtype)
            for name, feature in source.features.items()
        }
    )
    return peak_bytes(traced.graph, traced.outputs)


def _longest(source: Source, shape: Sequence[int | None]) -> list[int | None]:
    """Return a feature's shape, a free axis as long as it can be."""
    longest = source.buckets[-1] if source.buckets else None
    return [longest if size is None else size for size in shape]


def troubles(
    plan: RunPlan, job: Job, source: Source, eval_source: Source | None, built: Built
) -> list[Trouble]:
    """Return what would fail in a run whose steps can be made: before the first, or long after.

    Args:
        plan: of the run.
        job: the user's.
        source: of the training examples.
        eval_source: of those for evaluation, if there is one.
        built: the model; it has the weights of `plan.init_from` afterwards.
    """
    found: list[Trouble] = []

    def attempt(what: str, mend: str, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:
            known = {"error": one_line(error), "user_frame": user_frame(error)}
            found.append(Trouble(what=what, mend=mend, **known))

    init_from = plan.init_from
    if init_from is not None:
        attempt(
            "taking the initial weights",
            "name weights of such a model, or leave train.init_from out",
            lambda: load_initial(Path(init_from), job, built.model),
        )
    if eval_source is not None:
        attempt(
            "the evaluation",
            "mend best.metric, or the job's losses() and metrics(); data.num_eval_examples=0 "
            "evaluates nothing",
            lambda: _evaluate(plan, job, eval_source, built),
        )
    if plan.config.export.enabled:
        attempt(
            "the export",
            "mend the job's serve(), or set export.enabled=false",
            lambda: refuse_unservable(job, eval_source or source, built.model),
        )
    return found


class _OnHost(Resident):
    """Leaves a source's arrays where they are: a trace needs their shapes only."""

    def __init__(self) -> None:
        self.tables = None


def _evaluate(plan: RunPlan, job: Job, source: Source, built: Built) -> None:
    """Trace an evaluation.

    Raises:
        JobError: it has no metric `best.metric`.
    """
    evaluation = Evaluation(plan, job, built.model, built.strategy, range(1), source, _OnHost())
    names = evaluation.metric_names()
    if plan.config.best.metric is not None and names is not None:
        require_metric(plan.config.best.metric, dict.fromkeys(names))


def _bytes(variables: Sequence[Any]) -> int:
    return sum(
        int(tf.TensorShape(variable.shape).num_elements()) * tf.as_dtype(variable.dtype).size
        for variable in variables
    )


if __name__ == "__main__":
    sys.exit(main())
