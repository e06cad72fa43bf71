"""Putting a finished folder into place by a rename, durably, also where an older one is."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

_AT_FDCWD = -100  # fcntl.h
_RENAME_EXCHANGE = 2  # linux/fs.h
# What file systems without an exchange answer, such as NFS.
_CANNOT = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM)


def put_in_place(staged: Path, target: Path) -> None:
    """Rename a staged folder to its place; when this returns, it is durable.

    An older one at this place is exchanged for it in one step. Where the file system cannot do
    that, it lies aside as `.replaced-<name>` for a moment, from where `store.recover` gets it back.

    Args:
        staged: on the same file system, every file in it flushed.
        target: its place.

    Raises:
        OSError: it is not in place, and what was there still is.
    """
    if not os.path.lexists(target):
        staged.rename(target)
        _flush_or_undo(target.parent, lambda: target.rename(staged))
    elif _exchange(staged, target):
        _flush_or_undo(target.parent, lambda: _exchange(staged, target))
        remove(staged)
    else:
        _replace(staged, target)


def flush(path: Path) -> None:
    """Force a file or folder to the device."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a folder or file as far as possible; one that stays harms nobody."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _replace(staged: Path, target: Path) -> None:
    aside = target.with_name(f".replaced-{target.name}")
    remove(aside)
    target.rename(aside)
    try:
        staged.rename(target)
    except OSError:
        aside.rename(target)
        raise

    def undo() -> None:
        target.rename(staged)
        aside.rename(target)

    _flush_or_undo(target.parent, undo)
    remove(aside)


def _flush_or_undo(folder: Path, undo: Callable[[], object]) -> None:
    """Make renames durable; what is not durable must not be seen."""
    try:
        flush(folder)
    except OSError:
        undo()
        raise


def _exchange(left: Path, right: Path) -> bool:
    """Swap two folders in one step; tell whether the file system can.

    Raises:
        OSError: it can, but not these two: one is gone.
    """
    # Python 3.11 to 3.13 have no function for it.
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    paths = os.fsencode(left), os.fsencode(right)
    if renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT:
        return False
    raise OSError(number, os.strerror(number), str(left), None, str(right))
