"""Hosts with two networks: the workers take the one that is chosen."""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.chaos.netns import do
from orchestrator.spec.paths import RunPaths
from tests.cluster import rig
from tests.faults.host_rig import long_training
from tests.hosts import Hosts, hosts_or_skip

pytestmark = pytest.mark.thorough

FAST = "10.99.0."
ESTABLISHED = "01"


@pytest.fixture(autouse=True)
def leftovers() -> None:
    """`Hosts.close` leaves nothing behind."""


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """Two hosts with a second cable between them, `fast0`."""
    with hosts_or_skip(2) as made:
        left, right = (made.namespace(host) for host in range(2))
        do(*f"ip -n {left} link add fast0 type veth peer fast0 netns {right}".split())
        for number, name in enumerate((left, right), 1):
            do(*f"ip -n {name} addr add {FAST}{number}/24 dev fast0".split())
            do(*f"ip -n {name} link set fast0 up".split())
        yield made


def connections(pid: int) -> set[str]:
    """Return the own addresses of a process's connections, but loopback."""
    names = [entry.readlink().name for entry in Path(f"/proc/{pid}/fd").iterdir()]
    inodes = {name.removeprefix("socket:[").rstrip("]") for name in names}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == ESTABLISHED and words[9] in inodes:
                last = words[1].partition(":")[0][-8:]
                found.add(socket.inet_ntoa(struct.pack("<I", int(last, 16))))
    return {ip for ip in found if not ipaddress.ip_address(ip).is_loopback}


def pids(hosts: Hosts, run: RunPaths) -> list[int]:
    """Return the workers' process numbers: the namespaces are not of processes."""
    return [record["pid"] for record in rig.records(run, "Ready")]


def test_workers_talk_by_the_chosen_network(hosts: Hosts, tmp_path: Path) -> None:
    with long_training(hosts, tmp_path, "cluster.interface=fast0") as training:
        training.await_steps()
        found = [connections(pid) for pid in pids(hosts, training.run)]
    assert found == [{f"{FAST}1"}, {f"{FAST}2"}] or found == [{f"{FAST}2"}, {f"{FAST}1"}]


def test_without_a_choice_they_take_the_one_that_ray_was_started_with(
    hosts: Hosts, tmp_path: Path
) -> None:
    with long_training(hosts, tmp_path) as training:
        training.await_steps()
        found = [connections(pid) for pid in pids(hosts, training.run)]
    assert sorted(ip for each in found for ip in each) == [Hosts.ip(0), Hosts.ip(1)]


def test_a_network_that_a_host_lacks_is_refused_with_those_it_has(
    hosts: Hosts, tmp_path: Path
) -> None:
    process = hosts.train(*rig.JOB, "cluster.interface=ib0", "strategy.num_workers=2", cwd=tmp_path)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 6, out
    said = " ".join(out.split())
    assert "cluster.interface=ib0: host-" in said
    # Which of the two gets the first worker, and is named, Ray decides.
    assert any(f"eth0 {Hosts.ip(host)}" in said for host in range(2))
