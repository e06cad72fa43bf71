"""`weights`: a checkpoint as Keras's own file and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from orchestrator.errors import RestoreError
from orchestrator.train import store
from orchestrator.weights import find_source
from tests.cluster import rig
from tests.cluster.rig import MINE, Ended


def convert(*arguments: str, cwd: Path) -> Ended:
    command = rig.start("weights", *arguments, f"--config-dir={MINE}", cwd=cwd)
    return rig.finish(command, cwd)


def test_a_run_becomes_keras_weights_and_a_checkpoint_again(
    one_device: Ended, tmp_path: Path
) -> None:
    file, folder = tmp_path / "blobs.weights.h5", tmp_path / "blobs"
    there = convert(str(one_device.run.root), f"to={file}", cwd=tmp_path)
    assert there.code == 0, there.out
    assert "4 variables, 195 parameters" in there.out
    back = convert(str(file), f"to={folder}", "job=blobs", cwd=tmp_path)
    assert back.code == 0, back.out
    assert {path.name for path in tmp_path.iterdir()} == {file.name, folder.name}
    store.verify(folder)

    from orchestrator.train.checkpoint import read_model

    newest = store.newest_valid(one_device.run.checkpoints_dir).path
    assert newest is not None
    before, after = read_model(newest), read_model(folder)
    assert before.keys() == after.keys() and len(before) == 4
    assert all(np.array_equal(before[path], after[path]) for path in before)


def test_weights_that_do_not_fit_are_refused_with_the_table(
    one_device: Ended, tmp_path: Path
) -> None:
    newest = store.newest_valid(one_device.run.checkpoints_dir).path
    refused = convert(str(newest), "to=x.weights.h5", "job=mnist", cwd=tmp_path)
    assert refused.code == 4
    assert "does not fit this model" in refused.out and "in the checkpoint" in refused.out
    assert not list(tmp_path.iterdir())


def test_what_is_meant_must_be_said_and_there(one_device: Ended, tmp_path: Path) -> None:
    for arguments, code, said in (
        (["nothing"], 2, "`weights FROM to=TO` is known"),
        (["nothing", "to=x.weights.h5"], 4, "weights nothing: neither a run in"),
        ([str(one_device.run.root), "to=missing/x.weights.h5"], 2, "there is no folder"),
        (
            [str(one_device.run.root), "to=~/missing/x.weights.h5"],
            2,
            f"folder {Path.home()}/missing",
        ),
        ([str(one_device.run.root), f"to={tmp_path}"], 2, "is there already"),
        ([str(one_device.run.root), "to=x.keras"], 2, "called x.weights.h5"),
    ):
        refused = convert(*arguments, cwd=tmp_path)
        assert refused.code == code and said in refused.out, refused.out


def test_weights_may_lie_below_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.weights.h5").touch()
    assert find_source("~/a.weights.h5", "runs", Path("/")) == str(tmp_path / "a.weights.h5")
    with pytest.raises(RestoreError, match=f"neither a run in {tmp_path}/runs"):
        find_source("nothing", "~/runs", Path("/"))
