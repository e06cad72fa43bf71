"""Hosts on one machine, and what only tests do with them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from orchestrator.chaos import hosts as chaos_hosts
from orchestrator.chaos.netns import why_not_here
from tests.cluster.rig import ROOT


class Hosts(chaos_hosts.Hosts):
    """Hosts that trainings run on, and whose Ray can be frozen, killed or drained alone."""

    def popen(
        self, host: int, command: Sequence[str], cwd: Path, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start a command on a host; its standard error comes with its output."""
        return subprocess.Popen(
            self.entered(host, command, cwd),
            env={**os.environ, "PYTHONPATH": str(ROOT), **self.env, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def namespace(self, host: int) -> str:
        """Return the name of a host's network namespace."""
        return self._name(host)

    def train(self, *arguments: str, cwd: Path) -> subprocess.Popen[str]:
        """Start a training on the head, with workers on different hosts."""
        command = [
            *(sys.executable, "-m", "orchestrator", "train", *self.arguments),
            *("strategy=multi_worker", *arguments),
        ]
        return self.popen(0, command, cwd)

    def freeze_raylet(self, host: int) -> None:
        """Stop a host's raylet."""
        self.signal(self.raylet(host), signal.SIGSTOP)

    def kill_raylet(self, host: int) -> None:
        """Kill a host's raylet alone."""
        self.signal(self.raylet(host), signal.SIGKILL)

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


@contextlib.contextmanager
def hosts_or_skip(num_hosts: int, *, num_cpus: int = 1) -> Iterator[Hosts]:
    """Give hosts to a fixture; skip its tests where this machine cannot have any."""
    if reason := why_not_here():
        pytest.skip(reason)
    with Hosts(num_hosts, num_cpus=num_cpus) as hosts:
        yield hosts
