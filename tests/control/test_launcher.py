"""Real processes: forked from a zygote or started afresh, and gone when they must be."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.control.launcher import (
    Child,
    Launch,
    Zygote,
    fork,
    node_zygote,
    spawn,
    start_zygote,
)
from orchestrator.errors import StartFailed
from tests.control.conftest import PATIENCE_S, is_gone, wait_until

START_ZYGOTE = """
from orchestrator.control.launcher import start_zygote
print(start_zygote().socket_path, flush=True)
input()
"""
WAIT = "import threading; print('waiting', flush=True); threading.Event().wait()"


def log_of(folder: Path) -> str:
    log = folder / "logs" / "child.log"
    return log.read_text() if log.exists() else ""


def launch(folder: Path, code: str, *argv: str, **env: str | None) -> Launch:
    """Return what starts `code` as a script whose output goes to `log_of(folder)`."""
    script = folder / "script.py"
    script.write_text(code)
    return Launch(
        log=folder / "logs" / "child.log",
        sys_path=tuple(sys.path),
        env=env,
        script=script,
        argv=argv,
    )


@pytest.fixture(params=["fork", "spawn"])
def start(request: pytest.FixtureRequest) -> Callable[[Launch], Child]:
    """Either way to start a process; forking needs the zygote, starting afresh does not."""
    if request.param == "spawn":
        return spawn
    zygote: Zygote = request.getfixturevalue("zygote")
    return lambda what: fork(zygote.socket_path, what)


@pytest.fixture
def ask(zygote: Zygote, tmp_path: Path) -> Callable[[str], Any]:
    """Run code in a forked child and return the JSON it printed."""

    def run(code: str) -> Any:
        child = fork(zygote.socket_path, launch(tmp_path, code))
        assert child.wait(PATIENCE_S)
        child.close()
        return json.loads(log_of(tmp_path))

    return run


def finish(child: Child) -> int | None:
    """Wait for a child, let it go and return its exit status."""
    assert child.wait(PATIENCE_S)
    status = child.exit_status()
    child.close()
    return status


def test_a_script_gets_its_arguments_and_leaves_its_status(
    start: Callable[[Launch], Child], tmp_path: Path
) -> None:
    code = "import sys; print('argv', sys.argv[1:]); sys.exit(3)"
    assert finish(start(launch(tmp_path, code, "one", "2"))) == 3
    assert log_of(tmp_path) == "argv ['one', '2']\n"


def test_a_script_that_ends_leaves_status_zero(
    start: Callable[[Launch], Child], tmp_path: Path
) -> None:
    assert finish(start(launch(tmp_path, "pass"))) == 0


def test_a_crash_by_signal_leaves_a_negative_status(
    start: Callable[[Launch], Child], tmp_path: Path
) -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    assert finish(start(launch(tmp_path, code))) == -signal.SIGSEGV


def test_an_exception_leaves_its_traceback_in_the_log(
    start: Callable[[Launch], Child], tmp_path: Path
) -> None:
    assert finish(start(launch(tmp_path, "1 / 0"))) not in (0, None)
    assert "Traceback" in log_of(tmp_path)
    assert log_of(tmp_path).rstrip().endswith("ZeroDivisionError: division by zero")


def test_variables_are_set_and_unset(
    start: Callable[[Launch], Child], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOO_MUCH", "yes")
    code = "import os; print(os.environ.get('MINE'), os.environ.get('TOO_MUCH'))"
    finish(start(launch(tmp_path, code, MINE="1", TOO_MUCH=None)))
    assert log_of(tmp_path) == "1 None\n"


def test_a_child_runs_where_its_client_is(
    start: Callable[[Launch], Child], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    finish(start(launch(tmp_path, "import os; print(os.getcwd())")))
    assert log_of(tmp_path) == f"{tmp_path}\n"


def test_output_is_added_to_a_log_that_exists(
    start: Callable[[Launch], Child], tmp_path: Path
) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "child.log").write_text("before\n")
    finish(start(launch(tmp_path, "print('after')")))
    assert log_of(tmp_path) == "before\nafter\n"


def test_python_stacks_are_written_on_request(zygote: Zygote, tmp_path: Path) -> None:
    stacks = tmp_path / "stacks"
    what = launch(tmp_path, f"def mine():\n    {WAIT}\nmine()")
    child = fork(zygote.socket_path, dataclasses.replace(what, stacks=stacks))
    wait_until(lambda: "waiting" in log_of(tmp_path), "the script waits")
    child.signal(signal.SIGUSR1)
    wait_until(lambda: "in mine" in stacks.read_text(), "the stacks name the function")
    child.close()


def test_a_child_has_tensorflow_and_nothing_of_the_project(ask: Callable[[str], Any]) -> None:
    top = ask("import json, sys; print(json.dumps([name.split('.')[0] for name in sys.modules]))")
    assert {"tensorflow", "keras"} <= set(top)
    assert not {"orchestrator", "jobs", "tests"} & set(top)


def test_a_zygote_that_forks_has_one_thread(ask: Callable[[str], Any]) -> None:
    parent = ask("import os; print(os.getppid())")
    threads = [path.read_text().strip() for path in Path(f"/proc/{parent}/task").glob("*/comm")]
    # pandas, which Keras imports, brings pyarrow with a jemalloc that stops its own thread around
    # every fork; OpenBLAS ends its threads at the first one.
    assert len([name for name in threads if name != "jemalloc_bg_thd"]) == 1, threads


def test_children_run_at_the_same_time(zygote: Zygote, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
    children = [fork(zygote.socket_path, launch(folder, WAIT)) for folder in folders]
    wait_until(lambda: all("waiting" in log_of(folder) for folder in folders), "both wait")
    assert not any(is_gone(child.pid) for child in children)
    for child in children:
        child.close()


def test_a_child_dies_when_its_client_hangs_up(zygote: Zygote, tmp_path: Path) -> None:
    child = fork(zygote.socket_path, launch(tmp_path, WAIT))
    wait_until(lambda: "waiting" in log_of(tmp_path), "the script waits")
    child.close()
    wait_until(lambda: is_gone(child.pid), "the child ends")


def test_a_signal_to_a_child_that_is_gone_is_left_alone(zygote: Zygote, tmp_path: Path) -> None:
    child = fork(zygote.socket_path, launch(tmp_path, "pass"))
    assert child.wait(PATIENCE_S) and child.exit_status() == 0
    child.signal(signal.SIGKILL)
    child.close()


def test_a_zygote_and_its_children_end_with_their_owner(tmp_path: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", START_ZYGOTE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdin is not None and owner.stdout is not None
    socket_path = Path(owner.stdout.readline().strip())
    try:
        child = fork(socket_path, launch(tmp_path, "import os; print(os.getppid())\n" + WAIT))
        wait_until(lambda: "waiting" in log_of(tmp_path), "the script waits")
        zygote = int(log_of(tmp_path).splitlines()[0])
        owner.kill()
        owner.wait()
        wait_until(lambda: is_gone(zygote), "the zygote ends")
        wait_until(lambda: is_gone(child.pid), "the child ends")
        child.close()
    finally:
        owner.kill()
        owner.communicate()
        shutil.rmtree(socket_path.parent, ignore_errors=True)


def test_a_zygote_that_does_not_answer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "zygote"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
    # The socket's file outlives its listener, as after kill -9.
    with pytest.raises(StartFailed, match=f"the zygote at {path} does not answer"):
        fork(path, launch(tmp_path, "pass"))


SMALL_ZYGOTE = """
import os, resource, signal, socket, sys
import pkgutil, threading  # a child may not be allowed to read them
from orchestrator.train.zygote import _Zygote
listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
listener.bind(sys.argv[1])
listener.listen()
if os.getuid() == 0:
    os.setuid(1)  # no limit holds for root
soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
for number, limit in ((signal.SIGUSR1, 0), (signal.SIGUSR2, soft)):
    given = (resource.RLIMIT_NPROC, (limit, hard))
    signal.signal(number, lambda *_, given=given: resource.setrlimit(*given))
print("listens", flush=True)
_Zygote(listener, 0, 60.0, "").serve()
"""


def test_a_fork_that_fails_is_one_start_that_fails(temporary_dir: Path) -> None:
    temporary_dir.chmod(0o777)
    folders = [temporary_dir / name for name in "abc"]
    for folder in folders:
        (folder / "logs").mkdir(parents=True)
        (folder / "logs").chmod(0o777)
    launches = [launch(folder, WAIT) for folder in folders]
    command = [sys.executable, "-c", SMALL_ZYGOTE, str(temporary_dir / "zygote")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as zygote:
        assert zygote.stdin is not None and zygote.stdout is not None
        assert zygote.stdout.readline() == "listens\n"
        first = fork(temporary_dir / "zygote", launches[0])
        wait_until(lambda: "waiting" in log_of(folders[0]), "the first waits")
        zygote.send_signal(signal.SIGUSR1)
        with pytest.raises(StartFailed, match=r"no process can be made on .*: Resource temp"):
            fork(temporary_dir / "zygote", launches[1])
        assert not is_gone(first.pid)
        zygote.send_signal(signal.SIGUSR2)
        last = fork(temporary_dir / "zygote", launches[2])
        wait_until(lambda: "waiting" in log_of(folders[2]), "the last waits")
        for child in (first, last):
            child.close()
        zygote.stdin.close()


@pytest.fixture
def temporary_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder for temporary files, short enough for the path of a Unix socket."""
    with tempfile.TemporaryDirectory(prefix="t-") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(str(path)) == 0


def test_agents_of_a_run_on_one_node_share_a_zygote_that_ends_when_idle(
    temporary_dir: Path,
) -> None:
    first = node_zygote("r", idle_s=1.0)
    wait_until(lambda: listens(first), "the zygote listens")
    assert node_zygote("r", idle_s=1.0) == first
    assert first.parent.parent == temporary_dir
    assert first.parent.stat().st_mode & 0o777 == 0o700
    running = psutil.process_iter(["cmdline"])
    [pid] = [process.pid for process in running if str(first) in (process.info["cmdline"] or [])]
    wait_until(lambda: is_gone(pid), "the idle zygote ends")
    assert not first.exists()


@pytest.mark.usefixtures("temporary_dir")
def test_a_zygotes_folder_that_others_may_enter_is_refused() -> None:
    node_folder = node_zygote("r", idle_s=0.1).parent
    wait_until(lambda: not node_folder.exists(), "the idle zygote ends")
    node_folder.mkdir()
    node_folder.chmod(0o755)
    with pytest.raises(StartFailed, match="open to others; remove it"):
        node_zygote("r")


@pytest.mark.parametrize("name", ["o'neil", "x" * 90])
def test_a_zygote_is_found_whatever_run_and_temporary_folder_are_called(
    temporary_dir: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = temporary_dir / name
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    shared = node_zygote(f"/runs/{name}/{'y' * 90}", idle_s=0.1)
    own = start_zygote()
    try:
        wait_until(lambda: own.socket_path.exists(), "a zygote of its own")
        assert shared.parent.parent == own.socket_path.parent.parent
        assert (shared.parent.parent == folder) is (len(name) < 90)
    finally:
        own.close()
        wait_until(lambda: not shared.parent.exists(), "the idle zygote ends")
