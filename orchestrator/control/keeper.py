"""The keeper's ear: who holds what is kept, who asks, and when it shall end."""

from __future__ import annotations

import json
import selectors
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from orchestrator.control.processes import Process

_LOOK_S = 0.2
_REQUEST_S = 1.0
_LONGEST_REQUEST = 1 << 16
# Ray 2.60 keeps a socket and 0.8 MB of every driver that joined it (measured over 20 runs).
_MOST_RUNS = 500


@dataclass(slots=True)
class _Holder:
    """A run that has a claim; it ends with its connection, and so with its process."""

    connection: socket.socket
    what: str
    pid: int
    cpus: int
    gpus: int

    def __str__(self) -> str:
        return f"{self.what} (process {self.pid})"


class Keeper:
    """Serves one socket from one thread until what is kept shall end.

    Requests and answers are JSON lines. `hold` claims cores and GPUs for as long as the connection
    is open, `look` tells who holds something, `end` ends it all unless somebody does.
    """

    def __init__(
        self,
        listener: socket.socket,
        *,
        cpus: int,
        gpus: int,
        idle_s: float,
        processes: Mapping[str, Process],
        rest: Callable[[], str],
        most_runs: int = _MOST_RUNS,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Serve nobody yet.

        Args:
            listener: a Unix socket that listens.
            cpus: what Ray can hand out.
            gpus: the same.
            idle_s: end when nobody has held anything for so long.
            processes: what is kept, by name; when one of them dies, all ends.
            rest: called again and again while nobody holds anything; may return why all shall end.
            most_runs: end when so many have held something.
            clock: seconds that only grow.
        """
        self._listener = listener
        self._cpus, self._gpus = cpus, gpus
        self._idle_s = idle_s
        self._processes = processes
        self._rest = rest
        self._most_runs = most_runs
        self._num_runs = 0
        self._clock = clock
        self._last_use = clock()
        self._holders: list[_Holder] = []
        self._is_ending = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)

    def serve(self) -> str:
        """Serve; return why it ended by itself, or nothing if `end` was asked."""
        while not self._is_ending:
            for key, _ in self._selector.select(_LOOK_S):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._hear(key.data)
            if why := self._dead():
                return why
            if self._holders:
                self._last_use = self._clock()
                continue
            if self._clock() - self._last_use > self._idle_s:
                return f"no run has used it for {self._idle_s:g} s"
            if self._num_runs >= self._most_runs:
                return f"{self._num_runs} runs have used it, and Ray keeps some memory of each"
            if why := self._rest():
                return why
        return ""

    def close(self) -> None:
        """Listen no more, and let go of who still holds something."""
        self._selector.close()
        self._listener.close()
        for holder in self._holders:
            holder.connection.close()

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        connection.settimeout(_REQUEST_S)
        try:
            question = _read(connection)
            answer = self._answer(question, connection)
            connection.sendall(json.dumps(answer).encode() + b"\n")
        except (OSError, ValueError, KeyError, TypeError):
            self._let_go(connection)
            return
        if not any(holder.connection is connection for holder in self._holders):
            connection.close()

    def _answer(self, question: dict[str, Any], connection: socket.socket) -> dict[str, Any]:
        holders = [str(holder) for holder in self._holders]
        if question["ask"] == "hold":
            cpus, gpus = int(question["cpus"]), int(question["gpus"])
            if why := self._dead() or self._stopped() or self._lacks(cpus, gpus):
                return {"refused": why}
            what, pid = str(question["what"]), int(question["pid"])
            holder = _Holder(connection, what, pid, cpus, gpus)
            self._holders.append(holder)
            self._num_runs += 1
            self._selector.register(connection, selectors.EVENT_READ, holder)
            return {"held": True}
        if question["ask"] == "end" and not holders:
            self._is_ending = True
        return {"holders": holders}

    def _dead(self) -> str:
        """Return which process has died, as a clause."""
        gone = [name for name, process in self._processes.items() if not process.is_alive]
        return f"its {' and '.join(gone)} died or was killed" if gone else ""

    def _stopped(self) -> str:
        """Return which process does nothing at all, as a clause."""
        stopped = [name for name, process in self._processes.items() if process.state == "T"]
        return f"its {' and '.join(stopped)} is stopped (SIGSTOP)" if stopped else ""

    def _lacks(self, cpus: int, gpus: int) -> str:
        """Return what is missing for a claim, as a clause."""
        held = f"; {', '.join(map(str, self._holders))} holds the rest" if self._holders else ""
        for kind, wanted, room, taken in (
            ("CPU", cpus, self._cpus, sum(holder.cpus for holder in self._holders)),
            ("GPU", gpus, self._gpus, sum(holder.gpus for holder in self._holders)),
        ):
            if wanted > room - taken:
                return f"the run needs {wanted} {kind}, and {room - taken} of {room} are free{held}"
        return ""

    def _hear(self, holder: _Holder) -> None:
        """Hear from a holder: its name, or its end."""
        try:
            told = _read(holder.connection)
            holder.what = str(told["what"])
        except (OSError, ValueError, KeyError, TypeError):
            self._let_go(holder.connection)

    def _let_go(self, connection: socket.socket) -> None:
        with suppress(KeyError, ValueError):
            self._selector.unregister(connection)
        connection.close()
        self._holders = [each for each in self._holders if each.connection is not connection]
        self._last_use = self._clock()


def _read(connection: socket.socket) -> dict[str, Any]:
    """Read one line.

    Raises:
        ValueError: the peer has hung up, or says something else.
    """
    line = b""
    while not line.endswith(b"\n"):
        part = connection.recv(_LONGEST_REQUEST)
        if not part or len(line) > _LONGEST_REQUEST:
            raise ValueError("no request")
        line += part
    told = json.loads(line)
    if not isinstance(told, dict):
        raise ValueError("no request")
    return told
