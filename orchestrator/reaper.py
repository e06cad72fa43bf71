"""Ends what a killed process would leave behind."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Reads process groups until the pipe breaks, then kills what is left of them.
_END_GROUPS = 'while read -r group; do set -- "$@" "-$group"; done; kill -s KILL -- "$@"'
# What the process has started may end a moment after it, and write until then.
_REMOVE = 'read _; for _ in 1 2 3; do rm -rf "$1"; sleep 0.5; done; rm -rf "$1"'


class Reaper:
    """Kills process groups once this process is gone, however it went: at once, after SIGKILL too.

    A shell waits at the other end of a pipe, in a session of its own and so out of reach of what
    ends this process. Groups that have ended by themselves are not missed.
    """

    def __init__(self) -> None:
        """Start the shell."""
        self._shell = _start_shell(_END_GROUPS)

    def watch(self, group: int) -> None:
        """Take a process group: the number of the process that leads it."""
        assert self._shell.stdin is not None
        with contextlib.suppress(OSError):  # somebody has ended the shell
            self._shell.stdin.write(b"%d\n" % group)
            self._shell.stdin.flush()

    def close(self) -> None:
        """End what is left of the groups now."""
        with contextlib.suppress(OSError):
            self._shell.communicate()


@contextlib.contextmanager
def temporary_folder(prefix: str, parent: str | None = None) -> Iterator[Path]:
    """Make a folder that is removed when the block ends, or this process, however it ends.

    Args:
        prefix: of its name.
        parent: where to make it; TMPDIR by default.

    Raises:
        OSError: it cannot be made.
    """
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    shell = _start_shell(_REMOVE, str(folder))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            shell.kill()
        shell.communicate()  # it removes what a process on its way out has written since


def _start_shell(script: str, *arguments: str) -> subprocess.Popen[bytes]:
    """Start a shell that learns from its input when this process is gone."""
    return subprocess.Popen(
        ["/bin/sh", "-c", script, "sh", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )
