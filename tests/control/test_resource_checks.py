"""What `doctor` says of a job that its nodes cannot hold, read or run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from orchestrator.control.gpu_checks import gpus
from orchestrator.control.node_facts import Gpu, parse_gpus
from orchestrator.control.resource_checks import (
    RESOURCE_CHECKS,
    answers,
    checkpoints,
    data,
    limits,
    memory,
    model,
    placement,
)
from orchestrator.control.survey import Judge, Survey
from orchestrator.spec.footprint import Rehearsal, Trouble
from orchestrator.spec.memory import MemoryLimit
from orchestrator.spec.schema import StrategyName
from tests.control.surveys import (
    GIB,
    TWO_WORKERS,
    findings,
    node,
    notice,
    problem,
    rehearsal,
    said,
    survey,
)
from tests.plans import tiny_plan

MIB = 2**20
H100 = Gpu(0, "NVIDIA H100", 80 * GIB, 0, 0.0)


def on_gpus(folder: Path, *held: Gpu, asked: str = "1", **changes: object) -> Survey:
    """Return a survey of one node with GPUs, of a worker that is to have some."""
    plan = tiny_plan(
        folder,
        num_gpus=8,
        **TWO_WORKERS | {"strategy__num_workers": 1, "strategy__devices_per_worker": asked},
    )
    facts = {"is_cpu_build": False, "ray_gpus": len(held)} | changes
    return survey(folder, node(1, gpus=held, **facts), plan=plan)


@pytest.mark.parametrize(("name", "judge"), RESOURCE_CHECKS)
def test_nodes_that_are_well_give_no_alarm(name: str, judge: Judge, tmp_path: Path) -> None:
    assert findings(judge, survey(tmp_path)) == []
    assert findings(judge, on_gpus(tmp_path, H100)) == []


def test_the_map_tells_node_devices_and_examples_of_each_worker(tmp_path: Path) -> None:
    assert said(placement, survey(tmp_path)).splitlines() == [
        "worker 0 on host-1 (10.0.0.1): 1 CPU, 8 examples a step, 1 CPU threads",
        "worker 1 on host-2 (10.0.0.2): 1 CPU, 8 examples a step, 1 CPU threads",
    ]


def test_the_map_tells_each_replica_of_a_worker(tmp_path: Path) -> None:
    plan = tiny_plan(
        tmp_path,
        strategy__name=StrategyName.mirrored,
        strategy__devices_per_worker="3",
        train__global_batch_size=16,
    )
    text = said(placement, survey(tmp_path, plan=plan))
    assert text == "worker 0 on host-0: 3 CPU, 6 + 5 + 5 examples a step, 1 CPU threads"


def test_more_threads_than_a_host_has_cores_are_said(tmp_path: Path) -> None:
    plan = tiny_plan(
        tmp_path,
        strategy__name=StrategyName.multi_worker,
        strategy__num_workers=8,
        cluster__cpus_per_worker=4,
    )
    here = node(1, num_cpus=16)
    found = notice(placement, survey(tmp_path, here, plan=plan))
    assert "has 16 CPU core(s) for 8 worker(s) of 4 CPU thread(s)" in found.seen
    assert "cluster.cpus_per_worker" in found.mend


def test_a_cluster_without_room_is_told_in_rays_words(tmp_path: Path) -> None:
    full = survey(tmp_path, unplaced="2 worker(s) of 8 CPU each do not fit", places={})
    assert "2 worker(s) of 8 CPU each do not fit" in problem(placement, full).seen


def test_a_run_that_may_shrink_is_not_hindered_by_a_lack_of_room(tmp_path: Path) -> None:
    plan = tiny_plan(tmp_path, **TWO_WORKERS, strategy__min_workers=1)
    notice(placement, survey(tmp_path, plan=plan, unplaced="no room", places={}))


def test_a_node_that_does_not_answer_is_named(tmp_path: Path) -> None:
    found = problem(answers, survey(tmp_path, silent={"host-3 (10.0.0.3)": "not within 20 s"}))
    assert found.seen == "host-3 (10.0.0.3) did not answer: not within 20 s"


def test_data_that_a_node_cannot_read_is_told_with_the_node(tmp_path: Path) -> None:
    error = "data.path=/mnt/digits does not exist on this host"
    both = (rehearsal(), rehearsal(splits=(), error=error, with_model=False))
    found = problem(data, survey(tmp_path, rehearsals=both))
    assert found.seen == f"host-2 (10.0.0.2): {error}"


def test_data_that_takes_long_is_no_alarm(tmp_path: Path) -> None:
    slow = Rehearsal(error="not done within 60 s", is_unfinished=True)
    found = notice(data, survey(tmp_path, rehearsals=(slow, rehearsal(with_model=False))))
    assert "not done within 60 s" in found.seen and "not known" in found.why
    assert findings(model, survey(tmp_path, rehearsals=(slow, rehearsal()))) == []


def test_what_fails_after_the_steps_is_told_with_its_key(tmp_path: Path) -> None:
    trouble = Trouble(what="the export", mend="set export.enabled=false", error="no", user_frame="")
    found = problem(model, survey(tmp_path, rehearsals=(rehearsal(troubles=(trouble,)),)))
    assert found.seen == "the export would fail: no" and "export.enabled" in found.mend


def test_other_data_on_a_node_is_told_with_both_digests(tmp_path: Path) -> None:
    both = (rehearsal("a" * 64), rehearsal("b" * 64, with_model=False))
    found = problem(data, survey(tmp_path, rehearsals=both))
    assert "aaaaaaaaaaaa on host-1 (10.0.0.1); bbbbbbbbbbbb on host-2 (10.0.0.2)" in found.seen


def test_a_job_that_fails_is_told_with_its_own_line(tmp_path: Path) -> None:
    frame = "jobs/mine.py:12 in loss: return tf.reduce_mean(loss)"
    failing = rehearsal(with_model=False, error="the loss has shape []", user_frame=frame)
    found = problem(model, survey(tmp_path, rehearsals=(failing,)))
    assert f"the loss has shape [] (at {frame})" in found.seen


def test_a_step_beyond_the_hosts_memory_is_told_with_what_would_fit(tmp_path: Path) -> None:
    mine = rehearsal().footprint
    assert mine is not None
    # 12 GiB of activations for 8 examples, of which a node with 8 GiB has room for 4.
    large = dataclasses.replace(mine, step_bytes=mine.gradient_bytes + 12 * GIB)
    small = MemoryLimit(8 * GIB, "of its cgroup (/sys/fs/cgroup/memory.max)")
    nodes = [node(number, memory=small) for number in (1, 2)]
    both = (rehearsal(footprint=large), rehearsal(with_model=False))
    found = findings(memory, survey(tmp_path, *nodes, rehearsals=both))[0]
    assert "the limit of its cgroup (/sys/fs/cgroup/memory.max) is 8.0 GiB" in found.seen
    assert found.mend.startswith("about 4 examples at a time would fit: train.micro_batches=2")


def test_a_step_beyond_a_gpus_memory_is_told_with_what_would_fit(tmp_path: Path) -> None:
    mine = rehearsal().footprint
    assert mine is not None
    large = dataclasses.replace(mine, step_bytes=160 * GIB, micro_batch_size=16)
    found = problem(
        memory,
        dataclasses.replace(on_gpus(tmp_path, H100), rehearsals=(rehearsal(footprint=large),)),
    )
    assert "GPU 0 has 80.0 GiB" in found.seen
    assert found.mend.startswith("about 7 examples at a time would fit: train.micro_batches=3")


def test_a_model_beyond_a_gpus_memory_is_told_as_that(tmp_path: Path) -> None:
    mine = rehearsal().footprint
    assert mine is not None
    large = dataclasses.replace(mine, model_bytes=200 * GIB)
    held = dataclasses.replace(on_gpus(tmp_path, H100), rehearsals=(rehearsal(footprint=large),))
    assert problem(memory, held).mend.startswith("not even model and optimizer fit (200")


def test_memory_that_others_hold_is_said(tmp_path: Path) -> None:
    nodes = (node(1), node(2, free_memory_bytes=100 * MIB))
    assert "100 MiB of memory are free" in notice(memory, survey(tmp_path, *nodes)).seen


def test_fewer_gpus_than_asked_are_told_with_both_figures(tmp_path: Path) -> None:
    found = problem(gpus, on_gpus(tmp_path, H100, H100, asked="4"))
    assert found.seen == "host-1 (10.0.0.1) has 2 GPU(s) by nvidia-smi"
    assert "4" in found.why and "strategy.devices_per_worker to at most 2" in found.mend


def test_workers_of_a_node_are_counted_together_against_its_gpus(tmp_path: Path) -> None:
    two = on_gpus(tmp_path, *[H100] * 4, asked="4", ray_gpus=8)
    there = two.nodes[0].node_id
    two = dataclasses.replace(two, places={0: there, 1: there})
    found = findings(gpus, two)[0]
    assert found.error is not None and "has 4 GPU(s) by nvidia-smi" in found.seen
    assert found.why == "2 worker(s) there are to have 4 each"
    assert "strategy.devices_per_worker to at most 2" in found.mend


def test_gpus_that_a_plan_for_cpus_leaves_idle_are_said(tmp_path: Path) -> None:
    told = survey(tmp_path, node(1), node(2, gpus=(H100,), is_cpu_build=False))
    seen = [finding.seen for finding in findings(gpus, told)]
    assert seen[0] == "host-2 (10.0.0.2) has 1 x NVIDIA H100, the plan is for CPUs"
    assert "Ray was told of 0" in seen[1]


def test_a_busy_gpu_is_said(tmp_path: Path) -> None:
    busy = dataclasses.replace(H100, used_bytes=60 * GIB, busy_fraction=0.97)
    found = notice(gpus, on_gpus(tmp_path, busy))
    assert "GPU 0 of host-1 (10.0.0.1) is busy: 60.0 GiB of 80.0 GiB are held, 97%" in found.seen


def test_tensorflow_without_gpus_on_a_host_with_gpus_is_a_problem(tmp_path: Path) -> None:
    found = problem(gpus, on_gpus(tmp_path, H100, is_cpu_build=True))
    assert "tensorflow-cpu" in found.seen and "make setup device=gpu" in found.mend


def test_gpus_that_ray_was_not_told_of_are_said(tmp_path: Path) -> None:
    found = notice(gpus, on_gpus(tmp_path, H100, H100, ray_gpus=1))
    assert "has 2 GPU(s), Ray was told of 1" in found.seen


def test_what_nvidia_smi_prints_is_read(tmp_path: Path) -> None:
    text = "0, NVIDIA H100 80GB HBM3, 81559, 4, 0\n1, NVIDIA T4, 15360, 1200, [N/A]\n"
    first, second = parse_gpus(text)
    assert (first.name, first.total_bytes) == ("NVIDIA H100 80GB HBM3", 81559 * MIB)
    assert (second.index, second.used_bytes, second.busy_fraction) == (1, 1200 * MIB, 0.0)


def test_checkpoints_beyond_the_disk_are_told_with_both_figures(tmp_path: Path) -> None:
    # 3 kept and one in the making, of 12 MiB; 3 x 4 MiB of exports; 64 MiB of the rest.
    full = survey(tmp_path, own=node(0, free_disk_bytes=100 * MIB))
    found = problem(checkpoints, full)
    assert found.seen.endswith("has 100 MiB free") and "up to 124 MiB" in found.why
    assert "checkpoint.keep" in found.mend


def test_a_small_shared_memory_and_few_files_on_a_node_are_said(tmp_path: Path) -> None:
    poor = node(2, shm_bytes=64 * MIB, max_files=1024)
    seen = [finding.seen for finding in findings(limits, survey(tmp_path, node(1), poor))]
    assert seen == [
        "host-2 (10.0.0.2): /dev/shm has 64 MiB",
        "host-2 (10.0.0.2): at most 1024 files may be open (ulimit -n)",
    ]
