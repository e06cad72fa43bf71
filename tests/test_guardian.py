"""A driver is killed, and its run does not stay RUNNING."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.spec.messages import DRIVER_KILLED
from orchestrator.spec.paths import RunPaths
from orchestrator.track.journal import read
from tests.databases import with_tables
from tests.track import rig

ROOT = Path(__file__).parents[1]
# A driver as far as the guardian is concerned: it holds the lease, keeps a journal, tells MLflow.
DRIVER = """
import os, signal, sys, time
from pathlib import Path
from orchestrator.guardian import guarded
from orchestrator.lease import Lease
from orchestrator.spec.paths import RunPaths
root, uri, how = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
lease = Lease(RunPaths(root))
print("holds", flush=True)
from orchestrator.track.record import Record
from tests.databases import with_tables
from tests.track import rig
facts = rig.make_facts(root, uri, timeout_s=5.0)
with guarded(RunPaths(root), uri, facts.artifact_root) as guard:
    record = Record(RunPaths(root).journal, facts, notice=print)
    record.add(rig.block(0, 8))
    if how != "untracked":
        record.start_tracking()
        while not record._projection._writer.store:
            time.sleep(0.05)
    print("ready", flush=True)
    sys.stdin.read()
    if how == "hurried":
        assert record.end("KILLED", "stopped", 0.0).missing
        guard.hand_over()
    elif how == "ending":
        record.end("FINISHED", "", None)
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        record.end("FINISHED", "", 60)
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return rig.new_run(tmp_path)


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return rig.sqlite_uri(with_tables(tmp_path / "mlflow.db").parent)


def start_driver(root: Path, uri: str, how: str = "tracked") -> subprocess.Popen[str]:
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(root), uri, how],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert driver.stdout is not None
    assert [driver.stdout.readline() for _ in range(2)] == ["holds\n", "ready\n"]
    return driver


def ends(root: Path) -> list[dict[str, Any]]:
    return [r for r in read(RunPaths(root).journal) if r["kind"] == "RunEnded"]


def query(uri: str, text: str) -> list[tuple[Any, ...]]:
    with sqlite3.connect(uri.removeprefix("sqlite:///")) as connection:
        return connection.execute(text).fetchall()


def status_in_mlflow(uri: str) -> str:
    try:
        (row,) = query(uri, "select status from runs")
    except (sqlite3.OperationalError, ValueError):
        return ""  # not there yet
    return str(row[0])


def eventually(condition: Any, limit_s: float = 30.0) -> float:
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < limit_s
        time.sleep(0.1)
    return time.monotonic() - begin


def kill(driver: subprocess.Popen[str]) -> None:
    """Kill a driver with its process group, as Ray's job stop and terminals do."""
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()


def guardians(root: Path) -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if b"-m\0orchestrator.guardian" in command and str(root).encode() in command:
                yield int(entry.name)


def test_the_run_of_a_killed_driver_is_ended_in_journal_and_mlflow(root: Path, uri: str) -> None:
    driver = start_driver(root, uri)
    assert status_in_mlflow(uri) == "RUNNING"
    kill(driver)
    eventually(lambda: status_in_mlflow(uri) == "KILLED")
    (end,) = ends(root)
    assert (end["status"], end["cause"]) == ("KILLED", DRIVER_KILLED)
    eventually(lambda: not list(guardians(root)))
    assert RunPaths(root).report.exists()


def test_a_run_that_mlflow_never_heard_of_is_told_all_of_it(root: Path, uri: str) -> None:
    kill(start_driver(root, uri, "untracked"))
    eventually(lambda: status_in_mlflow(uri) == "KILLED")
    eventually(lambda: not list(guardians(root)))  # the points come after the status
    assert query(uri, "select count(*) from metrics where key = 'train/loss'") == [(4,)]


def test_a_run_that_was_taken_up_again_is_left_alone(root: Path, uri: str) -> None:
    kill(start_driver(root, uri))
    again = start_driver(root, uri)
    # The first guardian has gone when only the second driver's shell waits.
    eventually(lambda: len(list(guardians(root))) == 1)
    assert not ends(root)
    assert status_in_mlflow(uri) == "RUNNING"
    again.communicate()
    assert [end["status"] for end in ends(root)] == ["FINISHED"]
    assert status_in_mlflow(uri) == "FINISHED"


def test_a_guardian_is_no_child_of_the_driver(root: Path, uri: str) -> None:
    driver = start_driver(root, uri, "untracked")
    (guardian,) = guardians(root)
    assert psutil.Process(guardian).ppid() != driver.pid
    assert os.getsid(guardian) != os.getsid(driver.pid)
    driver.communicate()
    eventually(lambda: not list(guardians(root)))


def test_a_driver_that_ends_by_itself_leaves_no_guardian(root: Path, uri: str) -> None:
    driver = start_driver(root, uri, "untracked")
    assert list(guardians(root))
    driver.communicate()
    eventually(lambda: not list(guardians(root)))
    assert [end["status"] for end in ends(root)] == ["FINISHED"]


def test_what_mlflow_had_no_time_for_follows(root: Path, uri: str) -> None:
    driver = start_driver(root, uri, "hurried")
    driver.communicate()
    assert driver.returncode == 0
    eventually(lambda: status_in_mlflow(uri) == "KILLED")
    (end,) = ends(root)
    assert (end["status"], end["cause"]) == ("KILLED", "stopped")
    eventually(lambda: not list(guardians(root)))  # the points come after the status
    assert query(uri, "select count(*) from metrics where key = 'train/loss'") == [(4,)]


def test_a_driver_killed_while_it_tells_mlflow_the_end_leaves_no_run_running(
    root: Path, uri: str
) -> None:
    driver = start_driver(root, uri, "ending")
    assert status_in_mlflow(uri) == "RUNNING"
    driver.communicate()
    assert driver.returncode == -signal.SIGKILL
    eventually(lambda: status_in_mlflow(uri) == "FINISHED")
    assert [end["status"] for end in ends(root)] == ["FINISHED"]
    eventually(lambda: not list(guardians(root)))
