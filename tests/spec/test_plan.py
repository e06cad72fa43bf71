"""What follows from a configuration: arithmetic, placement, TF_CONFIG, and the plan as text.

The plans of the shipped jobs are kept in `golden/`. After a change that is meant, write them anew
with `UPDATE_GOLDEN=1 python -m pytest tests/spec/test_plan.py` and review the difference like code.
"""

from __future__ import annotations

import json
import os
import pickle
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import PlanError
from orchestrator.spec.config import list_group, load_config
from orchestrator.spec.describe import describe, params_of
from orchestrator.spec.plan import Host, RunPlan, make_plan, split_evenly
from orchestrator.spec.schema import ClusterName, Precision, StrategyName
from tests.plans import tiny_config, tiny_plan

GOLDEN_DIR = Path(__file__).parent / "golden"
# Stands for the current folder in the golden files.
CWD = Path("/FOLDER")
CPU_HOST = Host(num_cpus=8, num_gpus=0)
GPU_HOST = Host(num_cpus=8, num_gpus=8)
MIRRORED = {"strategy__name": StrategyName.mirrored}
MULTI_WORKER = {"strategy__name": StrategyName.multi_worker}
# Each worker on a host of its own.
HOSTS = {**MULTI_WORKER, "cluster__name": ClusterName.existing}


def plan_on(host: Host, **changes: Any) -> RunPlan:
    return make_plan(tiny_config(**changes), run="RUN", host=host, cwd=CWD)


def plan_refusal(host: Host, **changes: Any) -> str:
    with pytest.raises(PlanError) as caught:
        plan_on(host, **changes)
    return str(caught.value)


# Sizes of parts.


def test_a_split_keeps_the_total_and_differs_by_at_most_one_with_the_larger_first() -> None:
    for total in range(120):
        for parts in range(1, 40):
            sizes = split_evenly(total, parts)
            assert len(sizes) == parts
            assert sum(sizes) == total
            assert max(sizes) - min(sizes) <= 1
            assert list(sizes) == sorted(sizes, reverse=True)


def test_the_first_replicas_get_what_does_not_divide() -> None:
    plan = plan_on(
        CPU_HOST, **MIRRORED, strategy__devices_per_worker="4", train__global_batch_size=10
    )
    # 10 = 4 * 2 + 2: the first two replicas have one more.
    assert plan.replica_batch_sizes == (3, 3, 2, 2)


def test_the_workers_share_all_replicas_in_order() -> None:
    changes = {"strategy__num_workers": 3, "strategy__devices_per_worker": "4"}
    plan = plan_on(GPU_HOST, **HOSTS, **changes)
    shares = [plan.worker_replicas(worker) for worker in range(plan.num_workers)]
    assert shares == [range(4), range(4, 8), range(8, 12)]
    assert plan.num_replicas == 12


# Steps.


@pytest.mark.parametrize(
    ("num_examples", "epochs", "steps"),
    [
        (96, 1.0, 6),  # 96 / 16
        (96, 2.5, 15),  # 2.5 * 6
        (96, 1.25, 8),  # 1.25 * 6 = 7.5
        (100, 1.0, 7),  # 100 / 16 = 6.25
        (100, 2.0, 13),  # 2 * 6.25 = 12.5, not 2 * 7
        (8, 1.0, 1),  # half a batch
        (96, 0.001, 1),
    ],
)
def test_epochs_become_steps_rounded_up_once(num_examples: int, epochs: float, steps: int) -> None:
    changes = {"data__num_examples": num_examples, "train__epochs": epochs, "train__steps": None}
    assert plan_on(CPU_HOST, **changes).total_steps == steps


def test_steps_go_before_epochs() -> None:
    assert plan_on(CPU_HOST, train__steps=5, train__epochs=100.0).total_steps == 5


def test_an_epoch_may_end_within_a_step() -> None:
    assert plan_on(CPU_HOST, data__num_examples=100).steps_per_epoch == Fraction(25, 4)


# Evaluation.


def test_an_eval_period_in_epochs_is_a_fraction_of_steps() -> None:
    plan = plan_on(CPU_HOST, data__num_examples=100, train__eval_every_epochs=0.5)
    # 100 / 16 = 25 / 4 steps an epoch, half of them between evaluations.
    assert plan.eval_period == Fraction(25, 8)


def test_an_eval_period_in_steps_goes_before_one_in_epochs() -> None:
    plan = plan_on(CPU_HOST, train__eval_every_steps=5, train__eval_every_epochs=0.5)
    assert plan.eval_period == 5


