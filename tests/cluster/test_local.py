"""Runs on a Ray of their own: strategies, what they leave behind, and how they are ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from socket import gethostname

import numpy as np
import pytest

from orchestrator.control.folders import prepare
from orchestrator.train.store import (
    EvaluationState,
    evaluation_of,
    list_checkpoints,
    newest_valid,
)
from tests.cluster import rig
from tests.cluster.conftest import free_port
from tests.cluster.rig import Ended, train
from tests.plans import tiny_plan

SLOW = ("job.args.delay_ms=20", "train.max_block_steps=4", "train.steps=160")


def test_a_run_leaves_everything_that_is_promised(one_device: Ended) -> None:
    assert one_device.code == 0, one_device.out
    run = one_device.run
    assert "eval/accuracy" in run.driver_log.read_text()
    assert "finished: 120 steps" in run.driver_log.read_text()
    for path in (run.config, run.plan, run.overrides, run.journal, run.proof, run.saved_model_dir):
        assert path.exists(), path
    assert run.worker_log(1, 0).stat().st_size > 0
    (checkpoint,) = list_checkpoints(run.checkpoints_dir)
    assert checkpoint.name == "step-00000120"
    assert evaluation_of(checkpoint) is EvaluationState.told
    assert rig.records(run, "RunEnded")[0]["status"] == "FINISHED"
    assert len(rig.losses(run)) == 120
    assert [record["step"] for record in rig.records(run, "Evaluated")] == [60, 120]


def test_what_is_printed_is_plain_and_fits_80_columns_but_for_paths(one_device: Ended) -> None:
    assert "\x1b" not in one_device.out
    assert "finished: 120 steps" in one_device.out
    for chatter in ("WARNING", "oneDNN", "ray::", "absl", "Traceback"):
        assert chatter not in one_device.out
    # A path and a command to copy stay in one piece.
    whole = ("/", "make train")
    long = [line for line in one_device.out.splitlines() if len(line) > 80]
    assert [line for line in long if not any(part in line for part in whole)] == []


def test_the_worker_says_in_its_log_what_it_was_given(one_device: Ended) -> None:
    log = one_device.run.worker_log(1, 0).read_text()
    assert "worker 0 of 1: CPU:0, " in log
    assert "CUDA_VISIBLE_DEVICES=''" in log


@pytest.mark.parametrize(
    "overrides",
    [
        ("strategy=mirrored", "strategy.devices_per_worker=2", "export.enabled=false"),
        ("strategy=multi_worker", "strategy.num_workers=2"),
    ],
    ids=["mirrored", "multi_worker"],
)
def test_a_word_changes_where_it_runs_and_not_what_it_computes(
    one_device: Ended, tmp_path: Path, kept_ray: dict[str, str], overrides: tuple[str, ...]
) -> None:
    # Dropout draws one mask a replica, so it is equal for equal numbers of replicas only.
    computes_the_same(train(*overrides, cwd=tmp_path, env=kept_ray), one_device, 0.2)


@pytest.mark.thorough
def test_a_process_made_afresh_computes_the_same(one_device: Ended, tmp_path: Path) -> None:
    computes_the_same(train("cluster.fork=false", cwd=tmp_path), one_device, 1e-6)


def computes_the_same(ended: Ended, one_device: Ended, tolerance: float) -> None:
    assert ended.code == 0, ended.out
    assert rig.ledger(ended.run) == rig.ledger(one_device.run)
    np.testing.assert_allclose(
        rig.losses(ended.run)[-20:].mean(), rig.losses(one_device.run)[-20:].mean(), rtol=tolerance
    )
    assert rig.database(ended.folder)[0]["status"] == "FINISHED"
    # However many workers are on it, a node tells of itself once.
    assert [record["node"] for record in rig.records(ended.run, "NodeFound")] == [gethostname()]


@pytest.fixture(scope="module")
def inline(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """A finished run in the command's own process."""
    return train("cluster=inline", cwd=tmp_path_factory.mktemp("inline"))


def test_a_run_without_ray_computes_the_same(inline: Ended, one_device: Ended) -> None:
    computes_the_same(inline, one_device, 1e-6)


