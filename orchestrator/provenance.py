"""Where a run comes from: code, versions, machine, command."""

from __future__ import annotations

import getpass
import platform
import re
import shlex
import socket
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from orchestrator.spec.secrets import MASK, is_secret_key, mask_text

_PACKAGES = ("tensorflow", "tensorflow-cpu", "keras", "ray", "mlflow", "hydra-core", "orchestrator")
_GIT_TIMEOUT_S = 5.0
# Somebody who changes more at once should commit it.
_MAX_DIFF = 1_000_000
# `+  password: hunter2`, `-TOKEN = "abc"`
_ASSIGNMENT = re.compile(r"""^([ +\-]\s*["']?)([\w.\-]+)(["']?\s*[:=]\s*)(\S.*)$""")


def provenance(overrides: list[str], code_dirs: Sequence[str]) -> dict[str, str]:
    """Return MLflow tags that say what was run.

    Args:
        overrides: as typed, secrets masked.
        code_dirs: where code is imported from, this project's first; those after it were named
            with `--config-dir`. Their git commits are told if they have one.
    """
    own_dirs = [word for folder in code_dirs[1:] for word in ("--config-dir", folder)]
    tags = {
        "orchestrator.command": shlex.join(["orchestrator", "train", *own_dirs, *overrides]),
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
    return tags | _commits(code_dirs)


def _commits(code_dirs: Sequence[str]) -> dict[str, str]:
    """Return the commits of the code; MLflow shows one, which is that of the user's own code."""
    tags: dict[str, str] = {}
    is_dirty = False
    for folder, commit in _repositories(code_dirs).items():
        tags["mlflow.source.git.commit"] = tags[f"orchestrator.git.commit.{folder.name}"] = commit
        is_dirty |= bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))
    return tags | ({"orchestrator.git.dirty": str(is_dirty).lower()} if tags else {})


def keep_changes(code_dirs: Sequence[str], path: Path) -> None:
    """Write down what of the code is in no commit, if anything; literal secrets are masked.

    Files that git does not know are left out: those of the job are copied into the run folder.

    Args:
        code_dirs: where code is imported from.
        path: of the file.

    Raises:
        OSError: it cannot be written.
    """
    parts = []
    for folder, commit in _repositories(code_dirs).items():
        diff = _git(folder, "diff", "HEAD", "--no-color", "--no-ext-diff", "--no-textconv")
        if diff:
            parts.append(f"# {folder} since {commit}\n{diff}")
    text = "\n".join(_masked_line(line) for line in "\n".join(parts).splitlines())
    if len(text) > _MAX_DIFF:
        text = f"{text[:_MAX_DIFF]}\n# {len(text) - _MAX_DIFF:,} more characters"
    if text:
        path.write_text(f"{text}\n")


def _masked_line(line: str) -> str:
    found = _ASSIGNMENT.match(line)
    if found and is_secret_key(found[2]) and "oc.env" not in found[4]:
        return f"{found[1]}{found[2]}{found[3]}{MASK}"
    return mask_text(line)


def _repositories(code_dirs: Sequence[str]) -> dict[Path, str]:
    """Return root and commit of the git repositories that hold a folder of code."""
    answers = (_git(Path(folder), "rev-parse", "--show-toplevel", "HEAD") for folder in code_dirs)
    found = (answer.splitlines() for answer in answers if answer)
    return {Path(root): commit for root, commit in found}


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
            errors="replace",
            timeout=_GIT_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.rstrip() if done.returncode == 0 else ""
