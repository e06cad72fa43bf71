"""How another process asks a driver to stop: a file in the run folder that the driver looks for.

A file reaches the driver from every host that sees the folder, opens no port, needs no rights but
those of the folder, and the driver answers by removing it. What is asked for arrives as a signal
would, so that there is one way to stop.
"""

from __future__ import annotations

import getpass
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from orchestrator.errors import StorageError
from orchestrator.signals import Stops
from orchestrator.spec.paths import RunPaths

_LOOK_INTERVAL_S = 0.25


def ask_to_stop(paths: RunPaths, *, at_once: bool) -> None:
    """Ask the driver that holds a run to save and stop, or to end at once.

    Raises:
        StorageError: the run folder cannot be written.
    """
    request = {"by": f"{_user()} on {socket.gethostname()}", "at_once": at_once}
    aside = paths.stop_request.with_suffix(f".{os.getpid()}")
    try:
        aside.write_text(json.dumps(request))
        aside.chmod(0o644)  # the driver may be another user's, whatever the umask here
        aside.replace(paths.stop_request)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise StorageError(
            f"cannot write in the run folder {paths.root}: {error.strerror}; ask as the user who "
            "trains"
        ) from error


def was_heard(paths: RunPaths) -> bool:
    """Tell whether the driver has taken what it was asked for."""
    return not paths.stop_request.exists()


def withdraw(paths: RunPaths) -> None:
    """Take back what nobody has heard."""
    with suppress(OSError):
        paths.stop_request.unlink()


@contextmanager
def listening(paths: RunPaths, stops: Stops) -> Iterator[None]:
    """Let others ask this process to stop while a block runs; it holds the run's lease."""
    is_over = threading.Event()

    def listen() -> None:
        while not is_over.wait(_LOOK_INTERVAL_S):
            request = _take(paths)
            if request is not None:
                by, at_once = request.get("by", "somebody"), bool(request.get("at_once"))
                stops.ask(f"runs stop by {by}", at_once=at_once)

    thread = threading.Thread(target=listen, name="asked to stop", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        withdraw(paths)


def _take(paths: RunPaths) -> dict[str, Any] | None:
    """Return what is asked for and remove it, so that whoever asks sees that it was heard."""
    try:
        text = paths.stop_request.read_text()
    except FileNotFoundError:
        return None
    except OSError:
        text = ""  # by somebody whose files we may not read
    with suppress(OSError):
        paths.stop_request.unlink()
    try:
        request = json.loads(text)
    except ValueError:
        request = {}
    return request if isinstance(request, dict) else {}


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return f"user {os.getuid()}"
