"""The projection against a real SQLite store: what the journal says, once."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import pytest

from orchestrator.errors import ConfigError, StorageError
from orchestrator.runs_command import runs
from orchestrator.track.facts import RunFacts
from orchestrator.track.journal import Journal, read
from orchestrator.track.mlflow_projection import Projection, Report, check, sync
from orchestrator.track.mlflow_store import legal
from tests.cluster.rig import wait_for
from tests.databases import with_tables
from tests.track import rig

RUN_TAG = "orchestrator.run"


def project(facts: RunFacts, status: str = "FINISHED") -> tuple[Report, list[str]]:
    """Project what the journal has, as a driver does."""
    journal = Journal(Path(facts.root) / "journal.jsonl")
    notices: list[str] = []

    def keep(record: dict[str, Any]) -> None:
        journal.append(record)

    projection = Projection(facts, keep=keep, notice=notices.append)
    projection.start()
    report = projection.finish(status, 60)
    journal.close()
    return report, notices


def test_a_run_that_cannot_save_is_tagged_until_it_can(tmp_path: Path) -> None:
    root = rig.new_run(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    facts = rig.make_facts(root, uri)
    journal = Journal(root / "journal.jsonl")
    journal.append(facts.record(rig.START))
    journal.append({"kind": "SaveFailed", "step": 4, "error": "No space left on device"})
    journal.close()
    project(facts)
    tags = the_run(uri).data.tags
    assert tags["orchestrator.degraded"] == "no checkpoint of step 4: No space left on device"
    journal = Journal(root / "journal.jsonl")
    journal.append({"kind": "Saved", "step": 6})
    journal.close()
    project(facts)
    assert the_run(uri).data.tags["orchestrator.degraded"] == ""


def failed(attempt: int, worker: int, error: str, cause: str = "worker") -> dict[str, Any]:
    record = {"kind": "Failed", "attempt": attempt, "worker": worker, "time": rig.START + attempt}
    return record | {"error": error, "cause": cause}


def test_the_first_failure_is_a_tag_and_in_the_description_of_a_run_that_failed(
    root: Path, facts: RunFacts
) -> None:
    reset = failed(1, 0, "Connection reset", "collateral")
    cut = failed(1, 1, "the cable to http://ann:hunter2@host was cut\nand more")
    again = failed(2, 0, "no room")
    ended = rig.ended("FAILED") | {"cause": "worker 0 failed at step 3\n  no room"}
    rig.write(root, facts.record(rig.START), reset, cut, rig.block(0, 3), again, ended)
    project(facts, "FAILED")
    tags = the_run(facts.tracking_uri).data.tags
    first = "attempt 1, worker 1: the cable to http://***@host was cut"
    assert tags["orchestrator.first_failure"] == first
    assert f"first failure:\n```\n{first}\n```" in tags["mlflow.note.content"]
    # A resumption does not change what failed first.
    rig.write(root, facts.record(rig.START + 200), failed(3, 1, "no luck"), rig.ended())
    project(facts)
    tags = the_run(facts.tracking_uri).data.tags
    assert tags["orchestrator.first_failure"] == first
    assert "first failure" not in tags["mlflow.note.content"]


def the_run(uri: str, experiment: str = "tiny") -> Any:
    client = mlflow.MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    (run,) = client.search_runs([found.experiment_id])
    return run


def whole_run(facts: RunFacts, status: str = "FINISHED") -> list[dict[str, Any]]:
    return [
        facts.record(rig.START),
        rig.data_used(),
        rig.block(0, 3),
        rig.block(3, 5),
        rig.ended(status),
    ]


def test_a_run_holds_everything_the_journal_says(root: Path, facts: RunFacts) -> None:
    rig.write(root, *whole_run(facts))
    report, notices = project(facts)
    assert (notices, report.missing, report.url) == ([], "", None)
    run = the_run(facts.tracking_uri)
    assert run.info.run_id == report.run_id
    assert (run.info.run_name, run.info.status) == (facts.run, "FINISHED")
    assert (run.info.start_time, run.info.end_time) == (rig.START * 1000, (rig.START + 100) * 1000)
    assert run.data.params == facts.params
    assert run.data.tags.items() >= {RUN_TAG: facts.run, **facts.tags}.items()
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("mnist", "0123456789abcdef" * 2)
    client = mlflow.MlflowClient(facts.tracking_uri)
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {
        "config.yaml",
        "plan.txt",
        "overrides.txt",
        "packages.txt",
        "logs",
    }


def found(node: str, **changes: Any) -> dict[str, Any]:
    record = {"kind": "NodeFound", "worker": 0, "attempt": 0, "time": rig.START, "node": node}
    facts = {"system": "Linux", "processor": "Fast", "num_cpus": 8, "memory_bytes": 64e9}
    return record | facts | {"gpus": ["H100", "H100"]} | changes


def sampled(node: str, cpu: float) -> dict[str, Any]:
    record = {"kind": "NodeSampled", "worker": 0, "attempt": 0, "time": rig.START, "node": node}
    return record | {"values": {"cpu_utilization_percentage": cpu}}


def test_nodes_code_changes_and_packages_are_there(root: Path, facts: RunFacts) -> None:
    (root / "code").mkdir()
    (root / "code" / "mine.py").write_text("a = 1")
    (root / "uncommitted-before-attempt-1.diff").write_text("+a = 1")
    nodes = [found("host-1"), found("host-2"), found("host-3", gpus=[], num_cpus=2)]
    samples = [sampled("host-1", 50.0), sampled("host-1", 60.0), sampled("host-2", 70.0)]
    rig.write(root, facts.record(rig.START), *nodes, *samples, rig.block(0, 4), rig.ended())
    assert project(facts)[0].missing == ""
    run, client = the_run(facts.tracking_uri), mlflow.MlflowClient(facts.tracking_uri)
    assert run.data.tags["orchestrator.hardware"] == (
        "host-1, host-2: 8 CPUs (Fast), 64 GB, 2 x H100, Linux; "
        "host-3: 2 CPUs (Fast), 64 GB, no GPU, Linux"
    )
    history = client.get_metric_history(run.info.run_id, "system/host-1/cpu_utilization_percentage")
    assert [(point.step, point.value) for point in history] == [(0, 50.0), (1, 60.0)]
    assert run.data.metrics["system/host-2/cpu_utilization_percentage"] == 70.0
    folder = client.download_artifacts(run.info.run_id, "")
    told = {path.name: path.read_text() for path in Path(folder).rglob("*.*")}
    assert json.loads(told["nodes.json"])["host-1"]["gpus"] == ["H100", "H100"]
    assert f"mlflow=={mlflow.__version__}" in told["packages.txt"].splitlines()
    assert told["mine.py"] == "a = 1" and told["uncommitted-before-attempt-1.diff"] == "+a = 1"


def test_points_carry_the_time_of_their_block(root: Path, facts: RunFacts, tmp_path: Path) -> None:
    rig.write(root, *whole_run(facts))
    project(facts)
    first, second = round((rig.START + 3.001) * 1000), round((rig.START + 8.001) * 1000)
    assert rig.losses(tmp_path / "mlflow.db") == [
        (2, 1.5, first),
        (4, 3.5, second),
        (6, 5.5, second),
        (8, 7.5, second),
    ]


def test_sync_three_times_leaves_the_same_rows(root: Path, facts: RunFacts, tmp_path: Path) -> None:
    rig.write(root, *whole_run(facts))
    project(facts)
    before = rig.rows(tmp_path / "mlflow.db")
    assert before["runs"] == 1
    for tail in (b"", b"", b'{"n":99,"cr'):
        with (root / "journal.jsonl").open("ab") as file:
            file.write(tail)
        assert sync(root).missing == ""
        assert rig.rows(tmp_path / "mlflow.db") == before
    assert the_run(facts.tracking_uri).info.status == "FINISHED"


def test_sync_writes_a_run_into_another_mlflow(root: Path, facts: RunFacts, tmp_path: Path) -> None:
    rig.write(root, *whole_run(facts, "FAILED"))
    other = f"sqlite:///{tmp_path / 'other.db'}"
    report = sync(root, uri=other, artifact_root=str(tmp_path / "other"))
    assert report.missing == ""
    assert the_run(other).info.status == "FAILED"
    assert len(rig.losses(tmp_path / "other.db")) == 4


def test_the_command_finds_a_run_by_its_name_and_writes_it_where_it_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    root = rig.new_run(tmp_path / "runs" / "tiny")
    facts = rig.make_facts(root, "http://ann:hunter2@127.0.0.1:9")
    rig.write(root, *whole_run(facts))
    with_tables(tmp_path / "mlflow.db")
    uri = rig.sqlite_uri(tmp_path)
    assert runs(["sync", root.name, f"tracking.uri={uri}"], tmp_path) == 0
    assert f"MLflow has all of run {root.name}" in capsys.readouterr().out
    run = the_run(uri)
    assert (run.info.status, run.data.metrics["train/loss"]) == ("FINISHED", 7.5)
    artifacts = (tmp_path / "runs" / "mlartifacts").as_uri()
    assert run.info.artifact_uri.startswith(artifacts)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("tracking.uri=ftp://host", r"tracking.uri=ftp://host: must begin with"),
        ("tracking.uri=http://ann:hunter2@host", r"tracking.uri: a secret may not be written out"),
        ("tracking.uri=http://ann:${oc.env:NOT_SET}@host", r"variable NOT_SET is not set"),
        ("uri=http://host", r"runs sync: uri=http://host is not known here"),
    ],
)
def test_an_address_that_cannot_be_meant_is_refused(root: Path, given: str, said: str) -> None:
    rig.write(root, rig.make_facts(root, "sqlite:///x.db").record(rig.START))
    with pytest.raises(ConfigError, match=said):
        runs(["sync", str(root), given], root)


def test_a_resumed_run_stays_one_run_without_doubled_points(
    root: Path, facts: RunFacts, tmp_path: Path
) -> None:
    rig.write(root, facts.record(rig.START), rig.block(0, 5), rig.ended("KILLED"))
    first, _ = project(facts, "KILLED")
    assert the_run(facts.tracking_uri).data.tags["orchestrator.resumable"] == "true"
    resumed = rig.make_facts(root, facts.tracking_uri, params={**facts.params, "train.steps": "9"})
    rig.write(root, resumed.record(rig.START + 50), rig.block(4, 4, attempt=2), rig.ended())
    second, notices = project(resumed)
    assert (second.run_id, second.missing, notices) == (first.run_id, "", [])
    run = the_run(facts.tracking_uri)
    assert run.data.params["train.steps"] == "8"  # a param cannot change
    changed = {key: value for key, value in run.data.tags.items() if ".changed." in key}
    assert changed == {"orchestrator.changed.train.steps": "9"}
    assert run.data.tags["orchestrator.resumable"] == "false"
    # Stopped at step 5, in the middle of a window: as if it had never been.
    steps = [(step, value) for step, value, _ in rig.losses(tmp_path / "mlflow.db")]
    assert steps == [(2, 1.5), (4, 3.5), (6, 5.5), (8, 7.5)]


def test_the_window_and_the_run_id_are_journaled_once(root: Path, facts: RunFacts) -> None:
    auto = rig.make_facts(root, facts.tracking_uri, log_every_steps="auto")
    rig.write(root, auto.record(rig.START), rig.block(0, 3), rig.block(3, 20), rig.ended())
    report, _ = project(auto)
    project(rig.make_facts(root, facts.tracking_uri, log_every_steps="7"))
    noted = [r for r in read(root / "journal.jsonl") if r["kind"] in ("MlflowRun", "Window")]
    # 100 steps/s at 5 points a second.
    assert noted == [
        {
            "kind": "MlflowRun",
            "run_id": report.run_id,
            "experiment_id": mlflow.MlflowClient(facts.tracking_uri)
            .get_experiment_by_name("tiny")
            .experiment_id,
        },
        {"kind": "Window", "log_every_steps": 20},
    ]


def test_variables_of_the_environment_do_not_hijack(
    root: Path, facts: RunFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'hijack.db'}")
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", f"sqlite:///{tmp_path / 'hijack.db'}")
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "hijack")
    monkeypatch.chdir(tmp_path)
    rig.write(root, *whole_run(facts))
    report, _ = project(facts)
    assert report.missing == ""
    assert the_run(facts.tracking_uri).info.status == "FINISHED"
    assert not (tmp_path / "hijack.db").exists()
    assert not (tmp_path / "mlruns").exists()


def test_a_deleted_experiment_and_a_deleted_run_are_restored(
    root: Path, facts: RunFacts, tmp_path: Path
) -> None:
    rig.write(root, *whole_run(facts))
    report, _ = project(facts)
    client = mlflow.MlflowClient(facts.tracking_uri)
    client.delete_run(report.run_id)
    client.delete_experiment(client.get_experiment_by_name("tiny").experiment_id)
    assert sync(root).missing == ""
    assert the_run(facts.tracking_uri).info.lifecycle_stage == "active"


def test_names_and_values_that_mlflow_refuses_are_made_legal(
    root: Path, facts: RunFacts, tmp_path: Path
) -> None:
    odd = rig.make_facts(root, facts.tracking_uri, params={"a=b": "x" * 7000, "ok": "1"})
    values = {"loss": float("nan"), "top 5%": 0.5, "//": float("inf")}
    evaluated = {"kind": "Evaluated", "step": 3, "time": rig.START, "metrics": values}
    rig.write(root, odd.record(rig.START), evaluated, rig.ended())
    report, notices = project(odd)
    assert report.missing == ""
    run = the_run(facts.tracking_uri)
    param, percent, slashes = legal("a=b"), legal("eval/top 5%"), legal("eval///")
    assert {key: len(value) for key, value in run.data.params.items()} == {param: 6000, "ok": 1}
    assert set(run.data.metrics) == {"eval/loss", percent, slashes}
    assert notices == [
        f"MLflow takes no param named 'a=b': there it is {param}",
        "the param a=b has 7,000 characters: MLflow has the first ones, config.yaml all "
        "(it takes 6,000)",
        f"MLflow takes no metric named 'eval///': there it is {slashes}",
        f"MLflow takes no metric named 'eval/top 5%': there it is {percent}",
    ]


def test_two_names_that_mlflow_refuses_stay_two(root: Path, facts: RunFacts) -> None:
    long = "x" * 250
    both = rig.make_facts(root, facts.tracking_uri, params={f"{long}1": "1", f"{long}2": "2"})
    values = {"f1>0.5": 0.25, "f1<0.5": 0.75, "f1_0.5": 0.5}
    evaluated = {"kind": "Evaluated", "time": rig.START, "metrics": values}
    rig.write(root, both.record(rig.START), evaluated | {"step": 3}, evaluated | {"step": 6})
    rig.write(root, rig.ended())
    _, notices = project(both)
    run = the_run(facts.tracking_uri)
    assert sorted(run.data.params.values()) == ["1", "2"]
    metrics = {legal(f"eval/{name}"): value for name, value in values.items()}
    assert run.data.metrics == metrics and len(metrics) == 3
    assert len(notices) == 4  # two params, two metrics, each once
    assert sync(root).missing == ""
    assert the_run(facts.tracking_uri).data.metrics == metrics


@pytest.mark.parametrize("name", ["/team/vision", "../vision", "team/vision"])
def test_files_of_an_experiment_lie_below_the_runs_whatever_its_name(
    root: Path, database: Path, name: str
) -> None:
    facts = rig.make_facts(root, rig.sqlite_uri(database.parent), experiment=name)
    rig.write(root, facts.record(rig.START), rig.ended())
    project(facts)
    (found,) = mlflow.MlflowClient(facts.tracking_uri).search_experiments(
        filter_string=f"name = '{name}'"
    )
    assert found.artifact_location.startswith(f"file://{facts.artifact_root}/")
    assert "/.." not in found.artifact_location


@pytest.mark.parametrize(
    "key", ["eval/top 5", "system/host-1/gpu_0_memory_usage_percentage", "a.b-c_d/e:f", "x" * 250]
)
def test_a_name_that_mlflow_takes_stays_as_it_is(key: str) -> None:
    assert legal(key) == key


def test_a_name_that_was_changed_is_short_enough_and_changed_once() -> None:
    for key in ("f1>0.5", "x/" * 200, "..", "\udcff"):
        changed = legal(key)
        assert len(changed) <= 250 and legal(changed) == changed != key


@pytest.mark.parametrize("processes", [3, pytest.param(8, marks=pytest.mark.thorough)])
def test_processes_may_open_a_new_database_at_once(tmp_path: Path, processes: int) -> None:
    roots = [rig.new_run(tmp_path, f"run-{number}") for number in range(processes)]
    for root in roots:
        facts = rig.make_facts(root, rig.sqlite_uri(tmp_path))
        rig.write(root, facts.record(rig.START), rig.block(0, 4), rig.ended())
    code = """
