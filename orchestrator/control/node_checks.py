"""What is judged of nodes that are to train together: the same everywhere, and within reach."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

from orchestrator.control.addresses import missing_interface
from orchestrator.control.links import Link
from orchestrator.control.preflight import Finding
from orchestrator.control.survey import Judge, Survey
from orchestrator.errors import ClusterError, StorageError
from orchestrator.spec.schema import StrategyName

# Records carry the time of the host they were made on: with more, their order is a wrong one.
CLOCK_TOLERANCE_S = 2.0
_SLOW_BYTES_PER_S = 50e6
_SLOW_ROUND_TRIP_S = 0.005
_SHOWN_PORTS = 6
_DASHBOARD_PORT = 8265


def versions(survey: Survey) -> Iterator[str | Finding]:
    """Compare Python, the packages that compute and the project's code with the driver's."""
    own = survey.own.versions
    yield ", ".join(f"{name} {version}" for name, version in own.items())
    for node in survey.nodes:
        if "tensorflow-cpu" in node.versions:
            yield Finding(
                f"{node.where} has both tensorflow and tensorflow-cpu installed",
                "the files of one lie over those of the other; it may train on the CPU",
                "make setup there, in a new environment",
            )
        different = [
            f"{name} {node.versions.get(name, 'is missing')}, here {own.get(name, 'is missing')}"
            for name in sorted(own | node.versions)
            if node.versions.get(name) != own.get(name)
        ]
        if different:
            only_project = all(line.startswith("project ") for line in different)
            yield Finding(
                f"{node.where}: {'; '.join(different)}",
                "workers and driver would speak, or compute, differently",
                "bring the same checkout there"
                if only_project
                else "install the same Python and requirements/*.lock on every node",
                ClusterError,
            )


def clocks(survey: Survey) -> Iterator[str | Finding]:
    """Compare the nodes' clocks with the driver's, as far as the way of the answer lets one."""
    if survey.is_local:
        yield "one clock"
    largest = 0.0
    for node, clock in zip(survey.nodes, survey.clocks, strict=False):
        # Unless it is outside of the time between question and answer nothing is known of it.
        ahead_s = max(clock.told - clock.answered, 0.0) - max(clock.asked - clock.told, 0.0)
        largest = max(largest, abs(ahead_s))
        if abs(ahead_s) > CLOCK_TOLERANCE_S:
            yield Finding(
                f"the clock of {node.where} is {abs(ahead_s):.1f} s "
                f"{'ahead of' if ahead_s > 0 else 'behind'} the driver's",
                "times in the record and in MLflow will not fit together",
                "run an NTP service on every node",
            )
    if survey.clocks:
        yield f"within {max(largest, 0.1):.1f} s of the driver's"


def variables(survey: Survey) -> Iterator[str | Finding]:
    """Tell what nodes have in their environment; the driver's own is told with the rest of it."""
    if survey.is_local:
        return
    for node in survey.nodes:
        if not node.environment:
            continue
        is_proxy = any("proxy=" in text.lower() for text in node.environment)
        yield Finding(
            f"{node.where}: {', '.join(node.environment)}",
            "its workers inherit it, and those of other nodes may not"
            + ("; gRPC between nodes would go through a proxy" if is_proxy else ""),
            "unset it there, and start Ray again, unless it is meant"
            + ("; no_proxy there must name the nodes" if is_proxy else ""),
        )