def test_without_a_period_there_is_only_the_evaluation_at_the_end() -> None:
    plan = plan_on(CPU_HOST)
    assert (plan.eval_period, plan.eval_steps > 0) == (None, True)


def test_without_eval_examples_there_is_no_evaluation() -> None:
    plan = plan_on(CPU_HOST, data__num_eval_examples=0, train__eval_every_steps=5)
    assert (plan.eval_period, plan.eval_steps) == (None, 0)


@pytest.mark.parametrize(
    ("num_eval_examples", "batch", "devices", "expected"),
    [
        (50, 16, "1", (16, 4)),  # 50 / 16 = 3.1
        (50, 10, "4", (3, 5)),  # ceil(10 / 4) = 3; 50 / (4 * 3) = 4.2
        (48, 16, "1", (16, 3)),
        (2, 16, "4", (2, 1)),  # fewer than the 4 of a replica
        (1, 16, "4", (1, 1)),
    ],
)
def test_an_evaluation_covers_every_example(
    num_eval_examples: int, batch: int, devices: str, expected: tuple[int, int]
) -> None:
    plan = plan_on(
        CPU_HOST,
        **MIRRORED,
        strategy__devices_per_worker=devices,
        train__global_batch_size=batch,
        data__num_eval_examples=num_eval_examples,
    )
    assert (plan.eval_batch_size, plan.eval_steps) == expected


# Devices.


@pytest.mark.parametrize(
    ("strategy", "asked", "num_gpus", "expected"),
    [
        (StrategyName.one_device, "1", 0, (1, "CPU")),
        (StrategyName.one_device, "1", 8, (1, "GPU")),
        (StrategyName.mirrored, "auto", 0, (1, "CPU")),
        (StrategyName.mirrored, "auto", 8, (8, "GPU")),
        (StrategyName.mirrored, "2", 0, (2, "CPU")),
        (StrategyName.mirrored, "2", 8, (2, "GPU")),
        (StrategyName.mirrored, "8", 8, (8, "GPU")),
        (StrategyName.multi_worker, "auto", 0, (1, "CPU")),
        (StrategyName.multi_worker, "1", 0, (1, "CPU")),
        (StrategyName.multi_worker, "auto", 4, (4, "GPU")),
    ],
)
def test_devices_follow_from_the_strategy_and_the_host(
    strategy: StrategyName, asked: str, num_gpus: int, expected: tuple[int, str]
) -> None:
    changes = {"strategy__name": strategy, "strategy__devices_per_worker": asked}
    plan = plan_on(Host(num_cpus=8, num_gpus=num_gpus), **changes)
    assert (plan.devices_per_worker, plan.device_kind) == expected


def test_more_gpus_than_a_host_has_are_refused_with_both_numbers() -> None:
    text = plan_refusal(Host(num_cpus=8, num_gpus=2), **MIRRORED, strategy__devices_per_worker="4")
    parts = ("strategy.devices_per_worker=4", "2 GPU", "at most 2", "auto")
    assert [part for part in parts if part not in text] == [], text


def test_several_devices_of_a_worker_without_gpus_are_refused_with_the_way_out() -> None:
    text = plan_refusal(CPU_HOST, **MULTI_WORKER, strategy__devices_per_worker="2")
    parts = (
        "strategy.devices_per_worker=2",
        "strategy=multi_worker",
        "no GPU",
        "strategy.num_workers",
        "strategy=mirrored",
    )
    assert [part for part in parts if part not in text] == [], text


def test_a_batch_smaller_than_the_replicas_is_refused_with_the_three_keys() -> None:
    changes = {"strategy__num_workers": 3, "strategy__devices_per_worker": "8"}
    text = plan_refusal(GPU_HOST, **HOSTS, **changes, train__global_batch_size=23)
    parts = (
        "train.global_batch_size=23",
        "24 replicas",  # 3 * 8
        "strategy.num_workers=3",
        "devices_per_worker=8",
        "at least 24",
    )
    assert [part for part in parts if part not in text] == [], text


def test_a_batch_smaller_than_the_micro_batches_of_all_replicas_is_refused() -> None:
    changes = {"strategy__devices_per_worker": "2", "train__micro_batches": 3}
    text = plan_refusal(CPU_HOST, **MIRRORED, **changes, train__global_batch_size=5)
    # 2 replicas with 3 micro-batches each
    parts = ("train.global_batch_size=5", "train.micro_batches", "3 micro-batches", "at least 6")
    assert [part for part in parts if part not in text] == [], text


def test_a_batch_with_one_example_for_each_micro_batch_is_planned() -> None:
    changes = {"strategy__devices_per_worker": "2", "train__micro_batches": 3}
    plan = plan_on(CPU_HOST, **MIRRORED, **changes, train__global_batch_size=6)
    assert plan.replica_batch_sizes == (3, 3)


