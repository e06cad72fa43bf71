"""The folders of attempts, where the run folder cannot be written any more."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.control.folders import bury, prepare
from orchestrator.errors import StorageError
from orchestrator.spec.paths import RunPaths


def test_folders_that_cannot_be_taken_from_an_attempt_are_a_fault_of_storage(
    open_folder: Path,
) -> None:
    paths = RunPaths(open_folder / "run")
    prepare(paths, 1)
    staging = paths.staging_dir(1)
    paths.checkpoints_dir.chmod(0o500)
    said = f"cannot take {staging} away.*Permission denied; see that its folder can be written"
    with pytest.raises(StorageError, match=said):
        bury(paths, 1)
    with pytest.raises(StorageError, match=said):
        prepare(paths, 2)
    paths.checkpoints_dir.chmod(0o700)
    bury(paths, 1)
    assert not staging.exists()
