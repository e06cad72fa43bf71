"""The outer loop: blocks, due points, and the agreement at the end of each block."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.spec.messages import BlockDone, Evaluated, Outcome, Phase, Request
from orchestrator.spec.plan import RunPlan
from orchestrator.train.agreement import Agreement, Wish
from orchestrator.train.audit import Audit
from orchestrator.train.best import BestEvaluation
from orchestrator.train.block import BlockResult, step_means
from orchestrator.train.data import Feeder, ledger_hash
from orchestrator.train.evaluate import Evaluation
from orchestrator.train.guards import NanGuard
from orchestrator.train.job import Progress
from orchestrator.train.optimizer import Optimizers
from orchestrator.train.pace import Pace
from orchestrator.train.profile import Profile
from orchestrator.train.report import Reporter, folder_gauge
from orchestrator.train.saver import Saver
from orchestrator.train.saving import Saving
from orchestrator.train.schedule import BlockLength, Schedule
from orchestrator.train.step import TrainStep
from orchestrator.train.store import EvaluationState
from orchestrator.train.stream_feeder import StreamFeeder


@dataclass(frozen=True, slots=True)
class Parts:
    """What a loop drives."""

    plan: RunPlan
    worker: int
    step: TrainStep
    evaluation: Evaluation | None
    feeder: Feeder | StreamFeeder
    optimizers: Optimizers
    saver: Saver | None
    agreement: Agreement
    guard: NanGuard
    reporter: Reporter
    pending: Callable[[], set[Request]]
    audit: Audit | None = None
    best: BestEvaluation | None = None
    on_block: Callable[[Progress], None] | None = None
    profile: Profile | None = None
    pace: Pace | None = None
    clock: Callable[[], float] = time.monotonic


class Loop:
    """Runs blocks from a step to the end, or until all workers agree to stop."""

    def __init__(self, parts: Parts):
        self._parts = parts
        self._plan = parts.plan
        self._schedule = Schedule(parts.plan)
        train = parts.plan.config.train
        self._length = BlockLength(train.block_s, train.max_block_steps)
        self._saving = Saving(
            parts.plan,
            parts.reporter,
            parts.agreement,
            parts.saver,
            parts.feeder,
            clock=parts.clock,
        )
        self._is_chief = parts.worker == 0
        self._is_best = False
        self._asked: set[Request] = set()
        self._evaluation: EvaluationState | None = None  # after the present step

    def run(self, step: int, *, owes_evaluation: bool = False) -> tuple[Outcome, int]:
        """Train from after `step`.

        Args:
            step: of the variables.
            owes_evaluation: whether a stop has cut short the evaluation after it.

        Returns:
            How it ended and the last step done.

        Raises:
            JobError: a loss or gradient is not finite, or replicas have drifted apart.
            StorageError: saving has failed too often, or at the end.
        """
        if owes_evaluation and self._parts.evaluation is not None and self._catch_up(step):
            return Outcome.stopped, step
        if self._parts.best is not None and self._parts.best.is_exhausted:
            return Outcome.completed, step  # the run had ended early, and failed after that
        num_steps = self._schedule.clip(step, self._length.steps)
        self._parts.reporter.enter(Phase.tracing)
        while step < self._plan.total_steps:
            first, self._evaluation = step, None
            result, wall_s = self._block(step, num_steps)
            step += len(result.finite)
            self._parts.reporter.step = step
            self._parts.guard.roll_back(result, step)
            if self._schedule.evaluation_due(step):
                self._evaluate(step)
            if self._parts.audit is not None and self._schedule.audit_due(step):
                with self._parts.reporter.within(Phase.evaluating):
                    self._parts.audit.check(step)
            wish = self._wish(result, num_steps, wall_s)
            decision = self._parts.agreement.decide(wish)
            self._length.agreed(decision.number)
            self._parts.guard.refuse(result, first, wish, decision)
            self._save(step, decision)
            if decision.finish:
                return Outcome.completed, step
            if decision.stop and not self._is_complete(step):
                return Outcome.stopped, step
            num_steps = self._schedule.clip(step, decision.number)
        return Outcome.completed, step

    def _block(self, step: int, num_steps: int) -> tuple[BlockResult, float]:
        parts = self._parts
        start = parts.clock()
        if parts.pace is not None:
            parts.pace.before_block(num_steps)
        feed = parts.feeder.take(step, num_steps)
        data_wait_s = parts.clock() - start
        after = step + num_steps
        # A guess at the block after this one: lengths seldom change, and to a longer one is added.
        parts.feeder.prefetch(after, self._schedule.clip(after, self._length.steps))
        rates = parts.optimizers.learning_rates(num_steps) if self._is_chief else {}
        if parts.profile is not None:
            parts.profile.before(step)
        result = parts.guard.cut(parts.step.run(step, num_steps, feed))
        if parts.profile is not None:
            with parts.reporter.within(Phase.saving):
                parts.profile.after(after)
        wall_s = parts.clock() - start
        self._report(step, result, rates, (wall_s, data_wait_s))
        if parts.reporter.phase is Phase.tracing:
            parts.reporter.enter(Phase.stepping)
        return result, wall_s

    def _report(
        self,
        step: int,
        result: BlockResult,
        rates: dict[str, np.ndarray],
        seconds: tuple[float, float],
    ) -> None:
        num_steps = len(result.finite)
        ledger = sum(ledger_hash(ids, step) for ids in result.ids) % 2**64
        values: dict[str, Any] = {}
        if self._is_chief:
            series = step_means(result)
            first, *others = rates
            rates = {name: values[:num_steps] for name, values in rates.items()}
            metrics = {name: as_floats(v) for name, v in series.items() if name != "loss"}
            metrics |= {name: as_floats(v) for name, v in result.norms.items()}
            metrics["gradient_norm"] = as_floats(result.gradient_norm)
            if self._parts.optimizers.loss_scale is not None:
                metrics["loss_scale"] = as_floats(result.loss_scale)
            metrics |= {f"learning_rate/{name}": as_floats(rates[name]) for name in others}
            values = {
                "loss": as_floats(series["loss"]),
                "metrics": metrics,
                "learning_rate": as_floats(rates[first]),
            }
        self._parts.reporter.tell(
            BlockDone,
            first_step=step,
            num_steps=num_steps,
            wall_s=seconds[0],
            data_wait_s=seconds[1],
            ledger=ledger,
            skipped_steps=tuple(int(i) + step + 1 for i in np.flatnonzero(~result.finite)),
            **values,
        )
        if self._is_chief and self._parts.on_block is not None:
            means = {name: float(np.mean(v)) for name, v in series.items()}
            loss = means.pop("loss")
            with self._parts.reporter.within(Phase.calling_back):
                self._parts.on_block(Progress(step + num_steps, num_steps, loss, means))

    def _wish(self, result: BlockResult, num_steps: int, wall_s: float) -> Wish:
        self._length.measured(num_steps, wall_s)
        stop = self._is_asked_to_stop()
        at_once = self._is_best or Request.SAVE in self._asked
        self._asked = set()
        by_step = self._schedule.checkpoint_due(self._parts.reporter.step)
        return Wish(
            save=self._saving.wish(by_step=by_step, at_once=at_once),
            stop=stop,
            finish=self._is_finished(),
            guilty=result.is_guilty,
            number=self._length.steps,
        )

    def _is_asked_to_stop(self) -> bool:
        """Tell whether a stop was asked for here since the last block."""
        self._asked |= self._parts.pending()
        return Request.SAVE_AND_STOP in self._asked

    def _all_stop(self) -> bool:
        return self._parts.agreement.decide(Wish(stop=self._is_asked_to_stop())).stop

    def _is_finished(self) -> bool:
        """Tell, on the chief, whether the run is over before its last step."""
        best = self._parts.best
        return self._is_chief and best is not None and best.is_exhausted

    def _catch_up(self, step: int) -> bool:
        """Make the evaluation that a stop has cut short; tell whether to stop again."""
        self._evaluate(step)
        stop = self._is_asked_to_stop()
        wish = Wish(save=self._is_best, stop=stop, finish=self._is_finished())
        decision = self._parts.agreement.decide(wish)
        self._save(step, decision)
        return decision.stop and not self._is_complete(step)

    def _is_complete(self, step: int) -> bool:
        """Tell whether nothing is left to do after a step: no other one, and no evaluation."""
        return step == self._plan.total_steps and self._evaluation is not EvaluationState.owed

    def _evaluate(self, step: int) -> None:
        """Evaluate, unless all workers agree to stop before it is done."""
        parts = self._parts
        assert parts.evaluation is not None
        parts.reporter.enter(Phase.evaluating)
        start = parts.clock()
        averages = parts.optimizers.averages
        with contextlib.ExitStack() as stack:
            if averages is not None and self._plan.config.train.evaluate_ema:
                stack.enter_context(averages.in_place())
            metrics = parts.evaluation.run(self._all_stop)
        self._evaluation = EvaluationState.owed if metrics is None else EvaluationState.told
        if self._is_chief and metrics is not None:
            parts.reporter.tell(
                Evaluated,
                step=step,
                metrics=metrics,
                num_examples=self._plan.config.data.num_eval_examples,
                wall_s=parts.clock() - start,
            )
        if parts.best is not None and metrics is not None:
            # Every worker judges the same reduced values; what is done about it is agreed upon.
            self._is_best = parts.best.observe(step, metrics) and self._is_chief
        parts.reporter.enter(Phase.stepping)

    def _save(self, step: int, decision: Wish) -> None:
        best = self._parts.best.state if self._parts.best is not None else None
        if decision.stop or decision.finish or step == self._plan.total_steps:
            self._saving.save_last(step, best, evaluation=self._evaluation)
        elif decision.save:
            # A save may wait for the one before, and that for the disk.
            written = folder_gauge(self._plan.paths.checkpoints_dir)
            with self._parts.reporter.within(Phase.saving, written):
                self._saving.save(step, best, evaluation=self._evaluation)
            self._is_best = False


def as_floats(values: np.ndarray) -> tuple[float, ...]:
    """Return an array as plain floats, which cross process borders without NumPy."""
    return tuple(values.tolist())
