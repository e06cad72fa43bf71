"""When all workers save together, and what follows when that fails: the same on each of them."""

from __future__ import annotations

import time
from collections.abc import Callable

from orchestrator.errors import StorageError
from orchestrator.spec.messages import Phase, SaveFailed
from orchestrator.spec.plan import RunPlan
from orchestrator.train.agreement import Agreement, Wish
from orchestrator.train.best import Best
from orchestrator.train.data import Feeder
from orchestrator.train.report import Reporter, Stopped, folder_gauge
from orchestrator.train.saver import Saver, require_staging
from orchestrator.train.store import EvaluationState
from orchestrator.train.stream_feeder import StreamFeeder

# How long a save that is due by its step waits for the one before, once each: most are over by
# then, and a slow disk costs no more than this.
_GRACE_S = 0.25
# Until a save that failed is tried again: twice as long each time, up to the last.
_FIRST_BACK_OFF_S = 1.0
_LAST_BACK_OFF_S = 60.0
# Before each further try of the last save of all.
_LAST_TRIES_S = (1.0, 2.0, 4.0)


class Saving:
    """Decides with the other workers when to save.

    A save that is due while the one before is under way is put off to the end of a later block, so
    that a slow disk delays checkpoints and not steps. One that fails is tried again at the end of
    the first block after a back-off. The best evaluation and a stop save at their very step, and
    so does all that is due where runs are verified: their checkpoints are compared step by step.
    """

    def __init__(
        self,
        plan: RunPlan,
        reporter: Reporter,
        agreement: Agreement,
        saver: Saver | None,
        feeder: Feeder | StreamFeeder,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ):
        """Begin; the time until the first save runs from here.

        Args:
            plan: of the run.
            reporter: tells about it.
            agreement: between all workers.
            saver: the chief's; None on others.
            feeder: whose streams are saved too, if it has any.
            clock: seconds from any origin.
            sleep: waits for so many seconds.
        """
        self._plan = plan
        self._limit = plan.config.checkpoint.max_failed_saves
        self._reporter = reporter
        self._agreement = agreement
        self._saver = saver
        self._streams = feeder if isinstance(feeder, StreamFeeder) else None
        self._clock = clock
        self._sleep = sleep
        self._last_save = clock()
        self._is_owed = False
        self._has_waited = False

    def wish(self, *, by_step: bool, at_once: bool) -> bool:
        """Tell whether this worker wishes to save after the block that has just ended.

        Args:
            by_step: whether the schedule says so.
            at_once: whether it must be this very step.

        Raises:
            StorageError: saving has failed too often, or this attempt is over.
        """
        saver = self._saver
        if saver is None:
            return at_once
        saver.require_staging()
        self._refuse_to_go_on(saver)
        every_s = self._plan.config.checkpoint.every_s
        by_time = every_s is not None and self._clock() - self._last_save >= every_s
        self._is_owed = self._is_owed or by_step or by_time or saver.num_failed > 0
        if at_once or (by_step and self._plan.verifying):
            return True
        if not self._is_owed or self._clock() < self._back_off_until(saver):
            return False
        patience_s = _GRACE_S if by_step and not self._has_waited else 0.0
        self._has_waited = self._has_waited or by_step
        return not saver.is_busy(patience_s)

    def save(
        self, step: int, best: Best | None, *, evaluation: EvaluationState | None = None
    ) -> None:
        """Save; every worker calls this after the same step.

        Args:
            step: of the variables.
            best: the best evaluation so far.
            evaluation: what became of the one after this step, if it was due.

        Raises:
            StorageError: saving has failed too often, or this attempt is over.
            Stopped: the same, on workers that leave the telling to another.
        """
        if self._save_streams(step, best) and self._saver is not None:
            self._saver.save(step, best, evaluation=evaluation)
        self._is_owed = self._has_waited = False
        self._last_save = self._clock()

    def save_last(
        self, step: int, best: Best | None, *, evaluation: EvaluationState | None = None
    ) -> None:
        """Save before training ends, and wait until it is done; tried several times.

        The arguments are those of `save`.

        Raises:
            StorageError: it fails for good; what was saved before stays.
            Stopped: the same, on workers that leave the telling to the chief.
        """
        self._reporter.enter(Phase.saving)
        written = folder_gauge(self._plan.paths.checkpoints_dir)
        for pause_s in (*_LAST_TRIES_S, None):
            with self._reporter.within(Phase.saving, written):
                if self._saver is not None:
                    self._saver.wait()  # else the wait counted as a stall of this save too
                self.save(step, best, evaluation=evaluation)
                if self._saver is not None:
                    self._saver.wait()
            failed = self._saver is not None and self._saver.num_failed > 0
            if not self._agreement.decide(Wish(failed=failed)).failed:
                return
            if pause_s is not None:
                self._sleep(pause_s)
        if self._saver is None:
            raise Stopped("the last save failed; the chief tells about it")
        raise StorageError(
            f"the last save, of step {step:,}, failed {len(_LAST_TRIES_S) + 1} times: "
            f"{self._saver.error}. {self._what_to_do()}"
        )

    def _save_streams(self, step: int, best: Best | None) -> bool:
        """Write every worker's streams; tell whether all have succeeded.

        The chief commits the folder only once they all lie in it.
        """
        if self._streams is None:
            return True
        error = None
        try:
            self._streams.save(step)
        except StorageError as caught:
            error = caught
            require_staging(self._streams.staging_dir)
        before = self._saver.num_failed if self._saver is not None else 0
        agreed = self._agreement.decide(Wish(failed=error is not None, number=before))
        if not agreed.failed:
            return True
        count = agreed.number + 1
        if error is not None:
            self._reporter.tell(
                SaveFailed, step=step, error=str(error), num_failed=count, limit=self._limit
            )
        if self._saver is not None:
            self._saver.wait()
            self._saver.fail(step, str(error or "another worker could not write its streams"))
            if best is not None and best.step == step:
                self._saver.owe(step, best)
        if self._limit is not None and count >= self._limit:
            if error is None:
                raise Stopped("saving failed too often; the worker that cannot write tells why")
            raise StorageError(self._too_often(count, str(error))) from error
        return False

    def _refuse_to_go_on(self, saver: Saver) -> None:
        if self._limit is not None and saver.num_failed >= self._limit:
            raise StorageError(self._too_often(saver.num_failed, saver.error))

    def _back_off_until(self, saver: Saver) -> float:
        if saver.num_failed == 0:
            return 0.0
        doubled = _FIRST_BACK_OFF_S * 2 ** (min(saver.num_failed, 16) - 1)
        return saver.failed_at + min(doubled, _LAST_BACK_OFF_S)

    def _too_often(self, count: int, error: str) -> str:
        return (
            f"{count} saves in a row have failed (checkpoint.max_failed_saves): {error}. "
            f"{self._what_to_do()}"
        )

    def _what_to_do(self) -> str:
        return (
            f"Make room in {self._plan.paths.checkpoints_dir}, then resume={self._plan.run} goes "
            "on from the newest checkpoint there"
        )
