"""The one thread that writes to MLflow, from the records of the journal.

An outage of the tracking server delays charts and never training: records wait here, and are in
the journal in any case. Every point carries the time it was journaled with, and MLflow keeps equal
points once, so sending anything twice changes nothing.
"""

from __future__ import annotations

import fcntl
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import StorageError
from orchestrator.spec.paths import RunPaths
from orchestrator.track import journal as journal_file
from orchestrator.track.facts import RunFacts
from orchestrator.track.points import Point, Points

RUN_TAG = "orchestrator.run"
_BATCH = 1000
_FLUSH_S = 1.0
_BACK_OFF_S = (1.0, 2.0, 5.0, 10.0)
_MAX_PARAM = 6000
_DIGEST_LENGTH = 32  # MLflow's column has room for 36


@dataclass(frozen=True, slots=True)
class Report:
    """What has become of the record in MLflow.

    Attributes:
        run_id: MLflow's id, or None if MLflow was never reached.
        model_uri: `models:/...`, or None if no model was logged.
        missing: why something is missing, or nothing.
    """

    run_id: str | None
    model_uri: str | None
    missing: str


class Projection:
    """Sends a run's records to MLflow in the background."""

    def __init__(
        self,
        facts: RunFacts,
        *,
        keep: Callable[[dict[str, Any]], None],
        notice: Callable[[str], None],
    ):
        """Begin without touching MLflow.

        Args:
            facts: of the run.
            keep: writes a record into the journal.
            notice: shown to the user.
        """
        self._facts = facts
        self._keep = keep
        self._notice = notice
        self._points = Points(facts.log_every_steps, facts.global_batch_size)
        self._records: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._unsent: list[Point] = []
        self._inputs: list[Mapping[str, Any]] = []
        self._status = "RUNNING"
        self._run_id: str | None = None
        self._experiment_id: str | None = None
        self._model_uri: str | None = None
        self._missing = "MLflow was not reached"
        self._client: Any = None
        self._abandoned = threading.Event()
        self._last_flush = time.monotonic()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)

    def put(self, record: dict[str, Any]) -> None:
        """Take a record of the journal; never blocks."""
        self._records.put(record)

    def start(self) -> None:
        """Start writing. Importing MLflow takes seconds: begin when training has begun."""
        if not self._thread.is_alive():
            self._thread.start()

    def finish(self, status: str, deadline_s: float) -> Report:
        """Send what is left, the artifacts, the model and the status.

        Args:
            status: FINISHED, FAILED or KILLED.
            deadline_s: how long to wait for MLflow at most.
        """
        self._status = status
        self.start()
        self._records.put(None)
        self._thread.join(deadline_s)
        if self._thread.is_alive():
            self._abandoned.set()
        return Report(self._run_id, self._model_uri, self._missing)

    def _work(self) -> None:
        ended = False
        while not ended:
            ended = self._take_in()
            due = time.monotonic() - self._last_flush >= _FLUSH_S
            if ended or due or len(self._unsent) >= _BATCH:
                self._insist(self._flush)
        self._insist(self._end)

    def _take_in(self) -> bool:
        """Take records until it is time to send; tell whether the run has ended."""
        while True:
            left = _FLUSH_S - (time.monotonic() - self._last_flush)
            try:
                record = self._records.get(timeout=max(0.0, left))
            except queue.Empty:
                return False
            if record is None:
                return True
            self._digest(record)
            if len(self._unsent) >= _BATCH:
                return False

    def _digest(self, record: dict[str, Any]) -> None:
        self._unsent.extend(self._points.feed(record))
        if record.get("kind") == "DataUsed":
            self._inputs.append(record)
        elif record.get("kind") == "MlflowRun":
            self._run_id = record["run_id"]

    def _insist(self, act: Callable[[], None]) -> None:
        """Repeat an act until it succeeds or nobody waits for it any more."""
        for attempt in range(1_000_000):
            if self._abandoned.is_set():
                return
            try:
                if self._client is None:
                    self._connect()
                act()
            except Exception as error:
                self._missing = f"{type(error).__name__}: {_first_line(error)}"
                if attempt == 0:
                    self._notice(
                        f"MLflow does not take records ({self._missing}); training goes on, the "
                        "journal keeps everything"
                    )
                self._abandoned.wait(_BACK_OFF_S[min(attempt, len(_BACK_OFF_S) - 1)])
            else:
                self._missing = ""
                return

    def _connect(self) -> None:
        facts = self._facts
        client = make_client(facts.tracking_uri, facts.timeout_s)
        with _first_use(facts.tracking_uri):
            self._experiment_id = _experiment(client, facts)
        self._run_id = _find_or_create_run(client, facts, self._experiment_id)
        self._keep(
            {
                "kind": "MlflowRun",
                "time": time.time(),
                "run_id": self._run_id,
                "experiment_id": self._experiment_id,
            }
        )
        self._client = client

    def _flush(self) -> None:
        from mlflow.entities import Metric

        self._last_flush = time.monotonic()
        while self._unsent:
            batch = self._unsent[:_BATCH]
            metrics = [Metric(p.key, p.value, p.timestamp_ms, p.step) for p in batch]
            self._client.log_batch(self._run_id, metrics=metrics)
            del self._unsent[: len(batch)]
        while self._inputs:
            self._log_input(self._inputs[0])
            del self._inputs[0]

    def _log_input(self, record: Mapping[str, Any]) -> None:
        import json

        from mlflow.entities import Dataset, DatasetInput, InputTag

        schema = json.dumps({"mlflow_colspec": [
            {"name": name, "type": kind} for name, kind in record["features"].items()
        ]})  # fmt: skip
        dataset = Dataset(
            name=f"{record['name']} {record['split']}",
            digest=record["digest"][:_DIGEST_LENGTH],
            source_type="local",
            source=json.dumps({"uri": record["source"]}),
            schema=schema,
            profile=json.dumps({"num_rows": record["num_examples"]}),
        )
        tag = InputTag("mlflow.data.context", record["split"])
        self._client.log_inputs(self._run_id, [DatasetInput(dataset, [tag])])

    def _end(self) -> None:
        paths = RunPaths(Path(self._facts.root))
        for path in (paths.config, paths.overrides, paths.plan):
            if path.exists():
                self._client.log_artifact(self._run_id, str(path))
        if paths.logs_dir.exists():
            self._client.log_artifacts(self._run_id, str(paths.logs_dir), "logs")
        if self._status == "FINISHED" and paths.mlflow_model_dir.exists():
            self._model_uri = self._log_model(paths)
        resumable = str(self._status == "KILLED").lower()
        self._client.set_tag(self._run_id, "orchestrator.resumable", resumable)
        self._client.set_terminated(self._run_id, self._status)

    def _log_model(self, paths: RunPaths) -> str:
        """Log and register the packaged model once, without TensorFlow."""
        from mlflow.entities import LoggedModelOutput

        client, facts = self._client, self._facts
        found = client.search_logged_models(
            [self._experiment_id], filter_string=f"source_run_id = '{self._run_id}'"
        )
        ready = [model for model in found if str(model.status).upper().endswith("READY")]
        if ready:
            return str(ready[0].model_uri)
        model = client.create_logged_model(
            experiment_id=self._experiment_id,
            name=facts.job,
            source_run_id=self._run_id,
            tags={RUN_TAG: facts.run},
            model_type="savedmodel",
        )
        client.log_model_artifacts(model.model_id, str(paths.mlflow_model_dir))
        client.finalize_logged_model(model.model_id, "READY")
        client.log_outputs(self._run_id, [LoggedModelOutput(model.model_id, 0)])
        if facts.register:
            _register(client, facts.register, model, self._run_id)
        return str(model.model_uri)


