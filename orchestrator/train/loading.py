"""The user's class, its data and its model: loaded, and refused when they cannot be trained."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import keras

from orchestrator.errors import JobError
from orchestrator.spec.plan import RunPlan
from orchestrator.spec.secrets import masked
from orchestrator.train.job import Job, translated
from orchestrator.train.sources import Source, Split
from orchestrator.train.streams import StreamSource


def load_job(plan: RunPlan) -> Job:
    """Import the user's class and make the job.

    Raises:
        JobError: it is not a subclass of Job, or does not accept `job.args`.
    """
    config = plan.config.job
    return make_job(config.class_name, config.args, plan.data_path, plan.data_dir)


def make_job(
    dotted_name: str, args: Mapping[str, Any], data_path: str | None, data_dir: str
) -> Job:
    """Import a user's class and make the job.

    Args:
        dotted_name: of the class.
        args: of its constructor.
        data_path: the user's own copy of the data, or None.
        data_dir: where downloads are kept.

    Raises:
        JobError: it is not a subclass of Job, or does not accept its arguments or the data's place.
    """
    module_name, _, class_name = dotted_name.rpartition(".")
    module = importlib.import_module(module_name)
    job_class = getattr(module, class_name, None)
    if not (isinstance(job_class, type) and issubclass(job_class, Job)):
        raise JobError(
            f"job.class_name={dotted_name} in {module.__file__} is not a subclass of "
            "orchestrator.train.job.Job"
        )
    try:
        job = job_class(**args)
    except TypeError as error:
        raise JobError(f"{class_name}(**job.args) with job.args={masked(args)}: {error}") from error
    try:
        job.data_path = data_path
        job.data_dir = data_dir
    except AttributeError as error:
        raise JobError(
            f"{class_name} cannot be told where its data is: {error}; a job that is a dataclass "
            "is not frozen"
        ) from error
    return translated(job)


def load_source(job: Job, plan: RunPlan, split: Split, worker: int = 0) -> Source:
    """Open a split and compare it with what was planned.

    Raises:
        JobError: the split is not a Source, or has another number of examples than the plan; or it
            is a stream where none can be.
    """
    source = job.source(split)
    if not isinstance(source, Source):
        raise JobError(
            f"source({split.name}) returned {type(source).__name__}; return a Source, such as "
            "ArraySource({'x': ..., 'y': ...})"
        )
    training = split is Split.TRAIN
    key = "num_examples" if training else "num_eval_examples"
    planned = getattr(plan.config.data, key)
    if isinstance(source, StreamSource):
        _refuse_stream(plan, split)
        replicas = plan.worker_replicas(worker)
        source.open(replicas, plan.num_replicas, plan.config.train.seed, planned)
    if source.num_examples != planned:
        raise JobError(
            f"data.{key}={planned} but source({split.name}) has {source.num_examples} examples "
            f"({source.origin}); the plan was made for the former: set data.{key}="
            f"{source.num_examples}, or look at the data"
        )
    return source


def _refuse_stream(plan: RunPlan, split: Split) -> None:
    """Refuse a stream where every number of replicas must see the same examples."""
    if split is Split.EVAL:
        raise JobError(
            "source(EVAL) returned a stream; an evaluation counts every example exactly once, so "
            "it needs random access: return an ArraySource or a RecordSource, or set "
            "data.num_eval_examples=0"
        )
    if plan.config.strategy.min_workers not in (None, plan.config.strategy.num_workers):
        raise JobError(
            f"strategy.min_workers={plan.config.strategy.min_workers} with a stream as source("
            "TRAIN): a stream is not elastic, as the number of replicas decides which examples a "
            "step sees; set strategy.min_workers=null, or return a source of random access"
        )
    if plan.verifying:
        raise JobError(
            "source(TRAIN) returned a stream; verify compares runs of the same examples, and a "
            "stream gives others to another number of replicas: verify the job with an "
            "ArraySource of some of them"
        )


def checked_model(job: Job, source: Source) -> keras.Model:
    """Build the model and make sure that it can be trained.

    Raises:
        JobError: it is no Keras 3 model, has no variables yet, or none to train.
    """
    model: Any = job.model()
    name = type(job).__name__
    if not isinstance(model, keras.Model):
        raise JobError(
            f"{name}.model() returned {type(model).__module__}.{type(model).__qualname__}; "
            "return a keras.Model (Keras 3, not tf_keras)"
        )
    if not model.built or not model.variables:
        raise JobError(
            f"{name}.model() returned a model that is not built: it has no variables yet. Call it "
            f"on an example batch before returning it, such as {_example_call(source)}"
        )
    if not model.trainable_variables:
        raise JobError(f"{name}.model() returned a model without trainable variables")
    return model


def _example_call(source: Source) -> str:
    feature = source.features.get("x") or next(iter(source.features.values()))
    shape = ", ".join(map(str, (1, *feature.shape)))
    return f"model(keras.ops.zeros(({shape}), '{feature.dtype}'))"
