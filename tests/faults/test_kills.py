"""SIGKILL: workers at any moment, both at once, the driver itself."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from orchestrator.control.launcher import Zygote
from tests.cluster.conftest import Cluster
from tests.cluster.rig import (
    database,
    finish,
    is_alive,
    last_step,
    records,
    runs_in,
    wait_for,
)
from tests.faults import rig
from tests.faults.chaos_rig import Here, planted
from tests.faults.leftovers import Leftovers
from tests.faults.rig import JOB, QUIET, TWO, ended, paced, wait_for_record

STEPS, EVERY = 200, 20
# Detection and fencing are promises; the slack is for a machine that does other things too.
DETECT_S, GONE_S, SLACK_S = 0.5, 3.0, 1.5


@pytest.fixture(scope="session")
def undisturbed(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> rig.RunPaths:
    """A run of two workers that nobody disturbed, as quick as it can be: without Ray, too."""
    folder = tmp_path_factory.mktemp("undisturbed")
    arguments = [JOB[0], *TWO, *QUIET, "job.args.step_ms=0", f"runs_dir={folder}"]
    run = planted(Here, zygote)(arguments, folder, folder / "log")
    run.start("run_name=undisturbed")
    wait_for(lambda: run.code is not None, "the undisturbed run to end")
    run.close()
    assert run.code == 0, run.tail()
    return run.plan.paths


def is_as_undisturbed(run: rig.RunPaths, undisturbed: rig.RunPaths) -> None:
    """Compare final weights bit for bit, and the examples they were made of."""
    assert rig.weights(run) == rig.weights(undisturbed)
    assert rig.ledger_is_right(run, STEPS)


def lost_steps(run: rig.RunPaths, attempt: int) -> int:
    """Return how many steps of an attempt the next one made again."""
    made = [r for r in records(run, "BlockDone") if r["attempt"] == attempt]
    again = min(r["first_step"] for r in records(run, "BlockDone") if r["attempt"] == attempt + 1)
    return max(r["first_step"] + r["num_steps"] for r in made) - again


def check_kill(run: rig.RunPaths, attempt: int, at: float, survivors_s: float) -> None:
    told = [r for kind in ("Death", "Failed") for r in records(run, kind)]
    first = min(r["time"] for r in told if r["attempt"] == attempt)
    assert first - at < DETECT_S + SLACK_S
    assert survivors_s < GONE_S + SLACK_S
    # The interval, and what was made while one save was written.
    assert lost_steps(run, attempt) <= EVERY + 10


def test_workers_killed_at_random_steps_change_nothing(
    tmp_path: Path, undisturbed: rig.RunPaths
) -> None:
    process = paced(*TWO, *QUIET, cwd=tmp_path)
    run = wait_for_record(tmp_path, "AttemptStarted")
    draw = random.Random(4)
    for attempt, victims in enumerate([(1,), (0,), (0, 1)], 1):
        pids = rig.wait_for_attempt_step(run, attempt, 50 * attempt - 20 + draw.randrange(20))
        at = rig.kill(*(pids[worker] for worker in victims))
        gone_s = rig.wait_until_gone(*pids.values(), timeout_s=10)
        rig.wait_for_attempt_step(run, attempt + 1, 1)
        check_kill(run, attempt, at, gone_s)
    # Twice within a second: the group is killed again as soon as it is there.
    pids = rig.wait_for_attempt_step(run, 4, 150)
    rig.kill(pids[1])
    wait_for(lambda: len([r for r in records(run, "Ready") if r["attempt"] == 5]) == 2, "workers")
    rig.kill(*(r["pid"] for r in records(run, "Ready") if r["attempt"] == 5))
    out = finish(process, tmp_path)
    assert out.code == 0, out.out
    assert rig.attempts(run) == [1, 2, 3, 4, 5, 6], out.out
    is_as_undisturbed(run, undisturbed)


@pytest.mark.thorough
@pytest.mark.parametrize("phase", ["tracing", "exporting", "connecting", "building"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_kill_in_another_phase(
    tmp_path: Path, undisturbed: rig.RunPaths, phase: str, victim: int
) -> None:
    lingering = f"job.args.linger={phase}"
    process = paced(*TWO, "job.args.step_ms=0", lingering, cwd=tmp_path)
    run = wait_for_record(tmp_path, "Beacon", phase=phase)
    log = run.worker_log(1, victim)
    pid = wait_for(lambda: _pid_of(log), "the worker's process")
    rig.kill(pid)
    out = finish(process, tmp_path)
    assert out.code == 0, out.out
    is_as_undisturbed(run, undisturbed)


def _pid_of(log: Path) -> int | None:
    """Return the process whose output goes to a log."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "fd/1").resolve() == log:
                return int(folder.name)
        except OSError:
            continue
    return None


