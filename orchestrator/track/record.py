"""The record of a run while a driver holds it: the journal first, then MLflow."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.spec.paths import RunPaths
from orchestrator.track.facts import RunFacts
from orchestrator.track.journal import Journal
from orchestrator.track.mlflow_projection import Projection, Report
from orchestrator.track.report import write_report

# What drawing and writing the page of a run may take.
_PAGE_S = 5.0


class Record:
    """Journals what happens; MLflow's thread follows the journal."""

    def __init__(self, path: Path, facts: RunFacts, *, notice: Callable[[str], None]):
        """Open the journal and write down the facts.

        The records of earlier drivers go to MLflow again, from the journal: what it has already,
        it keeps once.

        Raises:
            StorageError: the journal cannot be written.
        """
        self._paths = RunPaths(path.parent)
        self._notice = notice
        self._journal = Journal(path)
        self._has_ended = False
        self._projection = Projection(facts, keep=self._append, notice=notice)
        self.add(facts.record(time.time()))

    def add(self, record: Mapping[str, Any]) -> None:
        """Journal a record; MLflow's thread reads it from the file.

        Raises:
            StorageError: the journal cannot be written.
        """
        self._journal.append(record)

    def start_tracking(self) -> None:
        """Let MLflow's thread begin; it takes seconds of CPU that training could use."""
        self._projection.start()

    def end(
        self, status: str, cause: str, deadline_s: float, commands: Sequence[tuple[str, str]] = ()
    ) -> Report:
        """Write down how the run ended, tell it on a page, and bring MLflow up to date.

        May be called again when it was broken off by an exception.

        Args:
            status: FINISHED, FAILED or KILLED.
            cause: why it did not finish.
            deadline_s: how long to wait for MLflow at most; a short one leaves the page out.
            commands: what can be done next: a word and the command to copy.
        """
        if not self._has_ended:
            ended = {"kind": "RunEnded", "time": time.time(), "status": status, "cause": cause}
            self.add({**ended, "commands": [list(command) for command in commands]})
            self._has_ended = True
            if deadline_s > _PAGE_S:
                self._tell()
        report = self._projection.finish(status, deadline_s)
        self._journal.close()
        return report

    def _tell(self) -> None:
        try:
            write_report(self._paths)
        except Exception as error:  # a page about the run is no reason to fail it
            self._notice(f"report.html could not be written: {error!r}")

    def _append(self, record: dict[str, Any]) -> None:
        self._journal.append(record)