def addresses(survey: Survey) -> Iterator[str | Finding]:
    """Tell which address and interface each node is known by, and refuse loopback."""
    if survey.is_local:
        yield "loopback: all workers are on this host"
        return
    for node in survey.nodes:
        others = [f"{name} {ip}" for name, ip in node.addresses.items() if name != node.interface]
        others = [text for text in others if not text.startswith("lo ")]
        also = f", also has {', '.join(others)}" if others else ""
        yield f"{node.where} by {node.interface or 'no interface of its own'}{also}"
        chosen = survey.plan.config.cluster.interface
        if chosen is not None and chosen not in node.addresses:
            yield Finding(
                missing_interface(node.host, chosen, node.addresses),
                "its workers would have no address to be reached at",
                "name an interface that all nodes have, or leave cluster.interface out: then it is "
                "the one that Ray was started with",
                ClusterError,
            )
        if len(survey.nodes) > 1 and ipaddress.ip_address(node.ip).is_loopback:
            name = f"; its name resolves to {node.resolves_to}" if node.resolves_to else ""
            yield Finding(
                f"{node.host} is known to Ray as {node.ip}{name}",
                "no other node reaches it there",
                "start Ray there with `ray start --node-ip-address=ADDRESS`, an address of "
                f"{', '.join(others) or 'an interface that others reach'}",
                ClusterError,
            )
        elif node.resolves_to.startswith("127.") and len(survey.nodes) > 1:
            yield (
                f"the name {node.host} resolves to {node.resolves_to} there, which is not used: "
                f"workers are told {node.ip}"
            )


def shared_folder(survey: Survey) -> Iterator[str | Finding]:
    """Refuse a run folder that is not one and the same on all nodes."""
    root = survey.plan.paths.root.parents[1]
    if survey.is_local:
        yield "one host"
    for observer, unseen in survey.unseen.items():
        if unseen:
            yield Finding(
                f"{observer} does not see in {root} what {' and '.join(unseen)} wrote there",
                "checkpoints and logs of one node must be read by all",
                "set runs_dir to the absolute path of a folder that all nodes share, such as NFS",
                StorageError,
            )
    if survey.unseen and not any(survey.unseen.values()):
        yield f"{root}: what each of {len(survey.unseen)} writes, all others read"


def ports(survey: Survey) -> Iterator[str | Finding]:
    """Look for enough free ports for TensorFlow's own servers."""
    config = survey.plan.config
    if config.strategy.name is not StrategyName.multi_worker:
        yield "none needed"
        return
    span = config.cluster.port_range
    first, last = map(int, span.split("-"))
    for node in survey.nodes:
        free = last - first + 1 - len(node.taken_ports)
        shown = ", ".join(f"{p.number} by {p.process}" for p in node.taken_ports[:_SHOWN_PORTS])
        more = len(node.taken_ports) - _SHOWN_PORTS
        shown += f" and {more} more" if more > 0 else ""
        needed = survey.workers_on(node)
        if free < needed:
            yield Finding(
                f"{node.where} has {free} free ports in cluster.port_range={span}, taken are "
                f"{shown}",
                f"its {needed} worker(s) need one each",
                "set cluster.port_range to a range in which nothing listens",
                ClusterError,
            )
        elif not all(port.is_closing for port in node.taken_ports):
            yield Finding(
                f"{node.where}: of cluster.port_range={span} are taken {shown}",
                f"{free} are left, workers pass over the others",
            )
    yield f"{span} on {len(survey.nodes)} node(s)"


def links(survey: Survey) -> Iterator[str | Finding]:
    """Judge whether all nodes reach each other, and how fast."""
    if len(survey.nodes) < 2:
        yield "one node"
        return
    is_needed = survey.plan.num_workers > 1
    for link in survey.links:
        if link.error:
            source, target = survey.nodes[link.source], survey.nodes[link.target]
            yield Finding(
                f"{source.where} does not reach {target.where} in cluster.port_range="
                f"{survey.plan.config.cluster.port_range}: {link.error}",
                "workers meet through these ports",
                "open them between the nodes, or name another address with "
                "`ray start --node-ip-address=ADDRESS`",
                ClusterError if is_needed else None,
            )
    good = [link for link in survey.links if not link.error]
    if not good:
        return
    slowest = min(good, key=lambda link: link.bytes_per_s)
    farthest = max(good, key=lambda link: link.round_trip_s)
    total = len(survey.nodes) * (len(survey.nodes) - 1)
    some = "" if len(survey.links) == total else f" ({len(survey.links)} of {total} pairs)"
    yield (
        f"round trip at most {farthest.round_trip_s * 1e3:.2f} ms ({_way(survey, farthest)}), at "
        f"least {slowest.bytes_per_s / 1e6:,.0f} MB/s ({_way(survey, slowest)}){some}"
    )
    yield from _slow(survey, slowest, farthest)


