"""The one thread that writes to MLflow what the journal says.

It reads the journal's file at its own pace, so an outage of the tracking server delays charts and
never training, and costs no memory. Every point carries the time at which its block was journaled,
and MLflow keeps equal points once: sending anything twice changes nothing.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import StorageError
from orchestrator.spec.paths import RunPaths
from orchestrator.spec.secrets import MASK, mask_text
from orchestrator.track.facts import RunFacts
from orchestrator.track.journal import read
from orchestrator.track.mlflow_client import open_client
from orchestrator.track.mlflow_reach import one_line
from orchestrator.track.mlflow_writer import Writer

_FLUSH_S = 1.0
_BACK_OFF_S = (0.5, 1.0, 2.0, 5.0)
# When training is over nobody should wait for a server that is gone: `sync` completes it later.
_TRIES_AT_END = 4
# MLflow's client takes these where an address has no credentials.
_CREDENTIALS = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")


@dataclass(frozen=True, slots=True)
class Report:
    """What has become of the record in MLflow.

    Attributes:
        run_id: MLflow's id, or None if MLflow was never reached.
        model_uri: `models:/...`, or None if no model was logged.
        missing: why something is missing, or nothing.
        url: of the run's page, or None if the tracking address is not one of a server.
    """

    run_id: str | None
    model_uri: str | None
    missing: str
    url: str | None = None


class Projection:
    """Sends a run's journal to MLflow in the background."""

    def __init__(
        self,
        facts: RunFacts,
        *,
        keep: Callable[[dict[str, Any]], None],
        notice: Callable[[str], None],
        is_live: bool = True,
        sends_again: bool = False,
        tries_at_end: int | None = _TRIES_AT_END,
    ):
        """Begin without touching MLflow.

        Args:
            facts: of the run.
            keep: writes a record into the journal; called from the thread.
            notice: shown to the user; called from the thread.
            is_live: whether the run is being trained, and so RUNNING until it is finished.
            sends_again: whether to send also what the journal says MLflow has taken.
            tries_at_end: how often to ask a server that does not answer; None goes on.
        """
        self._writer = Writer(facts, keep, notice, is_live=is_live, sends_again=sends_again)
        self._tries_at_end = tries_at_end
        self._notice = notice
        self._is_live = is_live
        self._ending = threading.Event()
        self._abandoned = threading.Event()
        self._missing = "MLflow was not reached"
        self._status: str | None = None
        self._model_uri: str | None = None
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)

    def start(self) -> None:
        """Start writing. Importing MLflow takes seconds: begin when training has begun."""
        if self._thread.ident is None:
            self._thread.start()

    def finish(self, status: str | None, deadline_s: float) -> Report:
        """Send what is left, the files, the model and the status.

        Args:
            status: FINISHED, FAILED or KILLED; None leaves it as it is.
            deadline_s: how long to wait for MLflow at most.
        """
        self._status = status
        self.start()
        self._ending.set()
        self._thread.join(deadline_s)
        if self._thread.is_alive():
            self._abandoned.set()
            self._missing = self._missing or f"MLflow took more than {deadline_s:g} s"
        store = self._writer.store
        return Report(
            run_id=store.run_id if store is not None else None,
            model_uri=self._model_uri,
            missing=self._missing,
            url=self._writer.url(),
        )

    def _work(self) -> None:
        if self._is_live:
            self._writer.keep_packages()
            while not self._ending.is_set():
                self._insist(self._writer.advance)
                self._ending.wait(_FLUSH_S)
        elif self._status is not None:
            self._insist(functools.partial(self._writer.tell_status, self._status))
        self._insist(self._end)

    def _end(self) -> None:
        self._writer.advance()
        self._model_uri = self._writer.end(self._status)

    def _insist(self, act: Callable[[], None]) -> None:
        """Repeat an act until it succeeds, the run ends meanwhile, or nobody waits any more."""
        failures, failures_at_end = 0, 0
        while not self._abandoned.is_set():
            try:
                act()
            except Exception as error:
                self._missing = one_line(error)
                if failures == 0:
                    self._notice(
                        f"MLflow at {self._writer.address} takes no records: {self._missing}; "
                        "training goes on and the journal keeps everything"
                    )
                pause_s = _BACK_OFF_S[min(failures, len(_BACK_OFF_S) - 1)]
                failures += 1
                failures_at_end += self._ending.is_set()
                if failures_at_end == self._tries_at_end:
                    self._abandoned.set()
                self._abandoned.wait(pause_s)
            else:
                self._missing = ""
                if failures:
                    self._notice(f"MLflow at {self._writer.address} takes records again")
                return


def check(facts: RunFacts) -> None:
    """Make sure that MLflow answers, for `tracking.required=true`.

    Raises:
        StorageError: it does not.
    """
    try:
        open_client(facts.tracking_uri, facts.timeout_s)
    except Exception as error:
        raise StorageError(
            f"MLflow at {mask_text(facts.tracking_uri)} takes no records "
            f"(tracking.required=true): {one_line(error)}; mend that or tracking.uri, or let "
            "the journal wait for it with tracking.required=false"
        ) from error


def sync(
    root: Path,
    *,
    uri: str | None = None,
    artifact_root: str | None = None,
    deadline_s: float = 600,
    sends_again: bool = True,
    is_patient: bool = False,
) -> Report:
    """Write a run's journal into MLflow from its beginning; again changes nothing.

    Args:
        root: the run folder, wherever it lies by now.
        uri: of MLflow; by default the one the run was recorded with.
        artifact_root: where a local SQLite store keeps artifacts; goes with `uri`.
        deadline_s: how long to wait for MLflow at most.
        sends_again: whether to send also what the journal says MLflow has taken.
        is_patient: whether to ask a server that does not answer until the time is over.

    Raises:
        StorageError: the folder has no journal.
    """
    started, status = None, None
    for record in read(RunPaths(root).journal):
        if record.get("kind") == "RunStarted":
            started, status = record, None
        elif record.get("kind") == "RunEnded":
            status = record["status"]
    if started is None:
        raise StorageError(f"{RunPaths(root).journal} has no run on record; name a run folder")
    facts = RunFacts.from_record(started, root)
    if uri is not None:
        facts = facts.moved(uri, artifact_root)
    elif f"{MASK}@" in facts.tracking_uri:
        if any(name not in os.environ for name in _CREDENTIALS):
            raise StorageError(
                f"the journal keeps no credentials: {facts.tracking_uri}; give the address with "
                f"tracking.uri=, or set {' and '.join(_CREDENTIALS)}"
            )
        facts = facts.moved(facts.tracking_uri.replace(f"{MASK}@", ""), facts.artifact_root)
    projection = Projection(
        facts,
        keep=lambda record: None,
        notice=lambda text: None,
        is_live=False,
        sends_again=sends_again,
        tries_at_end=None if is_patient else _TRIES_AT_END,
    )
    return projection.finish(status, deadline_s)
