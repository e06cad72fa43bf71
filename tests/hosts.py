"""Hosts on one machine: Ray nodes in network namespaces, with cables that can be cut.

Each host has its own address, host name, `/dev/shm` and temporary folder, and sees the file system
of this machine otherwise, as if it were shared. Host 0 is Ray's head; drivers run there.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cluster.rig import ROOT, wait_for

_GCS_PORT = 6379
# 4 s from a cut cable to Ray's own notice; the same on every node, as docs/cluster.md says.
HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
_RAY = {
    "RAY_AUTH_MODE": "token",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # A raylet dials its object store before that listens: it need not wait 1 s to try again.
    "RAY_raylet_client_connect_timeout_milliseconds": "20",
    "RAY_raylet_client_num_connect_attempts": "500",
    # A process for a job that needs another environment anyway.
    "RAY_prestart_worker_first_driver": "0",
}
_count = itertools.count()


def why_not_here() -> str:
    """Return why this machine cannot have hosts; empty if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "nsenter", "unshare", "mount") if not shutil.which(tool)]
    if missing:
        return f"{', '.join(missing)} is not installed (iproute2, util-linux)"
    name = f"hosts-{os.getpid()}-probe"
    made = _try("ip", "netns", "add", name)
    if made.returncode:
        return f"network namespaces are not permitted: {made.stderr.strip()}"
    try:
        probes = (
            f"ip -n {name} link add switch type bridge",
            f"ip -n {name} link add left type veth peer name right",
            f"ip netns exec {name} unshare --mount --uts mount -t tmpfs tmpfs /dev/shm",
        )
        for probe in probes:
            if (tried := _try(*probe.split())).returncode:
                return f"`{probe}` is not permitted: {tried.stderr.strip()}"
    finally:
        _do("ip", "netns", "del", name)
    return ""


