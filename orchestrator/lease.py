"""Who may write in a run folder: one driver at a time."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO

from orchestrator.errors import StorageError
from orchestrator.spec.paths import RunPaths

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# Containers may share a host's name and have process numbers of their own.
_PROCESS_NUMBERS = Path("/proc/self/ns/pid")
# A guardian holds the lease of a killed driver while it writes down how the run ended.
_GUARDIAN_S = 20.0
_LOOK_INTERVAL_S = 0.1
# Who only wants to know whether a run is held locks it for a moment.
_LOOKER_S = 0.2


class Lease:
    """The right to write in a run folder: a lock that ends with the process that holds it.

    Also with its host: the kernel, or the server of a network file system, gives the lock back.

    Attributes:
        notice: whose lease was taken over because the holder is gone; empty if it was free.
    """

    def __init__(self, paths: RunPaths):
        """Take the lease.

        Raises:
            StorageError: another living process holds it, which the message names, or the folder
                cannot be written or knows no locks.
        """
        root = str(paths.root)
        try:
            self._file = paths.lease.open("a+")
        except OSError as error:
            raise StorageError(
                f"cannot write in the run folder {root}: {error.strerror}; make it writable, or "
                "copy it below another runs_dir and resume it there"
            ) from error
        try:
            self._lock()
        except OSError as error:
            holder = self._read()
            self._file.close()
            raise _refusal(paths, error, holder) from error
        # What an earlier holder was asked for.
        paths.stop_request.unlink(missing_ok=True)
        before = self._read()
        # A copy of a folder brings its lease along, and says nothing about this one.
        is_left = before.get("root") == root
        self.notice = f"{_words(before)} is gone; its lease was taken over" if is_left else ""
        self._write(
            {
                "root": root,
                "pid": os.getpid(),
                "started": _started(os.getpid()),
                "since": time.time(),
                **_here(),
            }
        )

    def release(self) -> None:
        """Give the lease back; again does nothing."""
        if not self._file.closed:
            self._write(None)
            self._file.close()

    def _lock(self) -> None:
        """Lock the file; where the holder is dead, wait for who ends the record of its run."""
        deadline = time.monotonic() + _GUARDIAN_S
        while True:
            try:
                return lock(self._file)
            except BlockingIOError:
                if time.monotonic() > deadline or not _is_dead(self._read()):
                    raise
            time.sleep(_LOOK_INTERVAL_S)

    def _read(self) -> dict[str, object]:
        return _read(self._file)

    def _write(self, holder: dict[str, object] | None) -> None:
        self._file.seek(0)
        self._file.truncate()
        self._file.write(json.dumps(holder) if holder is not None else "")
        self._file.flush()


def lock(file: IO[str]) -> None:
    """Lock a file for its holder, if nobody else does; who only looks is waited for.

    Raises:
        OSError: somebody holds it, or its file system knows no locks.
    """
    deadline = time.monotonic() + _LOOKER_S
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
        time.sleep(_LOOKER_S / 20)


@dataclass(frozen=True, slots=True)
class Holder:
    """The living driver of a run.

    Attributes:
        words: process, host and since when.
        pid: of the process, where it is one of this host; else None.
    """

    words: str
    pid: int | None


def holder_of(paths: RunPaths) -> Holder | None:
    """Return who holds a run; None where its driver is gone, or never was."""
    try:
        with paths.lease.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _read(file)
            else:
                return None
    except OSError:
        return None
    if _is_dead(holder):
        return None  # its guardian ends the record
    return Holder(_words(holder), int(str(holder["pid"])) if _is_here(holder) else None)


def _read(file: IO[str]) -> dict[str, object]:
    file.seek(0)
    try:
        holder = json.loads(file.read())
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _refusal(paths: RunPaths, error: OSError, holder: dict[str, object]) -> StorageError:
    if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
        return StorageError(
            f"the file system of {paths.root} knows no locks: {error.strerror}; two drivers could "
            "write there at once. Set runs_dir to a folder on one that does"
        )
    return StorageError(
        f"the run {paths.root.name} is held by {_words(holder)}; wait for it to end, or stop it"
    )


def _is_dead(holder: dict[str, object]) -> bool:
    """Tell whether a holder is known to be gone; not to be seen from another host."""
    if not holder:
        return True  # it was given back: whoever has the lock is its guardian, for a moment
    if not _is_here(holder):
        return False
    started = _started(holder.get("pid"))
    # Another process may have its number by now.
    return not started or holder.get("started", started) != started


def _here() -> dict[str, str]:
    """Return what tells apart where processes have their numbers."""
    with suppress(OSError):
        numbers, boot = os.readlink(_PROCESS_NUMBERS), _BOOT_ID.read_text().strip()
        return {"host": socket.gethostname(), "boot_id": boot, "process_numbers": numbers}
    return {"host": socket.gethostname()}


def _is_here(holder: dict[str, object]) -> bool:
    """Tell whether a holder's process number means something to this process."""
    return all(holder.get(name, value) == value for name, value in _here().items())


def _started(pid: object) -> str:
    """Return when a process was started, in ticks since its host was; empty if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _words(holder: dict[str, object]) -> str:
    try:
        since = datetime.fromtimestamp(float(str(holder["since"])))
        return f"process {holder['pid']} on {holder['host']} since {since:%Y-%m-%d %H:%M:%S}"
    except (ValueError, KeyError):
        return "another process"