@pytest.mark.parametrize(
    ("num_workers", "asked", "cpus"),
    [
        (1, None, 8),
        (2, None, 4),  # 8 / 2
        (3, None, 2),  # 8 / 3 = 2.7
        (9, None, 1),
        (2, 3, 3),
    ],
)
def test_workers_share_the_cores_of_a_host(num_workers: int, asked: int | None, cpus: int) -> None:
    changes = {"strategy__num_workers": num_workers, "cluster__cpus_per_worker": asked}
    assert plan_on(CPU_HOST, **MULTI_WORKER, **changes).cpus_per_worker == cpus


# Addresses and folders.


def test_tf_config_names_all_workers_and_the_own_one() -> None:
    plan = plan_on(CPU_HOST, **MULTI_WORKER, strategy__num_workers=2)
    assert json.loads(plan.tf_config(("10.0.0.1:20000", "10.0.0.2:20000"), 1)) == {
        "cluster": {"worker": ["10.0.0.1:20000", "10.0.0.2:20000"]},
        "task": {"type": "worker", "index": 1},
    }


def test_a_run_lies_in_the_folder_of_its_job(tmp_path: Path) -> None:
    plan = tiny_plan(tmp_path, runs_dir="my/../runs")
    assert plan.paths.root == tmp_path / "runs" / "tiny" / plan.run


def test_an_absolute_runs_dir_stays_as_it_is(tmp_path: Path) -> None:
    plan = plan_on(CPU_HOST, runs_dir=str(tmp_path))
    assert plan.paths.root == tmp_path / "tiny" / "RUN"


def test_a_database_is_known_by_its_path_wherever_a_process_is() -> None:
    plan = plan_on(CPU_HOST, tracking__uri="sqlite:///mlflow.db")
    assert plan.tracking_uri == "sqlite:////FOLDER/mlflow.db"


def test_the_record_goes_into_runs_dir_unless_told_otherwise() -> None:
    plan = plan_on(CPU_HOST)
    assert plan.tracking_uri == "sqlite:////FOLDER/runs/mlflow.db"
    assert plan.artifact_root == "/FOLDER/runs/mlartifacts"


def test_a_server_decides_where_its_artifacts_lie() -> None:
    plan = plan_on(CPU_HOST, tracking__uri="http://host:5000")
    assert (plan.tracking_uri, plan.artifact_root) == ("http://host:5000", None)


def test_the_folders_of_data_are_absolute_for_workers() -> None:
    plan = plan_on(CPU_HOST, data__path="mine/digits.npz")
    assert (plan.data_dir, plan.data_path) == ("/FOLDER/data", "/FOLDER/mine/digits.npz")


def test_a_plan_survives_the_way_to_a_worker() -> None:
    plan = plan_on(CPU_HOST)
    assert pickle.loads(pickle.dumps(plan)) == plan


# As text.


def test_a_plan_as_text_hides_the_password_of_the_tracking_server() -> None:
    text = describe(plan_on(CPU_HOST, tracking__uri="https://me:hunter2@host"))
    assert "https://***@host" in text and "hunter2" not in text


def test_one_worker_of_multi_worker_is_told_about_mirrored() -> None:
    text = describe(plan_on(CPU_HOST, **MULTI_WORKER, strategy__num_workers=1))
    assert "hint: multi_worker with one worker" in text and "strategy=mirrored" in text


def test_a_plan_as_text_keeps_to_80_columns_but_for_paths() -> None:
    plan = plan_on(CPU_HOST, **MIRRORED, cluster__name=ClusterName.existing, cluster__address="a:1")
    lines = describe(plan).splitlines()
    assert [line for line in lines if len(line) > 80 and "/" not in line] == []


def test_the_epochs_in_the_text_follow_from_the_steps() -> None:
    text = describe(plan_on(CPU_HOST, data__num_examples=100, train__steps=10))
    # 10 steps of 16 examples are 160 of 100.
    assert "10 steps = 1.6 epochs of 6.25 steps" in text


GOLDEN_CASES: dict[str, tuple[Host, list[str]]] = {
    "one_device": (CPU_HOST, ["strategy=one_device"]),
    "mirrored-2": (CPU_HOST, ["strategy=mirrored", "strategy.devices_per_worker=2"]),
    "multi_worker-2": (CPU_HOST, ["strategy=multi_worker", "strategy.num_workers=2"]),
    "mirrored-8-gpus": (GPU_HOST, ["strategy=mirrored"]),
}


