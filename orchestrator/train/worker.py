"""The whole life of a worker, top to bottom."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from orchestrator.spec.messages import (
    Ended,
    Exported,
    Message,
    Notice,
    Outcome,
    Phase,
    Request,
    Substituted,
    WorkerOrder,
)
from orchestrator.spec.plan import RunPlan
from orchestrator.spec.schema import Weights
from orchestrator.train import datasets, store
from orchestrator.train.agreement import Agreement
from orchestrator.train.audit import Audit
from orchestrator.train.best import BestEvaluation, require_metric
from orchestrator.train.checkpoint import named_variables, restore
from orchestrator.train.data import make_shards
from orchestrator.train.devices import build_strategy, configure_devices, overrule_keras_settings
from orchestrator.train.evaluate import Evaluation
from orchestrator.train.export import export_model
from orchestrator.train.freeze import freeze
from orchestrator.train.guards import NanGuard
from orchestrator.train.initial import load_initial
from orchestrator.train.inputs import Resident
from orchestrator.train.introduce import tell_data, tell_ready, versions
from orchestrator.train.job import Job
from orchestrator.train.loading import checked_model, load_job, load_source
from orchestrator.train.loop import Loop, Parts
from orchestrator.train.optimizer import Optimizers
from orchestrator.train.pace import make_pace
from orchestrator.train.profile import Profile
from orchestrator.train.report import Reporter, folder_gauge
from orchestrator.train.saver import make_saver, owes_evaluation, require_staging
from orchestrator.train.sources import Source, Split
from orchestrator.train.step import TrainStep
from orchestrator.train.stream_feeder import make_feeder
from orchestrator.train.streams import StreamSource
from orchestrator.train.substitutions import substitute

# How long the story of an error waits for a checkpoint that is being written.
_SAVE_PATIENCE_S = 10.0


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
    with reporter.beating():
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
    require_staging(plan.paths.staging_dir(order.attempt))
    made = _make(order, reporter)
    start_step = _begin_with(order, reporter, made)
    reporter.step = start_step
    tell_ready(order, reporter, made.devices, made.model, start_step)

    parts = _assemble(order, reporter, pending, made)
    try:
        outcome, step = Loop(parts).run(start_step, owes_evaluation=owes_evaluation(order))
    except Exception:
        if parts.saver is not None:
            # What is being written is good: the attempt's end would take it along.
            parts.saver.is_busy(_SAVE_PATIENCE_S)
        raise
    finally:
        if parts.profile is not None:
            parts.profile.close()
    parts.feeder.close()
    if is_chief and outcome is Outcome.completed:
        _tell_end(reporter, made, parts.best)

    if parts.saver is not None:
        with reporter.within(Phase.saving, folder_gauge(plan.paths.staging_dir(order.attempt))):
            parts.saver.close()
    if is_chief and outcome is Outcome.completed and plan.config.export.enabled:
        _export(order, reporter, made, _exported_checkpoint(plan, parts.best, step))
    # A worker that leaves early is a lost peer to the others.
    reporter.enter(Phase.ending)
    parts.agreement.wait_for_all()
    reporter.tell(Ended, step=step, outcome=outcome)


def _make(order: WorkerOrder, reporter: Reporter) -> _Made:
    """Take the devices, meet the other workers, open the data and build the model."""
    plan, is_chief = order.plan, order.worker == 0
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


def _begin_with(order: WorkerOrder, reporter: Reporter, made: _Made) -> int:
    """Set the variables that training begins with; return the step they belong to."""
    if order.restore_from is not None:
        reporter.enter(Phase.restoring, order.restore_from)
        return restore(Path(order.restore_from), made.variables)
    path = order.plan.init_from
    if path is not None:
        reporter.enter(Phase.restoring, path)
        loaded = load_initial(Path(path), made.job, made.model)
        reporter.log(f"train.init_from={path}: {loaded.table()}")
        if order.worker == 0:
            reporter.tell(Notice, text=f"weights of {path}: {loaded.summary()}")
    return 0


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


def _assemble(
    order: WorkerOrder,
    reporter: Reporter,
    pending: Callable[[], set[Request]],
    made: _Made,
) -> Parts:
    """Put together what the loop drives."""
    plan, replicas = order.plan, order.plan.worker_replicas(order.worker)
    job, model, strategy, source = made.job, made.model, made.strategy, made.train_source
    shards = make_shards(plan.replica_batch_sizes, replicas)
    resident = Resident(source, made.devices)
    evaluation = None
    if made.eval_source is not None:
        eval_resident = Resident(made.eval_source, made.devices)
        evaluation = Evaluation(
            plan,
            job,
            model,
            strategy,
            replicas,
            made.eval_source,
            eval_resident,
            progress=reporter.progress,
        )
    saver = make_saver(order, reporter, made.variables, versions())
    agreement = Agreement(strategy, plan, order.worker)
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
            compiles=lambda: reporter.enter(Phase.tracing, "XLA"),
        ),
        evaluation=evaluation,
        feeder=make_feeder(order, reporter, source, shards, resident=resident.tables is not None),
        optimizers=made.optimizers,
        saver=saver,
        agreement=agreement,
        guard=NanGuard(
            plan,
            order.worker,
            reporter,
            agreement,
            saver,
            made.variables,
            can_go_back=not isinstance(source, StreamSource),
        ),
        audit=_audit(order, made),
        reporter=reporter,
        pending=pending,
        best=_best(order, evaluation),
        on_block=job.on_block,
        profile=Profile(plan) if order.worker == 0 else None,
        pace=make_pace(plan, order.worker),
    )


def _audit(order: WorkerOrder, made: _Made) -> Audit | None:
    if order.plan.num_replicas == 1 or order.plan.config.train.audit_every_steps is None:
        return None
    return Audit(made.strategy, order.plan, order.worker, made.variables)


def _tell_end(reporter: Reporter, made: _Made, best: BestEvaluation | None) -> None:
    """Say why training ended, if early, and what the job itself has to say."""
    if best is not None and best.is_exhausted:
        state = best.state
        reporter.tell(
            Notice,
            text=f"early stopping at step {reporter.step:,}: {state.num_worse} evaluations in a "
            f"row had no better eval/{state.metric} than {state.value} at step {state.step}",
        )
    with reporter.within(Phase.calling_back):
        text = made.job.on_end(made.model)
    if text is not None:
        reporter.log(text)
        reporter.tell(Notice, text=text)


def _exported_checkpoint(plan: RunPlan, best: BestEvaluation | None, step: int) -> Path | None:
    """Return the checkpoint to export; None for the weights that the model has."""
    if plan.config.export.weights is not Weights.best or best is None:
        return None
    if best.state.step in (None, step):
        return None
    return plan.paths.checkpoints_dir / store.checkpoint_name(best.state.step)


def _export(order: WorkerOrder, reporter: Reporter, made: _Made, checkpoint: Path | None) -> None:
    plan = order.plan
    reporter.enter(Phase.exporting, str(checkpoint or ""))
    start = reporter.clock()
    source = made.eval_source or made.train_source
    averages = made.optimizers.averages if plan.exports_averages else None
    staged = plan.paths.export_staging_dir(order.attempt)
    with reporter.within(Phase.exporting, folder_gauge(staged)):
        signature = export_model(
            made.job,
            made.model,
            source,
            plan.paths,
            staged,
            checkpoint=checkpoint,
            averages=averages,
            variables=made.variables,
        )
    reporter.tell(
        Exported,
        step=store.step_of(checkpoint) if checkpoint is not None else reporter.step,
        path=str(plan.paths.saved_model_dir),
        input_dtype=signature.input_dtype,
        input_shape=signature.input_shape,
        output_dtype=signature.output_dtype,
        output_shape=signature.output_shape,
        wall_s=reporter.clock() - start,
    )
