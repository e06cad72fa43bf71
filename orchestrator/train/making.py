"""What a worker makes before its first step: devices, data, model, and what drives them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from orchestrator.spec.messages import (
    Notice,
    Phase,
    Request,
    Substituted,
    WorkerOrder,
)
from orchestrator.train import datasets, store
from orchestrator.train.agreement import Agreement
from orchestrator.train.audit import Audit
from orchestrator.train.best import BestEvaluation, require_metric
from orchestrator.train.checkpoint import named_variables
from orchestrator.train.data import make_shards
from orchestrator.train.devices import build_strategy, configure_devices, overrule_keras_settings
from orchestrator.train.evaluate import Evaluation
from orchestrator.train.freeze import freeze
from orchestrator.train.guards import NanGuard
from orchestrator.train.inputs import Resident
from orchestrator.train.introduce import tell_busy_gpus, tell_data, versions
from orchestrator.train.job import Job
from orchestrator.train.loading import checked_model, load_job, load_source
from orchestrator.train.loop import Parts
from orchestrator.train.optimizer import Optimizers
from orchestrator.train.pace import make_pace
from orchestrator.train.profile import Profile
from orchestrator.train.report import Reporter
from orchestrator.train.saver import make_saver
from orchestrator.train.sources import Source, Split
from orchestrator.train.step import TrainStep
from orchestrator.train.stream_feeder import make_feeder
from orchestrator.train.streams import StreamSource
from orchestrator.train.substitutions import substitute


@dataclass(frozen=True, slots=True)
class Made:
    """What a worker has once its devices, data and model are there."""

    devices: list[str]
    strategy: tf.distribute.Strategy
    job: Job
    train_source: Source
    eval_source: Source | None
    model: keras.Model
    optimizers: Optimizers
    variables: dict[str, Any]


def make(order: WorkerOrder, reporter: Reporter) -> Made:
    """Take the devices, meet the other workers, open the data and build the model."""
    plan, is_chief = order.plan, order.worker == 0
    tell_busy_gpus(order, reporter)
    devices = configure_devices(order)
    if plan.config.train.check_numerics:
        tf.debugging.enable_check_numerics()
    overruled = overrule_keras_settings()
    if is_chief and overruled:
        reporter.tell(Notice, text=overruled)
    reporter.enter(Phase.connecting, ", ".join(devices))
    strategy = build_strategy(order, devices)

    reporter.enter(Phase.loading_data)
    datasets.set_reporter(reporter.progress, lambda text: reporter.tell(Notice, text=text))
    job = load_job(plan)
    reporter.log(f"job {plan.config.job.class_name} from {inspect.getfile(type(job))}")
    train_source = load_source(job, plan, Split.TRAIN, order.worker)
    eval_source = load_source(job, plan, Split.EVAL) if plan.eval_steps else None
    for split, source in ((Split.TRAIN, train_source), (Split.EVAL, eval_source)):
        if source is not None and is_chief:
            tell_data(reporter, split, source)

    reporter.enter(Phase.building)
    keras.utils.set_random_seed(plan.config.train.seed % 2**32)
    with strategy.scope():
        model = checked_model(job, train_source)
        if plan.config.train.freeze:
            reporter.log(freeze(job, model, plan.config.train.freeze))
        optimizers = Optimizers(plan, job.parameter_groups(model), model)
    if plan.verifying:
        reporter.tell(Substituted, **substitute(model))
    return Made(
        devices=devices,
        strategy=strategy,
        job=job,
        train_source=train_source,
        eval_source=eval_source,
        model=model,
        optimizers=optimizers,
        variables=named_variables(model, optimizers),
    )


def assemble(
    order: WorkerOrder,
    reporter: Reporter,
    pending: Callable[[], set[Request]],
    made: Made,
) -> Parts:
    """Put together what the loop drives."""
    plan = order.plan
    shards = make_shards(plan.replica_batch_sizes, plan.worker_replicas(order.worker))
    resident = Resident(made.train_source, made.devices)
    evaluation = _evaluation(order, reporter, made)
    has_streams = isinstance(made.train_source, StreamSource)
    saver = make_saver(order, reporter, made.variables, versions(), has_streams=has_streams)
    agreement = Agreement(made.strategy, plan, order.worker)
    return Parts(
        plan=plan,
        worker=order.worker,
        step=TrainStep(
            plan,
            made.job,
            made.model,
            made.optimizers,
            made.strategy,
            shards,
            made.train_source,
            resident,
            tell=lambda text: reporter.tell(Notice, text=text),
            compiles=lambda: reporter.enter(Phase.tracing, "XLA"),
        ),
        evaluation=evaluation,
        feeder=make_feeder(
            order, reporter, made.train_source, shards, resident=resident.tables is not None
        ),
        optimizers=made.optimizers,
        saver=saver,
        agreement=agreement,
        guard=NanGuard(
            order,
            reporter,
            agreement,
            saver,
            made.variables,
            can_go_back=not has_streams,
            restored=made.optimizers.take_configured_rates,
        ),
        audit=_audit(order, made),
        reporter=reporter,
        pending=pending,
        best=_best(order, evaluation),
        on_block=made.job.on_block,
        profile=Profile(plan) if order.worker == 0 else None,
        pace=make_pace(plan, order.worker),
    )


def _evaluation(order: WorkerOrder, reporter: Reporter, made: Made) -> Evaluation | None:
    if made.eval_source is None:
        return None
    return Evaluation(
        order.plan,
        made.job,
        made.model,
        made.strategy,
        order.plan.worker_replicas(order.worker),
        made.eval_source,
        Resident(made.eval_source, made.devices),
        progress=reporter.progress,
    )


def _best(order: WorkerOrder, evaluation: Evaluation | None) -> BestEvaluation | None:
    """Return the judge of evaluations, as it was at the checkpoint; refuse an unknown metric."""
    config = order.plan.config.best
    if config.metric is None or evaluation is None:
        return None
    names = evaluation.metric_names()
    if names is not None:
        require_metric(config.metric, dict.fromkeys(names))
    manifest = None
    if order.restore_from is not None:
        manifest = store.read_manifest(Path(order.restore_from))
    return BestEvaluation(config, manifest)


def _audit(order: WorkerOrder, made: Made) -> Audit | None:
    if order.plan.num_replicas == 1 or order.plan.config.train.audit_every_steps is None:
        return None
    return Audit(made.strategy, order.plan, order.worker, made.variables)
