"""Finished samples, kept so that an interrupted benchmark goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.spec import PROJECT

_PACKAGES = ("tensorflow-cpu", "tensorflow", "keras", "ray", "mlflow", "numpy")
_CODE = ("orchestrator", "jobs", "conf", "benchmarks", ":!benchmarks/RESULTS.md")


class State:
    """Lists of numbers by key, for one identity of code, versions and machine.

    What belongs to another identity stays in the file: one may return to a commit.
    """

    def __init__(self, path: Path, identity: str, *, fresh: bool = False):
        self._path = path
        self._identity = identity
        self._all: dict[str, dict[str, list[list[float]]]] = {}
        if path.exists():
            self._all = json.loads(path.read_text())
        if fresh:
            self._all.pop(identity, None)
        self._own = self._all.setdefault(identity, {})

    def samples(self, key: str) -> list[list[float]]:
        """Return what was kept under a key, in order."""
        return list(self._own.get(key, []))

    def add(self, key: str, numbers: list[float]) -> None:
        """Keep numbers: written aside and renamed, so that an interrupt leaves a whole file."""
        self._own.setdefault(key, []).append(numbers)
        aside = self._path.with_suffix(".tmp")
        aside.write_text(json.dumps(self._all, indent=1))
        os.replace(aside, self._path)


def versions() -> str:
    """Return what ran: Python and the packages that decide about speed."""
    found = [f"Python {platform.python_version()}"]
    for name in _PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def commit() -> str:
    """Return the commit, and a digest of what was changed since in the code that is measured."""
    head = _git("rev-parse", "--short=10", "HEAD").strip() or "unknown"
    changed = _git("diff", "HEAD", "--", *_CODE) + _git(
        "ls-files", "--others", "--exclude-standard", "--", *_CODE
    )
    if not changed:
        return head
    return f"{head}+{hashlib.sha256(changed.encode()).hexdigest()[:6]}"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=PROJECT, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else ""
