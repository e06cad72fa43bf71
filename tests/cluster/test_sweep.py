"""Sweeps of real runs: what they leave, and how they go on after an interruption or a kill."""

from __future__ import annotations

import shutil
import signal
import sqlite3
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.spec.paths import RunPaths, SweepPaths
from orchestrator.track.mlflow_sweep import PARENT_TAG, STOPPED_TAG
from tests.cluster import rig
from tests.cluster.rig import MINE, Ended, finish, start, wait_for

QUICK = ("export.enabled=false", "train.eval_every_steps=20", "train.steps=40")
SLOW = (
    *("export.enabled=false", "train.eval_every_steps=20", "train.steps=120"),
    *("train.max_block_steps=4", "job.args.delay_ms=50", "checkpoint.every_steps=10"),
)


def sweep(cwd: Path, *arguments: str, config_dir: Path = MINE) -> subprocess.Popen[str]:
    return start("sweep", "job=blobs", f"--config-dir={config_dir}", *arguments, cwd=cwd)


def folder_of(cwd: Path) -> SweepPaths:
    (path,) = (cwd / "runs" / "sweeps").glob("*/sweep.json")
    return SweepPaths(path.parent)


def children(cwd: Path) -> list[RunPaths]:
    """Return the run folders of the children, in the order of their names."""
    return sorted(rig.runs_in(cwd), key=lambda paths: paths.root.name)


def tags(cwd: Path, run_id: str) -> dict[str, str]:
    with sqlite3.connect(cwd / "runs" / "mlflow.db") as connection:
        rows = connection.execute("select key, value from tags where run_uuid = ?", (run_id,))
        return dict(rows.fetchall())


def by_name(cwd: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in rig.database(cwd)}


def statuses(cwd: Path) -> list[str]:
    return [rig.records(run, "RunEnded")[-1]["status"] for run in children(cwd)]


def test_a_sweep_trains_its_children_below_one_parent_and_is_done_once(tmp_path: Path) -> None:
    asked = (*QUICK, "optimizer.learning_rate=1e-7,1e-2")
    done = finish(sweep(tmp_path, *asked), tmp_path)
    assert done.code == 0, done.out
    paths, runs = folder_of(tmp_path), children(tmp_path)
    name = paths.root.name
    assert [run.root.name for run in runs] == [f"{name}-01", f"{name}-02"]
    assert statuses(tmp_path) == ["FINISHED", "FINISHED"]
    assert [rig.last_step(run) for run in runs] == [40, 40]
    assert "02 finished: 40 steps" in done.out and "\x1b" not in done.out
    assert "best: 02, eval/loss" in paths.table.read_text()
    found = by_name(tmp_path)
    parent = found.pop(name)
    assert parent["status"] == "FINISHED"
    assert {tags(tmp_path, row["run_uuid"])[PARENT_TAG] for row in found.values()} == {
        parent["run_uuid"]
    }
    about = tags(tmp_path, parent["run_uuid"])
    assert about["orchestrator.sweep.best"] == f"{name}-02"
    assert about["mlflow.note.content"].startswith("best: 02, eval/loss")
    kept = tmp_path / "runs" / "mlartifacts" / "blobs" / parent["run_uuid"] / "artifacts"
    assert {path.name for path in kept.iterdir()} == {
        *("table.md", "table.csv", "evaluations.png", "sweep.json")
    }
    again = finish(sweep(tmp_path, *asked), tmp_path)
    assert again.code == 0, again.out
    assert "all 2 children are done" in again.out and "sweep.name=NAME" in again.out
    assert [len(rig.records(run, "RunStarted")) for run in children(tmp_path)] == [1, 1]


@pytest.mark.thorough
def test_a_killed_sweep_goes_on_as_it_was_frozen_although_conf_was_edited(tmp_path: Path) -> None:
    mine = shutil.copytree(MINE, tmp_path / "mine")
    asked = (*SLOW, "train.seed=1,2,3", "sweep.parallel=1")
    first = sweep(tmp_path, *asked, config_dir=mine)

    def second_child_is_under_way() -> bool:
        runs = children(tmp_path)
        return len(runs) == 2 and rig.last_step(runs[1]) >= 30

    wait_for(second_child_is_under_way, "step 30 of the second child")
    before = children(tmp_path)[0].journal.read_bytes()
    workers = rig.worker_pids(children(tmp_path)[1])
    first.send_signal(signal.SIGKILL)
    first.communicate()
    wait_for(lambda: not any(map(rig.is_alive, workers.values())), "the child has ended", 60)
    parent = folder_of(tmp_path).root.name
    wait_for(
        lambda: by_name(tmp_path)[parent]["status"] == "KILLED", "the sweep is not RUNNING", 30
    )
    yaml = mine / "job" / "blobs.yaml"
    yaml.write_text(yaml.read_text().replace("global_batch_size: 32", "global_batch_size: 64"))
    done = finish(sweep(tmp_path, *asked, config_dir=mine), tmp_path)
    assert done.code == 0, done.out
    assert "begun before: 1 finished, 1 interrupted, 1 waiting" in done.out
    runs = children(tmp_path)
    assert statuses(tmp_path) == ["FINISHED"] * 3
    assert runs[0].journal.read_bytes() == before
    assert [len(rig.records(run, "RunStarted")) for run in runs] == [1, 2, 1]
    sizes = [
        record["facts"]["params"]["train.global_batch_size"]
        for run in runs
        for record in rig.records(run, "RunStarted")
    ]
    assert sizes == ["32"] * 4
    assert [len(rig.losses(run)) for run in runs] == [120] * 3
    rows = by_name(tmp_path)
    assert [row["status"] for row in rows.values()] == ["FINISHED"] * 4
    # The interrupted one saved before it ended: no step was made twice.
    blocks = rig.records(runs[1], "BlockDone")
    assert sum(block["num_steps"] for block in blocks) == 120


