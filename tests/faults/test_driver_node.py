"""The host of the driver is lost: what trains elsewhere ends, and had all it needs of the user."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster import rig
from tests.faults.host_rig import LONG, SLACK_S, Training
from tests.hosts import Hosts, hosts_or_skip

pytestmark = pytest.mark.thorough

# Of cluster.driver_silence_s: an agent that hears nothing for so long ends its worker.
SILENT_S = 5.0
FAULTS: dict[str, Callable[[Hosts], None]] = {
    "killed": lambda hosts: hosts.kill(0),
    "cut off": lambda hosts: hosts.cut(0),
}


@pytest.fixture(autouse=True)
def leftovers() -> None:
    """`Hosts.close` leaves nothing behind."""


def hidden(hosts: Hosts, folder: Path) -> Path:
    """Return a folder with the user's job that only the driver's host sees."""
    own = folder / "own"
    own.mkdir()
    script = f"mount -t tmpfs tmpfs {own} && cp -r {rig.MINE}/. {own}"
    made = hosts.popen(0, ["sh", "-c", script], folder)
    said, _ = made.communicate(timeout=60)
    assert made.returncode == 0, said
    assert not list(own.iterdir())
    return own


@pytest.mark.parametrize("name", FAULTS)
def test_a_worker_elsewhere_ends_soon_after_the_drivers_host(name: str, tmp_path: Path) -> None:
    with hosts_or_skip(2) as hosts:
        own = hidden(hosts, tmp_path)
        job = ("job=blobs", f"--config-dir={own}", "strategy.num_workers=2")
        process = hosts.train(*job, *LONG, cwd=tmp_path)
        try:
            training = Training(process, tmp_path)
            training.await_steps()
            log = training.run.driver_log.read_text()
            assert f"upload orchestrator, conf, jobs, {own}: " in " ".join(log.split())
            victim = training.victim()
            began = time.monotonic()
            FAULTS[name](hosts)
            rig.wait_for(lambda: not rig.is_alive(victim["pid"]), "the worker to end", 30.0)
            took_s = time.monotonic() - began
            print(f"driver's host {name}: its worker elsewhere was gone {took_s:.1f} s later")
            assert took_s < SILENT_S + SLACK_S
        finally:
            process.kill()
            process.communicate()
