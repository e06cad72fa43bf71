"""What a worker says of itself before its first step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from orchestrator.train.introduce import busy_gpus

GIB = 2**30


class Nvml:
    """Answers as NVIDIA's library does, for GPUs with these bytes held and this per cent busy."""

    def __init__(self, *gpus: tuple[int, int]):
        self._gpus = gpus

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetHandleByUUID(self, name: str) -> int:
        return {"GPU-0": 0, "GPU-1": 1}[name]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return SimpleNamespace(used=self._gpus[handle][0], total=80 * GIB)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        return SimpleNamespace(gpu=self._gpus[handle][1])


def test_a_gpu_that_others_hold_is_said_with_its_figures() -> None:
    (found,) = busy_gpus("0,1", Nvml((GIB, 0), (60 * GIB, 97)))
    assert found.startswith("GPU 1 is busy: 60.0 GiB of 80.0 GiB are held, 97% of the time")


def test_a_gpu_that_computes_for_others_is_said_under_the_name_it_has() -> None:
    (found,) = busy_gpus("GPU-1", Nvml((0, 0), (0, 50)))
    assert found.startswith("GPU GPU-1 is busy")


def test_gpus_that_nobody_holds_are_not_spoken_of() -> None:
    assert busy_gpus("0,1", Nvml((GIB, 0), (0, 5))) == []
    assert busy_gpus("", Nvml()) == []
