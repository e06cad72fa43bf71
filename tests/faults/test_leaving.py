"""Signals and limits of time: a run saves, ends, and goes on where it was."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestrator.train.store import newest_valid, step_of
from tests.cluster.rig import (
    finish,
    interrupt,
    is_alive,
    last_step,
    records,
    runs_in,
    start,
    statuses,
    wait_for,
    wait_until_known_as,
)
from tests.faults import rig
from tests.faults.rig import JOB, QUIET, TWO, ended, paced, status, wait_for_record

# A stop has 30 s; these machines are shared.
_STOP_S = 30.0
_NOW_S = 2.0
_SLACK_S = 1.5


def newest(run: rig.RunPaths) -> int:
    """Return the step of the newest valid checkpoint; 0 without one."""
    path = newest_valid(run.checkpoints_dir).path
    return step_of(path) if path is not None else 0


@pytest.mark.thorough
def test_a_stop_while_ray_starts_is_quick_and_leaves_no_run_without_a_record(
    tmp_path: Path,
) -> None:
    process = paced(*QUIET, "run_name=early", cwd=tmp_path)
    run = wait_for_record(tmp_path, "AttemptStarted")
    begin = time.monotonic()
    interrupt(process, signal.SIGTERM)
    out = finish(process, tmp_path)
    assert out.code == 143, out.out
    assert time.monotonic() - begin < 15
    assert "SIGTERM: stopping; there is nothing to save" in out.out
    assert status(run) == "KILLED"


def test_a_stop_before_there_is_a_run_leaves_no_folder(tmp_path: Path) -> None:
    process = paced(*QUIET, cwd=tmp_path)
    # The driver catches signals when it holds its first child, the watcher or the zygote.
    wait_for(lambda: _children(process.pid), "the driver's first child")
    interrupt(process, signal.SIGINT)
    out = finish(process, tmp_path)
    assert out.code == 130, out.out
    assert not list((tmp_path / "runs").glob("*/*")) or status(runs_in(tmp_path)[-1]) == "KILLED"
    assert "Traceback" not in out.out


def _children(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []


@pytest.mark.parametrize(
    "phase",
    [
        pytest.param("loading data", marks=pytest.mark.thorough),
        pytest.param("building", marks=pytest.mark.thorough),
        pytest.param("tracing", marks=pytest.mark.thorough),
        pytest.param("evaluating", marks=pytest.mark.thorough),
    ],
)
def test_a_stop_in_any_phase_saves_what_was_made(tmp_path: Path, phase: str) -> None:
    lingering = f"job.args.linger='{phase}'"
    process = paced("train.eval_every_steps=30", lingering, *TWO, cwd=tmp_path)
    run = wait_for_record(tmp_path, "Beacon", phase=phase)
    begin = time.monotonic()
    interrupt(process, signal.SIGTERM)
    out = finish(process, tmp_path)
    assert out.code == 143, out.out
    assert time.monotonic() - begin < _STOP_S
    assert newest(run) == last_step(run), out.out
    assert status(run) == "KILLED"
    if records(run, "BlockDone"):
        wait_until_known_as(tmp_path, "KILLED")


@pytest.mark.thorough
def test_a_stop_does_not_wait_for_a_long_evaluation_which_is_made_when_the_run_goes_on(
    tmp_path: Path,
) -> None:
    # 1,024 batches of two, 64 in a call that takes a second: 16 s, and its first step is traced.
    long = ("job.args.linger=evaluating", "job.args.num_eval=2048", "data.num_eval_examples=2048")
    few = ("train.global_batch_size=2", "train.steps=60", "train.eval_every_steps=30")
    process = paced(*long, *few, "export.enabled=false", *TWO, cwd=tmp_path)
    run = wait_for_record(tmp_path, "Beacon", phase="evaluating")
    begin = time.monotonic()
    interrupt(process, signal.SIGTERM)
    out = finish(process, tmp_path)
    print(f"stopped after {time.monotonic() - begin:.1f} s")
    assert out.code == 143, out.out
    assert records(run, "Evaluated") == []
    assert newest(run) == last_step(run) == 30

    again = ended("resume=latest", "job.args.linger=nowhere", cwd=tmp_path)
    assert again.code == 0, again.out
    evaluated = [(record["attempt"], record["step"]) for record in records(run, "Evaluated")]
    assert evaluated == [(2, 30), (2, 60)]


@pytest.mark.thorough
def test_a_stop_while_exporting_leaves_only_the_export_to_be_done(tmp_path: Path) -> None:
    process = paced("train.steps=40", "job.args.linger=exporting", cwd=tmp_path)
    run = wait_for_record(tmp_path, "Beacon", phase="exporting")
    begin = time.monotonic()
    interrupt(process, signal.SIGTERM)
    out = finish(process, tmp_path)
    assert out.code == 143, out.out
    assert time.monotonic() - begin < _STOP_S
    assert status(run) == "KILLED" and newest(run) == 40

    again = ended("resume=latest", "job.args.linger=nowhere", cwd=tmp_path)
    assert again.code == 0, again.out
    assert not [r for r in records(run, "BlockDone") if r["attempt"] > 1]
    assert status(run) == "FINISHED" and run.proof.exists()
    assert statuses(tmp_path) == ["FINISHED"]


@pytest.mark.thorough
def test_a_second_signal_ends_all_in_two_seconds(tmp_path: Path) -> None:
    # Steps of five seconds: the first signal waits for one.
    process = paced("job.args.step_ms=5000", *TWO, *QUIET, cwd=tmp_path)
    run = wait_for_record(tmp_path, "Beacon", phase="stepping")
    pids = [record["pid"] for record in records(run, "Ready")]
    interrupt(process)
    wait_for(lambda: "SIGINT" in run.driver_log.read_text(), "the first signal")
    begin = time.monotonic()
    interrupt(process)
    out = finish(process, tmp_path)
    took_s = time.monotonic() - begin
    assert out.code == 130, out.out
    assert took_s < _NOW_S + _SLACK_S
    assert not any(map(is_alive, pids))
    assert status(run) == "KILLED"


def test_a_stop_of_the_whole_process_group_while_tracing_saves(tmp_path: Path) -> None:
    lingering = "job.args.linger=tracing"
    command = [sys.executable, "-m", "orchestrator", "train", *JOB, *TWO, *QUIET, lingering]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    run = wait_for_record(tmp_path, "Beacon", phase="tracing")
    begin = time.monotonic()
    rig.signal_group(process, signal.SIGTERM)
    out = finish(process, tmp_path)
    assert out.code == 143, out.out
    assert time.monotonic() - begin < _STOP_S
    assert newest(run) == last_step(run) > 0
    wait_until_known_as(tmp_path, "KILLED")


@pytest.mark.thorough
@pytest.mark.parametrize("phase", ["tracing", "evaluating", "stepping"])
def test_a_worker_that_gets_sigterm_lets_all_save(tmp_path: Path, phase: str) -> None:
    lingering = ("train.eval_every_steps=30", f"job.args.linger={phase}", "export.enabled=false")
    process = paced(*lingering, *TWO, cwd=tmp_path)
    run = wait_for_record(tmp_path, "Beacon", phase=phase, worker=1)
    pids = {record["worker"]: record["pid"] for record in records(run, "Ready")}
    begin = time.monotonic()
    os.kill(pids[1], signal.SIGTERM)
    out = finish(process, tmp_path)
    assert out.code == 143, out.out
    assert time.monotonic() - begin < _STOP_S
    assert newest(run) == last_step(run) > 0
    assert rig.attempts(run) == [1] and status(run) == "KILLED"


@pytest.mark.thorough
def test_a_stop_while_a_checkpoint_is_written_waits_for_it_and_saves_the_last_step(
    tmp_path: Path,
) -> None:
    paces = ("chaos.step_ms=1", "checkpoint.every_steps=20", "checkpoint.keep=9")
    process = paced(*paces, *TWO, *QUIET, cwd=tmp_path)
    run = wait_for_record(tmp_path, "BlockDone")
    run.chaos_dir.mkdir(exist_ok=True)
    (run.chaos_dir / "hold-save").touch()
    wait_for((run.chaos_dir / "hold-save.taken").exists, "a save that is held")
    begin = time.monotonic()
    interrupt(process, signal.SIGTERM)
    stopped_at = last_step(run)
    time.sleep(2.0)
    # The step is made, its save waits for the one before: nothing is given up meanwhile.
    assert process.poll() is None and newest(run) < stopped_at
    (run.chaos_dir / "release-save").touch()
    out = finish(process, tmp_path)
    assert out.code == 143, out.out
    assert time.monotonic() - begin < _STOP_S
    assert newest(run) == last_step(run) >= stopped_at
    assert rig.attempts(run) == [1] and status(run) == "KILLED"


@pytest.mark.thorough
def test_the_time_counts_from_the_command_and_resume_goes_on(tmp_path: Path) -> None:
    begin = time.monotonic()
    first = ended("train.max_time_s=12", "train.steps=2000", *QUIET, cwd=tmp_path)
    assert first.code == 75, first.out
    assert time.monotonic() - begin < 12 + _STOP_S
    run = first.run
    assert 0 < newest(run) == last_step(run) < 2000
    assert "train.max_time_s is over: saving, then stopping" in first.out
    steps = last_step(run) + 20
    again = ended("resume=auto", "train.max_time_s=null", f"train.steps={steps}", cwd=tmp_path)
    assert again.code == 0, again.out
    assert len(runs_in(tmp_path)) == 1 and last_step(run) == steps


@pytest.mark.thorough
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_at_a_random_moment_of_the_start_ends_well(
    tmp_path: Path, number: signal.Signals
) -> None:
    for tenth in range(4, 60, 7):
        process = paced(*QUIET, cwd=tmp_path)
        try:
            process.wait(tenth / 10)
        except subprocess.TimeoutExpired:
            interrupt(process, number)
        begin = time.monotonic()
        out = finish(process, tmp_path)
        assert out.code in (128 + number, -number), (tenth, out.out)
        assert time.monotonic() - begin < 15, (tenth, out.out)
        assert "Traceback" not in out.out, (tenth, out.out)


@pytest.mark.thorough
def test_nohup_is_heeded(tmp_path: Path) -> None:
    process = subprocess.Popen(
        ["nohup", sys.executable, "-m", "orchestrator", "train", *JOB, *QUIET],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for_record(tmp_path, "Saved")
    interrupt(process, signal.SIGHUP)
    assert finish(process, tmp_path).code == 0


@pytest.mark.thorough
def test_a_moved_run_goes_on_and_its_changed_code_is_shown(tmp_path: Path) -> None:
    done = ended("train.steps=40", *QUIET, "job.args.step_ms=0", "run_name=first", cwd=tmp_path)
    assert done.code == 0, done.out
    shutil.move(tmp_path / "runs" / "paced", tmp_path / "elsewhere" / "paced")
    mine = shutil.copytree(rig.MINE, tmp_path / "mine")
    source = (mine / "paced.py").read_text()
    (mine / "paced.py").write_text(source.replace("Dropout(0.2)", "Dropout(0.1)"))
    arguments = ("job=paced", f"--config-dir={mine}", "runs_dir=elsewhere", "resume=first")
    again = finish(start("train", *arguments, "train.steps=60", cwd=tmp_path), tmp_path)
    assert again.code == 0, again.out
    assert "layers.Dropout(0.1)" in again.out and "code-before-attempt-2.diff" in again.out
    run = rig.RunPaths(tmp_path / "elsewhere" / "paced" / "first")
    assert last_step(run) == 60 and newest(run) == 60
    assert min(r["first_step"] for r in records(run, "BlockDone") if r["attempt"] == 2) == 40
    with sqlite3.connect(tmp_path / "elsewhere" / "mlflow.db") as connection:
        rows = connection.execute("select status from runs").fetchall()
    assert rows == [("FINISHED",)]
