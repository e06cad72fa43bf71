"""Ends what a killed process would leave behind."""

from __future__ import annotations

import contextlib
import subprocess

# Reads process groups until the pipe breaks, then kills what is left of them.
_END_GROUPS = 'while read -r group; do set -- "$@" "-$group"; done; kill -s KILL -- "$@"'


class Reaper:
    """Kills process groups once this process is gone, however it went: at once, after SIGKILL too.

    A shell waits at the other end of a pipe, in a session of its own and so out of reach of what
    ends this process. Groups that have ended by themselves are not missed.
    """

    def __init__(self) -> None:
        """Start the shell."""
        self._shell = subprocess.Popen(
            ["/bin/sh", "-c", _END_GROUPS],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )

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
