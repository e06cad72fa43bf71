"""Network namespaces by the `ip` command: whether they can be had, and what a killed owner left."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from pathlib import Path

from orchestrator.errors import ClusterError

# Their names go on with the process that made them.
NAME = "orchestrator-hosts"


def why_not_here() -> str:
    """Return why this machine cannot have hosts; empty if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "nsenter", "unshare", "mount") if not shutil.which(tool)]
    if missing:
        return f"{', '.join(missing)} is not installed (iproute2, util-linux)"
    name = f"{NAME}-{os.getpid()}-probe"
    made = tried("ip", "netns", "add", name)
    if made.returncode:
        return f"network namespaces are not permitted: {made.stderr.strip()}"
    try:
        probes = (
            f"ip -n {name} link add switch type bridge",
            f"ip -n {name} link add left type veth peer name right",
            f"ip netns exec {name} unshare --mount --uts mount -t tmpfs tmpfs /dev/shm",
        )
        for probe in probes:
            if (made := tried(*probe.split())).returncode:
                return f"`{probe}` is not permitted: {made.stderr.strip()}"
    finally:
        do("ip", "netns", "del", name)
    return ""


def sweep() -> None:
    """Remove the hosts of processes that were killed and could not remove them."""
    for line in do("ip", "netns", "list").splitlines():
        name = line.split()[0]
        owner = name.removeprefix(f"{NAME}-").partition("-")[0]
        if name == owner or not owner.isdigit() or Path(f"/proc/{owner}").exists():
            continue
        for pid in tried("ip", "netns", "pids", name).stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        tried("ip", "netns", "del", name)


def do(*command: str) -> str:
    """Run a command and return what it printed.

    Raises:
        ClusterError: it failed.
    """
    done = tried(*command)
    if done.returncode:
        raise ClusterError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
    return done.stdout


def tried(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command that may fail."""
    return subprocess.run(command, capture_output=True, text=True, check=False)
