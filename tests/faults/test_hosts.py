"""Several hosts: some fail or are lost, cables are cut, nodes are drained.

The hosts are made once. First a run on three of them shrinks and grows; then one run goes through
all the rest: two workers on three hosts, each fault where one of them is.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.comparison import Lineage, lineage
from orchestrator.track.journal import read
from tests.cluster import rig
from tests.cluster.rig import Ended
from tests.faults.host_rig import SLACK_S, Training, long_training, lose
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
    """Three hosts; each test leaves them as they were."""
    with hosts_or_skip(3) as made:
        yield made


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


@pytest.fixture(scope="module")
def training(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Training]:
    """A run on two of the hosts."""
    with long_training(hosts, tmp_path_factory.mktemp("training")) as begun:
        yield begun


def test_a_cut_cable_stops_both_sides_and_the_run_goes_on_elsewhere(
    hosts: Hosts, training: Training
) -> None:
    victim, cut = lose(training, hosts, hosts.cut)
    rig.wait_for(lambda: not rig.is_alive(victim["pid"]), "the cut worker to be ended")
    fenced_s = time.time() - cut
    again = training.await_next()
    told = training.told(1)
    print(f"cut: detected {told - cut:.2f} s, fenced {fenced_s:.2f} s, again {again - cut:.2f} s")
    assert told - cut < 5 + SLACK_S
    assert fenced_s < 5 + SLACK_S
    # While nobody reached it, only time could prove that it was gone.
    assert again - cut > fenced_s - 0.1
    training.await_steps()
    host = Hosts.index(victim["host"])
    assert victim["host"] not in {record["host"] for record in training.of("Ready")}
    hosts.heal(host)
    saved = len(training.of("Saved"))
    rig.wait_for(lambda: len(training.of("Saved")) > saved, "the run to go on after healing")
    assert training.of("Ended", 1) == []
    sampled = {record["node"] for record in rig.records(training.run, "NodeSampled")}
    assert sampled == {record["host"] for record in rig.records(training.run, "Ready")}
    assert not rig.is_alive(victim["pid"])
    hosts.start(host)


def test_a_lost_node_is_noticed_and_replaced(hosts: Hosts, training: Training) -> None:
    attempt = training.attempt
    victim, lost = lose(training, hosts, hosts.kill_raylet)
    training.await_next()
    told = training.told(attempt)
    print(f"raylet killed: detected {told - lost:.2f} s")
    assert told - lost < 2 + SLACK_S
    assert not rig.is_alive(victim["pid"])
    training.await_steps()
    hosts.start(Hosts.index(victim["host"]))


def test_a_node_that_is_drained_is_left_without_losing_a_step(
    hosts: Hosts, training: Training
) -> None:
    attempt = training.attempt
    victim, _ = lose(training, hosts, lambda host: hosts.drain(host, 60))
    training.await_next()
    draining = training.of("Draining", attempt)
    assert [record["host"] for record in draining] == [victim["host"]]
    assert training.of("Death", attempt) == training.of("Failed", attempt) == []
    training.await_steps()
    assert victim["host"] not in {record["host"] for record in training.of("Ready")}
    last = max(r["first_step"] + r["num_steps"] for r in training.of("BlockDone", attempt))
    assert training.of("Ready")[0]["start_step"] == last


def test_what_all_of_it_leaves_is_one_run_that_can_go_on(training: Training) -> None:
    training.await_steps()
    training.process.send_signal(signal.SIGTERM)
    ended = rig.finish(training.process, training.cwd)
    assert ended.code == 143, ended.out
    assert "\x1b" not in ended.out
    assert rig.records(ended.run, "RunEnded")[-1]["status"] == "KILLED"
    begun_at = [training.of("Ready", number)[0]["start_step"] for number in (1, 2, 3, 4)]
    assert begun_at == sorted(set(begun_at)), "an attempt began no further than the one before"
