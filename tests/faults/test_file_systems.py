"""Folders that cannot keep the promises of a checkpoint are refused before anything is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.strace import needs_strace, trace

pytestmark = needs_strace
SCRIPT = Path(__file__).with_name("probes.py")


@pytest.mark.parametrize(
    ("call", "number", "error", "cannot"),
    [
        ("mkdir", None, "EROFS", "cannot be written: Read-only file system"),
        ("write", None, "ENOSPC", "cannot be written: No space left on device"),
        ("fsync", 1, "EINVAL", "cannot flush a file to the disk (fsync)"),
        ("fsync", 2, "EINVAL", "cannot flush a folder to the disk (fsync)"),
        ("flock", 1, "ENOLCK", "cannot lock a file (flock): No locks available"),
        ("rename", 1, "EXDEV", "cannot rename a folder: Invalid cross-device link"),
    ],
)
def test_a_folder_that_is_not_posix_enough_is_refused_with_the_key(
    tmp_path: Path, call: str, number: int | None, error: str, cannot: str
) -> None:
    whole = trace(SCRIPT, str(tmp_path / "run"))
    assert whole.status == 0
    if number is None:
        # The first that is about the probe: the run's folder is made before.
        number = next(c.number for c in whole.calls if c.name == call and ".probe-1" in c.text)
    fault = f"{call}:error={error}:when={number}"
    refused = trace(SCRIPT, str(tmp_path / "bad"), inject=[fault])
    assert refused.status == 5, refused.out
    assert cannot in refused.out
    assert "set runs_dir to a folder on one" in refused.out
    assert not list((tmp_path / "bad").glob("*/*/.probe*"))
