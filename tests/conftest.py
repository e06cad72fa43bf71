"""What holds for every test: no process outlives the session, and no skip goes unnoticed in CI.

`FAULTS=all` runs the thorough tests too, which take minutes.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import uuid
from collections.abc import Generator, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import psutil
import pytest

from orchestrator.imports import uncollected

if TYPE_CHECKING:
    from orchestrator.control.launcher import Zygote

# Every process started by a test inherits it, also one that is re-parented to init.
SESSION_VARIABLE = "ORCHESTRATOR_TEST_SESSION"
SKIPS_FILE = Path(__file__).parent / "skips.txt"
# How long a process that is on its way out may take before it counts as left behind.
EXIT_PATIENCE_S = 5.0

_session_id = uuid.uuid4().hex
_skips: list[tuple[str, str]] = []
leftovers: list[str] = []


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """One for all tests, as importing TensorFlow takes seconds; the first child waits for it."""
    from orchestrator.control.launcher import start_zygote

    started = start_zygote()
    yield started
    started.close()


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder of a process that is not root, whom no permission stops."""
    with tempfile.TemporaryDirectory() as folder:
        user, nobody = os.geteuid(), 65534
        if user == 0:
            os.chown(folder, nobody, -1)
            os.seteuid(nobody)
        yield Path(folder)
        os.seteuid(user)


def read_allowed_skips(text: str) -> list[str]:
    """Return the node ids in `text`: one a line, the reason after `#`, other lines blank."""
    lines = (line.split("#", 1)[0].strip() for line in text.splitlines())
    return [line for line in lines if line]


def is_allowed(node_id: str, allowed: list[str]) -> bool:
    """Tell whether a line names this test, its parametrised form, its file or its folder."""
    return any(
        node_id == line or node_id.startswith((f"{line}[", f"{line}::", f"{line.rstrip('/')}/"))
        for line in allowed
    )


def unexpected_skips() -> list[tuple[str, str]]:
    """Skips of this session that tests/skips.txt does not allow; none outside CI."""
    if os.environ.get("CI") != "true":
        return []
    allowed = read_allowed_skips(SKIPS_FILE.read_text(encoding="utf-8"))
    return [(node_id, why) for node_id, why in _skips if not is_allowed(node_id, allowed)]


def session_processes() -> list[psutil.Process]:
    """Return the live processes that this test session started, directly or not.

    Those of a session that runs beside it are that one's.
    """
    own = psutil.Process()
    found = {process.pid: process for process in own.children(recursive=True)}
    for process in psutil.process_iter():
        try:
            session = process.environ().get(SESSION_VARIABLE)
        except psutil.Error:
            continue  # gone, a zombie, or not ours to read
        if session == _session_id:
            found[process.pid] = process
        elif session is not None:
            found.pop(process.pid, None)
    found.pop(own.pid, None)
    return [process for process in found.values() if not _is_harmless(process)]


def _is_harmless(process: psutil.Process) -> bool:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return True
        # multiprocessing's tracker lives exactly as long as the interpreter.
        return any("multiprocessing.resource_tracker" in part for part in process.cmdline())
    except psutil.NoSuchProcess:
        return True


def kill_leftovers() -> list[str]:
    """Kill what the session left running, after a grace; return one line for each."""
    psutil.wait_procs(session_processes(), timeout=EXIT_PATIENCE_S)
    killed = []
    # A second look: what a dying process forked meanwhile.
    for process in session_processes():
        try:
            command = " ".join(process.cmdline()) or process.name()
            process.kill()
            killed.append(f"{process.pid} {command[:200]}")
        except psutil.Error:
            continue
    return killed


def _end_session(signum: int, _frame: FrameType | None) -> None:
    if os.getpid() != _main_pid:  # a fork that kept this handler
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)
        return
    pytest.exit(f"stopped by {signal.Signals(signum).name}", returncode=128 + signum)


_main_pid = os.getpid()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "thorough: takes long; run with FAULTS=all")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Import what the tests need, TensorFlow and MLflow, for good."""
    with uncollected():
        return (yield)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what takes minutes, unless it is asked for."""
    if os.environ.get("FAULTS") == "all":
        return
    thorough = [item for item in items if item.get_closest_marker("thorough")]
    if thorough:
        config.hook.pytest_deselected(items=thorough)
        items[:] = [item for item in items if item not in thorough]


def pytest_sessionstart() -> None:
    os.environ[SESSION_VARIABLE] = _session_id
    # Ray's agents would write their titles over the variable.
    os.environ["SPT_NOENV"] = "1"
    # What the developer's own `make up` keeps is not for tests.
    os.environ["XDG_RUNTIME_DIR"] = tempfile.mkdtemp(prefix="orch-tests-")
    # By default both end Python at once, and the processes of session fixtures would live on.
    signal.signal(signal.SIGTERM, _end_session)
    signal.signal(signal.SIGHUP, _end_session)
    # A shell lets what it starts in the background ignore Ctrl-C, and so would the commands that
    # are tested.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _note_skip(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    _note_skip(report)


def _note_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        _skips.append((report.nodeid, str(why)))


@pytest.hookimpl(trylast=True)  # after the teardown of session fixtures, which runs in this hook
def pytest_sessionfinish(session: pytest.Session) -> None:
    leftovers.extend(kill_leftovers())
    shutil.rmtree(os.environ["XDG_RUNTIME_DIR"], ignore_errors=True)
    if unexpected_skips() and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(wrapper=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> Iterator[None]:
    yield
    if "tests/gpu" in (config.getoption("ignore") or []):
        terminalreporter.write_line("NOT RUN tests/gpu: needs a GPU; python -m pytest tests/gpu")
    if leftovers:
        terminalreporter.section("left running by tests, killed", yellow=True)
        for line in leftovers:
            terminalreporter.write_line(line)
    if unexpected := unexpected_skips():
        terminalreporter.section("FAILED: skips that tests/skips.txt does not allow", red=True)
        for node_id, why in unexpected:
            terminalreporter.write_line(f"{node_id}: {why}")
