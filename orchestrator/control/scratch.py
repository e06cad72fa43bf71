"""The temporary folder of a run on this host, used by everything it starts and outlived by nothing.

Ray keeps a folder for every session, and processes that are killed leave their temporary files
behind. A run with a Ray of its own takes it all into one folder, which is removed at the end: by
the run itself, by a watcher when the run was killed, or by the next run when both were.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from orchestrator.errors import StorageError
from orchestrator.reaper import temporary_folder

_PREFIX = "orch-run-"
_LOCK = "lock"
# A Unix socket's name has 107 bytes; Ray adds up to 68 for the socket of its object store.
_LONGEST_ROOT = 107 - 68 - len(f"/{_PREFIX}abcdefgh")
# What was made a moment ago may not be locked yet.
_SETTLED_S = 60.0


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Make the temporary folder of this process and of all it starts; remove it at the end.

    Where TMPDIR is too long for sockets, only Ray's files go there, below /tmp; where RAY_TMPDIR is
    set, Ray's files go there and stay.

    Raises:
        StorageError: there is no place for it.
    """
    root = tempfile.gettempdir()
    is_short = len(root) <= _LONGEST_ROOT
    sweep(Path(root if is_short else "/tmp"))
    with ExitStack() as stack:
        try:
            made = temporary_folder(_PREFIX, root if is_short else "/tmp")
            folder = stack.enter_context(made)
            lock = stack.enter_context((folder / _LOCK).open("w"))
        except OSError as error:
            raise StorageError(f"cannot make a temporary folder: {error}; set TMPDIR") from error
        fcntl.flock(lock, fcntl.LOCK_EX)
        stack.enter_context(_environment({"TMPDIR" if is_short else "RAY_TMPDIR": str(folder)}))
        yield folder


def sweep(root: Path) -> None:
    """Remove the folders of runs that were killed together with their watchers."""
    for folder in root.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            if folder.stat().st_uid != os.getuid() or _age_s(folder) < _SETTLED_S:
                continue
            with (folder / _LOCK).open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)


def _age_s(folder: Path) -> float:
    return time.time() - folder.stat().st_ctime


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    kept = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    tempfile.tempdir = None  # look again
    try:
        yield
    finally:
        for name, value in kept.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        tempfile.tempdir = None
