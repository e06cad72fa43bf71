"""The temporary folder of a run: used by what it starts, removed however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.control import scratch
from orchestrator.control.scratch import scratch_folder, sweep
from tests.control.conftest import wait_until

ROOT = Path(__file__).parents[2]
HOLD = """
import sys
from orchestrator.control.scratch import scratch_folder
with scratch_folder() as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A TMPDIR of a length that sockets can do with."""
    with tempfile.TemporaryDirectory(prefix="s-", dir="/tmp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield Path(folder)


def test_everything_temporary_lies_in_it_and_goes_with_it(short: Path) -> None:
    with scratch_folder() as folder:
        assert folder.parent == short
        assert tempfile.gettempdir() == os.environ["TMPDIR"] == str(folder)
        (folder / "ray").mkdir()
        (folder / "ray" / "file").touch()
    assert list(short.iterdir()) == []
    assert tempfile.gettempdir() == os.environ["TMPDIR"] == str(short)


def test_a_long_tmpdir_stays_and_only_ray_goes_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 40)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with scratch_folder() as folder:
        assert folder.parent == Path("/tmp")
        assert os.environ["RAY_TMPDIR"] == str(folder) and os.environ["TMPDIR"] == str(long)
    assert "RAY_TMPDIR" not in os.environ and not folder.exists()


def hold() -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_the_folder_of_a_killed_run_is_removed_by_its_watcher(short: Path) -> None:
    process, folder = hold()
    (folder / "left").touch()
    process.kill()
    process.communicate()
    wait_until(lambda: not folder.exists(), "the folder is removed")


def test_the_next_run_removes_what_run_and_watcher_left(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, living = hold()
    dead = short / "orch-run-dead"
    dead.mkdir()
    (dead / "lock").touch()
    foreign = short / "orch-0-20260101"  # not a run's
    foreign.mkdir()
    sweep(short)
    assert dead.exists()  # it may have been made a moment ago
    monkeypatch.setattr(scratch, "_SETTLED_S", -1.0)
    sweep(short)
    assert not dead.exists() and living.exists() and foreign.exists()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    wait_until(lambda: not living.exists(), "the folder is removed")
