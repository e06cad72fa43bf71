"""The whole life of a worker, top to bottom."""

from __future__ import annotations

import importlib
import inspect
import os
import socket
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from orchestrator.errors import JobError
from orchestrator.spec.messages import (
    DataUsed,
    Ended,
    Exported,
    Message,
    Notice,
    Outcome,
    Phase,
    Ready,
    Request,
    WorkerOrder,
)
from orchestrator.spec.plan import RunPlan
from orchestrator.train import datasets
from orchestrator.train.checkpoint import Saver, named_variables, restore
from orchestrator.train.data import Feeder, Order, make_shards
from orchestrator.train.devices import build_strategy, configure_devices, overrule_keras_settings
from orchestrator.train.evaluate import Evaluation
from orchestrator.train.export import export_model
from orchestrator.train.job import Job, translated
from orchestrator.train.loop import Agreement, Loop, Parts, Wish
from orchestrator.train.optimizer import Optimizers
from orchestrator.train.report import Reporter
from orchestrator.train.sources import Source, Split
from orchestrator.train.step import Resident, TrainStep


def run(
    order: WorkerOrder,
    send: Callable[[Message], None],
    pending: Callable[[], set[Request]],
) -> int:
    """Train as one worker of a plan.

    Never raises: what goes wrong is told as a `Failed` message.

    Args:
        order: which worker of which plan this process is.
        send: takes messages for the driver; may be called from several threads.
        pending: returns and clears the requests that arrived since it was called last.

    Returns:
        The exit status of the process: 0 if the worker ended well.
    """
    reporter = Reporter(order, send)
    try:
        _live(order, reporter, pending)
    except BaseException as error:  # also KeyboardInterrupt and SystemExit from user code
        reporter.failed(error)
        return 1
    return 0


def _live(order: WorkerOrder, reporter: Reporter, pending: Callable[[], set[Request]]) -> None:
    plan, is_chief = order.plan, order.worker == 0
    devices = configure_devices(order)
    overruled = overrule_keras_settings()
    if is_chief and overruled:
        reporter.tell(Notice, text=overruled)
    reporter.enter(Phase.connecting, ", ".join(devices))
    strategy = build_strategy(order, devices)

    reporter.enter(Phase.loading_data)
    datasets.set_reporter(reporter.progress, lambda text: reporter.tell(Notice, text=text))
    job = load_job(plan)
    reporter.log(f"job {plan.config.job.class_name} from {inspect.getfile(type(job))}")
    train_source = load_source(job, plan, Split.TRAIN)
    eval_source = load_source(job, plan, Split.EVAL) if plan.eval_steps else None
    for split, source in ((Split.TRAIN, train_source), (Split.EVAL, eval_source)):
        if source is not None and is_chief:
            _tell_data(reporter, split, source)

    reporter.enter(Phase.building)
    keras.utils.set_random_seed(plan.config.train.seed % 2**32)
    with strategy.scope():
        model = checked_model(job, train_source)
        optimizers = Optimizers(plan, job.parameter_groups(model))
    variables = named_variables(model, optimizers)
    start_step = 0
    if order.restore_from is not None:
        reporter.enter(Phase.restoring, order.restore_from)
        start_step = restore(Path(order.restore_from), variables)
    reporter.step = start_step
    _tell_ready(order, reporter, devices, model, start_step)

    shards = make_shards(plan.replica_batch_sizes, plan.worker_replicas(order.worker))
    resident = Resident(train_source, devices)
    train = plan.config.train
    feeder = Feeder(
        train_source,
        Order(train.seed, train_source.num_examples),
        shards,
        train.global_batch_size,
        resident=resident.tables is not None,
    )
    evaluation = None
    if eval_source is not None:
        evaluation = Evaluation(
            plan,
            job,
            model,
            strategy,
            plan.worker_replicas(order.worker),
            eval_source,
            Resident(eval_source, devices),
        )
    saver = None
    if is_chief:
        saver = Saver(
            plan.paths,
            order.attempt,
            variables,
            keep=plan.config.checkpoint.keep,
            facts={"run": plan.run, "attempt": order.attempt, "versions": _versions()},
            announce=reporter.tell,
        )
    agreement = Agreement(strategy, plan, order.worker)
    loop = Loop(
        Parts(
            plan=plan,
            worker=order.worker,
            step=TrainStep(plan, job, model, optimizers, strategy, shards, train_source, resident),
            evaluation=evaluation,
            feeder=feeder,
            optimizers=optimizers,
            saver=saver,
            agreement=agreement,
            reporter=reporter,
            pending=pending,
        )
    )
    outcome, step = loop.run(start_step)
    feeder.close()

    if saver is not None:
        reporter.enter(Phase.saving)
        saver.close()
    if is_chief and outcome is Outcome.completed and plan.config.export.enabled:
        _export(reporter, job, model, eval_source or train_source, plan)
    # A worker that leaves early is a lost peer to the others.
    reporter.enter(Phase.ending)
    agreement.decide(Wish())
    reporter.tell(Ended, step=step, outcome=outcome)


