"""Ray's own processes that wait to become actors: with one at hand an agent starts at once.

Ray starts some with its node and lets each serve one job only; they are not replaced. A process of
Ray takes most of a second to come up. The interface is that of Ray 2.60's node manager; with
another Ray, that knows no such request, agents wait for their process.
"""

from __future__ import annotations

import time
from contextlib import suppress

import psutil
from ray._private.grpc_utils import init_grpc_channel
from ray.core.generated import node_manager_pb2, node_manager_pb2_grpc

_TITLE = "ray::IDLE"
_REQUEST_S = 5.0
_LOOK_INTERVAL_S = 1.0
# A process that was asked for is there after this, or will not come.
_PATIENCE_S = 10.0
# Ray's own limit is what counts: as many as it has CPUs.
_KEEP_ALIVE_S = 7 * 24 * 3600


class IdleWorkers:
    """Keeps a number of Ray's worker processes waiting."""

    def __init__(self, raylet: int, address: str, wanted: int):
        """Ask for none yet.

        Args:
            raylet: process number of the node's raylet.
            address: of its node manager.
            wanted: how many shall wait.
        """
        self._raylet = psutil.Process(raylet)
        self._address = address
        self._wanted = wanted
        self._looked = -_LOOK_INTERVAL_S
        self._asked = -_PATIENCE_S

    def count(self) -> int:
        """Return how many wait."""
        found = 0
        with suppress(psutil.Error):
            for process in self._raylet.children():
                with suppress(psutil.Error, IndexError):
                    found += process.cmdline()[0].startswith(_TITLE)
        return found

    def refill(self) -> None:
        """Ask for those that are missing; does nothing where it has just been done."""
        now = time.monotonic()
        if now - self._looked < _LOOK_INTERVAL_S or now - self._asked < _PATIENCE_S:
            return
        self._looked = now
        if (missing := self._wanted - self.count()) > 0:
            self._asked = now
            self._ask_for(missing)

    def await_all(self) -> None:
        """Wait until as many wait as shall; not longer than they may take."""
        deadline = time.monotonic() + _PATIENCE_S
        while self.count() < self._wanted and time.monotonic() < deadline:
            time.sleep(0.05)

    def _ask_for(self, number: int) -> None:
        with suppress(Exception):  # gRPC's errors, or a Ray without the request
            channel = init_grpc_channel(self._address)
            try:
                stub = node_manager_pb2_grpc.NodeManagerServiceStub(channel)
                request = node_manager_pb2.PrestartWorkersRequest(
                    num_workers=number, keep_alive_duration_secs=_KEEP_ALIVE_S
                )
                stub.PrestartWorkers(request, timeout=_REQUEST_S)
            finally:
                channel.close()
