"""What this host offers, without asking any engine."""

from __future__ import annotations

import os
from pathlib import Path

from orchestrator.spec.plan import Host

_NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")


def local_host() -> Host:
    """Return the CPU cores this process may use and the GPUs it may see."""
    gpus = len(list(_NVIDIA_GPUS.iterdir())) if _NVIDIA_GPUS.is_dir() else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        chosen = [part for part in visible.split(",") if part.strip() not in ("", "-1")]
        gpus = min(gpus, len(chosen))
    return Host(num_cpus=len(os.sched_getaffinity(0)), num_gpus=gpus)