@pytest.mark.thorough
def test_the_chief_killed_while_worker_1_is_frozen(
    tmp_path: Path, undisturbed: rig.RunPaths
) -> None:
    process = paced(*TWO, *QUIET, cwd=tmp_path)
    run = wait_for_record(tmp_path, "Saved")
    pids = rig.wait_for_attempt_step(run, 1, 50)
    os.kill(pids[1], signal.SIGSTOP)
    at = rig.kill(pids[0])
    gone_s = rig.wait_until_gone(*pids.values(), timeout_s=15)
    out = finish(process, tmp_path)
    assert out.code == 0, out.out
    check_kill(run, 1, at, gone_s)
    is_as_undisturbed(run, undisturbed)


def test_a_killed_driver_leaves_nothing_and_auto_goes_on(
    tmp_path: Path, undisturbed: rig.RunPaths, leftovers: Leftovers
) -> None:
    process = paced(*TWO, *QUIET, "job.args.step_ms=100", cwd=tmp_path)
    run = wait_for_record(tmp_path, "Saved")
    pids = rig.wait_for_attempt_step(run, 1, 30)
    # A second driver is refused, and names the first.
    second = ended("resume=auto", cwd=tmp_path)
    assert second.code == 5, second.out
    assert f"is held by process {process.pid} on " in second.out
    assert process.poll() is None

    process.kill()
    process.wait()
    rig.wait_until_gone(*pids.values(), timeout_s=2.0 + SLACK_S)
    # The guardian waits whether the run goes on, then tells MLflow how it has ended.
    wait_for(lambda: not leftovers.found(), "nothing to be left", 30)

    again = ended("resume=auto", "job.args.step_ms=0", cwd=tmp_path)
    assert again.code == 0, again.out
    said = " ".join(again.out.split())
    assert f"process {process.pid} on " in said and "its lease was taken over" in said
    assert len(runs_in(tmp_path)) == 1 and len(database(tmp_path)) == 1
    assert database(tmp_path)[0]["status"] == "FINISHED"
    is_as_undisturbed(run, undisturbed)


@pytest.mark.thorough
def test_a_driver_killed_on_an_existing_cluster_leaves_no_worker(
    ray_cluster: Cluster, tmp_path: Path, undisturbed: rig.RunPaths, leftovers: Leftovers
) -> None:
    # The cluster stays, and its zygote for as long as the next attempt may need it.
    leftovers.allowed = ("ray", "orchestrator.train.zygote")
    there = (
        "cluster=existing",
        f"cluster.address={ray_cluster.address}",
        "cluster.trusted_network=true",
    )
    process = paced(*TWO, *QUIET, *there, cwd=tmp_path, env=ray_cluster.env)
    run = wait_for_record(tmp_path, "Saved")
    pids = rig.wait_for_attempt_step(run, 1, 50)
    process.kill()
    process.wait()
    begin = time.monotonic()
    rig.wait_until_gone(*pids.values(), timeout_s=2.0 + SLACK_S)
    print(f"workers gone after {time.monotonic() - begin:.2f} s")
    again = ended("resume=auto", cwd=tmp_path, env=ray_cluster.env)
    assert again.code == 0, again.out
    assert not any(map(is_alive, pids.values())) and last_step(run) == STEPS
    is_as_undisturbed(run, undisturbed)
