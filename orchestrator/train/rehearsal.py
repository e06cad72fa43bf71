"""Loads a job's data, builds its model and traces one step of it, without making one.

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
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from orchestrator.spec.footprint import Footprint, Rehearsal
from orchestrator.spec.footprint import Split as FoundSplit
from orchestrator.spec.plan import RunPlan, split_evenly
from orchestrator.spec.schema import Precision
from orchestrator.train.checkpoint import named_variables
from orchestrator.train.data import Shard, make_shards
from orchestrator.train.freeze import freeze
from orchestrator.train.job import Job, flatten_groups
from orchestrator.train.liveness import peak_bytes
from orchestrator.train.loading import checked_model, load_job, load_source
from orchestrator.train.optimizer import Optimizers
from orchestrator.train.replica import Replicas
from orchestrator.train.report import one_line, user_frame
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
    found: dict[str, Any] = {"splits": []}
    try:
        _rehearse(plan, with_model, found)
    except BaseException as error:  # also what the user's code raises to leave
        found |= {"error": one_line(error), "user_frame": user_frame(error)}
    found["splits"] = tuple(found["splits"])
    rehearsal = Rehearsal(**found, wall_s=time.monotonic() - start)
    with os.fdopen(answer, "w") as file:
        json.dump(rehearsal.plain(), file)
    sys.stderr.flush()
    # Not sys.exit: TensorFlow's threads may hold the interpreter for seconds at its end.
    os._exit(0)


def _rehearse(plan: RunPlan, with_model: bool, found: dict[str, Any]) -> None:
    """Fill in what is found, as far as it goes."""
    policy = plan.config.precision.policy
    keras.config.set_floatx("float64" if policy is Precision.float64 else "float32")
    keras.config.set_dtype_policy(policy.value)
    job = load_job(plan)
    source = load_source(job, plan, Split.TRAIN)
    found["splits"].append(_described(Split.TRAIN, source))
    if plan.eval_steps:
        found["splits"].append(_described(Split.EVAL, load_source(job, plan, Split.EVAL)))
    if with_model:
        found["footprint"] = footprint(plan, job, source)


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


def footprint(plan: RunPlan, job: Job, source: Source) -> Footprint:
    """Return what one replica of a job holds, from one trace of its largest share of a step.

    Raises:
        JobError: the model cannot be trained, or its losses have the wrong form.
    """
    keras.utils.set_random_seed(plan.config.train.seed % 2**32)
    strategy = tf.distribute.OneDeviceStrategy(_DEVICE)
    with strategy.scope():
        model = checked_model(job, source)
        if plan.config.train.freeze:
            freeze(job, model, plan.config.train.freeze)
        optimizers = Optimizers(plan, job.parameter_groups(model))
    (shard,) = make_shards(plan.replica_batch_sizes, range(1))
    step_bytes, is_lower_bound = _traced(plan, job, source, model, optimizers, shard, strategy)
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
    model: keras.Model,
    optimizers: Optimizers,
    shard: Shard,
    strategy: tf.distribute.Strategy,
) -> tuple[int, bool]:
    """Trace one replica's share of a step; return the bytes its tensors hold at a time."""
    replicas = Replicas(plan, job, model, optimizers.groups, [shard])
    scale = 1.0 / plan.config.train.global_batch_size

    def share(rows: dict[str, Any]) -> Any:
        found = replicas.share(0, tf.constant(0, tf.int64), rows, scale)
        return [tf.convert_to_tensor(gradient) for gradient in found.gradients], found.sums

    def step(rows: dict[str, Any]) -> Any:
        return strategy.run(share, (rows,))

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


def _bytes(variables: Sequence[Any]) -> int:
    return sum(
        int(tf.TensorShape(variable.shape).num_elements()) * tf.as_dtype(variable.dtype).size
        for variable in variables
    )


if __name__ == "__main__":
    sys.exit(main())
