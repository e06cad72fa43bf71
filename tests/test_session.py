"""The rules of tests/conftest.py, each in a pytest session of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

CONFTEST = Path(__file__).with_name("conftest.py")
SKIPPING_TEST = """
import pytest

@pytest.mark.parametrize("n", [1])
def test_that_skips(n):
    pytest.skip("no such engine")
"""
# A shell that ends at once leaves its child to init: only the environment tells whose it is.
LEAKING_TEST = """
import subprocess

def test_that_leaks(tmp_path):
    subprocess.run(["sh", "-c", "sleep 600 & echo $! > {pid_file}"], check=True)
"""


def run_pytest(folder: Path, test: str, allowed: str = "", **env: str) -> tuple[int, str]:
    shutil.copy(CONFTEST, folder / "conftest.py")
    (folder / "skips.txt").write_text(allowed, encoding="utf-8")
    (folder / "test_it.py").write_text(test, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", "."]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **env}, capture_output=True, text=True
    )
    return done.returncode, done.stdout


def test_a_skip_fails_ci_and_is_named(tmp_path: Path) -> None:
    code, out = run_pytest(tmp_path, SKIPPING_TEST, CI="true")
    assert code == 1
    assert "test_it.py::test_that_skips[1]: Skipped: no such engine" in out


def test_a_skipped_file_fails_ci(tmp_path: Path) -> None:
    skipped_file = "import pytest\npytest.importorskip('no_such_module')\n"
    code, out = run_pytest(tmp_path, skipped_file + "def test_it(): pass", CI="true")
    assert code != 0
    assert "test_it.py: Skipped: could not import 'no_such_module'" in out


def test_a_listed_skip_passes_ci(tmp_path: Path) -> None:
    allowed = "# comment\n\ntest_it.py::test_that_skips  # the engine is optional\n"
    assert run_pytest(tmp_path, SKIPPING_TEST, allowed, CI="true")[0] == 0


def test_a_skip_passes_outside_ci(tmp_path: Path) -> None:
    assert run_pytest(tmp_path, SKIPPING_TEST, CI="")[0] == 0


def test_a_process_left_behind_is_killed_and_named(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    _, out = run_pytest(tmp_path, LEAKING_TEST.format(pid_file=pid_file))
    pid = int(pid_file.read_text())
    assert f"{pid} sleep 600" in out
    deadline = time.monotonic() + 10  # the kernel reaps a killed orphan when init gets to it
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
