"""What a node is and how busy it is, under the names that MLflow has for its system metrics.

MLflow's own monitor (mlflow 3.17, system_metrics/metrics) writes to MLflow from the node itself;
here nodes tell the driver, as workers do. Figures and units are those of that monitor.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from orchestrator.spec.messages import NO_ATTEMPT, Message, NodeFound, NodeSampled

# The first figures come early, so that a run of seconds has some too.
_FIRST_S = 1.0
_MEGA = 1e6


class Sampler:
    """A thread that tells once what this node is and then, at intervals, how busy it is."""

    def __init__(
        self, worker: int, node: str, every_s: float | None, tell: Callable[[list[Message]], None]
    ):
        """Begin.

        Args:
            worker: whose agent this is.
            node: its name in the record.
            every_s: seconds between two samples; None for none.
            tell: takes the messages.
        """
        self._worker = worker
        self._node = node
        self._every_s = every_s
        self._tell = tell
        self._is_over = threading.Event()
        threading.Thread(target=self._run, name="sampler", daemon=True).start()

    def stop(self) -> None:
        """Tell nothing more."""
        self._is_over.set()

    def _run(self) -> None:
        figures = Figures()
        self._tell([NodeFound(**self._origin(), **figures.hardware())])
        if self._every_s is None:
            return
        pause_s = min(_FIRST_S, self._every_s)
        while not self._is_over.wait(pause_s):
            pause_s = self._every_s
            self._tell([NodeSampled(**self._origin(), values=figures.sample())])

    def _origin(self) -> dict[str, Any]:
        return {
            "worker": self._worker,
            "attempt": NO_ATTEMPT,
            "time": time.time(),
            "node": self._node,
        }


class Figures:
    """Reads this node's figures; the CPUs' are means since the look before, of the same thread."""

    def __init__(self) -> None:
        self._nvml = _nvml()
        self._network_begin = psutil.net_io_counters()
        psutil.cpu_percent()

    def hardware(self) -> dict[str, Any]:
        """Return what `NodeFound` tells."""
        return {
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "processor": _processor(),
            "num_cpus": psutil.cpu_count() or 1,
            "memory_bytes": psutil.virtual_memory().total,
            "gpus": tuple(self._gpu_names()),
        }

    def sample(self) -> dict[str, float]:
        """Return MLflow's system metrics by name."""
        memory, disk = psutil.virtual_memory(), psutil.disk_usage(os.sep)
        values: dict[str, float] = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / _MEGA,
            "system_memory_usage_percentage": 100 * memory.used / memory.total,
            "disk_usage_percentage": disk.percent,
            "disk_usage_megabytes": disk.used / _MEGA,
            "disk_available_megabytes": disk.free / _MEGA,
        }
        begin = self._network_begin
        # A machine without any interface has no counters.
        if begin is not None and (network := psutil.net_io_counters()) is not None:
            received, sent = network.bytes_recv, network.bytes_sent
            values["network_receive_megabytes"] = (received - begin.bytes_recv) / _MEGA
            values["network_transmit_megabytes"] = (sent - begin.bytes_sent) / _MEGA
        values.update(self._gpus())
        return {name: round(float(value), 1) for name, value in values.items()}

    def _handles(self) -> Iterator[tuple[int, Any]]:
        if self._nvml is None:
            return
        for index in range(self._nvml.nvmlDeviceGetCount()):
            yield index, self._nvml.nvmlDeviceGetHandleByIndex(index)

    def _gpu_names(self) -> Iterator[str]:
        for _, handle in self._handles():
            name = self._nvml.nvmlDeviceGetName(handle)
            yield name.decode() if isinstance(name, bytes) else str(name)

    def _gpus(self) -> dict[str, float]:
        """Return the figures of all GPUs, but for those that a GPU does not have."""
        nvml, values = self._nvml, dict[str, float]()
        for index, handle in self._handles():
            with contextlib.suppress(nvml.NVMLError):
                memory = nvml.nvmlDeviceGetMemoryInfo(handle)
                values[f"gpu_{index}_memory_usage_percentage"] = 100 * memory.used / memory.total
                values[f"gpu_{index}_memory_usage_megabytes"] = memory.used / _MEGA
            with contextlib.suppress(nvml.NVMLError):
                used = nvml.nvmlDeviceGetUtilizationRates(handle).gpu
                values[f"gpu_{index}_utilization_percentage"] = used
            with contextlib.suppress(nvml.NVMLError):
                power, limit = (
                    nvml.nvmlDeviceGetPowerUsage(handle),
                    nvml.nvmlDeviceGetEnforcedPowerLimit(handle),
                )
                values[f"gpu_{index}_power_usage_watts"] = power / 1000
                values[f"gpu_{index}_power_usage_percentage"] = 100 * power / limit
        return values


def _nvml() -> Any:
    """Return NVIDIA's library, ready to be asked; None without it or without its driver."""
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except Exception:  # not installed, no driver, no GPU: nothing of that concerns a run on CPUs
        return None
    return nvml


def _processor() -> str:
    """Return the processor's model; the platform module knows it on few systems."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
