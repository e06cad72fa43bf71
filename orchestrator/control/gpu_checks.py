"""What is judged of the GPUs that are there against those that a job asks for."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.control.preflight import Finding
from orchestrator.control.survey import Survey
from orchestrator.errors import ClusterError
from orchestrator.spec.memory import bytes_text

_BUSY_MEMORY_FRACTION = 0.05
_BUSY_FRACTION = 0.1


def gpus(survey: Survey) -> Iterator[str | Finding]:
    """Compare the GPUs that are there with those asked for."""
    plan = survey.plan
    for node in survey.nodes:
        there = f"{len(node.gpus)} x {node.gpus[0].name}" if node.gpus else "none"
        yield f"{node.host}: {there}"
        asked = plan.devices_per_worker if plan.device_kind == "GPU" else 0
        num_workers = survey.workers_on(node)
        if asked * num_workers > len(node.gpus):
            most = len(node.gpus) // num_workers
            yield Finding(
                f"{node.where} has {len(node.gpus)} GPU(s) by nvidia-smi",
                f"{num_workers} worker(s) there are to have {asked} each",
                f"set strategy.devices_per_worker to at most {most}"
                if most
                else "look at the NVIDIA driver there, or take nodes with more GPUs",
                ClusterError,
            )
        if node.gpus and plan.device_kind == "CPU":
            yield Finding(
                f"{node.where} has {there}, the plan is for CPUs",
                "they would not be used",
                "see CUDA_VISIBLE_DEVICES"
                if survey.is_local
                else "start Ray there with `ray start --num-gpus=N`, or keep CPU workers off it "
                "with cluster.node_labels",
            )
        if node.gpus and node.is_cpu_build:
            yield Finding(
                f"{node.where} has {there} and the TensorFlow without GPUs (tensorflow-cpu)",
                "it would train on the CPU",
                "make setup device=gpu there",
                ClusterError if asked else None,
            )
        if not survey.is_local and node.ray_gpus != len(node.gpus):
            yield Finding(
                f"{node.where} has {len(node.gpus)} GPU(s), Ray was told of {node.ray_gpus}",
                "Ray places by what it was told",
                "start Ray there with `ray start --num-gpus=N`",
            )
        for gpu in node.gpus:
            is_full = gpu.used_bytes > _BUSY_MEMORY_FRACTION * gpu.total_bytes
            if asked and (is_full or gpu.busy_fraction > _BUSY_FRACTION):
                yield Finding(
                    f"GPU {gpu.index} of {node.where} is busy: {bytes_text(gpu.used_bytes)} of "
                    f"{bytes_text(gpu.total_bytes)} are held, {gpu.busy_fraction:.0%} of the time",
                    "a worker shares it with whoever that is",
                    "nvidia-smi names the processes; end them or take another GPU",
                )