def test_inline_output_has_no_chatter_either(inline: Ended) -> None:
    for chatter in ("WARNING", "oneDNN", "rebuild TensorFlow"):
        assert chatter not in inline.out


def test_ctrl_c_saves_and_the_resumed_run_is_the_run_that_was_stopped(
    tmp_path: Path, kept_ray: dict[str, str]
) -> None:
    slow = (*SLOW, "export.enabled=false")
    process = rig.start("train", *rig.JOB, *slow, "run_name=stopped", cwd=tmp_path)
    run = rig.wait_for_step(tmp_path, 20)
    rig.interrupt(process)
    ended = rig.finish(process, tmp_path)
    assert ended.code == 130, ended.out
    assert "resume=stopped" in ended.out
    stopped_at = rig.last_step(run)
    assert stopped_at < 160
    assert [path.name for path in list_checkpoints(run.checkpoints_dir)] == [
        f"step-{stopped_at:08}"
    ]
    rig.wait_until_known_as(tmp_path, "KILLED")

    # The run keeps its own overrides: 160 steps, in blocks of 4.
    resumed = train("resume=latest", cwd=tmp_path, env=kept_ray)
    assert resumed.code == 0, resumed.out
    assert rig.statuses(tmp_path) == ["FINISHED"]
    whole = train(*slow, "job.args.delay_ms=0", cwd=tmp_path, env=kept_ray)
    np.testing.assert_allclose(rig.losses(run), rig.losses(whole.run), rtol=1e-6)
    assert sum(rig.ledger(run, attempt) for attempt in (1, 2)) % 2**64 == rig.ledger(whole.run)


def test_ctrl_c_saves_when_the_worker_has_the_main_thread(tmp_path: Path) -> None:
    process = rig.start("train", *rig.JOB, *SLOW, "cluster=inline", cwd=tmp_path)
    run = rig.wait_for_step(tmp_path, 8)
    rig.interrupt(process)
    ended = rig.finish(process, tmp_path)
    assert ended.code == 130, ended.out
    assert newest_valid(run.checkpoints_dir).path is not None


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.thorough)]
)
def test_other_signals_save_too(
    tmp_path: Path, kept_ray: dict[str, str], number: signal.Signals
) -> None:
    process = rig.start("train", *rig.JOB, *SLOW, cwd=tmp_path, env=kept_ray)
    run = rig.wait_for_step(tmp_path, 8)
    rig.interrupt(process, number)
    ended = rig.finish(process, tmp_path)
    assert ended.code == (143 if number is signal.SIGTERM else 130), ended.out
    assert newest_valid(run.checkpoints_dir).path is not None
    rig.wait_until_known_as(tmp_path, "KILLED")


def test_a_second_ctrl_c_ends_it_now_and_leaves_no_process(tmp_path: Path) -> None:
    # A step of three seconds: the first Ctrl-C waits for its block.
    slow = ("job.args.delay_ms=3000", "train.max_block_steps=1", "train.steps=100")
    process = rig.start("train", *rig.JOB, *slow, cwd=tmp_path)
    run = rig.wait_for_step(tmp_path, 1)
    pids = rig.worker_pids(run)
    rig.interrupt(process)
    rig.interrupt(process)
    ended = rig.finish(process, tmp_path)
    assert ended.code == 130, ended.out
    assert not any(rig.is_alive(pid) for pid in pids.values())
    rig.wait_until_known_as(tmp_path, "KILLED")


