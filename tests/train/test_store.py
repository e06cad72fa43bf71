"""A checkpoint appears whole or not at all, and only a whole one is used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import StorageError
from orchestrator.train import store


def make(folder: Path, step: int, content: bytes = b"weights") -> Path:
    """Commit a checkpoint of two files."""
    staged = folder / ".attempt-1" / store.checkpoint_name(step)
    staged.mkdir(parents=True)
    (staged / "variables.data").write_bytes(content)
    (staged / "variables.index").write_bytes(b"index")
    target = folder / store.checkpoint_name(step)
    store.commit(staged, target, {"step": step, "time": 1.5})
    return target


def truncate(path: Path) -> None:
    file = path / "variables.data"
    file.write_bytes(file.read_bytes()[:-1])


def flip(path: Path) -> None:
    file = path / "variables.data"
    content = bytearray(file.read_bytes())
    content[2] ^= 1
    file.write_bytes(content)


def change_manifest(path: Path, **changes: Any) -> None:
    manifest = json.loads((path / store.MANIFEST).read_text())
    (path / store.MANIFEST).write_text(json.dumps({**manifest, **changes}))


def flip_in_manifest(path: Path) -> None:
    """Make a digit of the time another: still JSON."""
    text = (path / store.MANIFEST).read_text()
    (path / store.MANIFEST).write_text(text.replace('"time": 1.', '"time": 9.'))


def become_a_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("a file")


def become_empty(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()


def become_a_link(path: Path) -> None:
    elsewhere = path.with_name(f"moved-{path.name}")
    path.rename(elsewhere)
    path.symlink_to(elsewhere.name)


def link(path: Path, *, dangling: bool) -> None:
    """Put a link in place of the data."""
    file, elsewhere = path / "variables.data", path.with_name(f"moved-{path.name}.data")
    file.rename(elsewhere)
    file.symlink_to("nowhere" if dangling else elsewhere)


DAMAGES: list[tuple[str, Callable[[Path], None]]] = [
    ("has 6 bytes instead of 7", truncate),
    ("has 8 bytes instead of 7", lambda path: (path / "variables.data").write_bytes(b"weights!")),
    ("does not have the content", flip),
    ("does not have the content", lambda path: (path / "variables.data").write_bytes(bytes(7))),
    ("variables.data is missing", lambda path: (path / "variables.data").unlink()),
    ("variables.index is missing", lambda path: (path / "variables.index").unlink()),
    ("has no manifest.json", lambda path: (path / store.MANIFEST).unlink()),
    ("manifest.json cannot be read", lambda path: (path / store.MANIFEST).write_text("{")),
    ("manifest.json cannot be read", lambda path: (path / store.MANIFEST).write_bytes(b"\xff")),
    ("manifest.json does not have the content", flip_in_manifest),
    ("made by a newer version", lambda path: change_manifest(path, format=99)),
    ("has format None", lambda path: change_manifest(path, format=None)),
    ("is not a folder", become_a_file),
    ("has no manifest.json", become_empty),
    ("is a symbolic link", become_a_link),
    ("variables.data is a symbolic link", lambda path: link(path, dangling=False)),
    ("variables.data is a symbolic link", lambda path: link(path, dangling=True)),
]


@pytest.mark.parametrize(("reason", "damage"), DAMAGES)
@pytest.mark.parametrize("num_damaged", [1, 2])
def test_damaged_checkpoints_are_passed_over_with_their_reason(
    tmp_path: Path, reason: str, damage: Callable[[Path], None], num_damaged: int
) -> None:
    paths = [make(tmp_path, step) for step in (10, 20, 30)]
    assert store.newest_valid(tmp_path).path == paths[-1]
    for path in paths[-num_damaged:]:
        damage(path)
    search = store.newest_valid(tmp_path)
    assert search.path == paths[-num_damaged - 1]
    assert len(search.damaged) == num_damaged
    assert all(reason in item.reason for item in search.damaged)


@pytest.mark.parametrize("name", ["variables.data", store.MANIFEST, ""])
def test_a_checkpoint_that_may_not_be_read_is_passed_over(open_folder: Path, name: str) -> None:
    good, bad = make(open_folder, 10), make(open_folder, 20)
    (bad / name).chmod(0)
    search = store.newest_valid(open_folder)
    assert search.path == good
    assert "Permission denied" in search.damaged[0].reason
    (bad / name).chmod(0o700)


def test_a_checkpoint_under_another_step_is_passed_over(tmp_path: Path) -> None:
    good = make(tmp_path, 10)
    make(tmp_path, 20).rename(tmp_path / store.checkpoint_name(40))
    search = store.newest_valid(tmp_path)
    assert search.path == good
    assert "holds step 20: it was renamed" in search.damaged[0].reason


def test_a_file_that_the_manifest_does_not_know_is_nobodys_damage(tmp_path: Path) -> None:
    path = make(tmp_path, 10)
    (path / ".nfs0001").write_bytes(b"the file system's own")
    assert store.newest_valid(tmp_path).path == path


@pytest.mark.parametrize("name", ["../step-00000010/variables.data", "/etc/passwd", "..", ""])
def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path, name: str) -> None:
    make(tmp_path, 10)
    path = make(tmp_path, 20)
    manifest = json.loads((path / store.MANIFEST).read_text())
    del manifest["manifest_sha256"]  # whoever writes this can also make the sum
    manifest["files"][name] = manifest["files"]["variables.data"]
    (path / store.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="not a file of this folder"):
        store.verify(path)


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_manifest_that_is_none_is_passed_over(tmp_path: Path, text: str) -> None:
    path = make(tmp_path, 10)
    (path / store.MANIFEST).write_text(text)
    search = store.newest_valid(tmp_path)
    assert search.path is None
    assert "manifest" in search.damaged[0].reason


def test_who_checks_a_checkpoint_tells_how_far_that_is(tmp_path: Path) -> None:
    told: list[str] = []
    store.verify(make(tmp_path, 4, bytes(3_000_000)), told.append)
    assert told == ["1.0 MB checked", "2.1 MB checked", "3.0 MB checked", "3.0 MB checked"]


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


def test_a_replacement_that_was_cut_short_is_put_right(tmp_path: Path) -> None:
    (make(tmp_path, 10)).rename(tmp_path / ".replaced-step-00000010")
    make(tmp_path, 20)
    make(tmp_path / "other", 20).rename(tmp_path / ".replaced-step-00000020")
    store.recover(tmp_path)
    assert [store.step_of(path) for path in store.list_checkpoints(tmp_path)] == [20, 10]
    assert not list(tmp_path.glob(".replaced-*"))


def test_a_folder_that_cannot_be_read_or_written_is_a_fault_of_storage(open_folder: Path) -> None:
    (open_folder / f".replaced-{make(open_folder, 10).name}").mkdir()
    (open_folder / "step-00000010").rename(open_folder / "elsewhere")
    open_folder.chmod(0o500)
    with pytest.raises(StorageError, match=r"put .*/.replaced-step-00000010 back.*Permission"):
        store.recover(open_folder)
    open_folder.chmod(0)
    with pytest.raises(StorageError, match=f"checkpoints in {open_folder}: Permission denied"):
        store.newest_valid(open_folder)
    open_folder.chmod(0o700)


def test_the_newest_and_the_best_are_kept_and_what_was_passed_over_does_not_count(
    tmp_path: Path,
) -> None:
    for step in (5, 10, 20, 30, 40):
        make(tmp_path, step)
    # 30 and 40 were damaged, so training went back to 10, and has come to 20 again.
    removed = store.prune(tmp_path, keep=1, best_step=5, newest=20)
    assert [store.step_of(path) for path in removed] == [10]
    assert [store.step_of(path) for path in store.list_checkpoints(tmp_path)] == [40, 30, 20, 5]


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 100, 20, 3):
        make(tmp_path, step)
    store.prune(tmp_path, keep=2)
    assert [store.step_of(path) for path in store.list_checkpoints(tmp_path)] == [100, 20]
