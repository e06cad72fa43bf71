"""Brings one run in MLflow up to what its journal says, a piece at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Set
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from orchestrator.spec.paths import RunPaths
from orchestrator.spec.secrets import mask_text, without_credentials
from orchestrator.track.account import account
from orchestrator.track.facts import RunFacts
from orchestrator.track.failure import FirstFailure
from orchestrator.track.journal import Reader, read
from orchestrator.track.mlflow_registry import log_model
from orchestrator.track.mlflow_store import (
    BATCH,
    DEGRADED_TAG,
    DESCRIPTION_TAG,
    FIRST_FAILURE_TAG,
    HARDWARE_TAG,
    MAX_VALUE,
    Store,
    legal,
)
from orchestrator.track.nodes import Nodes
from orchestrator.track.origin import origin
from orchestrator.track.points import Point, Points
from orchestrator.track.report import summarise

# Reading the journal again is cheap; sending it again takes a second for so many points.
_MARKED_POINTS = 5_000


class Writer:
    """What the thread does; every method raises whatever MLflow raises and may be repeated."""

    def __init__(
        self,
        facts: RunFacts,
        keep: Callable[[dict[str, Any]], None],
        notice: Callable[[str], None],
        *,
        is_live: bool,
        sends_again: bool = False,
    ):
        """Begin without touching MLflow.

        Args:
            facts: of the run.
            keep: writes a record into the journal.
            notice: shown to the user.
            is_live: whether the run is being trained, and so RUNNING.
            sends_again: whether to send also what the journal says MLflow has taken.
        """
        self._is_live = is_live
        self._sends_again = sends_again
        self._facts = facts
        self._paths = RunPaths(Path(facts.root))
        self._keep = keep
        self._notice = notice
        self.store: Store | None = None
        self._is_current = False
        self._refused: set[str] = set()
        self._named: set[str] = set()
        self._known_run_id: str | None = None
        self._begin()

    def _begin(self) -> None:
        """Read the journal from its beginning."""
        self._reader = Reader(self._paths.journal)
        self._points = Points(self._facts.log_every_steps, self._facts.global_batch_size)
        self._unsent: list[Point] = []
        # Points so far, how many of them MLflow has taken, and how many by the journal.
        self._num_points = self._num_sent = self._num_marked = 0
        self._marks: dict[str, int] = {}
        self._is_open = False
        self._data: list[Mapping[str, Any]] = []
        self._nodes = Nodes()
        self._failure = FirstFailure()
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
        server = without_credentials(uri).rstrip("/")
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
                self._send(store, at_least=BATCH)
            self._send(store)
            self._mark(store)
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

    def tell_status(self, status: str) -> None:
        """Say how a run ended that nobody trains, before anything else: it is waited for most."""
        store = self._connected()
        if not self._is_open:
            store.end(status, self._end_time_ms)

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
            # It is true whether or not there is a place for files; unless somebody, meanwhile,
            # trains the run again.
            if status is not None and (self._is_live or not self._is_open):
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
        if not self._num_points and not self._sends_again:
            self._num_sent = self._num_marked = self._marks.get(store.run_id, 0)
        self.store, self._is_current = store, True
        if known != store.run_id:
            self._known_run_id = store.run_id
            self._note(kind="MlflowRun", run_id=store.run_id, experiment_id=store.experiment_id)
        return store

    def _look_back(self) -> tuple[str | None, int | None]:
        """Learn run id, start, end and window from the journal before the points are made."""
        known, start_time_ms = self._known_run_id, None
        for record in read(self._paths.journal):
            match record.get("kind"):
                case "RunStarted":
                    self._is_open = True
                    start_time_ms = start_time_ms or round(record["time"] * 1000)
                case "RunEnded":
                    self._note_end(record)
                case "MlflowRun":
                    known = record["run_id"]
                case "Sent":
                    self._marks[record["run_id"]] = record["num_points"]
                case "Window" if not self._kept_window:
                    # The first choice stands for the whole run.
                    self._kept_window = True
                    self._points.feed(record)
        return known, start_time_ms

    def _digest(self, record: dict[str, Any]) -> None:
        known = self._failure.text
        self._failure.feed(record)
        if self._failure.text != known:
            self._untold[FIRST_FAILURE_TAG] = self._failure.text
        match record.get("kind"):
            case "RunStarted":
                self._is_open = True
                self._tell_of_params()
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
                self._note_end(record)
        points = self._points.feed(record)
        self._tell_of_names("metric", {point.key for point in points})
        self._unsent.extend(points)
        if self._points.window is not None and not self._kept_window:
            self._kept_window = True
            self._note(kind="Window", log_every_steps=self._points.window)

    def _note_end(self, record: Mapping[str, Any]) -> None:
        self._is_open, self._end_time_ms = False, round(record["time"] * 1000)

    def _tell_of_params(self) -> None:
        """Say once which params of this start MLflow has otherwise."""
        self._tell_of_names("param", self._facts.params.keys())
        for key, value in self._facts.params.items():
            if len(value) > MAX_VALUE and f"value {key}" not in self._named:
                self._named.add(f"value {key}")
                self._notice(
                    f"the param {key} has {len(value):,} characters: MLflow has the first ones, "
                    f"config.yaml all (it takes {MAX_VALUE:,})"
                )

    def _tell_of_names(self, what: str, keys: Set[str]) -> None:
        """Say once which names MLflow does not take, and what stands for them."""
        for key in sorted(key for key in keys if f"{what} {key}" not in self._named):
            self._named.add(f"{what} {key}")
            if legal(key) != key:
                self._notice(f"MLflow takes no {what} named {key!r}: there it is {legal(key)}")

    def _send(self, store: Store, at_least: int = 1) -> None:
        """Send the points that have come together, but for those that MLflow has already.

        Args:
            store: takes them.
            at_least: leave fewer than so many for later; a batch costs by itself, too.
        """
        known = min(len(self._unsent), max(0, self._num_sent - self._num_points))
        del self._unsent[:known]
        self._num_points += known
        while len(self._unsent) >= at_least:
            batch = self._unsent[:BATCH]
            refused = set(store.send(batch)) - self._refused
            del self._unsent[:BATCH]
            self._num_points += len(batch)
            self._refused |= refused
            for key in sorted(refused):
                self._notice(f"MLflow refuses points of the metric {key}; the journal has them")

    def _mark(self, store: Store) -> None:
        """Write down how many points MLflow has: whoever goes on with the run leaves them out.

        The first points of a journal are the same ones whenever it is read, in an order that is
        the same from when the window is known and nothing waits for it.
        """
        if self._num_points - self._num_marked >= _MARKED_POINTS and self._points.is_settled:
            self._num_marked = self._num_points
            self._note(kind="Sent", run_id=store.run_id, num_points=self._num_points)

    def _note(self, **record: Any) -> None:
        """Journal what was found out; not vital, since tag and journal give it again."""
        self._keep(record)