@pytest.mark.thorough
def test_a_killed_worker_costs_a_restart_and_changes_nothing(tmp_path: Path) -> None:
    two = ("strategy=multi_worker", "strategy.num_workers=2", "checkpoint.every_steps=20")
    process = rig.start("train", *rig.JOB, *SLOW, *two, cwd=tmp_path)
    run = rig.wait_for_step(tmp_path, 50)
    os.kill(rig.worker_pids(run)[1], signal.SIGKILL)
    ended = rig.finish(process, tmp_path)
    assert ended.code == 0, ended.out
    assert "SIGKILL" in ended.out and "retry 1 of" in ended.out
    attempts = [record["attempt"] for record in rig.records(run, "AttemptStarted")]
    assert attempts == [1, 2], ended.out
    assert rig.records(run, "AttemptStarted")[1]["restore_from"] is not None
    undisturbed = train(*SLOW, *two, "job.args.delay_ms=0", cwd=tmp_path)
    np.testing.assert_allclose(rig.losses(run), rig.losses(undisturbed.run), rtol=1e-5)


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose reader goes away, with an unrelated Ray and MLflow in its environment."""
    folder = tmp_path_factory.mktemp("left-alone")
    env = {"RAY_ADDRESS": "192.0.2.1:6379", "MLFLOW_TRACKING_URI": "http://192.0.2.1:5000"}
    process = rig.start("train", *rig.JOB, "export.enabled=false", cwd=folder, env=env)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(120) == 0
    return folder


def test_a_reader_that_goes_away_does_not_end_the_run(left_alone: Path) -> None:
    assert rig.records(rig.runs_in(left_alone)[-1], "RunEnded")[0]["status"] == "FINISHED"


def test_an_unrelated_ray_in_the_environment_is_not_joined(left_alone: Path) -> None:
    log = rig.runs_in(left_alone)[-1].driver_log.read_text()
    assert "RAY_ADDRESS=192.0.2.1:6379 is set and not honoured" in log
    assert len(rig.database(left_alone)) == 1


def test_two_runs_started_at_once_have_a_folder_and_a_record_each(tmp_path: Path) -> None:
    processes = [
        rig.start("train", *rig.JOB, "export.enabled=false", cwd=tmp_path) for _ in range(2)
    ]
    ended = [rig.finish(process, tmp_path) for process in processes]
    assert [item.code for item in ended] == [0, 0], ended[0].out + ended[1].out
    assert len(rig.runs_in(tmp_path)) == 2
    assert rig.statuses(tmp_path) == ["FINISHED", "FINISHED"]


def test_the_users_own_line_comes_first_and_once(tmp_path: Path, kept_ray: dict[str, str]) -> None:
    two = ("strategy=multi_worker", "strategy.num_workers=2")
    ended = train("job.args.fail=trace", *two, cwd=tmp_path, env=kept_ray)
    assert ended.code == 3, ended.out
    # A line when it happens, then the story: the user's line, the error, the end of the log.
    assert ended.out.count("ValueError: the user's own words") == 3
    assert "  | ValueError: the user's own words" in ended.out
    assert ended.out.count("blobs.py:") == 1
    assert ended.out.index("blobs.py:") < ended.out.index("\n  ValueError: the user's own words")
    assert "worker-" in ended.out and "Traceback" not in ended.out
    assert rig.database(tmp_path)[0]["status"] == "FAILED"


def test_two_workers_with_different_clocks_and_signals_act_alike(tmp_path: Path) -> None:
    script = Path(__file__).with_name("agreeing.py")
    prepare(tiny_plan(tmp_path).paths, 1)
    ports = [str(free_port()) for _ in range(2)]
    workers = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path), str(worker), *ports],
            env={**os.environ, "PYTHONPATH": str(rig.ROOT), "TF_CPP_MIN_LOG_LEVEL": "2"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for worker in range(2)
    ]
    told = [_told_until_the_end(worker) for worker in workers]
    for worker in workers:
        worker.communicate(timeout=60)
    assert [worker.returncode for worker in workers] == [0, 0], told
    blocks = [[line for line in lines if line.startswith("block")] for lines in told]
    # Only worker 1 was asked to save after its third block and to stop after its sixth.
    assert blocks[0] == blocks[1]
    assert len(blocks[0]) == 6
    assert [line for line in told[0] if line.startswith("saved")] == [
        f"saved {blocks[0][2].split()[-1]}",
        f"saved {blocks[0][5].split()[-1]}",
    ]
    assert told[0][-1] == told[1][-1] == f"ended stopped {blocks[0][5].split()[-1]}"


def _told_until_the_end(worker: subprocess.Popen[str]) -> list[str]:
    """Return what a worker prints until it says that it has ended, or is gone."""
    told = []
    assert worker.stdout is not None
    for line in worker.stdout:
        told.append(line.rstrip())
        if line.startswith("ended"):
            break
    return told