def _slow(survey: Survey, slowest: Link, farthest: Link) -> Iterator[str | Finding]:
    num_workers, footprint = survey.plan.num_workers, survey.footprint
    cost = "every step waits for the slowest way between two workers"
    if footprint is not None and num_workers > 1:
        # A ring sends 2 (W-1)/W of the gradients over each way.
        volume = 2 * (num_workers - 1) / num_workers * footprint.gradient_bytes
        seconds = volume / slowest.bytes_per_s
        cost = f"the gradients of a step take about {seconds:.2g} s there"
        yield cost
    if num_workers > 1 and slowest.bytes_per_s < _SLOW_BYTES_PER_S:
        yield Finding(
            f"{_way(survey, slowest)} carries {slowest.bytes_per_s / 1e6:,.1f} MB/s",
            cost,
            "look at the interface that Ray was given (ray start --node-ip-address)",
        )
    if num_workers > 1 and farthest.round_trip_s > _SLOW_ROUND_TRIP_S:
        yield Finding(
            f"{_way(survey, farthest)} takes {farthest.round_trip_s * 1e3:.1f} ms for a round trip",
            "every step waits for a few of them",
            "use nodes of one place",
        )


def open_to_others(survey: Survey) -> Iterator[str | Finding]:
    """Tell what a node offers to others on its network, as another node found it."""
    for node, (observer, found) in survey.exposed.items():
        shown = ", ".join(f"{port.number} ({port.process})" for port in found)
        yield (
            f"{survey.nodes[observer].host} reaches on {survey.nodes[node].where}: "
            f"{shown or 'nothing'}"
        )
        if untried := survey.nodes[node].num_untried:
            yield f"{untried} more ports are open on {survey.nodes[node].where} and were not tried"
    config = survey.plan.config
    if not survey.is_local:
        return
    if config.strategy.name is not StrategyName.multi_worker:
        yield "nothing beyond loopback"
        return
    yield (
        f"TensorFlow's ports ({config.cluster.port_range}) while it trains: they cannot be bound "
        "to loopback, see docs/cluster.md"
    )


def authentication(survey: Survey) -> Iterator[str | Finding]:
    """Refuse a cluster that lets anybody in, unless that is said to be meant."""
    if survey.is_local:
        yield "a token of its own for the run's Ray"
        return
    open_nodes = [node for node in survey.nodes if node.auth_mode != "token"]
    if not open_nodes:
        yield "Ray asks for a token on every node"
        return
    dashboards = [n.host for n in open_nodes if _DASHBOARD_PORT in {p.number for p in n.listening}]
    also = f", and its dashboard is open on {', '.join(dashboards)}" if dashboards else ""
    yield Finding(
        f"Ray on {', '.join(node.where for node in open_nodes)} asks for no token{also}",
        "whoever reaches its ports runs code on every node",
        "start it there with RAY_AUTH_MODE=token and the token's file in RAY_AUTH_TOKEN_PATH, or "
        "say cluster.allow_unauthenticated=true",
        None if survey.plan.config.cluster.allow_unauthenticated else ClusterError,
    )


def _way(survey: Survey, link: Link) -> str:
    return f"{survey.nodes[link.source].host} to {survey.nodes[link.target].host}"


NODE_CHECKS: list[tuple[str, Judge]] = [
    ("versions", versions),
    ("node variables", variables),
    ("clocks", clocks),
    ("addresses", addresses),
    ("shared folder", shared_folder),
    ("ports", ports),
    ("links", links),
    ("open ports", open_to_others),
    ("authentication", authentication),
]
