"""The run of a sweep in MLflow: one parent, whatever has become of its children."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import mlflow
import pytest

from orchestrator.track.mlflow_sweep import PARENT_TAG, Ending, ParentRun
from tests.track import rig


@pytest.fixture
def uri(database: Path) -> str:
    return rig.sqlite_uri(database.parent)


def ending(loss: float, time_ms: int = 1_000) -> Ending:
    return Ending(
        status="FINISHED", text="done", files=[], time_ms=time_ms, metrics={"best/loss": loss}
    )


def ended(
    folder: Path, uri: str, last: Ending, *children: str, deadline_s: float = 60
) -> ParentRun:
    """Do what one command does to the parent."""
    said: list[str] = []
    parent = ParentRun(rig.make_facts(folder, uri), 1.0, said.append)
    for child in children:
        parent.adopt(child)
    parent.finish(last, deadline_s)
    return parent


def found(uri: str, client: Any) -> Any:
    experiment = client.get_experiment_by_name("tiny")
    runs = client.search_runs([experiment.experiment_id], "tags.`orchestrator.run` LIKE '%'")
    (run,) = [run for run in runs if PARENT_TAG not in run.data.tags]
    return run


def test_a_child_that_somebody_has_deleted_keeps_nobody_from_the_end(
    tmp_path: Path, uri: str
) -> None:
    assert ended(tmp_path, uri, ending(0.5)).missing == ""
    client = mlflow.MlflowClient(uri)
    parent = found(uri, client)
    gone, other = (client.create_run(parent.info.experiment_id).info.run_id for _ in range(2))
    client.delete_run(gone)
    assert ended(tmp_path, uri, ending(0.5), gone, "0" * 32, other).missing == ""
    assert client.get_run(parent.info.run_id).info.status == "FINISHED"
    assert client.get_run(other).data.tags[PARENT_TAG] == parent.info.run_id


def test_the_best_of_the_last_command_is_shown(tmp_path: Path, uri: str) -> None:
    for loss, time_ms in ((0.5, 1_000), (0.4, 2_000)):
        assert ended(tmp_path, uri, ending(loss, time_ms)).missing == ""
    assert found(uri, mlflow.MlflowClient(uri)).data.metrics["best/loss"] == 0.4


def test_a_metric_that_mlflow_would_name_otherwise_is_told_by_that_name(
    tmp_path: Path, uri: str
) -> None:
    named = dataclasses.replace(ending(0.5), metrics={"best/acc@5": 0.5})
    assert ended(tmp_path, uri, named).missing == ""
    run = found(uri, mlflow.MlflowClient(uri))
    assert run.info.status == "FINISHED" and 0.5 in run.data.metrics.values()


def test_the_status_is_true_where_files_find_no_place(tmp_path: Path, uri: str) -> None:
    (tmp_path / "mlartifacts").write_bytes(b"")  # where the folder of artifacts would be
    table = tmp_path / "table.md"
    table.write_text("a table")
    facts = rig.make_facts(tmp_path, uri, artifact_root=str(tmp_path / "mlartifacts"))
    parent = ParentRun(facts, 1.0, lambda text: None)
    parent.finish(dataclasses.replace(ending(0.5), files=[table]), 60)
    assert parent.missing
    run = found(uri, mlflow.MlflowClient(uri))
    assert run.info.status == "FINISHED" and run.data.tags["mlflow.note.content"] == "done"


def test_an_end_that_took_too_long_is_told(tmp_path: Path, uri: str) -> None:
    parent = ended(tmp_path, uri, ending(0.5), deadline_s=0.0)
    assert parent.is_late and parent.missing
    parent.finish(ending(0.5), 60)  # nothing of it goes on beside the tests that follow
    assert not parent.is_late and parent.missing == ""
