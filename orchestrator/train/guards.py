"""What happens when a step is not finite: `train.on_nan`.

Which steps are not finite follows from reduced values, so all workers see the same. Whose loss or
gradient it was only the worker itself knows, and tells.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import keras
import numpy as np

from orchestrator.errors import JobError
from orchestrator.spec.messages import Notice, Phase, WorkerOrder
from orchestrator.spec.schema import OnNan
from orchestrator.train import store
from orchestrator.train.agreement import Agreement, Wish
from orchestrator.train.block import BlockResult
from orchestrator.train.checkpoint import restore
from orchestrator.train.report import Reporter, Stopped, folder_gauge
from orchestrator.train.saver import Saver

_SHOWN_IDS = 16
# Going back to one checkpoint so often without reaching the next one helps nobody.
_MOST_ROLLBACKS = 3


class NanGuard:
    """Acts on steps that were not finite: stops, skips, or goes back to a checkpoint.

    `rollback` takes the updates since the newest checkpoint back and goes on after the bad step:
    no example is used again, the next ones come as they would have come.
    """

    def __init__(
        self,
        order: WorkerOrder,
        reporter: Reporter,
        agreement: Agreement,
        saver: Saver | None,
        variables: Mapping[str, keras.Variable],
        *,
        can_go_back: bool = True,
        restored: Callable[[], None] = lambda: None,
    ):
        """Make a guard.

        Args:
            order: of this worker.
            reporter: tells about it.
            agreement: between all workers.
            saver: the chief's; None on others.
            variables: all that a checkpoint holds.
            can_go_back: whether the data can be read again from any step; a stream cannot.
            restored: called when the variables are those of a checkpoint.
        """
        self._attempt = order.attempt
        self._start = store.start_of(order.restore_from)
        self._checkpoints_dir = order.plan.paths.checkpoints_dir
        self._worker = order.worker
        self._reporter = reporter
        self._agreement = agreement
        self._saver = saver
        self._variables = variables
        self._on_nan = order.plan.config.train.on_nan
        self._can_go_back = can_go_back
        self._restored = restored
        self._rollbacks = (0, 0)  # step of the last checkpoint gone back to, and how often

    def cut(self, result: BlockResult) -> BlockResult:
        """Leave out what a block did after a bad step that is going to be taken back."""
        if self._on_nan is OnNan.rollback and self._can_go_back and result.broken.any():
            return result.until(int(np.flatnonzero(result.broken)[0]) + 1)
        return result

    def refuse(self, result: BlockResult, first: int, own: Wish, all_workers: Wish) -> None:
        """Stop at the first bad step, told by the worker whose loss or gradient it was.

        Args:
            result: of a block.
            first: steps done before it.
            own: what this worker wished.
            all_workers: what all did.

        Raises:
            JobError: on the worker that tells.
            Stopped: on the others.
        """
        if self._on_nan is not OnNan.stop or not result.broken.any():
            return
        index = int(np.flatnonzero(result.broken)[0])
        step = first + index + 1
        if not self._tells(own.guilty, all_workers.guilty):
            raise Stopped(f"step {step} was not finite; another worker tells about it")
        raise JobError(
            f"{self._story(result, index, step, 'is')}; the update was not applied. "
            "Look at these examples, lower optimizer.learning_rate, set "
            "optimizer.clip_global_norm, or go on with train.on_nan=skip or rollback"
        )

    def roll_back(self, result: BlockResult, step: int) -> None:
        """Go back to the newest checkpoint if a step of the block was bad.

        Args:
            result: of a block, cut if it can be: with a stream its last steps are taken back too.
            step: its last step.

        Raises:
            JobError: there is no checkpoint, or this one did not help before.
            Stopped: the same, on workers that leave the telling to another.
        """
        if self._on_nan is not OnNan.rollback or not result.broken.any():
            return
        index = int(np.flatnonzero(result.broken)[0])
        bad_step = step - len(result.finite) + index + 1
        what = self._story(result, index, bad_step, "was")
        checkpoint, guilty = self._agreed_checkpoint(bad_step, guilty=result.is_guilty)
        tells = self._tells(result.is_guilty, guilty)
        if checkpoint is None:
            _give_up(f"{what}; there is no checkpoint to go back to", tells=tells)
        else:
            known, times = self._rollbacks
            self._rollbacks = (checkpoint, times + 1 if known == checkpoint else 1)
            if self._rollbacks[1] > _MOST_ROLLBACKS:
                _give_up(
                    f"{what}; for the {self._rollbacks[1]}th time since the "
                    f"checkpoint of step {checkpoint}; going back there does not help",
                    tells=tells,
                )
            with self._reporter.within(Phase.restoring):
                progress = self._reporter.progress
                restore(self._folder(checkpoint), self._variables, progress=progress)
                self._restored()
            if tells:
                text = f"{what}; the weights are those of step {checkpoint} again"
                self._reporter.tell(Notice, text=text)

    def _tells(self, own: bool, anybody: bool) -> bool:
        """Tell whether this worker tells: a guilty one, or the chief where nobody is."""
        return own if anybody else self._worker == 0

    def _story(self, result: BlockResult, index: int, step: int, verb: str) -> str:
        """Return what was not finite, for the worker that tells about it."""
        bad = result.bad_variable[index]
        named = f"; the first bad gradient is that of {bad}" if bad else ""
        if not result.is_guilty:
            return (
                f"the sum over all replicas and variables {verb} not finite at step {step}, "
                "although the loss and the gradients of each replica are: worker and examples are "
                f"not known{named}"
            )
        what = "the gradient" if result.finite_losses[index].all() else "the loss"
        return (
            f"{what} {verb} not finite at step {step}, worker {self._worker}, examples "
            f"{_guilty_ids(result, index)}{named}"
        )

    def _agreed_checkpoint(self, before: int, *, guilty: bool) -> tuple[int | None, bool]:
        """Return the step of the newest valid checkpoint before a step, and if anybody is guilty.

        The checkpoint is the one that the chief finds.

        One that this attempt has not made, later than where it began, is of a driver that was
        killed before it was on record.
        """

        def accepts(path: Path) -> bool:
            step = store.step_of(path)
            return step < before and (
                step <= self._start or store.attempt_of(path) == self._attempt
            )

        number = 0
        if self._worker == 0:
            if self._saver is not None:
                written = folder_gauge(self._checkpoints_dir)
                with self._reporter.within(Phase.saving, written):
                    self._saver.wait()
            with self._reporter.within(Phase.restoring):
                progress = self._reporter.progress
                path = store.newest_valid(self._checkpoints_dir, accepts, progress).path
            number = 0 if path is None else store.step_of(path) + 1
        agreed = self._agreement.decide(Wish(guilty=guilty, number=number))
        return agreed.number - 1 if agreed.number else None, agreed.guilty

    def _folder(self, step: int) -> Path:
        return self._checkpoints_dir / store.checkpoint_name(step)


def _give_up(story: str, *, tells: bool) -> None:
    if not tells:
        raise Stopped("a step was not finite; another worker tells about it")
    raise JobError(
        f"{story} (train.on_nan=rollback). Save more often (checkpoint.every_steps), lower "
        "optimizer.learning_rate, or leave such updates out with train.on_nan=skip"
    )


def _guilty_ids(result: BlockResult, index: int) -> str:
    finite = result.finite_losses[index] & result.finite_gradients[index]
    bad = [ids[index] for ids, ok in zip(result.ids, finite, strict=True) if not ok]
    ids = np.concatenate(bad).tolist()
    shown = ", ".join(map(str, ids[:_SHOWN_IDS]))
    return f"[{shown}{f', ... {len(ids)} in all' if len(ids) > _SHOWN_IDS else ''}]"
