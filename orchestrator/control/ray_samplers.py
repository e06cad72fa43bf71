"""Which agents sample their nodes: one of each node, however many workers it has.

Call `ray_settings.apply_ray_settings` before this module is imported.
"""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.control.ray_listener import Seat


class Samplers:
    """Orders one agent of each node to sample it, under a name that stays the node's own."""

    def __init__(self) -> None:
        self._names: dict[tuple[str, str], str] = {}

    def assign(self, seats: Sequence[Seat], every_s: float | None) -> None:
        """Have each node sampled by the agent of its first worker; answers are not waited for.

        Args:
            seats: all of them, described, in the order of the workers.
            every_s: seconds between two samples; None for none.
        """
        taken: set[str] = set()
        for seat in seats:
            name = self._name(seat)
            wanted = None if name in taken else name
            taken.add(name)
            if seat.samples != wanted:
                seat.samples = wanted
                seat.actor.sample_node.remote(wanted, every_s)

    def _name(self, seat: Seat) -> str:
        """Return the host's name, with the address where another node is called the same."""
        host, address = seat.node["host"], seat.node["ip"]
        if (host, address) not in self._names:
            is_taken = host in self._names.values()
            self._names[host, address] = f"{host}-{address}" if is_taken else host
        return self._names[host, address]
