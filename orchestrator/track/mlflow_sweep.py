"""The parent of a sweep's runs in MLflow: made, kept up to date and ended by a thread.

A child is an ordinary run and knows nothing of its parent: the parent is written into it from here
once the child's run is there. Everything may be done twice; what an outage has delayed is done
when MLflow is back, or by the next call of the same sweep.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.track.facts import RunFacts
from orchestrator.track.mlflow_client import open_client
from orchestrator.track.mlflow_reach import one_line
from orchestrator.track.mlflow_store import DESCRIPTION_TAG, Store, legal

PARENT_TAG = "mlflow.parentRunId"
SWEEP_TAG = "orchestrator.sweep"
STOPPED_TAG = "orchestrator.sweep.stopped"
_LOOK_S = 2.0
_BACK_OFF_S = 5.0
_TRIES_AT_END = 3
# What MLflow says of a run that somebody has deleted, for good or not.
_DELETED = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """What is written when a sweep command ends.

    Attributes:
        status: FINISHED, FAILED or KILLED.
        text: the description, Markdown.
        files: become artifacts.
        metrics: of the best child.
        time_ms: of the metrics, in Unix milliseconds.
        tags: more of the parent's.
    """

    status: str
    text: str
    files: Sequence[Path]
    time_ms: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)


class ParentRun:
    """Keeps a sweep's run in MLflow up to date in the background.

    Attributes:
        missing: why MLflow lacks something; empty if it has everything.
        is_late: whether MLflow was still at work when the time of `finish` was over.
    """

    def __init__(self, facts: RunFacts, began: float, notice: Callable[[str], None]):
        """Begin without touching MLflow.

        Args:
            facts: of the parent.
            began: Unix seconds.
            notice: shown to the user; called from the thread.
        """
        self._facts = facts
        self._began_ms = round(began * 1000)
        self._notice = notice
        self._wanted: dict[str, dict[str, str]] = {}
        self._done: dict[str, dict[str, str]] = {}
        self._lock = threading.Lock()
        self._ending: Ending | None = None
        self._wake = threading.Event()
        self._store: Store | None = None
        self._client: Any = None
        self.missing = "MLflow was not reached"
        self.is_late = False
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)

    def start(self) -> None:
        """Start writing; importing MLflow takes seconds of CPU."""
        if self._thread.ident is None:
            self._thread.start()

    def adopt(self, child_run: str, stopped: str = "") -> None:
        """Take a run for a child of this one, and note why it was stopped early if it was."""
        tags = {STOPPED_TAG: stopped} if stopped else {}
        with self._lock:
            self._wanted[child_run] = tags

    def finish(self, ending: Ending, deadline_s: float) -> None:
        """Write how the sweep ended; wait for MLflow at most so long."""
        self._ending = ending
        self.start()
        self._wake.set()
        self._thread.join(deadline_s)
        self.is_late = self._thread.is_alive()
        if self.is_late:
            self.missing = self.missing or f"MLflow took more than {deadline_s:g} s"

    def _work(self) -> None:
        failures = 0
        while True:
            ending = self._ending
            try:
                self._advance()
                if ending is not None:
                    self._end(ending)
                self.missing = ""
                failures = 0
            except Exception as error:
                self.missing = one_line(error)
                self._store = None
                failures += 1
                if failures == 1:
                    self._notice(f"MLflow takes no record of the sweep: {self.missing}")
                if ending is not None and failures >= _TRIES_AT_END:
                    return
            if ending is not None and not failures:
                return
            self._wake.wait(_BACK_OFF_S if failures else _LOOK_S)
            if self._ending is not None and failures:
                self._wake.clear()

    def _advance(self) -> None:
        from mlflow.exceptions import MlflowException

        if self._store is None:
            self._store = Store(self._facts, None, self._began_ms)
            self._client = open_client(self._facts.tracking_uri, self._facts.timeout_s)
            self._store.set_running()
        with self._lock:
            wanted = dict(self._wanted)
        for run, more in wanted.items():
            tags = {PARENT_TAG: self._store.run_id, SWEEP_TAG: self._facts.run, **more}
            if self._done.get(run) == tags:
                continue
            try:
                for key, value in tags.items():
                    self._client.set_tag(run, key, value)
            except MlflowException as error:
                if error.error_code not in _DELETED:
                    raise
                continue  # somebody has deleted it; the others belong to the sweep all the same
            self._done[run] = tags

    def _end(self, ending: Ending) -> None:
        assert self._store is not None
        run = self._store.run_id
        try:
            for name, value in ending.metrics.items():
                # Of two values at one step MLflow shows that of the later command.
                self._client.log_metric(run, legal(name), value, timestamp=ending.time_ms, step=0)
            for key, text in ending.tags.items():
                self._client.set_tag(run, key, text)
            self._store.tag(DESCRIPTION_TAG, ending.text)
            for path in ending.files:
                if path.exists():
                    self._client.log_artifact(run, str(path))
        finally:
            # It is true whether or not there is a place for files.
            self._store.end(ending.status, None)


def end_parent(facts: RunFacts, began: float, status: str) -> None:
    """Set the status of a sweep's run.

    Args:
        facts: of the parent.
        began: Unix seconds.
        status: FINISHED, FAILED or KILLED.
    """
    Store(facts, None, round(began * 1000)).end(status, None)
