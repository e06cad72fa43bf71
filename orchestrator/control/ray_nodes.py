"""What Ray's nodes offer, which of them answer, and how a placement group keeps off some.

Call `ray_settings.apply_ray_settings` before this module is imported.
"""

from __future__ import annotations

import math
import os
import socket
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import ray
from ray._private import state

from orchestrator.control.policy import Room
from orchestrator.control.ray_listener import draining_nodes
from orchestrator.errors import ClusterError
from orchestrator.spec.plan import RunPlan
from orchestrator.spec.schema import Placement

_NODE_ID_LABEL = "ray.io/node-id"
_ANSWER_S = 1.0
# How every HTTP/2 client begins, and an empty SETTINGS frame: gRPC answers with its own.
_HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))


def bundle_of(plan: RunPlan) -> dict[str, float]:
    """Return what one worker takes of its node."""
    bundle: dict[str, float] = {"CPU": plan.cpus_per_worker}
    if plan.device_kind == "GPU":
        bundle["GPU"] = plan.devices_per_worker
    return bundle


def words(resources: Mapping[str, float]) -> str:
    """Return resources in words."""
    known = [f"{resources.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU") if kind in resources]
    return " and ".join(known) or "nothing"


def host_name(node: Mapping[str, Any]) -> str:
    """Return a node's host as users know it, with the address: host names may be alike."""
    name, address = node["NodeManagerHostname"], node["NodeName"]
    return name if name == address else f"{name} ({address})"


def living_nodes(suspects: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """Return the nodes that are alive by their id; those under suspicion must answer first.

    Ray takes seconds to notice that a node is gone: up to a minute where nobody has tuned it. Nodes
    that are to be left are as good as gone.
    """
    draining = draining_nodes()
    return {
        node["NodeID"]: node
        for node in ray.nodes()
        if node["Alive"]
        and node["NodeID"] not in draining
        and (node["NodeID"] not in suspects or _answers(node))
    }


def free_resources() -> dict[str, dict[str, float]]:
    """Return what is free on each node, by its id."""
    found: dict[str, dict[str, float]] = state.available_resources_per_node()
    return found


def count_room(
    plan: RunPlan,
    placement: Placement,
    nodes: Mapping[str, Mapping[str, Any]],
    free: Mapping[str, Mapping[str, float]],
    held: Iterable[str] = (),
) -> Room:
    """Count how many workers fit on each host.

    Args:
        plan: says what a worker takes.
        placement: how workers are spread over nodes.
        nodes: those that may be used, by id.
        free: what is free on them.
        held: the node of each bundle that this run holds already.
    """
    bundle = bundle_of(plan)
    counts = Counter(node for node in held if node in nodes)
    for node in nodes:
        counts[node] += _times(free.get(node, {}), bundle)
    if placement is Placement.STRICT_SPREAD:
        counts = Counter({node: min(1, count) for node, count in counts.items()})
    hosts: Counter[str] = Counter()
    for node, count in counts.items():
        hosts[host_name(nodes[node])] += count
    return Room(hosts, words(bundle), is_one_host=placement is Placement.STRICT_PACK)


def keep_off(nodes: Collection[str], num_bundles: int) -> list[dict[str, str]]:
    """Return what a placement group's bundles ask of a node's labels, so as to avoid some."""
    if not nodes:
        return [{} for _ in range(num_bundles)]
    return [{_NODE_ID_LABEL: f"!in({','.join(sorted(nodes))})"} for _ in range(num_bundles)]


def refuse_impossible(plan: RunPlan) -> None:
    """Refuse what the cluster can never give: Ray would wait for it for ever.

    Raises:
        ClusterError: it has not so much, with what was asked and what there is.
    """
    bundle = bundle_of(plan)
    nodes = [node["Resources"] for node in living_nodes().values()]
    if sum(_times(node, bundle) for node in nodes) < plan.num_workers:
        have = "; ".join(words(node) for node in nodes)
        raise ClusterError(
            f"{plan.num_workers} worker(s) of {words(bundle)} each do not fit the cluster, which "
            f"has {len(nodes)} node(s): {have}. Lower strategy.num_workers, "
            "strategy.devices_per_worker or cluster.cpus_per_worker"
        )


def _times(resources: Mapping[str, float], bundle: Mapping[str, float]) -> int:
    """Return how often a bundle fits."""
    return math.floor(min(resources.get(kind, 0) / amount for kind, amount in bundle.items()))


def _answers(node: Mapping[str, Any]) -> bool:
    """Tell whether a node's raylet says anything; one that is stopped takes a connection too."""
    address = (node["NodeManagerAddress"], node["NodeManagerPort"])
    try:
        with socket.create_connection(address, timeout=_ANSWER_S) as probe:
            if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
                return True  # it waits for a handshake
            probe.sendall(_HTTP2_HELLO)
            return bool(probe.recv(1))
    except OSError:
        return False


def cluster_total() -> tuple[int, int]:
    """Return the CPUs and GPUs of all living nodes together."""
    nodes = [node["Resources"] for node in living_nodes().values()]
    cpus, gpus = (sum(int(node.get(kind, 0)) for node in nodes) for kind in ("CPU", "GPU"))
    return cpus, gpus
