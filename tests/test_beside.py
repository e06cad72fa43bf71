"""Folders that are tested in a second process count as if they were tested in this one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
BESIDE = """
import os, pathlib, time
import pytest

def test_that_waits_for_the_other():
    deadline = time.monotonic() + 20
    while not pathlib.Path("other").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)

def test_that_fails():
    left, right = 1, 2
    assert left == right

def test_that_skips():
    pytest.skip("no such engine")

@pytest.mark.thorough
def test_that_is_left_out():
    pass

def test_at_the_end():
    {last}
    pathlib.Path("done").touch()
"""
OTHER = """
import pathlib

def test_that_the_other_waits_for():
    pathlib.Path("other").touch()
"""
ALONE = """
import pathlib

def test_when_nothing_else_runs():
    assert pathlib.Path("done").exists()
"""


def run_pytest(folder: Path, last: str = "pass") -> tuple[int, str]:
    files = {
        "a/test_other": OTHER,
        "b/test_beside": BESIDE.format(last=last),
        "a/alone/test_alone": ALONE,
    }
    for name, text in files.items():
        path = folder / "tests" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for name in ("__init__", "conftest", "beside"):
        shutil.copy(HERE / f"{name}.py", folder / "tests")
    options = ["-p", "tests.beside", "--beside=tests/b", "--alone=tests/a/alone", "-rs", "tests"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options],
        cwd=folder,
        env={**os.environ, "CI": "", "FAULTS": ""},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout


def test_both_processes_report_as_one_session(tmp_path: Path) -> None:
    code, out = run_pytest(tmp_path)
    assert code == 1, out
    assert "= 1 failed, 4 passed, 1 skipped, 1 deselected in " in out.splitlines()[-1], out
    assert "assert 1 == 2" in out
    assert "SKIPPED [1] tests/b/test_beside.py:" in out and "no such engine" in out
    assert "[100%]" in out


def test_a_second_process_that_breaks_fails_the_session_and_is_shown(tmp_path: Path) -> None:
    code, out = run_pytest(tmp_path, last="os._exit(9)")
    assert code == 1, out
    assert "it ended with exit code 9" in out
    assert "2 failed, 2 passed" in out.splitlines()[-1]