class Hosts:
    """Some hosts on one switch, each with a Ray node; a context manager that leaves nothing."""

    def __init__(
        self,
        num_hosts: int,
        *,
        num_cpus: int = 1,
        ray_env: Mapping[str, str] = HEALTH_CHECKS,
        dashboard: bool = False,
    ):
        """Make the hosts and start Ray on them.

        Args:
            num_hosts: how many.
            num_cpus: what each node offers to Ray.
            ray_env: variables of every node's Ray.
            dashboard: whether the head takes jobs, on all its addresses.
        """
        self._prefix = f"hosts-{os.getpid()}-{next(_count)}"
        self._num_cpus = num_cpus
        self._has_dashboard = dashboard
        self._switch = f"{self._prefix}-switch"
        self._holders: list[subprocess.Popen[bytes]] = []
        self.folder = Path(tempfile.mkdtemp(prefix="hosts-"))
        self.folder.chmod(0o755)
        (self.folder / "tmp").mkdir()
        token = self.folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        self.env = {**_RAY, **ray_env, "RAY_AUTH_TOKEN_PATH": str(token)}
        self.env |= {"TMPDIR": str(self.folder / "tmp")}
        try:
            _do("ip", "netns", "add", self._switch)
            self._in_switch("link", "add", "switch", "type", "bridge")
            self._in_switch("link", "set", "switch", "up")
            for _ in range(num_hosts):
                self._plug_in()
            with ThreadPoolExecutor(num_hosts) as pool:
                list(pool.map(self.start, range(num_hosts)))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def address(self) -> str:
        """The address of Ray's head, for `cluster.address`."""
        return f"{self.ip(0)}:{_GCS_PORT}"

    @property
    def dashboard(self) -> str:
        """Where the head takes jobs."""
        return f"http://{self.ip(0)}:8265"

    @staticmethod
    def ip(host: int) -> str:
        """Return a host's address."""
        return f"10.90.0.{host + 1}"

    @staticmethod
    def index(name: str) -> int:
        """Return which host has a host name."""
        return int(name.removeprefix("host-"))

    def add(self) -> int:
        """Add a host with a Ray node; return its index."""
        self._plug_in()
        self.start(len(self._holders) - 1)
        return len(self._holders) - 1

    def start(self, host: int) -> None:
        """Start Ray on a host that has lost it; a process with TensorFlow imported is kept."""
        self._kill([pid for pid in self.pids(host) if not _is_zygote(pid)])
        role = [f"--address={self.address}"]
        if host:
            wait_for(self._has_head, "the head's port")
        else:
            role = ["--head", f"--port={_GCS_PORT}", f"--include-dashboard={self._has_dashboard}"]
            role += ["--dashboard-host=0.0.0.0"] if self._has_dashboard else []
            role += [f"--temp-dir={self.folder / 'tmp' / 'ray'}"]
        command = [
            *(str(Path(sys.executable).with_name("ray")), "start", *role),
            *(f"--node-ip-address={self.ip(host)}", f"--num-cpus={self._num_cpus}"),
            *("--object-store-memory=80000000", "--include-log-monitor=false"),
            "--disable-usage-stats",
        ]
        log = self.folder / f"ray-start-{host}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                self._entered(host, command, self.folder),
                env={**os.environ, **self.env},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            assert process.wait(60) == 0, log.read_text()

    def popen(
        self, host: int, command: Sequence[str], cwd: Path, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start a command on a host; its standard error comes with its output."""
        entered = self._entered(host, command, cwd)
        return subprocess.Popen(
            entered,
            env={**os.environ, "PYTHONPATH": str(ROOT), **self.env, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def train(self, *arguments: str, cwd: Path) -> subprocess.Popen[str]:
        """Start a training on the head, with workers on different hosts."""
        command = [
            *(sys.executable, "-m", "orchestrator", "train", "cluster=existing"),
            *(f"cluster.address={self.address}", "cluster.trusted_network=true"),
            *("cluster.placement=STRICT_SPREAD", "strategy=multi_worker", *arguments),
        ]
        return self.popen(0, command, cwd)

    def cut(self, host: int) -> None:
        """Cut a host's cable: nothing arrives any more, and nobody is told."""
        self._in_switch("link", "set", f"port{host}", "down")

    def heal(self, host: int) -> None:
        """Plug a host's cable in again."""
        self._in_switch("link", "set", f"port{host}", "up")

    def freeze(self, host: int, *, everything: bool = False) -> None:
        """Stop a host's raylet, or everything on it."""
        self._signal(self.pids(host) if everything else self.raylet(host), signal.SIGSTOP)

    def thaw(self, host: int) -> None:
        """Let what was stopped go on."""
        self._signal(self.pids(host), signal.SIGCONT)

    def kill(self, host: int, *, everything: bool = True) -> None:
        """Kill everything on a host, or its raylet alone."""
        if everything:
            self._kill(self.pids(host))
        else:
            self._signal(self.raylet(host), signal.SIGKILL)

    def pids(self, host: int) -> list[int]:
        """Return the processes on a host."""
        found = _do("ip", "netns", "pids", self._name(host)).split()
        return [int(pid) for pid in found if int(pid) != self._holders[host].pid]

    def drain(self, host: int, seconds: int) -> None:
        """Tell Ray that a host goes in so many seconds."""
        script = (
            "import ray, sys; from ray.core.generated import autoscaler_pb2 as pb; import time; "
            "gcs = ray._raylet.GcsClient(address=sys.argv[1]); "
            "ids = [n.node_id.hex() for n in gcs.get_all_node_info().values() "
            "       if n.node_manager_address == sys.argv[2] and n.state == 0]; "
            "print(gcs.drain_node(ids[0], pb.DRAIN_NODE_REASON_PREEMPTION, 'a test', "
            "      int((time.time() + float(sys.argv[3])) * 1000)))"
        )
        command = [sys.executable, "-c", script, self.address, self.ip(host), str(seconds)]
        process = self.popen(0, command, self.folder)
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 0 and "True" in said, said

    def raylet(self, host: int) -> list[int]:
        """Return the process of a host's raylet."""
        return [pid for pid in self.pids(host) if _name_of(pid) == "raylet"]

    def close(self) -> None:
        """Remove hosts, links, processes and folders."""
        for host, holder in enumerate(self._holders):
            self._kill(self.pids(host))
            holder.kill()
            holder.wait()
            _do("ip", "netns", "del", self._name(host))
        self._holders = []
        _try("ip", "netns", "del", self._switch)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _has_head(self) -> bool:
        """Tell whether anything listens on the head's port: state 0A in its tables of sockets."""
        net = Path(f"/proc/{self._holders[0].pid}/net")
        tables = [(net / name).read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
        rows = (line.split() for table in tables for line in table)
        return any(row[1].endswith(f":{_GCS_PORT:04X}") and row[3] == "0A" for row in rows)

    def _name(self, host: int) -> str:
        return f"{self._prefix}-{host}"

    def _plug_in(self) -> None:
        """Make a host: a namespace with one cable to the switch, held by a process that sleeps."""
        host, name = len(self._holders), self._name(len(self._holders))
        _do("ip", "netns", "add", name)
        # The temporary folder has one path on all hosts, and each has its own.
        script = (
            f"mount -t tmpfs -o size=128m tmpfs /dev/shm && mount -t tmpfs tmpfs {self.folder}/tmp"
            f" && hostname host-{host} && echo made && exec sleep infinity"
        )
        holder = subprocess.Popen(
            ["ip", "netns", "exec", name, "unshare", "--mount", "--uts", "sh", "-c", script],
            stdout=subprocess.PIPE,
        )
        self._holders.append(holder)
        assert holder.stdout is not None and holder.stdout.readline() == b"made\n"
        port = f"port{host}"
        self._in_switch("link", "add", port, "type", "veth", "peer", "eth0", "netns", name)
        self._in_switch("link", "set", port, "master", "switch", "up")
        for words in (
            ("link", "set", "lo", "up"),
            ("link", "set", "eth0", "up"),
            ("addr", "add", f"{self.ip(host)}/24", "dev", "eth0"),
        ):
            _do("ip", "-n", name, *words)

    def _in_switch(self, *words: str) -> None:
        _do("ip", "-n", self._switch, *words)

    def _entered(self, host: int, command: Sequence[str], cwd: Path) -> list[str]:
        target = str(self._holders[host].pid)
        # Entering a mount namespace forgets the current folder.
        enter = ["nsenter", "--target", target, "--net", "--mount", "--uts", "env", "-C", str(cwd)]
        return [*enter, *command]

    def _kill(self, pids: list[int]) -> None:
        self._signal(pids, signal.SIGKILL)
        wait_for(lambda: not any(map(_name_of, pids)), "killed processes to be gone")

    @staticmethod
    def _signal(pids: list[int], number: int) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


@contextlib.contextmanager
def hosts_or_skip(num_hosts: int, *, num_cpus: int = 1) -> Iterator[Hosts]:
    """Give hosts to a fixture; skip its tests where this machine cannot have any."""
    if reason := why_not_here():
        pytest.skip(reason)
    with Hosts(num_hosts, num_cpus=num_cpus) as hosts:
        yield hosts


def _name_of(pid: int) -> str:
    """Return a process's name; empty if it is gone or a zombie."""
    try:
        before, _, after = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
    except OSError:
        return ""
    return "" if after.split()[0] in "ZX" else before.partition("(")[2]


def _is_zygote(pid: int) -> bool:
    try:
        return b"orchestrator.train.zygote" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _do(*command: str) -> str:
    done = _try(*command)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


def _try(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)
