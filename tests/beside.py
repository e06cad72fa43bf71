"""Runs some folders of tests in a second process beside the others; both report as one session.

    python -m pytest -p tests.beside --beside=tests/train --alone=tests/faults

The second process writes what pytest knows of each test into a file; this one takes it from there
between its own tests, so that counts, failures and durations are told once, at the end. Tests in
what `--alone` names, folders or files, begin when nothing runs beside them any more: those that
take the time. That order is why it is not pytest-xdist, which hands out tests to whoever is free.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import conftest

_POLL_S = 0.1
_TAIL_LINES = 30
# Of a second process that is ended early: it ends what its tests have started.
_END_S = 15.0


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("beside")
    group.addoption("--beside", action="append", default=[], help="run a folder beside the others")
    group.addoption(
        "--alone", action="append", default=[], help="run a folder or file when nothing else runs"
    )
    group.addoption("--reports-to", help="a file that takes the reports of this session")


def pytest_configure(config: pytest.Config) -> None:
    if path := config.getoption("--reports-to"):
        config.pluginmanager.register(Teller(config, Path(path)))
    elif folders := config.getoption("--beside"):
        config.option.ignore = [*(config.option.ignore or []), *folders]
        config.pluginmanager.register(Listener(config, folders))


class Teller:
    """Writes what happens in this session into a file, a line of JSON each."""

    def __init__(self, config: pytest.Config, path: Path):
        self._config = config
        self._file = path.open("w", encoding="utf-8")

    def _tell(self, kind: str, content: Any) -> None:
        self._file.write(json.dumps([kind, content]) + "\n")
        self._file.flush()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._tell("collected", len(session.items))

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        self._tell("deselected", len(items))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if not report.passed:
            self._tell("report", self._data_of(report))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._tell("report", self._data_of(report))

    def _data_of(self, report: Any) -> Any:
        return self._config.hook.pytest_report_to_serializable(config=self._config, report=report)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        self._tell("left running", conftest.leftovers)


class Listener:
    """Runs the second process and takes its reports for those of this session."""

    def __init__(self, config: pytest.Config, folders: list[str]):
        self._config = config
        self._folder = Path(tempfile.mkdtemp(prefix="tests-beside-"))
        self._log = self._folder / "log"
        self._alone = [Path(folder).resolve() for folder in config.getoption("--alone")]
        self._broken = ""
        self._process: subprocess.Popen[bytes] | None = None
        reports = self._folder / "reports"
        reports.touch()
        self._reports = reports.open(encoding="utf-8")
        self._line = ""
        self._command = [
            *(sys.executable, "-m", "pytest", "-p", "tests.beside", "-p", "no:cacheprovider"),
            *(f"--reports-to={reports}", *folders),
        ]

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self._session = session
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=self._is_alone)  # they come last, and the others keep their order

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self) -> Iterator[None]:
        result = yield
        self._join()
        return result

    @pytest.hookimpl(wrapper=True, tryfirst=True)  # the wait is not the test's own time
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        if self._is_alone(item):
            self._join()
        self._listen()
        return (yield)

    def _is_alone(self, item: pytest.Item) -> bool:
        return any(item.path.is_relative_to(folder) for folder in self._alone)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_S)
            self._listen()
        shutil.rmtree(self._folder, ignore_errors=True)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._broken:
            terminalreporter.section("FAILED: the tests that ran beside the others", red=True)
            terminalreporter.write_line(self._broken)

    def _join(self) -> None:
        """Wait until the second process has ended."""
        assert self._process is not None
        while (code := self._process.poll()) is None:
            self._listen()
            time.sleep(_POLL_S)
        self._listen()
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and not self._broken:
            tail = self._log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
            self._broken = "\n".join([*tail, f"it ended with exit code {code}"])
            self._session.testsfailed += 1

    def _listen(self) -> None:
        """Take note of what was told since the last time."""
        while text := self._reports.readline():
            self._line += text
            if self._line.endswith("\n"):
                kind, content = json.loads(self._line)
                self._line = ""
                self._take(kind, content)

    def _take(self, kind: str, content: Any) -> None:
        hook = self._config.hook
        if kind == "collected":
            self._session.testscollected += content
        elif kind == "deselected":
            hook.pytest_deselected(items=[None] * content)
        elif kind == "left running":
            conftest.leftovers.extend(content)
        else:
            report = hook.pytest_report_from_serializable(config=self._config, data=content)
            if isinstance(report.longrepr, list):  # JSON has no tuples
                report.longrepr = tuple(report.longrepr)
            if isinstance(report, pytest.CollectReport):
                hook.pytest_collectreport(report=report)
                return
            hook.pytest_runtest_logstart(nodeid=report.nodeid, location=report.location)
            hook.pytest_runtest_logreport(report=report)
