"""The whole life of a worker, top to bottom."""

from __future__ import annotations

import inspect
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

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
    Substituted,
    WorkerOrder,
)
from orchestrator.spec.plan import RunPlan
from orchestrator.train import datasets
from orchestrator.train.checkpoint import Saver, named_variables, restore
from orchestrator.train.data import Feeder, Order, make_shards
from orchestrator.train.devices import build_strategy, configure_devices, overrule_keras_settings
from orchestrator.train.evaluate import Evaluation
from orchestrator.train.export import export_model
from orchestrator.train.inputs import Resident
from orchestrator.train.job import Job
from orchestrator.train.loading import checked_model, load_job, load_source
from orchestrator.train.loop import Agreement, Loop, Parts, Wish
from orchestrator.train.optimizer import Optimizers
from orchestrator.train.report import Reporter
from orchestrator.train.sources import Source, Split
from orchestrator.train.step import TrainStep
from orchestrator.train.substitutions import substitute


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


@dataclass(frozen=True, slots=True)
class _Made:
    """What a worker has once its devices, data and model are there."""

    devices: list[str]
    strategy: tf.distribute.Strategy
    job: Job
    train_source: Source
    eval_source: Source | None
    model: keras.Model
    optimizers: Optimizers
    variables: dict[str, Any]


def _live(order: WorkerOrder, reporter: Reporter, pending: Callable[[], set[Request]]) -> None:
    plan, is_chief = order.plan, order.worker == 0
    made = _make(order, reporter)
    start_step = 0
    if order.restore_from is not None:
        reporter.enter(Phase.restoring, order.restore_from)
        start_step = restore(Path(order.restore_from), made.variables)
    reporter.step = start_step
    _tell_ready(order, reporter, made.devices, made.model, start_step)

    parts = _assemble(order, reporter, pending, made)
    outcome, step = Loop(parts).run(start_step)
    parts.feeder.close()

    if parts.saver is not None:
        reporter.enter(Phase.saving)
        parts.saver.close()
    if is_chief and outcome is Outcome.completed and plan.config.export.enabled:
        _export(reporter, made.job, made.model, made.eval_source or made.train_source, plan)
    # A worker that leaves early is a lost peer to the others.
    reporter.enter(Phase.ending)
    parts.agreement.decide(Wish())
    reporter.tell(Ended, step=step, outcome=outcome)


def _make(order: WorkerOrder, reporter: Reporter) -> _Made:
    """Take the devices, meet the other workers, open the data and build the model."""
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
    if plan.verifying:
        reporter.tell(Substituted, **substitute(model))
    return _Made(
        devices=devices,
        strategy=strategy,
        job=job,
        train_source=train_source,
        eval_source=eval_source,
        model=model,
        optimizers=optimizers,
        variables=named_variables(model, optimizers),
    )


def _assemble(
    order: WorkerOrder,
    reporter: Reporter,
    pending: Callable[[], set[Request]],
    made: _Made,
) -> Parts:
    """Put together what the loop drives."""
    plan, replicas = order.plan, order.plan.worker_replicas(order.worker)
    job, model, strategy, source = made.job, made.model, made.strategy, made.train_source
    train = plan.config.train
    shards = make_shards(plan.replica_batch_sizes, replicas)
    resident = Resident(source, made.devices)
    evaluation = None
    if made.eval_source is not None:
        eval_resident = Resident(made.eval_source, made.devices)
        evaluation = Evaluation(
            plan, job, model, strategy, replicas, made.eval_source, eval_resident
        )
    saver = None
    if order.worker == 0:
        saver = Saver(
            plan.paths,
            order.attempt,
            made.variables,
            keep=plan.config.checkpoint.keep,
            facts={"run": plan.run, "attempt": order.attempt, "versions": _versions()},
            announce=reporter.tell,
        )
    return Parts(
        plan=plan,
        worker=order.worker,
        step=TrainStep(
            plan,
            job,
            model,
            made.optimizers,
            strategy,
            shards,
            source,
            resident,
            tell=lambda text: reporter.tell(Notice, text=text),
        ),
        evaluation=evaluation,
        feeder=Feeder(
            source,
            Order(train.seed, source.num_examples),
            shards,
            train.global_batch_size,
            resident=resident.tables is not None,
        ),
        optimizers=made.optimizers,
        saver=saver,
        agreement=Agreement(strategy, plan, order.worker),
        reporter=reporter,
        pending=pending,
    )


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
