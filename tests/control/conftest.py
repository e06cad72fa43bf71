"""What tests of real processes share: waits."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil

# For what takes a second or two; a busy machine may need longer.
PATIENCE_S = 60.0


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Return when the condition holds; fail, saying what did not come, when it never does."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {PATIENCE_S:g} s"
        time.sleep(0.01)


def is_gone(pid: int) -> bool:
    """Tell whether a process has ended, reaped by its parent or not."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
