"""Processes of this host, told from others that get their numbers later."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Process:
    """A process, told from another that gets its number later by the time it was started."""

    pid: int
    started: str

    @staticmethod
    def of(pid: int) -> Process:
        """Return the process that has a number."""
        return Process(pid, _stat(pid)[1])

    @property
    def state(self) -> str:
        """Its letter in /proc, such as R, S or T (stopped); empty if it is gone."""
        state, started = _stat(self.pid)
        return state if started == self.started else ""

    @property
    def is_alive(self) -> bool:
        """Tell whether it runs or is stopped; a zombie does neither."""
        return self.state not in ("", "Z", "X")

    def kill(self) -> None:
        """End it at once; nothing happens if it is gone, whoever has its number by then."""
        with suppress(ProcessLookupError):
            descriptor = os.pidfd_open(self.pid)
            try:
                if self.is_alive:  # it cannot be another one from here on
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            finally:
                os.close(descriptor)


def _stat(pid: int) -> tuple[str, str]:
    """Return state and start time of a process; both empty if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]  # fields 3 and 22 of proc(5)
