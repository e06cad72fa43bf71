"""What is done on each node to survey it; runs there, in a process that Ray starts. No Ray."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

from orchestrator.control import links
from orchestrator.control.links import Echo, Link
from orchestrator.control.node_facts import NodeFacts, look
from orchestrator.control.rehearsal import rehearse
from orchestrator.spec.footprint import Rehearsal
from orchestrator.spec.plan import RunPlan

_LOOK_INTERVAL_S = 0.1


class Scout:
    """Looks around on its node; leaves nothing there."""

    def __init__(self) -> None:
        """Do nothing yet."""
        self._echo: Echo | None = None

    def clock(self) -> float:
        """Return the node's Unix time."""
        return time.time()

    def look(
        self,
        folder: str,
        ports: tuple[int, int] | None,
        ip: str,
        chosen: str | None,
        node_id: str,
        ray_gpus: int,
    ) -> NodeFacts:
        """Return what `node_facts.look` tells of the node."""
        return look(Path(folder), ports, ip=ip, chosen=chosen, node_id=node_id, ray_gpus=ray_gpus)

    def leave_mark(self, folder: str, name: str) -> bool:
        """Write a file into a folder; False if the folder is not there, or cannot be written."""
        return leave_mark(Path(folder), name)

    def unseen(self, folder: str, names: Sequence[str], limit_s: float) -> list[str]:
        """Return which files of a folder cannot be read here."""
        return unseen(Path(folder), names, limit_s)

    def rehearse(self, plan: RunPlan, with_model: bool, limit_s: float) -> Rehearsal:
        """Load the job's data here, and trace its model if that is wanted."""
        return rehearse(plan, with_model=with_model, limit_s=limit_s)

    def open_echo(self, first: int, last: int) -> tuple[int, bytes, tuple[int, ...]]:
        """Answer others on a port of a range; return it, what they must say, and the range's ends.

        Raises:
            OSError: every port is taken.
        """
        self.close_echo()
        self._echo = Echo(first, last)
        return self._echo.port, self._echo.token, self._echo.ends

    def close_echo(self) -> None:
        """Answer others no more."""
        if self._echo is not None:
            self._echo.close()
            self._echo = None

    def measure(
        self, source: int, target: int, host: str, port: int, token: bytes, ends: tuple[int, ...]
    ) -> Link:
        """Measure the way to another node's echo, which listens at the range's ends, too."""
        return links.measure(source, target, host, port, token, ends)

    def open_ports(self, host: str, ports: list[int]) -> list[int]:
        """Return which ports of another node take a connection from here."""
        return links.open_ports(host, ports)


def leave_mark(folder: Path, name: str) -> bool:
    """Write a file into a folder; False if the folder is not there, or cannot be written."""
    try:
        # The folder is not made: where it is missing it is another one.
        (folder / name).write_text(name)
    except OSError:
        return False
    return True


def unseen(folder: Path, names: Sequence[str], limit_s: float) -> list[str]:
    """Return which files of a folder cannot be read here.

    Files are opened by name, which also a network file system looks up afresh, and again for a
    while: one that has just been asked for a missing file may remember that.
    """
    deadline = time.monotonic() + limit_s
    while True:
        missing = [name for name in names if not _holds(folder / name, name)]
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(_LOOK_INTERVAL_S)


def _holds(path: Path, text: str) -> bool:
    with contextlib.suppress(OSError):
        return path.read_text() == text
    return False
