"""What a worker says of itself, its data and its model before the first step."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from importlib.metadata import version

import keras
import tensorflow as tf

from orchestrator.spec.messages import DataUsed, Ready, WorkerOrder
from orchestrator.spec.paths import RunPaths
from orchestrator.train.report import Reporter
from orchestrator.train.sources import Source, Split

_SUMMARY_COLUMNS = 80


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
