"""A node's figures are those of MLflow's own monitors, and say nothing about its workers."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.control.agent import Agent
from orchestrator.control.attempt import Attempt
from orchestrator.control.ray_listener import Seat
from orchestrator.control.ray_samplers import Samplers
from orchestrator.control.sampler import Figures, Sampler
from orchestrator.spec.messages import NO_ATTEMPT, Message, NodeFound, NodeSampled, to_record
from tests.control.conftest import wait_until


class FakeNvml(SimpleNamespace):
    """Two GPUs as NVML shows them; the second, like one that is shared, tells no power."""

    class NVMLError(Exception):
        """As NVML's own."""

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> str:
        return f"GPU model {handle}"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return SimpleNamespace(used=20e9, total=80e9)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        return SimpleNamespace(gpu=97)

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        if handle == 1:
            raise self.NVMLError
        return 350_000  # mW

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: int) -> int:
        return 700_000


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


def test_the_figures_are_those_of_mlflows_own_monitors(
    gpus: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.system_metrics.metrics import gpu_monitor
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monkeypatch.setattr(gpu_monitor, "pynvml", gpus, raising=False)
    own = Figures().sample()
    theirs: dict[str, float] = {}
    for monitor in (CPUMonitor(), DiskMonitor(), NetworkMonitor(), gpu_monitor.GPUMonitor()):
        monitor.collect_metrics()
        theirs |= monitor.aggregate_metrics()
    assert own.keys() == theirs.keys()
    steady = [name for name in own if name.startswith(("gpu", "disk"))]
    assert {n: own[n] for n in steady} == pytest.approx({n: theirs[n] for n in steady}, rel=0.01)
    assert own["gpu_0_power_usage_percentage"] == 50.0
    assert "gpu_1_power_usage_watts" not in own and "gpu_1_memory_usage_percentage" in own


def test_a_node_tells_what_it_is_and_then_how_busy_it_is(gpus: FakeNvml) -> None:
    told: list[Message] = []
    sampler = Sampler(3, "host-1", 0.02, told.extend)
    wait_until(lambda: len(told) > 3, "samples")
    sampler.stop()
    found, *samples = told
    assert isinstance(found, NodeFound)
    assert (found.node, found.worker, found.attempt) == ("host-1", 3, NO_ATTEMPT)
    assert found.num_cpus >= 1 and found.memory_bytes > 1e8 and found.processor
    assert found.gpus == ("GPU model 0", "GPU model 1")
    assert all(isinstance(sample, NodeSampled) for sample in samples)
    assert all(math.isfinite(value) for value in to_record(samples[-1])["values"].values())


def test_an_agent_keeps_what_its_node_told_when_the_worker_is_ended() -> None:
    agent = Agent(0, "run", zygote=None, use_fork=False, driver_silence_s=math.inf)
    agent.sample_node("host-1", 0.02)
    wait_until(lambda: any(isinstance(m, NodeFound) for m in agent.poll(0.1)), "the node")
    wait_until(lambda: agent._inbox, "a sample")
    kept = list(agent._inbox)
    agent.kill()
    assert agent.poll(0.1)[: len(kept)] == kept
    wait_until(lambda: any(isinstance(m, NodeSampled) for m in agent.poll(0.1)), "another")
    agent.sample_node(None, None)
    agent.poll(0.0)
    # One may have been on its way.
    assert len(agent.poll(0.2)) <= 1


def test_what_a_node_tells_is_no_sign_of_life_of_a_worker() -> None:
    attempt = Attempt.begin(1, 0, num_workers=2, now=10.0)
    for worker in (1, 7):  # the last was there before the group became smaller
        sample = NodeSampled(worker=worker, attempt=NO_ATTEMPT, time=0.0, node="host-1", values={})
        attempt.observe(sample, now=20.0)
    assert (attempt.workers[1].heard, attempt.workers[1].moved) == (10.0, 10.0)


class Actor:
    """Notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str | None, float | None]] = []
        self.sample_node = SimpleNamespace(remote=lambda *asked: self.asked.append(asked))


def seat(worker: int, host: str, ip: str) -> Seat:
    return Seat(worker, Actor(), node={"host": host, "ip": ip})


def test_each_node_is_sampled_once_under_a_name_of_its_own() -> None:
    samplers = Samplers()
    places = [("a", "10.0.0.1"), ("a", "10.0.0.1"), ("b", "10.0.0.2"), ("a", "10.0.0.3")]
    seats = [seat(worker, *place) for worker, place in enumerate(places)]
    for _ in range(2):  # the second attempt changes nothing
        samplers.assign(seats, 10.0)
        asked = [seat.actor.asked for seat in seats]
        assert asked == [[("a", 10.0)], [], [("b", 10.0)], [("a-10.0.0.3", 10.0)]]
    # The first agent was lost and its worker is placed elsewhere, beside another one.
    seats[0] = seat(0, "b", "10.0.0.2")
    samplers.assign(seats, 10.0)
    asked = [seat.actor.asked[-1:] for seat in seats]
    assert asked == [[("b", 10.0)], [("a", 10.0)], [(None, 10.0)], [("a-10.0.0.3", 10.0)]]
