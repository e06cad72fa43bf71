"""By which address the nodes of a cluster reach each other."""

from __future__ import annotations

import socket
from typing import Any

import psutil

from orchestrator.errors import ClusterError


def interface_addresses() -> dict[str, str]:
    """Return an address of each interface that is up: of version 4 where there is one."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    found = {}
    for name, addresses in psutil.net_if_addrs().items():
        for family in (socket.AF_INET6, socket.AF_INET):
            for address in addresses:
                if address.family == family and name in up:
                    found[name] = address.address.partition("%")[0]
    return found


def routed_address() -> str:
    """Return the address other hosts reach this node by, as far as routing tells."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Nothing is sent: connecting a datagram socket only asks for the route.
            probe.connect(("192.0.2.1", 9))
            address: str = probe.getsockname()[0]
        except OSError:
            return "127.0.0.1"
        return address


def chosen_address(node: dict[str, Any], interface: str | None) -> str:
    """Return the address that the workers of a node are reached by.

    Args:
        node: what its agent tells of it (`Agent.describe_node`).
        interface: `cluster.interface`; None for the address that Ray knows the node by.

    Raises:
        ClusterError: the node has no such interface, or it is down or without an address.
    """
    if interface is None:
        return str(node["ip"])
    interfaces: dict[str, str] = node["interfaces"]
    if interface not in interfaces:
        raise ClusterError(missing_interface(node["host"], interface, interfaces))
    return interfaces[interface]


def missing_interface(host: str, interface: str, interfaces: dict[str, str]) -> str:
    """Return the words for a node that has no such interface."""
    there = ", ".join(f"{name} {ip}" for name, ip in sorted(interfaces.items()))
    return (
        f"cluster.interface={interface}: {host} has no such interface that is up with an address; "
        f"it has {there or 'none'}"
    )
