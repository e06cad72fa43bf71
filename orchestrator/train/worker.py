"""The whole life of a worker, top to bottom."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from orchestrator.errors import ExportError
from orchestrator.spec.messages import (
    Ended,
    Exported,
    Message,
    Notice,
    Outcome,
    Phase,
    Request,
    WorkerOrder,
)
from orchestrator.spec.plan import RunPlan
from orchestrator.spec.schema import Weights
from orchestrator.train import store
from orchestrator.train.best import BestEvaluation
from orchestrator.train.checkpoint import restore
from orchestrator.train.export import export_model
from orchestrator.train.initial import load_initial
from orchestrator.train.introduce import tell_ready
from orchestrator.train.loop import Loop
from orchestrator.train.making import Made, assemble, make
from orchestrator.train.report import Reporter, folder_gauge
from orchestrator.train.saver import owes_evaluation, require_staging
from orchestrator.train.serving import refuse_unservable

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


def _live(order: WorkerOrder, reporter: Reporter, pending: Callable[[], set[Request]]) -> None:
    plan, is_chief = order.plan, order.worker == 0
    require_staging(plan.paths.staging_dir(order.attempt))
    made = make(order, reporter)
    start_step = _begin_with(order, reporter, made)
    reporter.step = start_step
    tell_ready(order, reporter, made.devices, made.model, start_step)
    if is_chief and plan.config.export.enabled and order.restore_from is None:
        refuse_unservable(made.job, made.eval_source or made.train_source, made.model)

    parts = assemble(order, reporter, pending, made)
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


def _begin_with(order: WorkerOrder, reporter: Reporter, made: Made) -> int:
    """Set the variables that training begins with; return the step they belong to."""
    if order.restore_from is not None:
        reporter.enter(Phase.restoring, order.restore_from)
        step = restore(Path(order.restore_from), made.variables, progress=reporter.progress)
        made.optimizers.take_configured_rates()
        return step
    path = order.plan.init_from
    if path is not None:
        reporter.enter(Phase.restoring, path)
        loaded = load_initial(Path(path), made.job, made.model, reporter.progress)
        made.optimizers.take_initial_weights()
        reporter.log(f"train.init_from={path}: {loaded.table()}")
        if order.worker == 0:
            reporter.tell(Notice, text=f"weights of {path}: {loaded.summary()}")
    return 0


def _tell_end(reporter: Reporter, made: Made, best: BestEvaluation | None) -> None:
    """Say why training ended, if early, and what the job itself has to say."""
    if best is not None and best.is_exhausted:
        state = best.state
        story = f"had no better eval/{state.metric} than {state.value} at step {state.step}"
        if state.step is None:
            story = f"had an eval/{state.metric} that is no number"
        reporter.tell(
            Notice,
            text=f"early stopping at step {reporter.step:,}: {state.num_worse} evaluations in a "
            f"row {story}",
        )
    with reporter.within(Phase.calling_back):
        text = made.job.on_end(made.model)
    if text is not None:
        reporter.log(text)
        reporter.tell(Notice, text=text)


def _exported_checkpoint(plan: RunPlan, best: BestEvaluation | None, step: int) -> Path | None:
    """Return the checkpoint to export; None for the weights that the model has.

    Raises:
        ExportError: none is the best.
    """
    if plan.config.export.weights is not Weights.best or best is None or best.state.step == step:
        return None
    if best.state.step is None:
        raise ExportError(
            f"export.weights=best: eval/{best.state.metric} was a number in no evaluation; look "
            "at the metric, or export the last ones with export.weights=last"
        )
    return plan.paths.checkpoints_dir / store.checkpoint_name(best.state.step)


def _export(order: WorkerOrder, reporter: Reporter, made: Made, checkpoint: Path | None) -> None:
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
