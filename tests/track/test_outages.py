"""A real MLflow server that is killed, stopped, failing, gone, guarded: no point lost or twice.

The table of the server's own database is read, not the client's answers.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import mlflow
import pytest

from orchestrator.track.journal import read
from orchestrator.track.mlflow_projection import sync
from tests.track import rig
from tests.track.gate import State, gate_to
from tests.track.paced import (
    NAME,
    Paced,
    assert_nothing_lost_or_doubled,
    facts_of,
    points_in,
)

# A driver that trains until it is killed.
DRIVER = """
import sys
from pathlib import Path
from tests.track.paced import Paced, facts_of

training = Paced(facts_of(Path(sys.argv[1]), sys.argv[2]))
training.until(lambda: False, "its end")
"""
ROOT = Path(__file__).parents[2]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[rig.Server]:
    """A server with an empty database."""
    made = rig.Server(tmp_path)
    made.start()
    yield made
    made.kill()


def begin(folder: Path, server: rig.Server, uri: str = "") -> Paced:
    """Begin to train, until MLflow has points."""
    training = Paced(facts_of(folder, uri or server.uri))
    training.until(lambda: points_in(server.database), "points in MLflow")
    return training


def test_a_server_that_is_killed_and_comes_back_has_every_point_once(
    tmp_path: Path, server: rig.Server
) -> None:
    training = begin(tmp_path, server)
    server.kill()
    training.until_said("takes no records")
    server.start(wait=False)
    training.until_said("takes records again")
    training.for_steps(50)
    report = training.end()
    assert (report.missing, len(training.said)) == ("", 2)
    assert_nothing_lost_or_doubled(tmp_path / NAME, server.database)


def test_a_password_comes_from_the_environment_and_files_go_through_the_server(
    tmp_path: Path, server: rig.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with gate_to(server.uri, credentials="ann:hunter2") as gate:
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
        training = begin(tmp_path, server, gate.uri)
        report = training.end()
        assert (report.missing, training.said, gate.refused) == ("", [], 0)
        assert_nothing_lost_or_doubled(tmp_path / NAME, server.database)
        kept = tmp_path / "artifacts" / "1" / str(report.run_id) / "artifacts"
        assert (kept / "logs" / "attempt-1" / "worker-0.log").read_text() == "worker log"
        written = [path.read_bytes() for path in (tmp_path / NAME).rglob("*.*")]
        assert not any(b"hunter2" in content for content in written)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
        assert "401" in sync(tmp_path / NAME, deadline_s=20).missing


@pytest.mark.thorough
@pytest.mark.parametrize("state", [State.failing, State.losing, State.hanging])
def test_a_server_in_a_bad_state_delays_points_and_no_step(
    tmp_path: Path, server: rig.Server, state: State
) -> None:
    with gate_to(server.uri) as gate:
        training = begin(tmp_path, server, gate.uri)
        for _ in range(2):
            gate.state = state
            training.until_said("takes no records")
            training.for_steps(300)
            gate.state = State.open
            training.until_said("takes records again")
        report = training.end()
    assert report.missing == ""
    assert_nothing_lost_or_doubled(tmp_path / NAME, server.database)


@pytest.mark.thorough
def test_a_server_that_was_stopped_for_a_minute_has_every_point_once(
    tmp_path: Path, server: rig.Server
) -> None:
    training = begin(tmp_path, server)
    server.signal(signal.SIGSTOP)
    end = time.monotonic() + 60
    training.until(lambda: time.monotonic() > end, "a minute")
    server.signal(signal.SIGCONT)
    training.until_said("takes records again")
    report = training.end()
    assert report.missing == ""
    assert_nothing_lost_or_doubled(tmp_path / NAME, server.database)


@pytest.mark.thorough
def test_a_run_ends_well_without_its_server_and_is_completed_later(
    tmp_path: Path, server: rig.Server
) -> None:
    training = begin(tmp_path, server)
    server.kill()
    training.until_said("takes no records")
    training.for_steps(200)
    report = training.end(deadline_s=5.0)
    assert report.missing and report.run_id
    server.start()
    root = tmp_path / NAME
    counts = []
    for tail in (b"", b"", b'{"n":99,"cr'):
        with (root / "journal.jsonl").open("ab") as file:
            file.write(tail)
        assert sync(root).missing == ""
        counts.append(rig.rows(server.database))
    assert counts[0] == counts[1] == counts[2]
    assert_nothing_lost_or_doubled(root, server.database)
    assert status(server.database) == ["FINISHED"]


@pytest.mark.thorough
def test_a_driver_that_is_killed_while_the_server_is_away_goes_on_as_one_run(
    tmp_path: Path, server: rig.Server
) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path), server.uri],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        wait_for_points(server.database, 300)
        server.kill()
        journal = tmp_path / NAME / "journal.jsonl"
        wait_for_size(journal, 2 * journal.stat().st_size)
    finally:
        driver.kill()
        driver.wait()
    with journal.open("ab") as file:
        file.write(b'{"n":7,"crc":"0123')  # killed in mid-write
    server.start()
    made = sum(record["kind"] == "BlockDone" for record in read(journal))
    # Forty steps are made again, from the last checkpoint.
    training = Paced(facts_of(tmp_path, server.uri), first_step=made - 40)
    training.for_steps(80)
    report = training.end()
    assert report.missing == ""
    assert_nothing_lost_or_doubled(tmp_path / NAME, server.database)


@pytest.mark.thorough
def test_eight_runs_that_begin_at_once_on_a_new_database_all_have_their_points(
    tmp_path: Path,
) -> None:
    code = """
