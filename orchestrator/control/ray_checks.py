"""What is checked of nodes that are to train together: versions, addresses, clocks."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Any

from orchestrator.control.addresses import chosen_address
from orchestrator.control.authentication import open_to_anybody
from orchestrator.errors import ClusterError, StartFailed

_SAME_EVERYWHERE = ("tensorflow", "tensorflow-cpu", "keras", "ray", "numpy", "mlflow")
# Records carry the time of the host they were made on: with more, their order is a wrong one.
_CLOCK_TOLERANCE_S = 2.0


def check_nodes(
    own: dict[str, Any], nodes: Sequence[dict[str, Any]], interface: str | None = None
) -> None:
    """Refuse nodes that cannot train together.

    Args:
        own: what `describe_here` tells of the driver's node.
        nodes: what the agents tell of theirs, in the order of the workers.
        interface: `cluster.interface`.

    Raises:
        ClusterError: versions differ, or a node has no address that others can reach.
    """
    differences = {line for node in nodes for line in version_differences(own, node)}
    if differences:
        raise ClusterError(
            "the nodes do not run what the driver runs:\n  "
            + "\n  ".join(sorted(differences))
            + "\ninstall the same requirements/*.lock everywhere, and with "
            "cluster.code=installed the same checkout of the project"
        )
    if len({node.get("node_id") for node in nodes}) < 2:
        return
    for node in nodes:
        address = chosen_address(node, interface)
        if ipaddress.ip_address(address).version != 4:
            raise ClusterError(
                f"the node {node['host']} would be reached by {address}: workers talk by addresses "
                "of version 4. Name an interface that has one with cluster.interface, or start Ray "
                "there with `ray start --node-ip-address=ADDRESS`"
            )
        if interface is not None and ipaddress.ip_address(address).is_loopback:
            raise ClusterError(
                f"cluster.interface={interface}: the nodes do not reach each other by loopback"
            )
        if ipaddress.ip_address(address).is_loopback:
            raise ClusterError(
                f"the node {node['host']} is known to Ray as {address}, where other nodes do "
                "not reach it; its host name may resolve to that. Start Ray there with "
                "`ray start --node-ip-address=ADDRESS`"
            )


def unfit(error: ClusterError, own: dict[str, Any], nodes: Sequence[dict[str, Any]]) -> StartFailed:
    """Turn what `check_nodes` refuses of a run that has trained into the failure of a worker.

    A node that joined meanwhile is no reason to end the run: one that fails twice is avoided.
    """
    failed = StartFailed(str(error))
    unlike = (worker for worker, node in enumerate(nodes) if version_differences(own, node))
    failed.worker = next(unlike, None)
    return failed


def check_authentication(nodes: Sequence[dict[str, Any]]) -> None:
    """Refuse a cluster that lets anybody in.

    Args:
        nodes: what the agents tell of theirs; each has the environment of its node's Ray.

    Raises:
        ClusterError: a node's Ray asks for no token.
    """
    hosts = sorted({node["host"] for node in nodes if node["auth_mode"] != "token"})
    if hosts:
        raise open_to_anybody(f"Ray on {', '.join(hosts)}")


def version_differences(own: dict[str, Any], node: dict[str, Any]) -> list[str]:
    """Return a line for each version that a node does not share with the driver's."""
    pairs = [("Python", own["python"], node["python"])]
    for package in _SAME_EVERYWHERE:
        mine, theirs = own["packages"].get(package), node["packages"].get(package)
        pairs.append((package, mine, theirs))
    pairs.append(("project", own["project"], node["project"]))
    return [
        f"{node['host']}: {name} {theirs or 'is missing'}, here {mine or 'is none'}"
        for name, mine, theirs in pairs
        if mine != theirs
    ]


def clock_warning(host: str, told: float, asked: float, answered: float) -> str:
    """Return a warning if a host's clock is not the driver's; empty if it may be.

    Args:
        host: its name.
        told: its Unix time, at some moment between the next two.
        asked: the driver's Unix time when it asked.
        answered: the driver's Unix time when the answer was there.
    """
    ahead_s = max(told - answered, 0.0) - max(asked - told, 0.0)
    if abs(ahead_s) <= _CLOCK_TOLERANCE_S:
        return ""
    word = "ahead of" if ahead_s > 0 else "behind"
    return (
        f"the clock of {host} is {abs(ahead_s):.1f} s {word} the driver's: times in the record and "
        "in MLflow will not fit together; run an NTP service on every node"
    )
