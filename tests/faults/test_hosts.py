"""Several hosts: cut cables, lost nodes, nodes that are drained.

One run goes through all of it: two workers on three hosts, each fault where one of them is.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import pytest

from tests.cluster import rig
from tests.faults.host_rig import SLACK_S, Training, long_training, lose
from tests.hosts import Hosts, hosts_or_skip


@pytest.fixture(autouse=True)
def leftovers() -> None:
    """Let the run live on from test to test; `Hosts.close` leaves nothing behind."""


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """Three hosts; each test leaves them as they were."""
    with hosts_or_skip(3) as made:
        yield made


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
