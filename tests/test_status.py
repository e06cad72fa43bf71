"""`runs status` and `runs logs`, on run folders as drivers leave them."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import ConfigError
from orchestrator.lease import Lease
from orchestrator.logs import print_logs
from orchestrator.runs_command import runs
from orchestrator.spec.paths import RunPaths
from orchestrator.status import find_run_folder
from orchestrator.track.journal import Journal
from tests.cluster.rig import wait_for

NOW = time.time()


def at(seconds: float, kind: str, worker: int = 0, **fields: Any) -> dict[str, Any]:
    """Return a record of attempt 2, `seconds` after the start of the run."""
    time_ = NOW - 600 + seconds
    return {"kind": kind, "time": time_, "worker": worker, "attempt": 2, **fields}


def ready(seconds: float, worker: int) -> dict[str, Any]:
    about = {"host": f"host-{worker}", "devices": ["CPU:0"], "start_step": 20}
    return at(seconds, "Ready", worker, **about)


def failed(seconds: float, worker: int, error: str, cause: str) -> dict[str, Any]:
    return at(seconds, "Failed", worker, error=error, cause=cause)


def block(seconds: float, worker: int, first: int) -> dict[str, Any]:
    about = {"first_step": first, "num_steps": 20, "loss": [], "data_wait_s": 0.0}
    return at(seconds, "BlockDone", worker, **about)


STORY = [
    at(0, "RunStarted", facts={"params": {}}),
    failed(50, 1, "the cable was cut", "worker"),
    failed(51, 0, "Connection reset", "collateral"),
    at(60, "AttemptStarted", num_workers=2, total_steps=80, restore_from=None),
    at(61, "MlflowRun", run_id="abc123"),
    ready(100, 0),
    ready(100, 1),
    at(110, "Beacon", 0, phase="stepping"),
    block(300, 0, 20),
    block(300, 1, 20),
    at(310, "Evaluated", step=40, metrics={"loss": 0.25, "accuracy": 0.9}),
    at(320, "Saved", step=40, path="x", num_bytes=2_000_000, stall_s=0.0),
    at(330, "Beacon", 1, phase="evaluating"),
]


def leave(folder: Path, name: str, *records: dict[str, Any]) -> RunPaths:
    """Write the journal of a run `<job>/<run>` below `folder`."""
    paths = RunPaths(folder / "runs" / name)
    paths.root.mkdir(parents=True)
    journal = Journal(paths.journal)
    for record in records:
        journal.append(record)
    journal.close()
    return paths


def test_a_running_run_is_told_with_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = leave(tmp_path, "tiny/a", *STORY)
    (paths.checkpoints_dir / "step-00000040").mkdir(parents=True)
    lease = Lease(paths)
    runs(["status", "tiny/a"], tmp_path)
    lease.release()
    out = capsys.readouterr().out
    lines = {line[:15].strip(): line for line in out.splitlines()}
    assert "tiny/a: running since" in out and "driver: process" in out
    assert "40 of 80 (50 %)" in lines["step"] and lines["attempt"].endswith(" 2")
    assert "step 40  eval/loss 0.25  eval/accuracy 0.9" in lines["evaluated"]
    assert "host-0: CPU:0  stepping since" in lines["worker 0"]
    assert "host-1: CPU:0  evaluating since" in lines["worker 1"]
    assert "1, newest of step 40; last save 2.0 MB" in lines["checkpoints"]
    assert "abc123" in lines["MLflow run"]
    assert "productive 66 %" in lines["goodput"]  # the chief from 110 to 320 of 320 s
    assert "worker 1," in lines["first failure"] and "the cable was cut" in lines["first failure"]
    assert "go on" not in out


def test_a_run_whose_driver_is_gone_is_told_with_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(tmp_path, "tiny/a", *STORY)
    monkeypatch.chdir(tmp_path)
    runs(["status", "a"], tmp_path)
    out = capsys.readouterr().out
    assert "tiny/a: died: its driver is gone" in out
    assert "host-0: CPU:0  last seen stepping" in out
    assert 'make train conf=tiny args="resume=a"' in out


def test_a_run_that_has_ended_is_told_with_its_cause(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave(tmp_path, "tiny/a", *STORY, at(400, "RunEnded", status="FAILED", cause="no luck\nmore"))
    runs(["status", "a"], tmp_path)
    assert "tiny/a: failed, no luck, since" in capsys.readouterr().out


def test_runs_are_found_by_folder_path_and_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = leave(tmp_path, "tiny/a", *STORY)
    leave(tmp_path, "other/b", *STORY)
    for name in (str(paths.root), "runs/tiny/a", "tiny/a", "a"):
        assert find_run_folder(name, "runs", tmp_path) == paths
    assert find_run_folder("a", str(tmp_path / "runs"), Path("/")) == paths
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_run_folder("a", "~/runs", Path("/")) == paths
    with pytest.raises(ConfigError, match=r"newest there: tiny/a, other/b\); name its folder"):
        find_run_folder("c", "runs", tmp_path)
    for pattern in ("*", "a**", "[a]"):  # a name, and no pattern of names
        with pytest.raises(ConfigError, match="there is no such run"):
            find_run_folder(pattern, "runs", tmp_path)
    bracket = leave(tmp_path, "tiny/[a]", *STORY)
    assert find_run_folder("[a]", "runs", tmp_path) == bracket
    leave(tmp_path, "other/a", *STORY)
    with pytest.raises(ConfigError, match=r"a is a run of several jobs: say .*tiny/a"):
        find_run_folder("a", "runs", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["status"], "runs status RUN"),
        (["status", "a", "force=true"], "force=true is not known here"),
        (["logs", "a", "worker=one"], "worker=one: the index of a worker"),
        (["stop", "a", "force=yes"], "force=true or force=false"),
    ],
)
def test_what_is_not_known_is_refused(arguments: list[str], said: str, tmp_path: Path) -> None:
    leave(tmp_path, "tiny/a", *STORY)
    with pytest.raises(ConfigError, match=said):
        runs(arguments, tmp_path)


def test_logs_are_those_of_the_driver_or_of_a_worker_of_the_newest_attempt(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    paths = leave(tmp_path, "tiny/a", *STORY)
    for attempt in (1, 2, 10):
        paths.worker_log(attempt, 1).parent.mkdir(parents=True)
        paths.worker_log(attempt, 1).write_text(f"attempt {attempt}\n")
    paths.driver_log.write_text("the driver\n")
    runs(["logs", "a"], tmp_path)
    runs(["logs", "a", "worker=1"], tmp_path)
    assert capfdbinary.readouterr().out == b"the driver\nattempt 10\n"
    with pytest.raises(ConfigError, match="workers with a log there: 1"):
        print_logs(paths, 5, follow=False)


def test_a_log_is_followed_through_attempts_until_the_driver_is_gone(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    paths = leave(tmp_path, "tiny/a", *STORY)
    lease = Lease(paths)
    said: list[bytes] = []

    def heard(text: bytes) -> bool:
        said.append(capfdbinary.readouterr().out)
        return text in b"".join(said)

    follower = threading.Thread(target=lambda: print_logs(paths, 0, follow=True))
    follower.start()
    for attempt in (1, 2):
        log = paths.worker_log(attempt, 0)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(f"attempt {attempt} begins\n")
        wait_for(lambda: heard(f"attempt {attempt} begins\n".encode()), "the log")  # noqa: B023
    with log.open("a") as file:
        file.write("last words\n")
    lease.release()
    follower.join(10)
    assert not follower.is_alive()
    said.append(capfdbinary.readouterr().out)
    assert b"==> attempt-2/worker-0.log <==\n" in b"".join(said)
    assert b"".join(said).endswith(b"last words\n")
