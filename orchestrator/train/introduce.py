"""What a worker says of itself, its data and its model before the first step."""

from __future__ import annotations

import importlib
import os
import socket
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import keras
import tensorflow as tf

from orchestrator.spec.memory import bytes_text
from orchestrator.spec.messages import DataUsed, Notice, Ready, WorkerOrder
from orchestrator.spec.paths import RunPaths
from orchestrator.train.report import Reporter
from orchestrator.train.sources import Source, Split

_SUMMARY_COLUMNS = 80
# Displays and drivers hold some, too.
_BUSY_MEMORY_FRACTION = 0.05
_BUSY_FRACTION = 0.1


def tell_data(reporter: Reporter, split: Split, source: Source) -> None:
    """Say what a split is; the chief does."""
    features = {name: str(feature) for name, feature in source.features.items()}
    placement = source.placement
    reporter.log(
        f"{split.value} data: {source.name} ({source.origin}), {source.num_examples} examples, "
        f"{placement}"
    )
    reporter.tell(
        DataUsed,
        split=split.name.lower(),
        name=source.name,
        source=source.origin,
        digest=source.digest,
        num_examples=source.num_examples,
        features=features,
        placement=placement,
    )


def tell_ready(
    order: WorkerOrder,
    reporter: Reporter,
    devices: list[str],
    model: keras.Model,
    start_step: int,
) -> None:
    """Say where the worker runs, and on what; the chief writes down the model."""
    plan = order.plan
    if order.worker == 0:
        _write_summary(plan.paths, model)
    reporter.log(
        f"worker {order.worker} of {plan.num_workers}: {', '.join(devices)}, "
        f"{plan.cpus_per_worker} CPU thread(s), "
        f"CUDA_VISIBLE_DEVICES={order.visible_gpus!r}, {plan.config.strategy.name.value}"
    )
    if plan.device_kind == "GPU":
        reporter.log(nccl_settings(os.environ))
    replicas = plan.worker_replicas(order.worker)
    reporter.tell(
        Ready,
        host=socket.gethostname(),
        pid=os.getpid(),
        devices=tuple(devices),
        cpu_threads=plan.cpus_per_worker,
        replica_batch_sizes=tuple(plan.replica_batch_sizes[r] for r in replicas),
        num_parameters=model.count_params(),
        start_step=start_step,
        restored_from=order.restore_from,
        versions=versions(),
    )


def tell_busy_gpus(order: WorkerOrder, reporter: Reporter) -> None:
    """Say which of the worker's GPUs others hold; call before TensorFlow takes them."""
    if order.plan.device_kind != "GPU":
        return
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        found = busy_gpus(order.visible_gpus, nvml)
    except Exception:  # without NVIDIA's library, or its permission, nothing is known
        return
    for text in found:
        text = f"worker {order.worker} on {socket.gethostname()}: {text}"
        reporter.log(text)
        reporter.tell(Notice, text=text)


def busy_gpus(visible: str, nvml: Any) -> list[str]:
    """Return, in words, which of some GPUs are busy.

    Args:
        visible: the GPUs, as CUDA_VISIBLE_DEVICES names them.
        nvml: NVIDIA's library, as the module `pynvml` offers it.
    """
    found = []
    for name in filter(None, (part.strip() for part in visible.split(","))):
        by_name = nvml.nvmlDeviceGetHandleByUUID
        handle = nvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else by_name(name)
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        busy_fraction = nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
        if memory.used > _BUSY_MEMORY_FRACTION * memory.total or busy_fraction > _BUSY_FRACTION:
            found.append(
                f"GPU {name} is busy: {bytes_text(memory.used)} of {bytes_text(memory.total)} are "
                f"held, {busy_fraction:.0%} of the time; nvidia-smi names the processes"
            )
    return found


def nccl_settings(environ: Mapping[str, str]) -> str:
    """Return in words what this process tells NCCL."""
    found = sorted(name for name in environ if name.startswith("NCCL_"))
    told = ", ".join(f"{name}={environ[name]}" for name in found)
    return f"NCCL: {told or 'no variable NCCL_* is set, it chooses by itself'}"


def _write_summary(paths: RunPaths, model: keras.Model) -> None:
    lines: list[str] = []
    model.summary(
        line_length=_SUMMARY_COLUMNS,
        print_fn=lines.append,
        expand_nested=True,
        show_trainable=True,
    )
    paths.root.mkdir(parents=True, exist_ok=True)
    paths.model_summary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """Return the versions of the libraries that compute."""
    return {"tensorflow": tf.__version__, "keras": keras.__version__, "numpy": version("numpy")}
