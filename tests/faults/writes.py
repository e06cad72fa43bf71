"""Who writes below a folder, as the kernel tells it: fanotify, which needs root."""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# <linux/fanotify.h>, <fcntl.h>
_FAN_CLOEXEC, _FAN_UNLIMITED_QUEUE = 0x1, 0x10
_FAN_MARK_ADD, _FAN_MARK_FILESYSTEM = 0x1, 0x100
_FAN_MODIFY, _FAN_CLOSE_WRITE = 0x2, 0x8
_AT_FDCWD = -100
_EVENT = struct.Struct("IBBHQii")  # length, version, reserved, length of this, mask, file, process
_BUFFER_BYTES = 1 << 16


@dataclass(frozen=True)
class Write:
    """A write, or the closing of a file that was open for writing.

    Attributes:
        time: Unix seconds.
        network: the network namespace of who wrote; 0 if it was gone before it could be asked.
    """

    time: float
    path: Path
    network: int


def network_of(pid: int) -> int:
    """Return the network namespace that a process is in; 0 if it is gone."""
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino
    except OSError:
        return 0


@contextlib.contextmanager
def writes_below(folder: Path) -> Iterator[list[Write]]:
    """Give a list that grows with every write below a folder, by whichever process of any host."""
    libc = ctypes.CDLL(None, use_errno=True)
    watch = libc.fanotify_init(_FAN_CLOEXEC | _FAN_UNLIMITED_QUEUE, os.O_RDONLY)
    mask = ctypes.c_uint64(_FAN_MODIFY | _FAN_CLOSE_WRITE)
    flags = _FAN_MARK_ADD | _FAN_MARK_FILESYSTEM  # hosts have mounts of their own
    if watch < 0 or libc.fanotify_mark(watch, flags, mask, _AT_FDCWD, bytes(folder)) < 0:
        raise OSError(ctypes.get_errno(), "fanotify")
    found: list[Write] = []
    over = threading.Event()
    thread = threading.Thread(target=_collect, args=(watch, folder, found, over))
    thread.start()
    try:
        yield found
    finally:
        over.set()
        (folder / "the-last-write").write_text("")  # wakes the reader
        thread.join()
        os.close(watch)


def _collect(watch: int, folder: Path, found: list[Write], over: threading.Event) -> None:
    while not over.is_set():
        events = os.read(watch, _BUFFER_BYTES)
        while events:
            length, _, _, _, _, file, pid = _EVENT.unpack_from(events)
            events = events[length:]
            if file < 0:
                continue
            try:
                path = Path(os.readlink(f"/proc/self/fd/{file}"))
            finally:
                os.close(file)
            if path.is_relative_to(folder):
                found.append(Write(time.time(), path, network_of(pid)))
