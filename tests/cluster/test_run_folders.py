"""Run folders that were moved, damaged, made read-only, or whose journal cannot be written."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from pathlib import Path

import pytest

from orchestrator.spec.paths import RunPaths
from orchestrator.train import store
from tests.cluster import rig
from tests.cluster.rig import JOB, Ended, train

# In one process, which is all that these need.
INLINE = ("cluster=inline", "export.enabled=false")


@pytest.fixture
def copied(one_device: Ended, tmp_path: Path) -> RunPaths:
    """A finished run, copied to another place."""
    shutil.copytree(one_device.folder / "runs", tmp_path / "runs")
    return RunPaths(tmp_path / one_device.run.root.relative_to(one_device.folder))


def resumed(copied: RunPaths, *arguments: str) -> Ended:
    steps = f"train.steps={rig.last_step(copied) + 16}"
    folder = copied.root.parents[2]
    return train(*INLINE, f"resume={copied.root.name}", steps, *arguments, cwd=folder)


def test_a_run_goes_on_at_another_place(copied: RunPaths, one_device: Ended) -> None:
    before = rig.last_step(copied)
    untouched = sorted(one_device.run.root.rglob("*"))
    ended = resumed(copied)
    assert ended.code == 0, ended.out
    assert rig.last_step(copied) == before + 16
    started = rig.records(copied, "AttemptStarted")[-1]
    assert Path(started["restore_from"]).parent == copied.checkpoints_dir
    assert sorted(one_device.run.root.rglob("*")) == untouched
    # MLflow's database was copied too: it is the same run there.
    assert [run["name"] for run in rig.database(copied.root.parents[2])] == [copied.root.name]


def test_damaged_checkpoints_are_all_listed_and_nothing_begins_at_step_0(copied: RunPaths) -> None:
    paths = store.list_checkpoints(copied.checkpoints_dir)
    for path in paths:
        next(path.glob("variables.data*")).write_bytes(b"")
    steps = rig.last_step(copied)
    ended = resumed(copied)
    assert ended.code == 4, ended.out
    told = " ".join(ended.out.split())
    assert all(f"{path.name}: variables.data" in told for path in paths)
    assert "exit code 4: no valid checkpoint to resume from" in ended.out
    assert rig.last_step(copied) == steps


def test_a_read_only_run_is_refused(copied: RunPaths) -> None:
    root = copied.root
    mounted = subprocess.run(["mount", "--bind", root, root], check=False)
    if mounted.returncode != 0:
        pytest.skip("nothing can be mounted here: not root")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", root], check=True)
        ended = resumed(copied)
    finally:
        subprocess.run(["umount", "--lazy", root], check=True)
    assert ended.code == 5, ended.out
    assert "cannot write in the run folder" in ended.out and "Traceback" not in ended.out


def test_a_journal_that_cannot_be_written_is_borne_then_the_run_saves_and_ends(
    tmp_path: Path, kept_ray: dict[str, str]
) -> None:
    limits = ("train.steps=4000", "tracking.journal_patience_s=1.5", "checkpoint.every_s=null")
    slow = ("job.args.delay_ms=20", "train.block_s=0.1", "export.enabled=false")
    process = rig.start("train", *JOB, *limits, *slow, cwd=tmp_path, env=kept_ray)
    run = rig.wait_for_step(tmp_path, 10)
    # The kernel refuses the driver, and nobody else, to make any file larger.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    on_record = rig.last_step(run)
    ended = rig.finish(process, tmp_path)
    assert ended.code == 5, ended.out
    told = " ".join(ended.out.split())
    assert "DEGRADED: cannot write the journal" in told and "File too large" in told
    assert "the journal could not be written for 1.5 s" in told
    assert f"resume={run.root.name}" in told and "Traceback" not in told
    # Training went on meanwhile, and what it made is saved.
    found = store.newest_valid(run.checkpoints_dir).path
    assert found is not None and store.step_of(found) > on_record + 20
    assert not [pid for pid in rig.worker_pids(run).values() if os.path.exists(f"/proc/{pid}")]
