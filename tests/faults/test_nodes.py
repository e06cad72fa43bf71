"""A node that is lost by halves, and a host that is cut off for half a minute."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.train import store
from tests.cluster import rig
from tests.faults.host_rig import SLACK_S, Training, long_training, lose
from tests.faults.writes import Write, network_of, writes_below
from tests.hosts import Hosts, hosts_or_skip

pytestmark = pytest.mark.thorough

CUT_S = 30.0
# The driver's silence, cluster.driver_silence_s, and what a busy machine adds.
SILENT_S = 5.0
FAULTS: dict[str, tuple[Callable[[Hosts, int], None], float]] = {
    "raylet killed": (lambda hosts, host: hosts.kill_raylet(host), 2.0),
    "raylet stopped": (lambda hosts, host: hosts.freeze_raylet(host), 5.0),
    "everything killed": (lambda hosts, host: hosts.kill(host), 2.0),
    "everything stopped": (
        lambda hosts, host: hosts.signal(hosts.pids(host), signal.SIGSTOP),
        5.0,
    ),
}


@pytest.fixture(autouse=True)
def leftovers() -> None:
    """Let the run live on from test to test; `Hosts.close` leaves nothing behind."""


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """Three hosts; each test leaves them as they were."""
    with hosts_or_skip(3) as made:
        yield made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the run is."""
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def writes(folder: Path) -> Iterator[list[Write]]:
    """All that is written there from the first moment on."""
    with writes_below(folder) as found:
        yield found


@pytest.fixture(scope="module")
def training(hosts: Hosts, folder: Path, writes: list[Write]) -> Iterator[Training]:
    """A run on two of the hosts."""
    with long_training(hosts, folder) as begun:
        yield begun


def test_a_host_that_was_cut_off_writes_nothing_after_five_seconds_nor_when_it_is_back(
    hosts: Hosts, training: Training, writes: list[Write]
) -> None:
    victim, cut = lose(training, hosts, hosts.cut)
    host = Hosts.index(victim["host"])
    there = network_of(victim["pid"])
    assert there not in (0, network_of(os.getpid()))
    training.await_next()
    training.await_steps()
    rig.wait_for(lambda: time.time() > cut + CUT_S, "half a minute", CUT_S + 1)
    hosts.heal(host)
    # Ray tells the node that it was given up, and its raylet ends with its workers.
    rig.wait_for(lambda: not hosts.raylet(host), "the raylet to be told")
    saved = len(training.of("Saved"))
    rig.wait_for(lambda: len(training.of("Saved")) > saved + 2, "three more checkpoints")
    mine = [write for write in writes if write.network == there]
    assert mine, "the watch sees nothing"
    last = max(write.time for write in mine)
    print(f"cut off: {len(mine)} writes, the last {last - cut:.2f} s after the cut")
    assert [write for write in mine if write.time > cut + SILENT_S] == []
    # Whoever was gone before it could be asked wrote into no file of the attempt that was cut.
    unknown = [w for w in writes if w.network == 0 and w.time > cut + SILENT_S]
    assert [write for write in unknown if "attempt-1" in str(write.path)] == []
    assert not rig.is_alive(victim["pid"])
    hosts.start(host)


@pytest.mark.parametrize("name", FAULTS)
def test_a_node_that_is_lost_is_noticed_and_what_it_does_later_counts_for_nothing(
    hosts: Hosts, training: Training, name: str
) -> None:
    inject, limit_s = FAULTS[name]
    attempt = training.attempt
    victim, lost = lose(training, hosts, lambda host: inject(hosts, host))
    again = training.await_next()
    seen_s = training.told(attempt) - lost
    print(f"{name}: detected {seen_s:.2f} s, again {again - lost:.2f} s")
    assert seen_s < limit_s + SLACK_S
    training.await_steps()
    host = Hosts.index(victim["host"])
    woken = time.time()
    hosts.signal(hosts.pids(host), signal.SIGCONT)
    rig.wait_for(lambda: not rig.is_alive(victim["pid"]), "the lost worker to be ended", 5.0)
    print(f"{name}: its worker gone {max(0.0, time.time() - woken):.2f} s after it was woken")
    for path in store.list_checkpoints(training.run.checkpoints_dir):
        if path.stat().st_ctime > woken:
            assert store.read_manifest(path)["attempt"] == training.attempt
    hosts.start(host)
