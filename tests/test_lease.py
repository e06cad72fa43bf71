"""Who holds a run."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator.errors import StorageError
from orchestrator.lease import Lease, holder_of
from orchestrator.spec.paths import RunPaths

ROOT = Path(__file__).parents[1]

HOLD = """
import sys
import threading
from pathlib import Path
from orchestrator.lease import Lease
from orchestrator.spec.paths import RunPaths
lease = Lease(RunPaths(Path(sys.argv[1])))
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def held_elsewhere(folder: Path, *inside: str) -> Iterator[subprocess.Popen[str]]:
    """Let another process hold the lease of a run folder."""
    command = [*inside, sys.executable, "-c", HOLD, str(folder)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process


def test_a_run_held_by_another_process_names_process_host_and_time(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path) as holder, pytest.raises(StorageError) as caught:
        Lease(RunPaths(tmp_path))
    text = str(caught.value)
    assert f"the run {tmp_path.name} is held by process {holder.pid}" in text
    assert re.search(rf"on {re.escape(socket.gethostname())} since \d{{4}}-\d\d-\d\d \d\d:", text)


def test_a_refused_lease_leaves_the_holders_name_in_place(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path) as holder:
        for _ in range(2):
            with pytest.raises(StorageError, match=f"process {holder.pid} "):
                Lease(RunPaths(tmp_path))


def test_a_run_whose_holder_was_killed_is_free(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path) as holder:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        Lease(RunPaths(tmp_path)).release()


def test_a_run_that_was_given_back_is_free(tmp_path: Path) -> None:
    Lease(RunPaths(tmp_path)).release()
    Lease(RunPaths(tmp_path)).release()


def test_a_run_is_held_once_within_a_process_too(tmp_path: Path) -> None:
    lease = Lease(RunPaths(tmp_path))
    with pytest.raises(StorageError, match=f"process {os.getpid()} "):
        Lease(RunPaths(tmp_path))
    lease.release()


def test_a_lease_in_a_folder_that_is_not_there_is_a_failure_of_storage(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot write in the run folder"):
        Lease(RunPaths(tmp_path / "gone"))


def test_the_lease_of_a_killed_holder_is_taken_over_and_that_is_said(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path) as holder:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        lease = Lease(RunPaths(tmp_path))
    host = re.escape(socket.gethostname())
    said = rf"process {holder.pid} on {host} since .* is gone; its lease was taken over"
    assert re.fullmatch(said, lease.notice)
    lease.release()
    again = Lease(RunPaths(tmp_path))
    assert again.notice == ""  # it was given back
    again.release()


def test_the_lease_that_a_copied_folder_brings_along_is_nobodys(tmp_path: Path) -> None:
    with held_elsewhere_in(tmp_path / "run"):
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        lease = Lease(RunPaths(tmp_path / "copy"))
    assert lease.notice == ""
    lease.release()


def test_a_holder_with_process_numbers_of_its_own_is_alive_and_not_to_be_killed_from_here(
    tmp_path: Path,
) -> None:
    inside = ["unshare", "--fork", "--pid", "--mount-proc", "--kill-child"]
    if subprocess.run([*inside, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no process numbers can be set apart here: not root")
    with held_elsewhere(tmp_path, *inside):
        holder = holder_of(RunPaths(tmp_path))
        assert holder is not None and holder.pid is None
        assert "process 1 on " in holder.words
        with pytest.raises(StorageError, match="is held by process 1 on "):
            Lease(RunPaths(tmp_path))


def test_a_holder_whose_number_another_process_has_by_now_is_gone(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    lease = Lease(paths)
    found = holder_of(paths)
    assert found is not None and found.pid == os.getpid()
    # Its guardian has the lock, for a moment.
    paths.lease.write_text(json.dumps({**json.loads(paths.lease.read_text()), "started": "1"}))
    assert holder_of(paths) is None
    lease.release()


@contextmanager
def held_elsewhere_in(folder: Path) -> Iterator[subprocess.Popen[str]]:
    folder.mkdir()
    with held_elsewhere(folder) as process:
        yield process


@pytest.mark.skipif(os.getuid() != 0, reason="mounting a read-only folder needs root")
def test_a_run_in_a_folder_that_is_mounted_read_only_is_a_failure_of_storage(
    tmp_path: Path,
) -> None:
    mounted = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(tmp_path)]
    if subprocess.run(mounted, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(StorageError, match=r"Read-only file system; make it writable, or copy"):
            Lease(RunPaths(tmp_path))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("number", [signal.SIGKILL, None], ids=["killed", "gave it back"])
def test_a_lease_held_for_a_driver_that_is_gone_is_waited_for(
    tmp_path: Path, number: int | None
) -> None:
    if number is None:
        Lease(RunPaths(tmp_path)).release()
    else:
        with held_elsewhere(tmp_path) as driver:
            driver.send_signal(number)
            driver.wait()
    guardian = RunPaths(tmp_path).lease.open("a+")
    fcntl.flock(guardian, fcntl.LOCK_EX)
    timer = threading.Timer(0.3, guardian.close)
    timer.start()
    Lease(RunPaths(tmp_path)).release()
    timer.join()
