"""What a killed process has started ends with it, and so do its temporary folders."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.rig import is_alive, wait_for

# Starts a group of two processes that ignore all but SIGKILL, and tells who leads it.
_STARTER = """
import subprocess, time
from orchestrator.reaper import Reaper
started = subprocess.Popen(
    ["/bin/sh", "-c", "trap '' TERM HUP INT; sleep 60 & echo $!; wait"],
    stdout=subprocess.PIPE,
    text=True,
    start_new_session=True,
)
reaper = Reaper()
reaper.watch(started.pid)
print(started.pid, started.stdout.readline().strip(), flush=True)
if {ends}:
    reaper.close()
    print("closed", flush=True)
time.sleep(60)
"""


def started(ends: bool) -> tuple[subprocess.Popen[str], list[int]]:
    code = _STARTER.replace("{ends}", str(ends))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, [int(word) for word in process.stdout.readline().split()]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_group_ends_with_the_process_that_watches_it(number: signal.Signals) -> None:
    process, group = started(ends=False)
    assert all(map(is_alive, group))
    process.send_signal(number)
    process.wait()
    wait_for(lambda: not any(map(is_alive, group)), "the group to be gone", 2)


def test_a_group_ends_when_asked() -> None:
    process, group = started(ends=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "closed\n"
    wait_for(lambda: not any(map(is_alive, group)), "the group to be gone", 2)
    process.kill()
    process.wait()


_FOLDER = """
import sys
from pathlib import Path
from orchestrator.reaper import temporary_folder
with temporary_folder("held-", sys.argv[1]) as folder:
    Path(folder, "file").touch()
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("is_killed", [True, False])
def test_a_temporary_folder_goes_with_its_process(tmp_path: Path, is_killed: bool) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _FOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    folder = Path(process.stdout.readline().strip())
    assert folder.parent == tmp_path and (folder / "file").exists()
    if is_killed:
        process.kill()
    process.communicate()
    wait_for(lambda: not folder.exists(), "the folder to be gone", 5)
