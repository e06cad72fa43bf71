"""Where a run comes from: code, versions, machine, command."""

from __future__ import annotations

import getpass
import platform
import shlex
import socket
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("tensorflow", "tensorflow-cpu", "keras", "ray", "mlflow", "hydra-core", "orchestrator")
_GIT_TIMEOUT_S = 5.0


def provenance(overrides: list[str], folder: Path) -> dict[str, str]:
    """Return MLflow tags that say what was run.

    Args:
        overrides: as typed, secrets masked.
        folder: of the code; its git commit is told if it has one.
    """
    tags = {
        "orchestrator.command": f"orchestrator train {shlex.join(overrides)}",
        "orchestrator.host": socket.gethostname(),
        "orchestrator.python": platform.python_version(),
        "mlflow.user": _user(),
        "mlflow.source.name": "orchestrator train",
        "mlflow.source.type": "JOB",
    }
    for package in _PACKAGES:
        try:
            tags[f"orchestrator.version.{package.removesuffix('-cpu')}"] = version(package)
        except PackageNotFoundError:
            continue
    commit = _git(folder, "rev-parse", "HEAD")
    if commit:
        tags["mlflow.source.git.commit"] = commit
        dirty = _git(folder, "status", "--porcelain", "--untracked-files=no")
        tags["orchestrator.git.dirty"] = str(bool(dirty)).lower()
    return tags


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=_GIT_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
