"""What is judged of a job against its nodes: place, data, model, memory, GPUs, disk."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator

from orchestrator.control.gpu_checks import gpus
from orchestrator.control.node_facts import NodeFacts
from orchestrator.control.preflight import FEW_FILES, Finding, few_files, small_shared_memory
from orchestrator.control.survey import Judge, Survey
from orchestrator.errors import ClusterError, JobError, PlanError, StorageError
from orchestrator.spec.footprint import CUDA_BYTES, TENSORFLOW_BYTES, Footprint
from orchestrator.spec.memory import bytes_text

_SHOWN_WORKERS = 16


def answers(survey: Survey) -> Iterator[str | Finding]:
    """Tell which nodes did not answer."""
    for host, why in survey.silent.items():
        yield Finding(
            f"{host} did not answer: {why}",
            "workers that Ray places there would not start",
            "look at Ray's logs there, or drain the node (ray drain-node)",
            ClusterError,
        )
    yield f"{len(survey.nodes)} of {len(survey.nodes) + len(survey.silent)}"


def placement(survey: Survey) -> Iterator[str | Finding]:
    """Tell where each worker is, with what devices and how many examples a step."""
    plan = survey.plan
    if survey.unplaced:
        yield Finding(
            f"Ray has no place for the workers: {survey.unplaced}",
            "a start would wait, then be refused",
            error=None if plan.config.strategy.min_workers is not None else ClusterError,
        )
    names = {node.node_id: node.where for node in survey.nodes}
    by_host: dict[str, list[int]] = defaultdict(list)
    for worker in range(plan.num_workers):
        place = survey.places.get(worker, "")
        by_host[survey.own.host if survey.is_local else names.get(place, place)].append(worker)
    for host, workers in by_host.items():
        if not host:
            continue
        for worker in workers[:_SHOWN_WORKERS]:
            sizes = [plan.replica_batch_sizes[r] for r in plan.worker_replicas(worker)]
            # Several workers of a host have GPUs each: which, Ray decides.
            devices = f"{plan.devices_per_worker} {plan.device_kind}"
            yield (
                f"worker {worker} on {host}: {devices}, {' + '.join(map(str, sizes))} examples a "
                f"step, {plan.cpus_per_worker} CPU threads"
            )
        if len(workers) > _SHOWN_WORKERS:
            yield f"and {len(workers) - _SHOWN_WORKERS} more workers on {host}"
    for node in survey.nodes:
        num_threads = survey.workers_on(node) * plan.cpus_per_worker
        if num_threads > node.num_cpus:
            yield Finding(
                f"{node.where} has {node.num_cpus} CPU core(s) for {survey.workers_on(node)} "
                f"worker(s) of {plan.cpus_per_worker} CPU thread(s)",
                "they take turns, and every step waits for the last one",
                "lower strategy.num_workers or cluster.cpus_per_worker",
            )


def data(survey: Survey) -> Iterator[str | Finding]:
    """Refuse data that a node cannot read, or that is other data there."""
    digests: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    # Where no cluster was reached, this host alone was looked at.
    hosts = [node.where for node in survey.nodes] or [survey.own.host]
    for host, rehearsal in zip(hosts, survey.rehearsals, strict=False):
        for split in rehearsal.splits:
            digests[split.split][split.digest].append(host)
        if rehearsal.is_unfinished:
            yield Finding(
                f"{host}: loading the data and tracing a step was {rehearsal.error}",
                "whether they can be is not known; train waits for them",
                "ask again: what was downloaded is kept",
            )
        elif rehearsal.error and not rehearsal.splits:
            yield Finding(
                f"{host}: {_said(rehearsal.error, rehearsal.user_frame)}",
                "its workers would fail before the first step",
                "mend what it says; data.path or data.cache_dir must lead to the data there",
                JobError,
            )
    for name, found in digests.items():
        if len(found) > 1:
            shown = "; ".join(
                f"{digest[:12]} on {', '.join(nodes)}" for digest, nodes in found.items()
            )
            yield Finding(
                f"the {name} data is not the same everywhere: {shown}",
                "workers would train on different examples under the same numbers",
                "copy the same files to every node, or set data.path to a shared folder",
                JobError,
            )
    for split in (s for r in survey.rehearsals[:1] for s in r.splits):
        readers = sum(len(nodes) for nodes in digests[split.split].values())
        yield (
            f"{split.split}: {split.num_examples:,} examples, {split.name} ({split.origin}), "
            f"{split.placement}, {split.digest[:12]} on {readers} node(s)"
        )


def model(survey: Survey) -> Iterator[str | Finding]:
    """Tell what the model is, or why it cannot be trained, evaluated or exported."""
    for rehearsal in survey.rehearsals[:1]:
        if rehearsal.error and rehearsal.splits:
            yield Finding(
                f"the job fails: {_said(rehearsal.error, rehearsal.user_frame)}",
                "every worker would fail with it before the first step",
                "mend it in the job's class",
                JobError,
            )
        for trouble in rehearsal.troubles:
            yield Finding(
                f"{trouble.what} would fail: {_said(trouble.error, trouble.user_frame)}",
                "the run would end there",
                trouble.mend,
                JobError,
            )
    footprint = survey.footprint
    if footprint is not None:
        yield f"{footprint.num_parameters:,} parameters, one step traced"


def memory(survey: Survey) -> Iterator[str | Finding]:
    """Compare what a replica holds with what its device and its node have."""
    found = survey.footprint
    if found is None:
        return
    plan = survey.plan
    at_least = "at least " if found.is_lower_bound else ""
    yield (
        f"a replica: model {bytes_text(found.model_bytes)}, optimizer "
        f"{bytes_text(found.optimizer_bytes)}, gradients {bytes_text(found.gradient_bytes)}, "
        f"activations {at_least}{bytes_text(found.activation_bytes)} for "
        f"{found.micro_batch_size} examples, data {bytes_text(survey.resident_bytes)} (estimated)"
    )
    for node in survey.nodes:
        if plan.device_kind == "GPU":
            yield from _gpu_memory(survey, node, found)
        if node.memory is None or not survey.workers_on(node):
            continue
        needed = _host_bytes(survey, found) * survey.workers_on(node)
        limit = node.memory.num_bytes
        if needed > limit:
            spare = limit / survey.workers_on(node) - TENSORFLOW_BYTES - survey.resident_bytes
            room = int(spare / plan.devices_per_worker) - survey.resident_bytes
            on_gpu = plan.device_kind == "GPU"
            yield Finding(
                f"{node.where}: {survey.workers_on(node)} worker(s) hold {at_least}about "
                f"{bytes_text(needed)}, the limit {node.memory.source} is {bytes_text(limit)}",
                "the kernel would end them for want of memory",
                "keep less data in memory" if on_gpu else _smaller(survey, found, room),
                ClusterError,
            )
        elif needed > node.free_memory_bytes:
            yield Finding(
                f"{node.where}: {survey.workers_on(node)} worker(s) hold about "
                f"{bytes_text(needed)}, {bytes_text(node.free_memory_bytes)} of memory are free",
                "others hold the rest",
                "end what else runs there, or take another node",
            )


def checkpoints(survey: Survey) -> Iterator[str | Finding]:
    """Compare what checkpoints and exports need with the disk of the run folder."""
    found, plan = survey.footprint, survey.plan
    if found is None:
        return
    checkpoint = plan.config.checkpoint
    needed, free = found.disk_bytes(plan), survey.own.free_disk_bytes
    when = [f"every {checkpoint.every_steps:,} steps" if checkpoint.every_steps else ""]
    when += [f"every {checkpoint.every_s:g} s" if checkpoint.every_s else "", "at the end"]
    yield (
        f"{bytes_text(found.checkpoint_bytes)} each, {', '.join(filter(None, when))}; with exports "
        f"at most {bytes_text(needed)} of {bytes_text(free)} free"
    )
    if needed > free:
        yield Finding(
            f"the disk of {plan.paths.root.parents[1]} has {bytes_text(free)} free",
            f"checkpoints and exports need up to {bytes_text(needed)}",
            "make room, set runs_dir to another disk, or lower checkpoint.keep",
            StorageError,
        )


def limits(survey: Survey) -> Iterator[str | Finding]:
    """Judge /dev/shm and the limit of open files of other nodes; the driver's are cheap checks."""
    for node in survey.nodes if not survey.is_local else ():
        if small := small_shared_memory(node.shm_bytes, f"{node.where}: "):
            yield small
        if node.max_files < FEW_FILES:
            yield few_files(node.max_files, f"{node.where}: ")
    yield f"{len(survey.nodes)} node(s)"


