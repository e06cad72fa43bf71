"""What a command may leave behind: processes, ports, temporary files, shared memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.conftest import session_processes

_SHARED_MEMORY = Path("/dev/shm")


def _entries(folder: Path) -> set[str]:
    return {entry.name for entry in os.scandir(folder)} if folder.is_dir() else set()


@dataclass
class Leftovers:
    """Compares what is there with what was there when it was made.

    Attributes:
        temporary: the folder that was given to the commands as TMPDIR.
        allowed: parts of the commands of processes that may stay, such as those of a cluster.
    """

    temporary: Path
    allowed: tuple[str, ...] = ()
    _processes: set[int] = field(default_factory=lambda: {p.pid for p in session_processes()})
    _shared: set[str] = field(default_factory=lambda: _entries(_SHARED_MEMORY))

    def found(self) -> list[str]:
        """Return a line for each thing that was left."""
        return [*self._running(), *self._files()]

    def _running(self) -> Iterator[str]:
        for process in session_processes():
            if process.pid in self._processes:
                continue
            try:
                command = " ".join(process.cmdline())[:120]
                ports = [c.laddr.port for c in process.net_connections() if c.status == "LISTEN"]
            except psutil.Error:
                continue  # it is gone by now
            if any(part in command for part in self.allowed):
                continue
            yield f"process {process.pid}: {command}{f', listening on {ports}' if ports else ''}"

    def _files(self) -> Iterator[str]:
        for name in sorted(_entries(self.temporary)):
            yield f"temporary file {self.temporary / name}"
        for name in sorted(_entries(_SHARED_MEMORY) - self._shared):
            try:
                is_own = (_SHARED_MEMORY / name).stat().st_uid == os.getuid()
            except OSError:
                continue
            if is_own and not _is_used(_SHARED_MEMORY / name):
                yield f"shared memory {name}"


def _is_used(path: Path) -> bool:
    """Tell whether a process of somebody else, such as another test session, has a file open."""
    for process in psutil.process_iter():
        try:
            if any(item.path == str(path) for item in process.memory_maps(grouped=False)):
                return True
        except psutil.Error:
            continue
    return False
