"""Hosts on one machine: Ray nodes in network namespaces, with cables that can be cut.

Each host has its own address, host name, `/dev/shm` and temporary folder, and sees the file system
of this machine otherwise, as if it were shared. Host 0 is Ray's head; drivers run there. It needs
root, iproute2 and util-linux.
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
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from orchestrator.chaos.netns import NAME, do, sweep, tried
from orchestrator.errors import ClusterError

_GCS_PORT = 6379
_PATIENCE_S = 60.0
_POLL_S = 0.05
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

        Raises:
            ClusterError: the machine does not permit it, or Ray does not start.
        """
        sweep()
        self._prefix = f"{NAME}-{os.getpid()}-{next(_count)}"
        self._num_cpus = num_cpus
        self._has_dashboard = dashboard
        self._switch = f"{self._prefix}-switch"
        self._holders: list[subprocess.Popen[bytes]] = []
        self.folder = Path(
            tempfile.mkdtemp(prefix="hosts-", dir="/tmp")
        )  # short: sockets lie below
        self.folder.chmod(0o755)
        (self.folder / "tmp").mkdir()
        token = self.folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        self.env = {**_RAY, **ray_env, "RAY_AUTH_TOKEN_PATH": str(token)}
        self.env |= {"TMPDIR": str(self.folder / "tmp")}
        try:
            do("ip", "netns", "add", self._switch)
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

    @property
    def arguments(self) -> tuple[str, ...]:
        """What the train command needs to have each worker on another host."""
        return (
            "cluster=existing",
            f"cluster.address={self.address}",
            "cluster.trusted_network=true",
            "cluster.placement=STRICT_SPREAD",
        )

    @staticmethod
    def ip(host: int) -> str:
        """Return a host's address."""
        return f"10.90.0.{host + 1}"

    @staticmethod
    def index(name: str) -> int:
        """Return which host has a host name."""
        return int(name.removeprefix("host-"))

    def start(self, host: int) -> None:
        """Start Ray on a host that has lost it; a process with TensorFlow imported is kept."""
        self._kill([pid for pid in self.pids(host) if not _is_zygote(pid)])
        role = [f"--address={self.address}"]
        if host:
            _until(self._has_head, "Ray's head to listen")
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
                self.entered(host, command, self.folder),
                env={**os.environ, **self.env},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            if process.wait(_PATIENCE_S) != 0:
                raise ClusterError(f"Ray did not start on host {host}:\n{log.read_text()}")

    def entered(self, host: int, command: Sequence[str], cwd: Path) -> list[str]:
        """Return a command that runs another one on a host, as the same process.

        Args:
            host: which one.
            command: what to run there, with `env` and TMPDIR in its environment.
            cwd: its current folder.
        """
        target = str(self._holders[host].pid)
        # Entering a mount namespace forgets the current folder.
        enter = ["nsenter", "--target", target, "--net", "--mount", "--uts", "env", "-C", str(cwd)]
        return [*enter, *command]

    def cut(self, host: int) -> None:
        """Cut a host's cable: nothing arrives any more, and nobody is told."""
        self._in_switch("link", "set", f"port{host}", "down")

    def heal(self, host: int) -> None:
        """Plug a host's cable in again."""
        self._in_switch("link", "set", f"port{host}", "up")

    def kill(self, host: int) -> None:
        """Kill everything on a host."""
        self._kill(self.pids(host))

    @staticmethod
    def signal(pids: Sequence[int], number: int) -> None:
        """Send a signal to processes; those that are gone do not matter."""
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def pids(self, host: int) -> list[int]:
        """Return the processes on a host."""
        found = do("ip", "netns", "pids", self._name(host)).split()
        return [int(pid) for pid in found if int(pid) != self._holders[host].pid]

    def raylet(self, host: int) -> list[int]:
        """Return the process of a host's raylet."""
        return [pid for pid in self.pids(host) if _name_of(pid) == "raylet"]

    def close(self) -> None:
        """Remove hosts, links, processes and folders."""
        for host, holder in enumerate(self._holders):
            self._kill(self.pids(host))
            holder.kill()
            holder.wait()
            do("ip", "netns", "del", self._name(host))
        self._holders = []
        tried("ip", "netns", "del", self._switch)
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
        do("ip", "netns", "add", name)
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
        assert holder.stdout is not None
        if holder.stdout.readline() != b"made\n":
            raise ClusterError(f"host {host} could not be made: `{script}` failed; run it as root")
        port = f"port{host}"
        self._in_switch("link", "add", port, "type", "veth", "peer", "eth0", "netns", name)
        self._in_switch("link", "set", port, "master", "switch", "up")
        for words in (
            ("link", "set", "lo", "up"),
            ("link", "set", "eth0", "up"),
            ("addr", "add", f"{self.ip(host)}/24", "dev", "eth0"),
        ):
            do("ip", "-n", name, *words)

    def _in_switch(self, *words: str) -> None:
        do("ip", "-n", self._switch, *words)

    def _kill(self, pids: list[int]) -> None:
        self.signal(pids, signal.SIGKILL)
        _until(lambda: not any(map(_name_of, pids)), "killed processes to be gone")


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


def _until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise ClusterError(f"waited {_PATIENCE_S:g} s for {what}")
        time.sleep(_POLL_S)
