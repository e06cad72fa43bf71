"""Several hosts: cut cables, lost nodes, nodes that are drained.

One run goes through all of it: two workers on three hosts, each fault where one of them is.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from orchestrator.spec.paths import RunPaths
from tests.cluster import rig
from tests.hosts import Hosts, hosts_or_skip

LONG = (
    *("job.args.delay_ms=20", "train.max_block_steps=4", "train.steps=100000"),
    *("train.eval_every_steps=null", "checkpoint.every_steps=20", "export.enabled=false"),
)
# What a busy machine may add to a promise of a few seconds.
SLACK_S = 2.0


@dataclass
class Training:
    """A run that goes on from fault to fault."""

    process: subprocess.Popen[str]
    cwd: Path
    attempt: int = 1

    @property
    def run(self) -> RunPaths:
        """The run's folder."""
        return rig.runs_in(self.cwd)[-1]

    def of(self, kind: str, attempt: int | None = None) -> list[dict[str, Any]]:
        """Return the records of a kind in an attempt, by default the last."""
        number = self.attempt if attempt is None else attempt
        return [r for r in rig.records(self.run, kind) if r["attempt"] == number]

    def await_steps(self) -> None:
        """Wait until the attempt has saved something and goes on."""

        def goes_on() -> bool:
            if self.process.poll() is not None:
                raise AssertionError(self.process.communicate()[0])
            return bool(rig.runs_in(self.cwd) and self.of("Saved") and self.of("BlockDone"))

        rig.wait_for(goes_on, f"attempt {self.attempt} to save", 120.0)

    def victim(self) -> dict[str, Any]:
        """Return the first worker that is not beside the driver, as it told of itself."""
        ready = sorted(self.of("Ready"), key=lambda record: record["worker"])
        return next(record for record in ready if Hosts.index(record["host"]) != 0)

    def await_next(self) -> float:
        """Wait for the next attempt; return when it began."""
        self.attempt += 1
        began = rig.wait_for(lambda: self.of("AttemptStarted"), f"attempt {self.attempt}")
        return float(began[0]["time"])


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
    cwd = tmp_path_factory.mktemp("training")
    process = hosts.train(*rig.JOB, *LONG, "strategy.num_workers=2", cwd=cwd)
    yield Training(process, cwd)
    process.kill()
    process.communicate()


def lose(
    training: Training, hosts: Hosts, fault: Callable[[int], None]
) -> tuple[dict[str, Any], float]:
    """Do something to the host of a worker; return the worker, and when that was."""
    training.await_steps()
    victim = training.victim()
    began = time.time()
    fault(Hosts.index(victim["host"]))
    return victim, began


def test_a_cut_cable_stops_both_sides_and_the_run_goes_on_elsewhere(
    hosts: Hosts, training: Training
) -> None:
    victim, cut = lose(training, hosts, hosts.cut)
    rig.wait_for(lambda: not rig.is_alive(victim["pid"]), "the cut worker to be ended")
    fenced_s = time.time() - cut
    again = training.await_next()
    told = min(record["time"] for kind in ("Death", "Failed") for record in training.of(kind, 1))
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
    told = min(
        record["time"] for kind in ("Death", "Failed") for record in training.of(kind, attempt)
    )
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
