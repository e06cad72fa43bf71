"""Imports without garbage collection.

What a process imports, it keeps. Python's collector goes through it all the same, again and again
while it grows: a fifth of the time that importing TensorFlow takes, or MLflow, and as much of the
time that writing a million points takes, once MLflow is there.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Look for no garbage while a block imports, and never after in what there is by its end.

    For what is imported once and is large: garbage that lies about by then is kept, too. Threads
    may import at the same time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