def check(facts: RunFacts) -> None:
    """Make sure that the tracking server takes records, for `tracking.required=true`.

    Raises:
        StorageError: it does not.
    """
    try:
        client = make_client(facts.tracking_uri, facts.timeout_s)
        with _first_use(facts.tracking_uri):
            _experiment(client, facts)
    except Exception as error:
        raise StorageError(
            f"the tracking server does not take records (tracking.required=true): "
            f"{_first_line(error)}; start it, or let the journal wait for it with "
            "tracking.required=false"
        ) from error


def sync(root: Path, deadline_s: float = 600.0) -> Report:
    """Write a run's journal into MLflow from its beginning; again changes nothing.

    Raises:
        StorageError: the folder has no journal.
    """
    paths = RunPaths(root)
    records = list(journal_file.read(paths.journal))
    if not records:
        raise StorageError(f"{paths.journal} has no records: is {root} a run folder?")
    facts = RunFacts.from_record(records[0], root)
    projection = Projection(facts, keep=lambda record: None, notice=lambda text: None)
    status = "RUNNING"
    for record in records:
        projection.put(record)
        if record.get("kind") == "RunEnded":
            status = record["status"]
        elif record.get("kind") == "RunStarted":
            status = "RUNNING"
    return projection.finish(status, deadline_s)


def make_client(uri: str, timeout_s: float) -> Any:
    """Return a client for a tracking URI that fails soon instead of retrying for minutes."""
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(max(1, int(timeout_s)))
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    import logging

    import mlflow

    # SQLite's migrations and the client's hints would land on the user's terminal.
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Registering a model asks the global URI, not the client's: without this it would make a
    # database in the working folder.
    mlflow.set_tracking_uri(uri)
    return mlflow.MlflowClient(uri)


@contextmanager
def _first_use(uri: str) -> Iterator[None]:
    """Let one process at a time make the tables of a SQLite file: two at once crash."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    database = Path(uri.removeprefix("sqlite:///"))
    database.parent.mkdir(parents=True, exist_ok=True)
    with database.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _experiment(client: Any, facts: RunFacts) -> str:
    """Return the id of the experiment, made or restored if need be."""
    found = client.get_experiment_by_name(facts.experiment)
    if found is None:
        location = None
        if facts.artifact_root is not None:
            location = (Path(facts.artifact_root) / facts.experiment).as_uri()
        return str(client.create_experiment(facts.experiment, artifact_location=location))
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def _find_or_create_run(client: Any, facts: RunFacts, experiment_id: str) -> str:
    """Return the id of the run, with the params and tags it lacks, and RUNNING."""
    found = client.search_runs(
        [experiment_id], filter_string=f"tags.`{RUN_TAG}` = '{facts.run}'", max_results=1
    )
    tags = {**facts.tags, RUN_TAG: facts.run}
    if found:
        run = found[0]
        client.update_run(run.info.run_id, status="RUNNING")
    else:
        run = client.create_run(experiment_id, run_name=facts.run, tags=tags)
    run_id = str(run.info.run_id)
    from mlflow.entities import Param

    new = {key: value for key, value in facts.params.items() if key not in run.data.params}
    params = [Param(key, value[:_MAX_PARAM]) for key, value in new.items()]
    for start in range(0, len(params), 100):
        client.log_batch(run_id, params=params[start : start + 100])
    return run_id


def _register(client: Any, name: str, model: Any, run_id: str | None) -> None:
    if not client.search_registered_models(filter_string=f"name = '{name}'"):
        client.create_registered_model(name)
    client.create_model_version(
        name, source=model.model_uri, run_id=run_id, model_id=model.model_id
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
