"""The record of a run while a driver holds it: the journal first, then MLflow."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from orchestrator.errors import StorageError
from orchestrator.spec.paths import RunPaths
from orchestrator.track.facts import RunFacts
from orchestrator.track.journal import Journal
from orchestrator.track.mlflow_projection import Projection, Report
from orchestrator.track.report import write_report

# What drawing and writing the page of a run may take.
_PAGE_S = 5.0
# Records that are written at once: of many that wait, some may find room on a disk.
_AT_ONCE = 256


class Record:
    """Journals what happens; MLflow's thread follows the journal.

    While the journal cannot be written, records wait in memory, in their order: training goes on.
    Whoever holds the record asks `failing_s` how long that has been so, and acts on it.
    """

    def __init__(
        self,
        path: Path,
        facts: RunFacts,
        *,
        notice: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ):
        """Open the journal and write down the facts.

        The records of earlier drivers go to MLflow again, from the journal: what it has already,
        it keeps once.

        Raises:
            StorageError: the journal cannot be written.
        """
        self.error = ""
        self._notice = notice
        self._clock = clock
        self._lock = threading.Lock()
        self._waiting: deque[Mapping[str, Any]] = deque()
        self._failing_since: float | None = None
        self._has_ended = self._is_closed = False
        self._is_gathering = False
        self._paths = RunPaths(path.parent)
        self._journal = Journal(path)
        self._projection = Projection(facts, keep=self.add, notice=notice)
        self._journal.append(facts.record(time.time()))

    @property
    def failing_s(self) -> float:
        """Return for how long the journal could not be written, in seconds; 0 if it can."""
        since = self._failing_since
        return 0.0 if since is None else self._clock() - since

    def add(self, record: Mapping[str, Any]) -> None:
        """Journal a record, or keep it until that is possible; MLflow's thread reads the file.

        What that thread finds out when nobody waits for it any more is not kept.
        """
        with self._lock:
            if self._is_closed:
                return
            self._waiting.append(record)
            said = "" if self._is_gathering else self._write_waiting()
        if said:
            self._notice(said)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Write what a block adds when the block is over: the disk is waited for once."""
        self._is_gathering = True
        try:
            yield
        finally:
            with self._lock:
                self._is_gathering = False
                said = self._write_waiting()
            if said:
                self._notice(said)

    def start_tracking(self) -> None:
        """Let MLflow's thread begin; it takes seconds of CPU that training could use."""
        self._projection.start()

    def end(
        self,
        status: str,
        cause: str,
        deadline_s: float | None,
        commands: Sequence[tuple[str, str]] = (),
    ) -> Report:
        """Write down how the run ended, tell it on a page, and bring MLflow up to date.

        May be called again when it was broken off by an exception. Records that could not be
        written to the last are lost with this process; `failing_s` says whether there are any.

        Args:
            status: FINISHED, FAILED or KILLED.
            cause: why it did not finish.
            deadline_s: how long to wait for MLflow at most; a short one leaves the page out. None
                leaves MLflow alone too.
            commands: what can be done next: a word and the command to copy.
        """
        if not self._has_ended:
            ended = {"kind": "RunEnded", "time": time.time(), "status": status, "cause": cause}
            self.add({**ended, "commands": [list(command) for command in commands]})
            self._has_ended = True
            if deadline_s is not None and deadline_s > _PAGE_S:
                self._tell()
        report = Report(run_id=None, model_uri=None, missing="")
        if deadline_s is not None:
            report = self._projection.finish(status, deadline_s)
        with self._lock:
            self._write_waiting()  # the projection's last ones
            self._is_closed = True
        self._journal.close()
        return report

    def _tell(self) -> None:
        try:
            write_report(self._paths)
        except Exception as error:  # a page about the run is no reason to fail it
            self._notice(f"report.html could not be written: {error!r}")

    def _write_waiting(self) -> str:
        """Write what waits, as far as possible; return what to say about it."""
        try:
            while self._waiting:
                records = list(islice(self._waiting, _AT_ONCE))
                self._journal.extend(records)
                for _ in records:
                    self._waiting.popleft()
        except StorageError as error:
            self.error = str(error)
            if self._failing_since is not None:
                return ""
            self._failing_since = self._clock()
            return f"DEGRADED: {self.error}; training goes on, its record is kept in memory"
        if self._failing_since is None:
            return ""
        self._failing_since = None
        return "the journal can be written again; it has everything"
