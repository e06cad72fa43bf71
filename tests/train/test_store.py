"""A checkpoint appears whole or not at all, and only a whole one is used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.errors import StorageError
from orchestrator.train import store


def make(folder: Path, step: int, content: bytes = b"weights") -> Path:
    """Commit a checkpoint of one file."""
    staged = folder / ".attempt-1" / store.checkpoint_name(step)
    staged.mkdir(parents=True)
    (staged / "variables.data").write_bytes(content)
    target = folder / store.checkpoint_name(step)
    store.commit(staged, target, {"step": step})
    return target


def truncate(path: Path) -> None:
    file = path / "variables.data"
    file.write_bytes(file.read_bytes()[:-1])


def flip(path: Path) -> None:
    file = path / "variables.data"
    content = bytearray(file.read_bytes())
    content[2] ^= 1
    file.write_bytes(content)


def newer_format(path: Path) -> None:
    manifest = json.loads((path / store.MANIFEST).read_text())
    (path / store.MANIFEST).write_text(json.dumps({**manifest, "format": 99}))


DAMAGES: list[tuple[str, Callable[[Path], None]]] = [
    ("has 6 bytes instead of 7", truncate),
    ("does not have the content", flip),
    ("variables.data is missing", lambda path: (path / "variables.data").unlink()),
    ("has no manifest.json", lambda path: (path / store.MANIFEST).unlink()),
    ("has format 99", newer_format),
]


@pytest.mark.parametrize(("reason", "damage"), DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_its_reason(
    tmp_path: Path, reason: str, damage: Callable[[Path], None]
) -> None:
    good, bad = make(tmp_path, 10), make(tmp_path, 20)
    assert store.newest_valid(tmp_path).path == bad
    damage(bad)
    search = store.newest_valid(tmp_path)
    assert search.path == good
    assert [item.path for item in search.damaged] == [bad]
    assert reason in search.damaged[0].reason


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_manifest_that_is_none_is_passed_over(tmp_path: Path, text: str) -> None:
    path = make(tmp_path, 10)
    (path / store.MANIFEST).write_text(text)
    search = store.newest_valid(tmp_path)
    assert search.path is None
    assert "manifest" in search.damaged[0].reason


def test_staged_and_foreign_folders_are_no_checkpoints(tmp_path: Path) -> None:
    staged = tmp_path / ".attempt-1" / store.checkpoint_name(30)
    staged.mkdir(parents=True)
    (tmp_path / "step-00000040.tmp").mkdir()
    assert store.newest_valid(tmp_path).path is None
    assert store.newest_valid(tmp_path / "nowhere").path is None


def test_an_attempt_whose_staging_folder_was_renamed_away_cannot_commit(tmp_path: Path) -> None:
    staging = tmp_path / ".attempt-1"
    staged = staging / store.checkpoint_name(30)
    staged.mkdir(parents=True)
    (staged / "variables.data").write_bytes(b"late")
    staging.rename(tmp_path / ".dead-1")
    with pytest.raises(StorageError, match="cannot save the checkpoint"):
        store.commit(staged, tmp_path / store.checkpoint_name(30), {"step": 30})
    assert store.list_checkpoints(tmp_path) == []


def test_a_step_saved_again_after_going_back_replaces_the_older_one(tmp_path: Path) -> None:
    make(tmp_path, 10, b"first")
    shutil.rmtree(tmp_path / ".attempt-1")
    path = make(tmp_path, 10, b"second")
    assert store.newest_valid(tmp_path).path == path
    assert (path / "variables.data").read_bytes() == b"second"


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 100, 20, 3):
        make(tmp_path, step)
    store.prune(tmp_path, keep=2)
    assert [store.step_of(path) for path in store.list_checkpoints(tmp_path)] == [100, 20]