import sys
from pathlib import Path
from tests.track.paced import Paced, facts_of

training = Paced(facts_of(Path(sys.argv[1]), sys.argv[2], sys.argv[3]))
training.for_steps(200)
report = training.end()
sys.exit(report.missing or None)
"""
    uri = rig.sqlite_uri(tmp_path)
    names = [f"run-{number}" for number in range(8)]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), uri, name],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for name in names
    ]
    assert [process.wait(300) for process in running] == [0] * 8
    database = tmp_path / "mlflow.db"
    assert status(database) == ["FINISHED"] * 8
    found = points_in(database)
    # 200 steps of six points, and goodput's eleven at the end.
    assert len(found) == 200 * 6 + 11 and set(found.values()) == {8}


def test_a_run_that_is_deleted_while_it_trains_comes_back_whole(tmp_path: Path) -> None:
    training = begin_in_file(tmp_path)
    client = mlflow.MlflowClient(rig.sqlite_uri(tmp_path))
    client.delete_run(the_run(client))
    training.until_said("takes records again")
    assert training.end().missing == ""
    assert_nothing_lost_or_doubled(tmp_path / NAME, tmp_path / "mlflow.db")
    assert client.get_run(the_run(client)).info.lifecycle_stage == "active"


@pytest.mark.thorough
def test_an_experiment_that_is_deleted_while_it_trains_comes_back_whole(tmp_path: Path) -> None:
    training = begin_in_file(tmp_path)
    client = mlflow.MlflowClient(rig.sqlite_uri(tmp_path))
    client.delete_experiment(client.get_experiment_by_name("tiny").experiment_id)
    training.until_said("takes records again")
    assert training.end().missing == ""
    assert_nothing_lost_or_doubled(tmp_path / NAME, tmp_path / "mlflow.db")
    assert client.get_experiment_by_name("tiny").lifecycle_stage == "active"


@pytest.mark.thorough
def test_an_experiment_that_is_deleted_for_good_and_named_again_gets_the_whole_run(
    tmp_path: Path,
) -> None:
    training = begin_in_file(tmp_path)
    client = mlflow.MlflowClient(rig.sqlite_uri(tmp_path))
    old = client.get_experiment_by_name("tiny").experiment_id
    client.delete_experiment(old)
    uri = rig.sqlite_uri(tmp_path)
    forget = ("-m", "mlflow", "gc", "--backend-store-uri", uri, "--experiment-ids", old)
    environ = {**os.environ, "MLFLOW_TRACKING_URI": uri}
    subprocess.run([sys.executable, *forget], check=True, capture_output=True, env=environ)
    client.create_experiment("tiny")
    training.for_steps(100)
    training.until(lambda: rig.rows(tmp_path / "mlflow.db")["runs"], "a run made anew")
    assert training.end().missing == ""
    assert_nothing_lost_or_doubled(tmp_path / NAME, tmp_path / "mlflow.db")


def test_a_run_stays_one_when_its_experiment_is_renamed_and_the_name_is_used_again(
    tmp_path: Path,
) -> None:
    training = begin_in_file(tmp_path)
    client = mlflow.MlflowClient(rig.sqlite_uri(tmp_path))
    run_id, old = the_run(client), client.get_experiment_by_name("tiny").experiment_id
    client.rename_experiment(old, "tiny, first try")
    client.create_experiment("tiny")
    assert training.end("KILLED").missing == ""
    resumed = Paced(facts_of(tmp_path, rig.sqlite_uri(tmp_path)), first_step=training.step)
    resumed.for_steps(20)
    report = resumed.end()
    assert (report.missing, report.run_id) == ("", run_id)
    assert_nothing_lost_or_doubled(tmp_path / NAME, tmp_path / "mlflow.db")


def begin_in_file(folder: Path) -> Paced:
    """Begin to train with a SQLite file, until it has points."""
    training = Paced(facts_of(folder, rig.sqlite_uri(folder)))
    database = folder / "mlflow.db"
    training.until(lambda: database.exists() and has_points(database), "points in MLflow")
    return training


def has_points(database: Path) -> bool:
    """Tell whether there are points; while the tables are made there are none."""
    try:
        return bool(points_in(database))
    except sqlite3.OperationalError:
        return False


def the_run(client: mlflow.MlflowClient) -> str:
    """Return the id of the only run, deleted or not."""
    (run,) = client.search_runs(
        [item.experiment_id for item in client.search_experiments(view_type=3)], run_view_type=3
    )
    return str(run.info.run_id)


def status(database: Path) -> list[str]:
    """Return the status of all runs."""
    with closing(sqlite3.connect(database)) as connection:
        return [row[0] for row in connection.execute("select status from runs")]


def wait_for_points(database: Path, number: int) -> None:
    deadline = time.monotonic() + 60
    while not has_points(database) or len(points_in(database)) < number:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_for_size(path: Path, size: int) -> None:
    deadline = time.monotonic() + 60
    while path.stat().st_size < size:
        assert time.monotonic() < deadline
        time.sleep(0.05)