import os, sys
from pathlib import Path
import mlflow
from orchestrator.track.mlflow_projection import sync

def in_fork(root):
    if child := os.fork():
        return child
    report = sync(Path(root))
    print(report.missing, file=sys.stderr, flush=True)
    os._exit(report.missing != "")

children = [in_fork(root) for root in sys.argv[1:]]
sys.exit(any([os.waitpid(child, 0)[1] for child in children]))
"""
    subprocess.run([sys.executable, "-c", code, *map(str, roots)], check=True, timeout=120)
    assert rig.rows(tmp_path / "mlflow.db")["runs"] == processes


def test_a_process_killed_while_it_makes_the_database_leaves_none(
    root: Path, tmp_path: Path
) -> None:
    facts = rig.make_facts(root, rig.sqlite_uri(tmp_path))
    rig.write(root, *whole_run(facts))
    code = (
        "import sys; from orchestrator.track.mlflow_client import open_client;"
        "open_client(sys.argv[1], 5.0)"
    )
    making = subprocess.Popen([sys.executable, "-c", code, rig.sqlite_uri(tmp_path)])
    try:
        # Some tables are made, and more are to come.
        wait_for(lambda: num_tables(tmp_path / "mlflow.db.new") > 3, "the first tables")
    finally:
        making.kill()
        making.wait()
    assert not (tmp_path / "mlflow.db").exists()
    assert sync(root).missing == ""
    assert rig.rows(tmp_path / "mlflow.db")["runs"] == 1
    assert not (tmp_path / "mlflow.db.new").exists()


def num_tables(database: Path) -> int:
    """Return how many tables a database has; 0 where it is not there or just written."""
    try:
        with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
            return int(connection.execute("select count(*) from sqlite_master").fetchone()[0])
    except sqlite3.OperationalError:
        return 0


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_a_status_is_true_where_files_find_no_place(
    root: Path, tmp_path: Path, status: str
) -> None:
    (tmp_path / "file").touch()
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    facts = rig.make_facts(root, uri, artifact_root=str(tmp_path / "file" / "artifacts"))
    rig.write(root, *whole_run(facts, status))
    report, _ = project(facts, status)
    assert "NotADirectoryError" in report.missing
    assert the_run(uri).info.status == status


def test_a_database_that_cannot_be_used_is_reported_and_stops_nothing(
    root: Path, tmp_path: Path
) -> None:
    (tmp_path / "broken.db").write_text("this is no database, " * 100)
    facts = rig.make_facts(root, f"sqlite:///{tmp_path / 'broken.db'}")
    rig.write(root, *whole_run(facts))
    report, notices = project(facts)
    assert report.run_id is None
    assert "not a database" in report.missing
    assert len(notices) == 1 and "journal keeps everything" in notices[0]
    with pytest.raises(StorageError, match=r"tracking\.required=false"):
        check(facts)


def test_a_folder_without_a_journal_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no run on record"):
        sync(tmp_path)


def test_credentials_stay_out_of_the_journal(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD", raising=False)
    facts = rig.make_facts(root, "http://ann:hunter2@127.0.0.1:9")
    rig.write(root, facts.record(rig.START))
    assert "hunter2" not in (root / "journal.jsonl").read_text()
    with pytest.raises(StorageError, match="no credentials"):
        sync(root)
