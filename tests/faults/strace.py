"""What strace sees of a process, and what it does to it: a kill or an error at one exact call."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Whatever changes or opens something in a file system.
CALLS = (
    *("openat", "write", "pwrite64", "fsync", "fdatasync", "ftruncate"),
    *("rename", "renameat", "renameat2", "mkdir", "unlink", "unlinkat", "rmdir", "flock"),
)
_LINE = re.compile(r"^\d+ +(?P<name>\w+)\((?P<rest>.*)$")


def _why_not() -> str:
    """Return why strace cannot be used here, or nothing."""
    strace = shutil.which("strace")
    if strace is None:
        return "strace is not installed"
    tried = subprocess.run([strace, "-o", "/dev/null", "true"], capture_output=True, text=True)
    return "" if tried.returncode == 0 else f"strace may not trace here: {tried.stderr.strip()}"


WHY_NOT = _why_not()
needs_strace = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)


@dataclass(frozen=True)
class Call:
    """One call of a traced process.

    Attributes:
        name: of the system call.
        number: among the calls of this name, from 1.
        text: arguments and result, with the paths of descriptors.
    """

    name: str
    number: int
    text: str


@dataclass(frozen=True)
class Traced:
    """What became of a traced process: its exit status, negative for a signal, output and calls."""

    status: int
    out: str
    calls: list[Call]


def trace(script: Path, *arguments: str, inject: Sequence[str] = ()) -> Traced:
    """Run a Python script under strace.

    Args:
        script: what to run.
        arguments: for the script.
        inject: what strace shall do, such as `fsync:error=EIO:when=2`.
    """
    log = Path(arguments[0]).with_suffix(".trace")
    process = subprocess.run(
        [
            *("strace", "-f", "-y", "-qq", "-o", str(log)),
            *("-e", f"trace={','.join(CALLS)}"),
            *(part for what in inject for part in ("-e", f"inject={what}")),
            *(sys.executable, str(script), *arguments),
        ],
        # Each run makes the same calls: nothing is compiled or written on the way.
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return Traced(process.returncode, process.stdout + process.stderr, _calls(log.read_text()))


def _calls(text: str) -> list[Call]:
    seen: Counter[str] = Counter()
    calls = []
    for line in text.splitlines():
        match = _LINE.match(line)
        if match is not None:
            seen[match["name"]] += 1
            calls.append(Call(match["name"], seen[match["name"]], match["rest"]))
    return calls
