"""What is done with MLflow's client: finding the run, and sending each kind of thing to it.

Everything here may be done twice and leaves the same behind. Errors are MLflow's own; whoever
calls decides whether to try again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.spec.paths import RunPaths
from orchestrator.track.facts import RunFacts
from orchestrator.track.mlflow_client import open_client
from orchestrator.track.points import Point

RUN_TAG = "orchestrator.run"
DESCRIPTION_TAG = "mlflow.note.content"
DEGRADED_TAG = "orchestrator.degraded"
FIRST_FAILURE_TAG = "orchestrator.first_failure"
HARDWARE_TAG = "orchestrator.hardware"
REFUSED_TAG = "orchestrator.refused"
_CHANGED_TAG = "orchestrator.changed."
BATCH = 1000  # MLflow's own limit on the metrics of one request
_BATCH_OF_WORDS = 100  # params or tags of one request
MAX_VALUE = 6000  # of a param
_MAX_TAG = 5000
_MAX_KEY = 250
_DIGEST_OF_KEY = 6
DIGEST_LENGTH = 32  # MLflow's column has room for 36
# Uploads are answered when the server has stored them, which may take longer than other requests.
_UPLOAD_TIMEOUT_S = 60
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
_UNKNOWN = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


class Store:
    """One run in MLflow.

    Attributes:
        experiment_id: of the experiment that holds the run.
        run_id: MLflow's id of the run.
    """

    def __init__(self, facts: RunFacts, known_run_id: str | None, start_time_ms: int | None):
        """Find or make experiment and run, with all params and tags.

        Args:
            facts: of the run.
            known_run_id: its id as far as known; the tag finds it otherwise.
            start_time_ms: when it began; a run of the same name that began at another time is
                another one.
        """
        self._facts = facts
        self._client = open_client(facts.tracking_uri, facts.timeout_s)
        run = self._find_known(known_run_id)
        # A run that is there stays where it is, whatever its experiment is called by now.
        self.experiment_id = self._find_experiment() if run is None else str(run.info.experiment_id)
        run = run or self._find_run(start_time_ms)
        if run is None:
            tags = {RUN_TAG: facts.run}
            run = self._client.create_run(
                self.experiment_id, start_time_ms, tags=tags, run_name=facts.run
            )
        self.run_id = str(run.info.run_id)
        self._describe(run.data.params, run.data.tags)

    @property
    def client(self) -> Any:
        """MLflow's client."""
        return self._client

    @property
    def facts(self) -> RunFacts:
        """What the record knows of the run."""
        return self._facts

    def _find_experiment(self) -> str:
        """Return the id of the experiment; one that was deleted is restored."""
        from mlflow.exceptions import MlflowException

        name, root = self._facts.experiment, self._facts.artifact_root
        found = self._client.get_experiment_by_name(name)
        if found is None:
            location = None
            if root is not None:  # below it, whatever the name looks like as a path
                parts = [part for part in name.split("/") if part not in ("", ".", "..")]
                location = Path(root, *parts).absolute().as_uri()
            try:
                return str(self._client.create_experiment(name, artifact_location=location))
            except MlflowException as error:
                found = self._client.get_experiment_by_name(name)
                if found is None:  # not another process that was faster
                    raise error
        if found.lifecycle_stage == "deleted":
            self._client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    def _find_known(self, run_id: str | None) -> Any:
        """Return the run that the journal names, restored if it was deleted, or None."""
        from mlflow.exceptions import MlflowException

        if run_id is None:
            return None
        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code not in _UNKNOWN:
                raise
            return None  # another store, or it was deleted for good
        if run.data.tags.get(RUN_TAG) != self._facts.run:
            return None
        experiment = self._client.get_experiment(run.info.experiment_id)
        if experiment.lifecycle_stage == "deleted":
            self._client.restore_experiment(experiment.experiment_id)
            run = self._client.get_run(run_id)
        return self._restored(run)

    def _restored(self, run: Any) -> Any:
        if run.info.lifecycle_stage == "deleted":
            self._client.restore_run(run.info.run_id)
        return run

    def _find_run(self, start_time_ms: int | None) -> Any:
        """Return the run by its tag and start, restored if it was deleted, or None."""
        from mlflow.entities import ViewType

        found = self._client.search_runs(
            [self.experiment_id],
            filter_string=f"tags.`{RUN_TAG}` = '{self._facts.run}'",
            run_view_type=ViewType.ALL,
        )
        # A folder that was removed, or one of another checkout, may have had the name before.
        same = [run for run in found if start_time_ms in (None, run.info.start_time)]
        # Two can only be there if somebody made one by hand.
        same.sort(key=lambda run: int(run.info.start_time))
        return self._restored(same[0]) if same else None

    def _describe(self, params: Mapping[str, str], known_tags: Mapping[str, str]) -> None:
        """Log tags, and the params that are not there yet: of one that differs, a tag tells it.

        Args:
            params: that MLflow has; they cannot change.
            known_tags: that MLflow has.
        """
        from mlflow.entities import Param, RunTag

        wanted = {legal(k): shortened(v, MAX_VALUE) for k, v in self._facts.params.items()}
        missing = [Param(key, value) for key, value in wanted.items() if key not in params]
        for start in range(0, len(missing), _BATCH_OF_WORDS):
            self._client.log_batch(self.run_id, params=missing[start : start + _BATCH_OF_WORDS])
        told = dict(self._facts.tags)
        for key, value in wanted.items():
            tag = legal(f"{_CHANGED_TAG}{key}")
            # One that is as it was at first again has a tag that says otherwise.
            if tag in known_tags or params.get(key, value) != value:
                told[tag] = value
        tags = [RunTag(legal(key), shortened(value, _MAX_TAG)) for key, value in told.items()]
        for start in range(0, len(tags), _BATCH_OF_WORDS):
            self._client.log_batch(self.run_id, tags=tags[start : start + _BATCH_OF_WORDS])

    def send(self, points: Sequence[Point]) -> list[str]:
        """Send at most 1,000 points; return the keys of those that MLflow refuses for good."""
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        metrics = [Metric(legal(p.key), p.value, p.timestamp_ms, p.step) for p in points]
        try:
            self._client.log_batch(self.run_id, metrics=metrics)
            return []
        except MlflowException as error:
            # The same answer comes when the run was deleted meanwhile: that is no bad point.
            if error.error_code not in _REFUSALS or not self._is_active():
                raise
            if len(points) == 1:
                # And when the database takes no writes at all, which raises here too.
                self.tag(REFUSED_TAG, f"{points[0].key} of step {points[0].step:,}")
                return [points[0].key]
        middle = len(points) // 2
        return self.send(points[:middle]) + self.send(points[middle:])

    def _is_active(self) -> bool:
        return bool(self._client.get_run(self.run_id).info.lifecycle_stage == "active")

    def log_data(self, record: Mapping[str, Any]) -> None:
        """Log a DataUsed record as an input of the run; MLflow knows it by name and digest."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        columns = [{"name": name, "type": kind} for name, kind in record["features"].items()]
        dataset = Dataset(
            name=record["name"][:_MAX_KEY],
            digest=record["digest"][:DIGEST_LENGTH],
            source_type="local",
            source=json.dumps({"uri": record["source"]}),
            schema=json.dumps({"mlflow_colspec": columns}),
            profile=json.dumps(
                {"num_rows": record["num_examples"], "placement": record.get("placement", "")}
            ),
        )
        tags = [InputTag("mlflow.data.context", record["split"])]
        self._client.log_inputs(self.run_id, [DatasetInput(dataset, tags)])

    def set_running(self) -> None:
        """Say that the run goes on."""
        self._client.update_run(self.run_id, status="RUNNING")

    def tag(self, key: str, text: str) -> None:
        """Set a tag, or set it anew."""
        self._client.set_tag(self.run_id, key, shortened(text, _MAX_TAG))

    def end(self, status: str, time_ms: int | None) -> None:
        """Say how the run ended."""
        resumable = str(status == "KILLED").lower()
        self._client.set_tag(self.run_id, "orchestrator.resumable", resumable)
        self._client.set_terminated(self.run_id, status, time_ms)

    def log_files(self, paths: RunPaths, nodes: Mapping[str, Any]) -> None:
        """Upload what was run, the code of it, how it went, and what the nodes are."""
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(_UPLOAD_TIMEOUT_S)
        texts = [paths.config, paths.overrides, paths.plan, paths.model_summary, paths.report]
        for path in [*texts, paths.packages, *paths.diffs]:
            if path.exists():
                self._client.log_artifact(self.run_id, str(path))
        if nodes:
            self._client.log_text(self.run_id, json.dumps(nodes, indent=2), "nodes.json")
        folders = (paths.logs_dir, paths.plots_dir, paths.profile_dir, paths.code_dir)
        for folder in folders:
            if folder.exists():
                self._client.log_artifacts(self.run_id, str(folder), folder.name)


@functools.lru_cache(maxsize=4096)  # asked for every point
def legal(key: str) -> str:
    """Return a key that MLflow takes: letters, digits and `_ - . space : /`, no odd paths.

    One that had to be changed ends with a digest of what it was: two names stay two.
    """
    parts = re.sub(r"[^\w\-. :/]", "_", key).split("/")
    found = "/".join("_" if part in ("", ".", "..") else part for part in parts)
    if found == key and len(key) <= _MAX_KEY:
        return key
    digest = hashlib.sha256(key.encode(errors="backslashreplace")).hexdigest()[:_DIGEST_OF_KEY]
    return f"{found[: _MAX_KEY - 1 - _DIGEST_OF_KEY]}-{digest}"


def shortened(value: str, size: int) -> str:
    """Return a text of at most `size` characters."""
    return value if len(value) <= size else f"{value[: size - 3]}..."