def load_job(plan: RunPlan) -> Job:
    """Import the user's class and make the job.

    Raises:
        JobError: it is not a subclass of Job, or does not accept `job.args`.
    """
    config = plan.config.job
    module_name, _, class_name = config.class_name.rpartition(".")
    module = importlib.import_module(module_name)
    job_class = getattr(module, class_name, None)
    if not (isinstance(job_class, type) and issubclass(job_class, Job)):
        raise JobError(
            f"job.class_name={config.class_name} in {module.__file__} is not a subclass of "
            "orchestrator.train.job.Job"
        )
    try:
        job = job_class(**config.args)
    except TypeError as error:
        raise JobError(f"{class_name}(**job.args) with job.args={config.args}: {error}") from error
    job.data_path = plan.data_path
    job.data_dir = plan.data_dir
    return translated(job)


def load_source(job: Job, plan: RunPlan, split: Split) -> Source:
    """Open a split and compare it with what was planned.

    Raises:
        JobError: the split is not a Source, or has another number of examples than the plan.
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
    if source.num_examples != planned:
        raise JobError(
            f"data.{key}={planned} but source({split.name}) has {source.num_examples} examples "
            f"({source.origin}); the plan was made for the former: set data.{key}="
            f"{source.num_examples}, or look at the data"
        )
    return source


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


def _export(
    reporter: Reporter, job: Job, model: keras.Model, source: Source, plan: RunPlan
) -> None:
    reporter.enter(Phase.exporting)
    start = reporter.clock()
    signature = export_model(job, model, source, plan.paths)
    reporter.tell(
        Exported,
        step=reporter.step,
        path=str(plan.paths.saved_model_dir),
        input_dtype=signature.input_dtype,
        input_shape=signature.input_shape,
        output_dtype=signature.output_dtype,
        output_shape=signature.output_shape,
        wall_s=reporter.clock() - start,
    )


def _tell_data(reporter: Reporter, split: Split, source: Source) -> None:
    features = {name: str(feature) for name, feature in source.features.items()}
    reporter.tell(
        DataUsed,
        split=split.name.lower(),
        name=source.name,
        source=source.origin,
        digest=source.digest,
        num_examples=source.num_examples,
        features=features,
    )


def _tell_ready(
    order: WorkerOrder,
    reporter: Reporter,
    devices: list[str],
    model: keras.Model,
    start_step: int,
) -> None:
    plan = order.plan
    reporter.log(
        f"worker {order.worker} of {plan.num_workers}: {', '.join(devices)}, "
        f"{plan.cpus_per_worker} CPU thread(s), "
        f"CUDA_VISIBLE_DEVICES={order.visible_gpus!r}, {plan.config.strategy.name.value}"
    )
    replicas = plan.worker_replicas(order.worker)
    reporter.tell(
        Ready,
        host=socket.gethostname(),
        pid=os.getpid(),
        devices=tuple(devices),
        cpu_threads=plan.cpus_per_worker,
        replica_batch_sizes=tuple(plan.replica_batch_sizes[r] for r in replicas),
        num_parameters=model.count_params(),
        start_step=start_step,
        restored_from=order.restore_from,
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    return {"tensorflow": tf.__version__, "keras": keras.__version__, "numpy": version("numpy")}
