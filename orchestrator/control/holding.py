"""A run's claim on what `make up` keeps, and how what is left of it is ended."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from orchestrator.control.kept import (
    Gone,
    Kept,
    differences,
    listed,
    read_state,
    surroundings,
)
from orchestrator.control.launcher import TENSORFLOW_ENV

_ANSWER_S = 1.0
_END_S = 5.0
_LOOK_S = 0.02


class Hold:
    """A claim on what is kept, for as long as this process has it.

    Attributes:
        kept: what is held.
        surroundings: file with what this run's processes shall have of this one's.
    """

    def __init__(self, kept: Kept, connection: socket.socket):
        self.kept = kept
        self.surroundings: Path | None = None
        self._connection = connection

    def name(self, what: str) -> None:
        """Tell the keeper which run it is, for others who ask."""
        with suppress(OSError):  # it is gone, which the run finds out by itself
            self._connection.sendall(json.dumps({"what": what}).encode() + b"\n")

    def close(self) -> None:
        """Give it back."""
        self._connection.close()

    def write_surroundings(self, path: Path) -> None:
        """Write down folder and environment of this process, for agents of this run.

        Not by Ray: its head would keep what may be secrets.
        """
        changes: dict[str, str | None] = dict.fromkeys(self.kept.variables)
        changes |= os.environ
        # The zygote has its own of these; the paths to import from come with each process.
        for name in ("PYTHONPATH", *TENSORFLOW_ENV):
            changes.pop(name, None)
        with open(path, "w", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            json.dump({"cwd": os.getcwd(), "environment": changes}, file)
        self.surroundings = path


def take_hold(path: Path, cpus: int, gpus: int, what: str) -> tuple[Hold | None, str]:
    """Claim what is kept for a run, if it is there and as it should be.

    Args:
        path: the state file.
        cpus: what the run's workers need together.
        gpus: the same.
        what: the run, in a word.

    Returns:
        The claim, or None and what to tell the user; nothing where nothing was kept.
    """
    state = read_state(path)
    if isinstance(state, Kept):
        if differing := differences(state, surroundings(os.environ)):
            return None, (
                f"what `make up` keeps is not used: {listed(differing)} not what it was then; "
                "`make down` and `make up` start it anew"
            )
        claim = {"ask": "hold", "cpus": cpus, "gpus": gpus, "what": what, "pid": os.getpid()}
        try:
            connection, answer = ask(state, claim, _ANSWER_S)
        except OSError as error:
            state = _after_silence(path, state)
            if isinstance(state, Kept):
                return None, (
                    f"what `make up` keeps is not used: its keeper (process {state.keeper.pid}) "
                    f"does not answer ({error}); `make down` ends it"
                )
        else:
            if "held" in answer:
                return Hold(state, connection), ""
            connection.close()
            return None, f"what `make up` keeps is not used: {answer.get('refused')}"
    if state is None:
        return None, ""
    path.unlink(missing_ok=True)
    return None, f"what `make up` kept has ended: {state.why}; `make up` starts it again"


def _after_silence(path: Path, kept: Kept) -> Kept | Gone | None:
    """Return what there is to know of something kept whose keeper did not answer."""
    if kept.keeper.is_alive:
        return read_state(path)  # it may have just ended
    state = read_state(path)
    if isinstance(state, Kept):
        clear(kept)
        return Gone(f"its keeper, process {kept.keeper.pid}, was killed")
    return state


def ask(
    kept: Kept, question: Mapping[str, Any], limit_s: float
) -> tuple[socket.socket, dict[str, Any]]:
    """Ask the keeper something; return the open connection and the answer.

    Raises:
        OSError: there is no keeper, or it does not answer.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(limit_s)
    try:
        connection.connect(kept.control)
        connection.sendall(json.dumps(question).encode() + b"\n")
        line = connection.makefile("rb").readline()
        if not line.endswith(b"\n"):
            raise ConnectionError("it hung up")
        return connection, json.loads(line)
    except BaseException:
        connection.close()
        raise


def clear(kept: Kept) -> None:
    """Kill whatever is left of something kept, and remove its files; returns when it is gone.

    Only processes that the state file names are ended, and only if they were started when it says.
    """
    for process in (kept.keeper, *kept.processes.values()):
        process.kill()
    await_end(kept, _END_S)
    shutil.rmtree(Path(kept.control).parent, ignore_errors=True)


def await_end(kept: Kept, limit_s: float) -> bool:
    """Wait until nothing kept is left; tell whether that is so."""
    deadline = time.monotonic() + limit_s
    every = [kept.keeper, *kept.processes.values()]
    while any(process.is_alive for process in every):
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_S)
    return True
