"""Three hosts, of which some fail: the run goes on with the others, and computes the same."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.comparison import Lineage, lineage
from orchestrator.track.journal import read
from tests.cluster import rig
from tests.cluster.rig import Ended
from tests.hosts import Hosts, hosts_or_skip

MINE = Path(__file__).parent / "mine"
STEPS = 800
ELASTIC = ("strategy.num_workers=3", "strategy.min_workers=2")
# Training goes on while a node starts and imports TensorFlow.
_PATIENCE_S = 120.0


@pytest.fixture(autouse=True)
def leftovers() -> None:
    """Let the run live on from test to test; `Hosts.close` leaves nothing behind."""


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """Three hosts with room for a worker each."""
    with hosts_or_skip(3) as found:
        yield found


def start(hosts: Hosts, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    job = ("job=even", f"--config-dir={MINE}", f"job.args.slow_while={folder / 'slow'}")
    return hosts.train(*job, *ELASTIC, *arguments, cwd=folder)


def curve(ended: Ended) -> Lineage:
    return lineage(read(ended.run.journal))


def said(ended: Ended) -> str:
    """Return what was printed, without line breaks."""
    return " ".join(ended.out.split())


def decisions(ended: Ended) -> list[dict[str, Any]]:
    return rig.records(ended.run, "Decided")


def sizes(ended: Ended) -> list[int]:
    return [record["num_workers"] for record in rig.records(ended.run, "AttemptStarted")]


@pytest.fixture(scope="module")
def on_two(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """A run on hosts of which one has no port for TensorFlow."""
    folder = tmp_path_factory.mktemp("bad-host")
    hog = (
        "import socket, time\n"
        "held = [socket.create_server(('', 20000 + port)) for port in range(3)]\n"
        "print('taken', flush=True)\n"
        "time.sleep(3600)\n"
    )
    taker = hosts.popen(2, [sys.executable, "-c", hog], folder)
    try:
        assert taker.stdout is not None and taker.stdout.readline() == "taken\n"
        return rig.finish(start(hosts, folder, "cluster.port_range=20000-20002"), folder)
    finally:
        taker.kill()
        taker.wait()


def test_a_host_that_fails_twice_at_the_start_is_avoided_and_that_is_said(on_two: Ended) -> None:
    assert on_two.code == 0, on_two.out
    assert sizes(on_two) == [3, 3, 2], on_two.out
    assert "no free port in cluster.port_range=20000-20002 on host-2" in said(on_two)
    assert "not on host-2 (10.90.0.3): it failed twice in a row" in said(on_two)
    failed = [(record["cause"], record["host"]) for record in decisions(on_two)]
    assert failed == [("start", "host-2 (10.90.0.3)")] * 2
    used = {record["host"] for record in rig.records(on_two.run, "Ready")}
    assert used == {"host-0", "host-1"}


def test_a_run_goes_on_without_a_lost_host_and_grows_when_it_is_back(
    hosts: Hosts, on_two: Ended, tmp_path: Path
) -> None:
    slow = tmp_path / "slow"
    slow.touch()
    process = start(hosts, tmp_path)
    run = rig.wait_for_step(tmp_path, 30)
    hosts.kill(2)
    rig.wait_for(lambda: len(rig.records(run, "Ready")) >= 5, "two workers", _PATIENCE_S)
    hosts.start(2)
    rig.wait_for(lambda: len(rig.records(run, "Ready")) >= 8, "three workers", _PATIENCE_S)
    slow.unlink()
    ended = rig.finish(process, tmp_path)
    assert ended.code == 0, ended.out
    assert sizes(ended) == [3, 2, 3], ended.out
    second = rig.records(ended.run, "AttemptStarted")[1]
    assert second["restore_from"] is not None
    lost, grown = decisions(ended)
    assert (lost["cause"], lost["host"], lost["decision"], lost["num_workers"]) == (
        *("node", "host-2 (10.90.0.3)", "retry", 2),
    )
    assert (grown["decision"], grown["num_workers"]) == ("grow", 3)
    assert "with 2 of 3 workers" in said(ended)
    assert "there is room for 3 workers: saving, then going on with 3" in said(ended)
    # It grows at a checkpoint of the step it had come to: nothing is done again.
    last = rig.records(ended.run, "AttemptStarted")[-1]
    blocks = [r for r in rig.records(ended.run, "BlockDone") if r["worker"] == 0]
    done = max(r["first_step"] + r["num_steps"] for r in blocks if r["attempt"] == 2)
    assert last["restore_from"].endswith(f"step-{done:08}")
    # Every example of every step was used once, as in the run on two hosts.
    mine, other = curve(ended), curve(on_two)
    assert mine.last_step == other.last_step == STEPS
    assert mine.used_until(STEPS) == other.used_until(STEPS)
    losses = [[run.losses[step] for step in range(1, STEPS + 1)] for run in (mine, other)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