@pytest.mark.parametrize("case", GOLDEN_CASES)
@pytest.mark.parametrize("job", list_group("job"))
def test_the_plan_of_a_shipped_job_reads_as_it_did(job: str, case: str) -> None:
    host, overrides = GOLDEN_CASES[case]
    config = load_config([f"job={job}", *overrides])
    text = describe(make_plan(config, run="RUN", host=host, cwd=CWD))
    path = GOLDEN_DIR / f"{job}-{case}.txt"
    if os.environ.get("UPDATE_GOLDEN") == "1":
        path.write_text(text, encoding="utf-8")
    assert path.is_file(), f"no {path}; UPDATE_GOLDEN=1 writes it"
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize(("host", "policy"), [(CPU_HOST, "float32"), (GPU_HOST, "mixed_bfloat16")])
def test_auto_precision_follows_the_device_and_the_plan_tells(host: Host, policy: str) -> None:
    plan = plan_on(host, precision__policy=Precision.auto)
    assert plan.precision is Precision(policy) and plan.loss_scale is None
    assert f"auto: {policy} (on a " in describe(plan)
    plan = plan_on(host, precision__policy=Precision.mixed_float16)
    assert plan.precision is Precision.mixed_float16 and plan.loss_scale == 2.0**15


def test_every_golden_file_belongs_to_a_shipped_job() -> None:
    expected = {f"{job}-{case}.txt" for job in list_group("job") for case in GOLDEN_CASES}
    assert {path.name for path in GOLDEN_DIR.iterdir()} == expected


def test_workers_of_a_local_cluster_share_its_gpus() -> None:
    # 8 GPUs / 3 workers = 2 for each, 2 stay free.
    plan = plan_on(GPU_HOST, **MULTI_WORKER, strategy__num_workers=3, **AUTO)
    assert (plan.devices_per_worker, plan.num_replicas) == (2, 6)
    text = plan_refusal(GPU_HOST, **MULTI_WORKER, strategy__num_workers=9, **AUTO)
    assert "9 workers" in text and "strategy.num_workers to at most 8" in text


AUTO = {"strategy__devices_per_worker": "auto"}


def test_a_part_of_an_epoch_is_taken_as_it_is_written() -> None:
    # 1.1 * 100 = 110 steps; as a sum of halves 1.1 is a little more, which would make it 111.
    plan = plan_on(CPU_HOST, data__num_examples=1600, train__steps=None, train__epochs=1.1)
    assert plan.total_steps == 110


def test_a_warm_up_as_long_as_the_run_is_refused() -> None:
    text = plan_refusal(CPU_HOST, train__steps=None, train__epochs=1.0, schedule__warmup_steps=99)
    assert "schedule.warmup_steps=99" in text and "6 steps" in text


def test_fewer_workers_change_neither_the_batch_nor_what_a_worker_takes() -> None:
    config = tiny_config(
        strategy__name=StrategyName.multi_worker,
        strategy__num_workers=3,
        strategy__min_workers=2,
        cluster__cpus_per_worker=None,
    )
    host = Host(num_cpus=12, num_gpus=0)
    whole, part = (
        make_plan(config, run="run", host=host, cwd=Path("/"), num_workers=number)
        for number in (None, 2)
    )
    assert (whole.num_workers, part.num_workers) == (3, 2)
    assert (whole.replica_batch_sizes, part.replica_batch_sizes) == ((6, 5, 5), (8, 8))
    assert (whole.total_steps, whole.steps_per_epoch) == (part.total_steps, part.steps_per_epoch)
    assert whole.cpus_per_worker == part.cpus_per_worker == 4
    assert whole.paths == part.paths


def test_workers_of_a_local_cluster_keep_their_gpus_when_there_are_fewer() -> None:
    config = tiny_config(
        strategy__name=StrategyName.multi_worker,
        strategy__num_workers=4,
        strategy__devices_per_worker="auto",
    )
    host = Host(num_cpus=8, num_gpus=8)
    plan = make_plan(config, run="run", host=host, cwd=Path("/"), num_workers=2)
    assert plan.devices_per_worker == 2


def test_an_elastic_plan_says_how_few_workers_it_may_have(tmp_path: Path) -> None:
    plan = tiny_plan(
        tmp_path,
        strategy__name=StrategyName.multi_worker,
        strategy__num_workers=3,
        strategy__min_workers=2,
    )
    assert "3 workers x 1 CPU = 3 replicas, multi_worker" in describe(plan)
    assert "at least 2 workers" in describe(plan)


def test_the_record_has_the_precision_that_auto_came_to() -> None:
    plan = tiny_plan(Path("/somewhere"), precision__policy=Precision.auto)
    assert params_of(plan)["precision.policy"] == "float32"
