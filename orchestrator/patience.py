"""How long a run bears a journal that cannot be written, and how it ends then."""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.errors import StorageError
from orchestrator.spec.plan import RunPlan
from orchestrator.track.record import Record


class JournalPatience:
    """Lets a run save and stop when its journal could not be written for too long.

    Attributes:
        is_over: whether that has happened.
    """

    def __init__(
        self,
        record: Record,
        plan: RunPlan,
        *,
        notice: Callable[[str], None],
        stop: Callable[[], None],
    ):
        """Begin; `stop` lets the run save and stop."""
        self.is_over = False
        self._record = record
        self._run = plan.run
        self._patience_s = plan.config.tracking.journal_patience_s
        self._notice = notice
        self._stop = stop

    def watch(self) -> None:
        """Look at the journal; call it often."""
        if self.is_over or self._record.failing_s <= self._patience_s:
            return
        self.is_over = True
        self._notice(
            f"the journal could not be written for {self._patience_s:g} s "
            "(tracking.journal_patience_s): saving, then stopping"
        )
        self._stop()

    def refuse(self) -> None:
        """Refuse to call a run done whose record is not whole; after its end.

        Raises:
            StorageError: patience was at its end, or the last records are lost.
        """
        if self._record.failing_s > 0:
            raise StorageError(
                f"{self._record.error}; the last records of this run are lost. Make room, then "
                f"resume={self._run} goes on from the newest checkpoint"
            )
        if self.is_over:
            raise StorageError(
                f"{self._record.error} for {self._patience_s:g} s (tracking.journal_patience_s), "
                f"so the run saved and stopped; it can be written again: resume={self._run}"
            )