@pytest.mark.thorough
def test_an_interrupted_sweep_saves_and_goes_on(tmp_path: Path) -> None:
    asked = (*SLOW, "train.seed=1,2")
    first = sweep(tmp_path, *asked)
    wait_for(
        lambda: (
            len(children(tmp_path)) == 2
            and all(rig.last_step(run) >= 10 for run in children(tmp_path))
        ),
        "both children are under way",
    )
    rig.interrupt(first)
    stopped = finish(first, tmp_path)
    assert stopped.code == 130, stopped.out
    assert statuses(tmp_path) == ["KILLED", "KILLED"]
    assert "the same command goes on" in stopped.out
    steps = [rig.last_step(run) for run in children(tmp_path)]
    saved = [rig.records(run, "Saved")[-1]["step"] for run in children(tmp_path)]
    assert saved == steps and max(steps) < 120
    done = finish(sweep(tmp_path, *asked), tmp_path)
    assert done.code == 0, done.out
    assert statuses(tmp_path) == ["FINISHED", "FINISHED"]
    assert [len(rig.losses(run)) for run in children(tmp_path)] == [120, 120]


@pytest.mark.thorough
def test_a_sweep_that_is_ended_at_once_leaves_nothing_running_in_mlflow(tmp_path: Path) -> None:
    long = [text.replace("train.steps=120", "train.steps=100000") for text in SLOW]
    process = sweep(tmp_path, *long, "train.seed=1,2")

    def all_are_known() -> bool:
        return rig.statuses(tmp_path) == ["RUNNING"] * 3

    wait_for(all_are_known, "the parent and both children in MLflow")
    rig.interrupt(process)
    time.sleep(0.2)
    rig.interrupt(process)
    assert finish(process, tmp_path).code == 130
    rig.wait_until_known_as(tmp_path, "KILLED", "KILLED", "KILLED")


@pytest.mark.thorough
def test_a_child_that_fails_does_not_hold_up_the_others_and_is_tried_again(tmp_path: Path) -> None:
    asked = (*QUICK, "job.args.fail=infinite,''")
    done = finish(sweep(tmp_path, *asked), tmp_path)
    assert done.code == 3, done.out
    assert statuses(tmp_path) == ["FAILED", "FINISHED"]
    assert "01 failed: " in done.out and "logs/01.log" in done.out
    again = finish(sweep(tmp_path, *asked), tmp_path)
    assert again.code == 3
    assert "begun before: 1 failed, 1 finished" in again.out
    assert [len(rig.records(run, "RunStarted")) for run in children(tmp_path)] == [2, 1]


@pytest.mark.thorough
def test_a_child_that_is_behind_is_stopped_at_a_rung_and_stays_so(tmp_path: Path) -> None:
    asked = (
        *(*SLOW, "optimizer.learning_rate=1e-2,1e-7"),
        *("sweep.parallel=1", "sweep.halving.factor=2", "sweep.halving.first=0.25"),
    )
    done = finish(sweep(tmp_path, *asked), tmp_path)
    assert done.code == 0, done.out
    assert statuses(tmp_path) == ["FINISHED", "KILLED"]
    # Evaluated at 20 and 40: the rung at 0.25 of 120 steps is passed with the one at step 40.
    behind = children(tmp_path)[1]
    assert 40 <= rig.last_step(behind) < 60
    assert rig.records(behind, "Saved")[-1]["step"] == rig.last_step(behind)
    assert "02 stopped: " in done.out and "number 2 of 2" in done.out
    rows = by_name(tmp_path)
    row = rows[behind.root.name]
    assert "number 2 of 2" in tags(tmp_path, row["run_uuid"])[STOPPED_TAG]
    assert rows[folder_of(tmp_path).root.name]["status"] == "FINISHED"
    again = finish(sweep(tmp_path, *asked), tmp_path)
    assert again.code == 0 and "all 2 children are done" in again.out


@pytest.mark.thorough
def test_children_train_as_they_would_alone(tmp_path: Path) -> None:
    sweep_folder, alone = tmp_path / "sweep", tmp_path / "alone"
    sweep_folder.mkdir(), alone.mkdir()
    exact = (*QUICK, "train.deterministic=true", "cluster.cpus_per_worker=1")
    done = finish(sweep(sweep_folder, *exact, "train.seed=1,2"), sweep_folder)
    assert done.code == 0, done.out
    single: Ended = rig.train(*exact, "train.seed=2", cwd=alone)
    assert single.code == 0, single.out
    np.testing.assert_array_equal(rig.losses(children(sweep_folder)[1]), rig.losses(single.run))
