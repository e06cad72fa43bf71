"""`runs stop`: how a driver is asked to stop, and what is told of one that cannot be asked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator.asking import ask_to_stop, listening, was_heard
from orchestrator.errors import ClusterError, ExitCode
from orchestrator.lease import holder_of
from orchestrator.signals import Stops
from orchestrator.spec.paths import RunPaths
from orchestrator.stopping import stop
from tests.cluster.rig import wait_for

ROOT = Path(__file__).parents[1]
# A driver as far as stops are concerned: it holds the lease, listens, saves and ends its journal.
DRIVER = """
import sys, time
from pathlib import Path
from orchestrator.asking import listening
from orchestrator.lease import Lease
from orchestrator.signals import Stops
from orchestrator.spec.paths import RunPaths
from orchestrator.track.journal import Journal
paths, said = RunPaths(Path(sys.argv[1])), []
with Stops() as stops:
    lease = Lease(paths)
    journal = Journal(paths.journal)
    journal.append({"kind": "RunStarted", "time": time.time(), "facts": {"params": {}}})
    stops.hand_over(lambda reason: not said.append(reason))
    cause = "stopped"
    with listening(paths, stops):
        print("ready", flush=True)
        try:
            while not said or sys.argv[2:] == ["slow"]:
                time.sleep(0.01)
        except KeyboardInterrupt:
            cause = "ended at once"
    print(said, flush=True)
    journal.append({"kind": "RunEnded", "time": time.time(), "status": "KILLED", "cause": cause})
    lease.release()
"""


@contextmanager
def driver(paths: RunPaths, *how: str) -> Iterator[subprocess.Popen[str]]:
    """Let another process train a run."""
    command = [sys.executable, "-c", DRIVER, str(paths.root), *how]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    """The folder of a run."""
    root = tmp_path / "runs" / "tiny" / "a"
    root.mkdir(parents=True)
    return RunPaths(root)


def test_a_driver_that_is_asked_saves_and_its_end_is_told(
    paths: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    with driver(paths) as process:
        assert stop(paths, force=False, address=None) is ExitCode.DONE
        assert process.stdout is not None and "runs stop by" in process.stdout.read()
    out = capsys.readouterr().out
    assert f"asked process {process.pid} on" in out
    assert "tiny/a: killed, stopped, since" in out
    assert 'make train conf=tiny args="runs_dir=' in out and "resume=a" in out
    assert not paths.stop_request.exists()


@pytest.mark.parametrize("again", [False, True])
def test_a_second_stop_or_force_ends_it_at_once(
    again: bool, paths: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    with driver(paths, "slow") as process:
        if again:
            ask_to_stop(paths, at_once=False)
            wait_for(lambda: was_heard(paths), "the driver to hear")
        assert stop(paths, force=not again, address=None) is ExitCode.DONE
        process.wait(10)
    assert "ended at once" in capsys.readouterr().out


def test_a_dead_driver_is_told_as_such_with_how_to_go_on(
    paths: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    with driver(paths) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert stop(paths, force=False, address="http://head:8265") is ExitCode.DONE
    out = capsys.readouterr().out
    assert "nobody trains it: tiny/a: died: its driver is gone without a word" in out
    assert "make submit conf=tiny address=http://head:8265" in out and "resume=a" in out
    assert not paths.stop_request.exists()


def test_a_driver_that_does_not_answer_is_named_and_killed_by_force(
    paths: RunPaths, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.stopping._HEARING_S", 0.5)
    monkeypatch.setattr("orchestrator.stopping._FORCED_HEARING_S", 0.5)
    with driver(paths) as process:
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(ClusterError, match=rf"process {process.pid} on .* does not answer"):
            stop(paths, force=False, address=None)
        assert not paths.stop_request.exists(), "it would stop when it wakes up"
        stop(paths, force=True, address=None)
        assert process.wait(5) == -signal.SIGKILL
    assert f"killed process {process.pid}" in capsys.readouterr().out


def test_a_driver_of_another_user_hears_whatever_the_umask_of_who_asks(open_folder: Path) -> None:
    me, root = os.geteuid(), os.getuid()
    paths = RunPaths(open_folder)
    stops = Stops(end=lambda code: None)
    said: list[str] = []
    os.seteuid(root)
    umask = os.umask(0o077)
    try:
        ask_to_stop(paths, at_once=False)
        assert paths.stop_request.stat().st_mode & 0o777 == 0o644
        paths.stop_request.chmod(0o600)  # as who asks by hand may leave it
    finally:
        os.umask(umask)
        os.seteuid(me)
    with stops:
        stops.hand_over(lambda reason: not said.append(reason))
        with listening(paths, stops):
            wait_for(lambda: said, "the driver to hear it")
    assert was_heard(paths)
    assert said == ["runs stop by somebody" if me else f"runs stop by {said[0][13:]}"]


def test_what_an_earlier_driver_was_asked_for_is_not_heard_by_the_next(paths: RunPaths) -> None:
    ask_to_stop(paths, at_once=True)
    with driver(paths) as process:
        assert process.poll() is None and not paths.stop_request.exists()


def test_a_run_is_held_by_a_living_driver_only(paths: RunPaths) -> None:
    assert holder_of(paths) is None
    with driver(paths) as process:
        holder = holder_of(paths)
        assert holder is not None and holder.pid == process.pid != os.getpid()
    assert holder_of(paths) is None
