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
from orchestrator.spec.plan import RunPlan
from orchestrator.spec.schema import ClusterConfig, Placement

_ACCELERATOR = "accelerator_type:"
_A_TRACE = 0.001
_NODE_ID_LABEL = "ray.io/node-id"
_ANSWER_S = 1.0
# How every HTTP/2 client begins, and an empty SETTINGS frame: gRPC answers with its own.
_HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))


def bundle_of(plan: RunPlan) -> dict[str, float]:
    """Return what one worker takes of its node."""
    bundle: dict[str, float] = {"CPU": plan.cpus_per_worker}
    if plan.device_kind == "GPU":
        bundle["GPU"] = plan.devices_per_worker
    if accelerator := plan.config.cluster.accelerator_type:
        # As Ray's own `accelerator_type=` asks for it: autoscalers know it.
        bundle[f"{_ACCELERATOR}{accelerator}"] = _A_TRACE
    return bundle


def words(resources: Mapping[str, float]) -> str:
    """Return resources in words."""
    known = [f"{resources.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU") if kind in resources]
    text = " and ".join(known) or "nothing"
    types = sorted(k.removeprefix(_ACCELERATOR) for k in resources if k.startswith(_ACCELERATOR))
    return f"{text} ({', '.join(types)})" if types else text


def asked_words(plan: RunPlan) -> str:
    """Return in words what each worker of a plan asks of its node."""
    text, cluster = words(bundle_of(plan)), plan.config.cluster
    labels = ", ".join(f"{key}={value}" for key, value in cluster.node_labels.items())
    return f"{text} with the label(s) {labels}" if labels else text


def has_labels(node: Mapping[str, Any], wanted: Mapping[str, str]) -> bool:
    """Tell whether a node's labels are as wanted, by Ray's rules.

    Source: https://docs.ray.io/en/latest/ray-core/scheduling/labels.html: `a`, `!a`, `in(a,b)`,
    `!in(a,b)`; a label that is not there is not `a`.
    """
    labels: Mapping[str, str] = node.get("Labels") or {}
    for key, rule in wanted.items():
        is_negative = rule.startswith("!")
        values = rule.removeprefix("!")
        if values.startswith("in(") and values.endswith(")"):
            accepted = {value.strip() for value in values[3:-1].split(",")}
        else:
            accepted = {values}
        if (labels.get(key) in accepted) is is_negative:
            return False
    return True


def host_name(node: Mapping[str, Any]) -> str:
    """Return a node's host as users know it, with the address: host names may be alike."""
    name, address = node["NodeManagerHostname"], node["NodeName"]
    return name if name == address else f"{name} ({address})"


def may_hold_workers(node: Mapping[str, Any], config: ClusterConfig) -> bool:
    """Tell whether a node has a CPU, and the labels and accelerator that workers are to have."""
    accelerator, resources = config.accelerator_type, node["Resources"]
    has_type = accelerator is None or f"{_ACCELERATOR}{accelerator}" in resources
    return has_type and resources.get("CPU", 0) >= 1 and has_labels(node, config.node_labels)


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
    wanted = plan.config.cluster.node_labels
    nodes = {name: node for name, node in nodes.items() if has_labels(node, wanted)}
    counts = Counter(node for node in held if node in nodes)
    for node in nodes:
        counts[node] += _times(free.get(node, {}), bundle)
    if placement is Placement.STRICT_SPREAD:
        counts = Counter({node: min(1, count) for node, count in counts.items()})
    hosts: Counter[str] = Counter()
    for node, count in counts.items():
        hosts[host_name(nodes[node])] += count
    return Room(hosts, asked_words(plan), is_one_host=placement is Placement.STRICT_PACK)


def wanted_labels(plan: RunPlan, avoided: Collection[str]) -> list[dict[str, str]]:
    """Return what a placement group's bundles ask of a node's labels.

    Args:
        plan: says what is wanted.
        avoided: ids of nodes that shall get no worker.
    """
    wanted = dict(plan.config.cluster.node_labels)
    if avoided:
        wanted[_NODE_ID_LABEL] = f"!in({','.join(sorted(avoided))})"
    return [wanted for _ in range(plan.num_workers)]


def why_impossible(plan: RunPlan) -> str:
    """Return why the nodes that are there can never hold the workers; empty if they can."""
    wanted, placement = plan.config.cluster.node_labels, plan.config.cluster.placement
    nodes = living_nodes()
    all_free = {name: node["Resources"] for name, node in nodes.items()}
    room = count_room(plan, placement, nodes, all_free)
    if room.fits() >= plan.num_workers:
        return ""
    have = "; ".join(
        words(node["Resources"])
        + ("" if has_labels(node, wanted) else f" with the labels {_labels_of(node)}")
        for node in nodes.values()
    )
    return (
        f"{plan.num_workers} worker(s) of {asked_words(plan)} each do not fit the cluster with "
        f"cluster.placement={placement.value}, which has {len(nodes)} node(s): {have}"
    )


def _labels_of(node: Mapping[str, Any]) -> str:
    own = {k: v for k, v in (node.get("Labels") or {}).items() if not k.startswith("ray.io/")}
    return ", ".join(f"{key}={value}" for key, value in sorted(own.items())) or "none"


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
