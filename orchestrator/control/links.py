"""How fast a node reaches another: a round trip, and some megabytes. Plain sockets."""

from __future__ import annotations

import contextlib
import secrets
import socket
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

_TOKEN_BYTES = 16
_NUM_PINGS = 15
_NUM_BYTES = 8 * 2**20
_PIECE = bytes(2**16)
_DIAL_S = 2.0
_TRANSFER_S = 1.0
_PATIENCE_S = 5.0


@dataclass(frozen=True, slots=True)
class Link:
    """From one node to another, as the first one sees it.

    Attributes:
        source: index of the node that dialled.
        target: index of the node that answered.
        round_trip_s: the median of some.
        bytes_per_s: of a transfer of 8 MB, or of what came across in a second.
        error: why there is no connection; empty if there is one.
    """

    source: int
    target: int
    round_trip_s: float = 0.0
    bytes_per_s: float = 0.0
    error: str = ""


class Echo:
    """Answers whoever knows its token, on a port of a range; a thread of this process.

    The first and the last port of the range listen too, where they are free: a firewall may open a
    part of it.
    """

    def __init__(self, first: int, last: int):
        """Listen.

        Raises:
            OSError: every port of the range is taken.
        """
        self.token = secrets.token_bytes(_TOKEN_BYTES)
        self._server = _bound(first, last)
        self.port: int = self._server.getsockname()[1]
        self._server.listen(16)
        self._ends = [end for number in {first, last} if (end := _free(number)) is not None]
        for end in self._ends:
            end.listen(16)
        self.ends: tuple[int, ...] = tuple(sorted(end.getsockname()[1] for end in self._ends))
        threading.Thread(target=self._serve, name="echo", daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        # A thread that waits in accept() is woken by this, not by closing.
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for end in self._ends:
            end.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        """Send single bytes back, then count what comes until its end."""
        with contextlib.suppress(OSError), connection:
            connection.settimeout(_PATIENCE_S)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if not secrets.compare_digest(_received(connection, _TOKEN_BYTES), self.token):
                return
            for _ in range(_NUM_PINGS):
                connection.sendall(_received(connection, 1))
            count = 0
            while piece := connection.recv(len(_PIECE)):
                count += len(piece)
            connection.sendall(count.to_bytes(8, "big"))


def measure(
    source: int, target: int, host: str, port: int, token: bytes, ends: Sequence[int] = ()
) -> Link:
    """Measure the way to a node's `Echo`; an unreachable one is a link with an error.

    Args:
        source: index of this node.
        target: index of the other.
        host: its address.
        port: of its echo.
        token: what the echo wants to hear.
        ends: ports that must take a connection, besides.
    """
    for end in ends:
        try:
            socket.create_connection((host, end), timeout=_DIAL_S).close()
        except OSError as error:
            return Link(source, target, error=f"port {end}: {_reason(error)}")
    try:
        with socket.create_connection((host, port), timeout=_DIAL_S) as connection:
            connection.settimeout(_PATIENCE_S)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(token)
            trips = []
            for _ in range(_NUM_PINGS):
                start = time.perf_counter()
                connection.sendall(b"?")
                _received(connection, 1)
                trips.append(time.perf_counter() - start)
            start = time.perf_counter()
            sent = 0
            while sent < _NUM_BYTES and time.perf_counter() - start < _TRANSFER_S:
                connection.sendall(_PIECE)
                sent += len(_PIECE)
            connection.shutdown(socket.SHUT_WR)
            arrived = int.from_bytes(_received(connection, 8), "big")
            wall_s = time.perf_counter() - start
    except OSError as error:
        return Link(source, target, error=f"port {port}: {_reason(error)}")
    return Link(source, target, statistics.median(trips), arrived / wall_s)


def rounds(num_nodes: int) -> list[list[tuple[int, int]]]:
    """Return all ordered pairs of nodes, in rounds in which each dials once and answers once."""
    return [
        [(node, (node + shift) % num_nodes) for node in range(num_nodes)]
        for shift in range(1, num_nodes)
    ]


def open_ports(host: str, ports: list[int], limit_s: float = 1.0) -> list[int]:
    """Return which ports of a host take a connection from here."""
    found: list[int] = []

    def dial(port: int) -> None:
        with (
            contextlib.suppress(OSError),
            socket.create_connection((host, port), timeout=limit_s),
        ):
            found.append(port)

    threads = [threading.Thread(target=dial, args=(port,), daemon=True) for port in ports]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * limit_s)
    return sorted(found)


def _bound(first: int, last: int) -> socket.socket:
    ports = range(first, last + 1)
    begin = secrets.randbelow(len(ports))
    for port in [*ports[begin:], *ports[:begin]]:
        if (server := _free(port)) is not None:
            return server
    raise OSError(f"no free port in {first}-{last}")


def _free(port: int) -> socket.socket | None:
    """Return a socket bound to a port; None if it is taken."""
    server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        server.bind(("", port))
    except OSError:
        server.close()
        return None
    return server


def _reason(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__


def _received(connection: socket.socket, count: int) -> bytes:
    """Return exactly so many bytes.

    Raises:
        OSError: the other side hung up.
    """
    data = b""
    while len(data) < count:
        piece = connection.recv(count - len(data))
        if not piece:
            raise OSError("the other side hung up")
        data += piece
    return data
