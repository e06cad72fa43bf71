"""Brings one run in MLflow up to what its journal says, a piece at a time."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from orchestrator.spec.paths import RunPaths
from orchestrator.spec.secrets import mask_text
from orchestrator.track.account import account
from orchestrator.track.facts import RunFacts
from orchestrator.track.journal import Reader, read
from orchestrator.track.mlflow_registry import log_model
from orchestrator.track.mlflow_store import (
    BATCH,
    DEGRADED_TAG,
    DESCRIPTION_TAG,
    HARDWARE_TAG,
    Store,
)
from orchestrator.track.nodes import Nodes
from orchestrator.track.origin import origin
from orchestrator.track.points import Point, Points
from orchestrator.track.report import summarise


class Writer:
    """What the thread does; every method raises whatever MLflow raises and may be repeated."""

    def __init__(
        self,
        facts: RunFacts,
        keep: Callable[[dict[str, Any]], None],
        notice: Callable[[str], None],
        *,
        is_live: bool,
    ):
        """Begin without touching MLflow.

        Args:
            facts: of the run.
            keep: writes a record into the journal.
            notice: shown to the user.
            is_live: whether the run is being trained, and so RUNNING.
        """
        self._is_live = is_live
        self._facts = facts
        self._paths = RunPaths(Path(facts.root))
        self._keep = keep
        self._notice = notice
        self.store: Store | None = None
        self._is_current = False
        self._refused: set[str] = set()
        self._known_run_id: str | None = None
        self._begin()

    def _begin(self) -> None:
        """Read the journal from its beginning."""
        self._reader = Reader(self._paths.journal)
        self._points = Points(self._facts.log_every_steps, self._facts.global_batch_size)
        self._unsent: list[Point] = []
        self._data: list[Mapping[str, Any]] = []
        self._nodes = Nodes()
        # What tags should say, and those that say something else still.
        self._degraded = ""
        self._untold: dict[str, str] = {}
        self._kept_window = False
        self._end_time_ms: int | None = None

    @property
    def address(self) -> str:
        """Where MLflow is, without credentials."""
        return mask_text(self._facts.tracking_uri)

    def url(self) -> str | None:
        """Return the address of the run's page, if MLflow is behind a server."""
        uri = self._facts.tracking_uri
        if self.store is None or not uri.startswith("http"):
            return None
        server = re.sub(r"//[^/@]*@", "//", uri).rstrip("/")
        return (
            f"{server}/#/experiments/{self.store.experiment_id}/runs/{self.store.run_id}"
            "?workflowType=machine_learning"
        )

    def advance(self) -> None:
        """Send what the journal has gained."""
        try:
            store = self._connected()
            self._send(store)
            for record in self._reader.new():
                self._digest(record)
                if len(self._unsent) >= BATCH:
                    self._send(store)
            self._send(store)
            for key in list(self._untold):
                store.tag(key, self._untold[key])
                del self._untold[key]
            while self._data:
                store.log_data(self._data[0])
                del self._data[0]
        except Exception:
            # The run may have been deleted meanwhile: look again before the next try.
            self._is_current = False
            raise

    def keep_packages(self) -> None:
        """Write down what is installed, where the run is trained; not vital."""
        # Metadata may be broken, and the disk full: neither is a reason to have no record.
        with contextlib.suppress(Exception):
            names = sorted(f"{item.name}=={item.version}" for item in distributions())
            self._paths.packages.write_text("".join(f"{name}\n" for name in dict.fromkeys(names)))

    def end(self, status: str | None) -> str | None:
        """Upload files and model and set the status; return the model's address."""
        store = self._connected()
        try:
            found = account(read(self._paths.journal))
            store.tag(DESCRIPTION_TAG, summarise(found))
            store.log_files(self._paths, found.nodes.facts)
            if (self._paths.mlflow_model_dir / "MLmodel").exists():
                return log_model(store, self._paths, origin(read(self._paths.journal)))
            return None
        finally:
            # It is true whether or not there is a place for files.
            if status is not None:
                store.end(status, self._end_time_ms)

    def _connected(self) -> Store:
        if self.store is not None and self._is_current:
            return self.store
        known, start_time_ms = self._look_back()
        store = Store(self._facts, known, start_time_ms)
        if self._is_live:
            store.set_running()
        if self.store is not None and self.store.run_id != store.run_id:
            self._begin()  # a run made anew has none of the points
            self._look_back()
        self.store, self._is_current = store, True
        if known != store.run_id:
            self._known_run_id = store.run_id
            self._note(kind="MlflowRun", run_id=store.run_id, experiment_id=store.experiment_id)
        return store

    def _look_back(self) -> tuple[str | None, int | None]:
        """Learn run id, start and window from the journal before the points are made."""
        known, start_time_ms = self._known_run_id, None
        for record in read(self._paths.journal):
            match record.get("kind"):
                case "RunStarted" if start_time_ms is None:
                    start_time_ms = round(record["time"] * 1000)
                case "MlflowRun":
                    known = record["run_id"]
                case "Window" if not self._kept_window:
                    # The first choice stands for the whole run.
                    self._kept_window = True
                    self._points.feed(record)
        return known, start_time_ms

    def _digest(self, record: dict[str, Any]) -> None:
        match record.get("kind"):
            case "Window":
                return  # known already: `_look_back` or `_keep_window`
            case "DataUsed":
                self._data.append(record)
            case "NodeFound":
                self._nodes.add(record)
                self._untold[HARDWARE_TAG] = self._nodes.words()
            case "SaveFailed":
                self._degraded = f"no checkpoint of step {record['step']}: {record['error']}"
                self._untold[DEGRADED_TAG] = self._degraded
            case "Saved" if self._degraded:
                self._degraded = self._untold[DEGRADED_TAG] = ""
            case "RunEnded":
                self._end_time_ms = round(record["time"] * 1000)
        self._unsent.extend(self._points.feed(record))
        if self._points.window is not None and not self._kept_window:
            self._kept_window = True
            self._note(kind="Window", log_every_steps=self._points.window)

    def _send(self, store: Store) -> None:
        while self._unsent:
            refused = set(store.send(self._unsent[:BATCH])) - self._refused
            del self._unsent[:BATCH]
            self._refused |= refused
            for key in sorted(refused):
                self._notice(f"MLflow refuses points of the metric {key}; the journal has them")

    def _note(self, **record: Any) -> None:
        """Journal what was found out; not vital, since tag and journal give it again."""
        self._keep(record)
