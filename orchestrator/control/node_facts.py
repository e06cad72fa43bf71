"""What can be told of a node by looking at it, from any process that runs there. No Ray."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from orchestrator.control.addresses import interface_addresses
from orchestrator.control.agent import Agent
from orchestrator.spec.environment import inspect_node
from orchestrator.spec.host import local_host
from orchestrator.spec.memory import MemoryLimit, memory_limit

_NVIDIA_TIMEOUT_S = 5.0
_NVIDIA_QUERY = "index,name,memory.total,memory.used,utilization.gpu"
_MIB = 2**20
_MOST_LISTENING = 64


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as its driver tells of it; `busy_fraction` is its utilisation."""

    index: int
    name: str
    total_bytes: int
    used_bytes: int
    busy_fraction: float


@dataclass(frozen=True, slots=True)
class Port:
    """A TCP port that is in use: a process listens on it, or a connection is still closing."""

    number: int
    process: str
    is_closing: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """What a node is.

    Attributes:
        host: its host name.
        ip: the address that the others are told.
        interface: the one that has this address; empty if none has.
        addresses: all its addresses, by interface.
        resolves_to: the address that its own host name resolves to; empty if it does not.
        node_id: Ray's name of it; empty without Ray.
        versions: of Python and of the packages that compute, and a digest of the project's code;
            `tensorflow-cpu` stands there only beside `tensorflow`.
        is_cpu_build: whether the TensorFlow here is the one without GPUs.
        ray_gpus: GPUs that Ray was told of.
        gpus: those that are there.
        num_cpus: cores that a process may use the time of.
        memory: how much a process may hold.
        free_memory_bytes: how much of it nobody holds.
        free_disk_bytes: on the disk of the run folder.
        shm_bytes: the size of /dev/shm; 0 if there is none.
        max_files: how many files a process may open.
        taken_ports: those of `cluster.port_range` that a worker would not get.
        listening: ports that are open beyond loopback, not more than a neighbour tries.
        num_untried: how many more are.
        environment: variables that change what its workers do, as they stand there.
        auth_mode: of the Ray that runs here; empty if none was set.
        told_at: Unix time when all this was seen.
    """

    host: str
    ip: str
    interface: str
    addresses: dict[str, str]
    resolves_to: str
    node_id: str = ""
    versions: dict[str, str]
    is_cpu_build: bool
    ray_gpus: int = 0
    gpus: tuple[Gpu, ...] = ()
    num_cpus: int
    memory: MemoryLimit | None
    free_memory_bytes: int
    free_disk_bytes: int
    shm_bytes: int
    max_files: int
    taken_ports: tuple[Port, ...] = ()
    listening: tuple[Port, ...] = ()
    num_untried: int = 0
    environment: tuple[str, ...] = ()
    auth_mode: str = ""
    told_at: float

    @property
    def where(self) -> str:
        """The node as users know it, with its address: host names may be alike."""
        return f"{self.host} ({self.ip})"


def look(
    folder: Path,
    ports: tuple[int, int] | None,
    *,
    ip: str,
    chosen: str | None = None,
    node_id: str = "",
    ray_gpus: int = 0,
) -> NodeFacts:
    """Look at the node that this process runs on.

    Args:
        folder: the run folder; it need not exist.
        ports: first and last of `cluster.port_range`, or None where no ports are needed.
        ip: the address that Ray knows it by.
        chosen: `cluster.interface`, whose address is told instead where there is one.
        node_id: Ray's name of the node.
        ray_gpus: GPUs that Ray was told of.
    """
    told = Agent.describe_here(with_project=True)
    addresses = interface_addresses()
    if chosen is not None:
        ip = addresses.get(chosen, ip)
    listening = _listening()
    beyond_loopback = tuple(Port(*p) for p in sorted(_beyond_loopback(listening).items()))
    return NodeFacts(
        host=told["host"],
        ip=ip,
        interface=next((name for name, address in addresses.items() if address == ip), ""),
        addresses=addresses,
        resolves_to=_resolved(told["host"]),
        node_id=node_id,
        versions={"Python": told["python"], **told["packages"], "project": told["project"]},
        is_cpu_build=_is_installed("tensorflow-cpu"),
        ray_gpus=ray_gpus,
        gpus=gpus(),
        num_cpus=local_host().num_cpus,
        memory=memory_limit(),
        free_memory_bytes=psutil.virtual_memory().available,
        free_disk_bytes=_free_disk(folder),
        shm_bytes=shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0,
        max_files=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        taken_ports=() if ports is None else taken_ports(*ports, listening=listening),
        listening=beyond_loopback[:_MOST_LISTENING],
        num_untried=max(0, len(beyond_loopback) - _MOST_LISTENING),
        environment=tuple(inspect_node(os.environ)),
        auth_mode=told["auth_mode"],
        told_at=time.time(),
    )


def gpus() -> tuple[Gpu, ...]:
    """Return the GPUs of this host as NVIDIA's own tool tells of them; none without the tool."""
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={_NVIDIA_QUERY}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=_NVIDIA_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    return parse_gpus(done.stdout)


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """Return the GPUs in what nvidia-smi prints; what it cannot tell, `[N/A]`, counts as 0."""
    found = []
    for line in text.strip().splitlines():
        index, name, *rest = (part.strip() for part in line.split(","))
        total, used, busy = (float(part) if part[:1].isdigit() else 0.0 for part in rest)
        found.append(Gpu(int(index), name, int(total * _MIB), int(used * _MIB), busy / 100))
    return tuple(found)


def taken_ports(
    first: int, last: int, listening: dict[tuple[str, int], str] | None = None
) -> tuple[Port, ...]:
    """Return the ports of a range that cannot be bound, each with the process that has it."""
    who = {number: name for (_, number), name in (listening or _listening()).items()}
    taken = []
    for number in range(first, last + 1):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            try:
                probe.bind(("", number))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    taken.append(Port(number, f"nobody, but {os.strerror(error.errno or 0)}"))
                elif number in who:
                    taken.append(Port(number, who[number]))
                else:
                    taken.append(Port(number, "a connection that closes", is_closing=True))
    return tuple(taken)


def _listening() -> dict[tuple[str, int], str]:
    """Return who listens at each address and port, as far as this user may know."""
    found: dict[tuple[str, int], str] = {}
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN:
                address = (connection.laddr.ip, connection.laddr.port)
                found[address] = _process(connection.pid)
    return found


def _beyond_loopback(listening: dict[tuple[str, int], str]) -> dict[int, str]:
    """Return the ports that are open at an address of the network, once each."""
    return {
        number: process
        for (address, number), process in listening.items()
        if not address.startswith("127.") and address != "::1"
    }


def _process(pid: int | None) -> str:
    """Return a process in words."""
    if pid is None:
        return "a process of another user"
    try:
        name = psutil.Process(pid).name()
    except psutil.Error:
        name = "process"
    return f"{name} (pid {pid})"


def _resolved(host: str) -> str:
    try:
        found: Any = socket.getaddrinfo(host, None, proto=socket.IPPROTO_TCP)
    except OSError:
        return ""
    addresses = [entry[4][0] for entry in found]
    fourth = [address for address in addresses if "." in address]
    return str((fourth or addresses or [""])[0])


def _free_disk(folder: Path) -> int:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True
