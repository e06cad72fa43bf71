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
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest

from orchestrator.errors import StorageError
from orchestrator.runs_command import runs
from orchestrator.track.journal import read
from orchestrator.track.mlflow_projection import sync
from tests.disks import disk, fill
from tests.track import rig
from tests.track.gate import State, gate_to
from tests.track.paced import (
    Paced,
    assert_nothing_lost_or_doubled,
    facts_of,
    points_in,
    root_of,
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
# Room for a database with MLflow's tables and many points.
_DISK_BYTES = 16 * 2**20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[rig.Server]:
    """A server; each test leaves it running, and has a run of its own."""
    made = rig.Server(tmp_path_factory.mktemp("server"))
    made.start()
    yield made
    made.kill()


def begin(folder: Path, server: rig.Server, uri: str = "") -> Paced:
    """Begin to train, until MLflow has points."""
    training = Paced(facts_of(folder, uri or server.uri))
    training.until(lambda: has_points(server.database, folder), "points in MLflow")
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
    assert_nothing_lost_or_doubled(tmp_path, server.database)


def test_a_password_comes_from_the_environment_and_files_go_through_the_server(
    tmp_path: Path, server: rig.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with gate_to(server.uri, credentials="ann:hunter2") as gate:
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
        training = begin(tmp_path, server, gate.uri)
        report = training.end()
        assert (report.missing, training.said, gate.refused) == ("", [], 0)
        assert_nothing_lost_or_doubled(tmp_path, server.database)
        files = server.database.parent / "artifacts" / "1" / str(report.run_id) / "artifacts"
        assert (files / "logs" / "attempt-1" / "worker-0.log").read_text() == "worker log"
        written = [path.read_bytes() for path in (root_of(tmp_path)).rglob("*.*")]
        assert not any(b"hunter2" in content for content in written)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
        missing = sync(root_of(tmp_path), deadline_s=20).missing
        assert "(401)" in missing and "MLFLOW_TRACKING_USERNAME" in missing


def test_credentials_of_an_address_are_given_again_when_the_record_is_completed(
    tmp_path: Path, server: rig.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = rig.new_run(tmp_path)
    with gate_to(server.uri, credentials="ann:hunter2") as gate:
        facts = rig.make_facts(root, gate.uri.replace("//", "//ann:hunter2@"))
        rig.write(root, facts.record(rig.START), rig.block(0, 4), rig.ended())
        with pytest.raises(StorageError, match="MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASS"):
            sync(root)
        monkeypatch.setenv("SECRET", "hunter2")
        given = gate.uri.replace("//", "//ann:${oc.env:SECRET}@")
        assert runs(["sync", str(root), f"tracking.uri={given}"], tmp_path) == 0
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
        assert runs(["sync", str(root)], tmp_path) == 0
        assert gate.refused == 0


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
    assert_nothing_lost_or_doubled(tmp_path, server.database)


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
    assert_nothing_lost_or_doubled(tmp_path, server.database)


@pytest.mark.thorough
def test_a_server_whose_disk_is_full_delays_points_and_no_step(tmp_path: Path) -> None:
    folder = tmp_path / "server"
    folder.mkdir()
    with disk(folder, _DISK_BYTES):
        made = rig.Server(folder)
        made.start()
        try:
            training = begin(tmp_path, made)
            fill(folder)
            training.until_said("takes no records")
            training.for_steps(300)
            (folder / "filling").unlink()
            training.until_said("takes records again")
            report = training.end()
            assert (report.missing, len(training.said)) == ("", 2)
            assert_nothing_lost_or_doubled(tmp_path, made.database)
        finally:
            made.kill()


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
    root = root_of(tmp_path)
    counts = []
    for tail in (b"", b"", b'{"n":99,"cr'):
        with (root / "journal.jsonl").open("ab") as file:
            file.write(tail)
        assert sync(root).missing == ""
        counts.append(rig.rows(server.database))
    assert counts[0] == counts[1] == counts[2]
    assert_nothing_lost_or_doubled(tmp_path, server.database)


@pytest.mark.thorough
def test_a_driver_that_is_killed_while_the_server_is_away_goes_on_as_one_run(
    tmp_path: Path, server: rig.Server
) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path), server.uri],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        wait_for(lambda: has_points(server.database, tmp_path, 300), "points")
        server.kill()
        journal = root_of(tmp_path) / "journal.jsonl"
        size = 2 * journal.stat().st_size
        wait_for(lambda: journal.stat().st_size > size, "more steps")
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
    assert_nothing_lost_or_doubled(tmp_path, server.database)


@pytest.mark.thorough
def test_eight_runs_that_begin_at_once_on_a_new_database_all_have_their_points(
    tmp_path: Path,
) -> None:
    code = """
import sys
from pathlib import Path
from tests.track.paced import Paced, facts_of

training = Paced(facts_of(Path(sys.argv[1]), sys.argv[2]))
training.for_steps(200)
report = training.end()
sys.exit(report.missing or None)
"""
    uri, folders = rig.sqlite_uri(tmp_path), [tmp_path / str(number) for number in range(8)]
    running = []
    for folder in folders:
        folder.mkdir()
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", code, str(folder), uri]
        running.append(subprocess.Popen(command, env=environ))
    assert [process.wait(300) for process in running] == [0] * 8
    for folder in folders:
        assert_nothing_lost_or_doubled(folder, tmp_path / "mlflow.db")


@pytest.mark.thorough
def test_a_run_that_is_deleted_while_it_trains_comes_back_whole(tmp_path: Path) -> None:
    training = begin_in_file(tmp_path)
    client = mlflow.MlflowClient(rig.sqlite_uri(tmp_path))
    client.delete_run(the_run(client))
    training.until_said("takes records again")
    assert training.end().missing == ""
    assert_nothing_lost_or_doubled(tmp_path, tmp_path / "mlflow.db")
    assert client.get_run(the_run(client)).info.lifecycle_stage == "active"


@pytest.mark.thorough
def test_an_experiment_that_is_deleted_while_it_trains_comes_back_whole(tmp_path: Path) -> None:
    training = begin_in_file(tmp_path)
    client = mlflow.MlflowClient(rig.sqlite_uri(tmp_path))
    client.delete_experiment(client.get_experiment_by_name("tiny").experiment_id)
    training.until_said("takes records again")
    assert training.end().missing == ""
    assert_nothing_lost_or_doubled(tmp_path, tmp_path / "mlflow.db")
    assert client.get_experiment_by_name("tiny").lifecycle_stage == "active"


@pytest.mark.thorough
def test_an_experiment_that_is_deleted_for_good_and_named_again_gets_the_whole_run(
    tmp_path: Path,
) -> None:
    training = begin_in_file(tmp_path)
    client = mlflow.MlflowClient(rig.sqlite_uri(tmp_path))
    old = client.get_experiment_by_name("tiny").experiment_id
    run_id = the_run(client)
    store = client._tracking_client.store
    client.delete_experiment(old)  # what `mlflow gc` then does, before the next points come
    store._hard_delete_run(run_id)
    store._hard_delete_experiment(old)
    client.create_experiment("tiny")
    training.for_steps(100)
    training.until(lambda: has_points(tmp_path / "mlflow.db", tmp_path), "a run made anew")
    assert training.end().missing == ""
    assert_nothing_lost_or_doubled(tmp_path, tmp_path / "mlflow.db")


@pytest.mark.thorough
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
    assert_nothing_lost_or_doubled(tmp_path, tmp_path / "mlflow.db")


def begin_in_file(folder: Path) -> Paced:
    """Begin to train with a SQLite file, until it has points."""
    training = Paced(facts_of(folder, rig.sqlite_uri(folder)))
    training.until(lambda: has_points(folder / "mlflow.db", folder), "points in MLflow")
    return training


def has_points(database: Path, folder: Path, number: int = 1) -> bool:
    """Tell whether a run has so many points; while the tables are made there are none."""
    try:
        return len(points_in(database, root_of(folder).name)) >= number
    except sqlite3.OperationalError:
        return False


def the_run(client: mlflow.MlflowClient) -> str:
    """Return the id of the only run, deleted or not."""
    (run,) = client.search_runs(
        [item.experiment_id for item in client.search_experiments(view_type=3)], run_view_type=3
    )
    return str(run.info.run_id)


def wait_for(condition: Callable[[], object], what: str) -> None:
    """Wait for another process."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.05)