def _host_bytes(survey: Survey, found: Footprint) -> int:
    """Return what a worker's process holds of its host's memory."""
    plan, resident = survey.plan, survey.resident_bytes
    on_devices = plan.devices_per_worker * (found.replica_bytes(plan) + resident)
    return TENSORFLOW_BYTES + resident + (on_devices if plan.device_kind == "CPU" else 0)


def _gpu_memory(survey: Survey, node: NodeFacts, found: Footprint) -> Iterator[Finding]:
    needed = found.replica_bytes(survey.plan) + survey.resident_bytes + CUDA_BYTES
    smallest = min(node.gpus, key=lambda gpu: gpu.total_bytes, default=None)
    if smallest is not None and needed > smallest.total_bytes:
        room = smallest.total_bytes - CUDA_BYTES - survey.resident_bytes
        yield Finding(
            f"{node.where}: a replica holds about {bytes_text(needed)}, GPU {smallest.index} has "
            f"{bytes_text(smallest.total_bytes)}",
            "the first step would end for want of its memory",
            _smaller(survey, found, room),
            PlanError,
        )


def _smaller(survey: Survey, found: Footprint, room_bytes: int) -> str:
    """Return what makes a step fit into so much memory."""
    plan = survey.plan
    fitting = found.largest_micro_batch(plan, room_bytes)
    if fitting < 1:
        return (
            f"not even model and optimizer fit ({bytes_text(found.fixed_bytes(plan))}): take a "
            "smaller model, fewer workers a host, or larger nodes"
        )
    largest = max(plan.replica_batch_sizes)
    number = math.ceil(largest / fitting)
    return (
        f"about {fitting} examples at a time would fit: train.micro_batches={number}, or a "
        "smaller train.global_batch_size"
    )


def _said(error: str, user_frame: str) -> str:
    return f"{error} (at {user_frame})" if user_frame else error


RESOURCE_CHECKS: list[tuple[str, Judge]] = [
    ("nodes", answers),
    ("placement", placement),
    ("data", data),
    ("model", model),
    ("memory", memory),
    ("GPUs", gpus),
    ("checkpoints", checkpoints),
    ("limits", limits),
]
