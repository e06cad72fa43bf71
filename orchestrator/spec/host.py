"""What this host offers, without asking any engine."""

from __future__ import annotations

import math
import os
from pathlib import Path

from orchestrator.spec.memory import CGROUPS, cgroup_folders, text_of
from orchestrator.spec.plan import Host
from orchestrator.spec.schema import ClusterName, RunConfig, StrategyName

_NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")

NOT_ASKED = (
    "the cluster was not asked what its nodes have: they are taken to be like this host, with the "
    "GPUs that strategy.devices_per_worker asks for; `make doctor` asks them"
)


def local_host() -> Host:
    """Return the CPU cores this process may use and the GPUs it may see."""
    gpus = len(list(_NVIDIA_GPUS.iterdir())) if _NVIDIA_GPUS.is_dir() else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        chosen = [part for part in visible.split(",") if part.strip() not in ("", "-1")]
        gpus = min(gpus, len(chosen))
    return Host(num_cpus=usable_cpus(len(os.sched_getaffinity(0))), num_gpus=gpus)


def usable_cpus(
    most: int, pid: int | str = "self", proc: Path = Path("/proc"), cgroups: Path = CGROUPS
) -> int:
    """Return how many cores a process has the time of, by the quotas of its cgroups.

    A container with `--cpus=2` runs on all cores, for the time of two.

    Args:
        most: cores that it may run on.
        pid: of the process.
        proc: where the kernel tells of processes.
        cgroups: where it tells of cgroups.
    """
    for folder in cgroup_folders(pid, proc, cgroups, "cpu"):
        words = text_of(folder / "cpu.max").split() or [
            text_of(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")
        ]
        # `max` and -1 are no limit.
        if all(word.isdigit() for word in words) and int(words[1]):
            most = min(most, max(1, math.ceil(int(words[0]) / int(words[1]))))
    return most


def expected_host(config: RunConfig) -> Host:
    """Return what each host of a run offers, as far as that is known before a cluster is asked.

    Its nodes are taken to be like this host, and to have the GPUs that are asked of them: whether
    they do is theirs to tell.
    """
    here, asked = local_host(), config.strategy.devices_per_worker
    if config.cluster.name is not ClusterName.existing or not asked.isdigit():
        return here
    # Several devices of a worker of multi_worker are GPUs: TensorFlow gives it one CPU only.
    is_gpu = config.strategy.name is StrategyName.multi_worker and int(asked) > 1
    if not (is_gpu or here.num_gpus):
        return here
    return Host(num_cpus=here.num_cpus, num_gpus=max(here.num_gpus, int(asked)))
