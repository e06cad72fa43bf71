"""Checkpoint folders: commit, verify, find, prune. No TensorFlow.

A checkpoint appears whole: its files are written aside, each is flushed to the device, a manifest
with their sizes and SHA-256 is written last, the folder is renamed into place and the parent is
flushed. Whoever sees `step-00001200/` sees all of it. Everything in a checkpoint is data: nothing
is unpickled, no link is followed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from orchestrator.errors import StorageError
from orchestrator.train.rename import flush, put_in_place, remove

FORMAT = 1
MANIFEST = "manifest.json"
# In a manifest: the checkpoint can be exported, but training cannot go on from it.
WEIGHTS_ONLY = "weights_only"
_EVALUATION = "evaluation"
_NAME = re.compile(r"step-(\d{8,})$")
_REPLACED = ".replaced-"
_MANIFEST_SUM = "manifest_sha256"
_READ_BYTES = 1 << 20


class EvaluationState(StrEnum):
    """What became of the evaluation after a checkpoint's step, before the checkpoint was saved."""

    owed = "owed"  # a stop has cut it short
    told = "told"

    def facts(self) -> dict[str, str]:
        """Return what a manifest says of it."""
        return {_EVALUATION: self.value}


@dataclass(frozen=True, slots=True)
class Damage:
    """Why a checkpoint cannot be used."""

    path: Path
    reason: str


@dataclass(frozen=True, slots=True)
class Search:
    """The newest valid checkpoint, or None, and every newer one with what is wrong with it."""

    path: Path | None
    damaged: tuple[Damage, ...]


def checkpoint_name(step: int) -> str:
    """Return the folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def is_checkpoint_name(name: str) -> bool:
    """Tell whether a folder is named like a checkpoint."""
    return _NAME.fullmatch(name) is not None


def step_of(path: Path) -> int:
    """Return the step of a checkpoint folder."""
    match = _NAME.search(path.name)
    if match is None:
        raise ValueError(f"{path} is not named like a checkpoint (step-00001200)")
    return int(match.group(1))


def start_of(restore_from: str | None) -> int:
    """Return the step that an attempt goes on from: its checkpoint's, or 0 without one."""
    return step_of(Path(restore_from)) if restore_from else 0


def commit(
    staged: Path,
    target: Path,
    manifest: Mapping[str, Any],
    *,
    check: Callable[[], None] = lambda: None,
) -> int:
    """Make a staged folder durable and rename it into place.

    Args:
        staged: the folder as written, on the same file system.
        target: where it shall appear; replaced if it is there.
        manifest: what the manifest says besides format and files.
        check: called right before the rename; what it raises goes on and nothing appears.

    Returns:
        The size of all files in bytes.

    Raises:
        StorageError: a file cannot be flushed or the folder not renamed; nothing has appeared.
    """
    files: dict[str, dict[str, Any]] = {}
    try:
        for path in sorted(staged.iterdir()):
            flush(path)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        content = _sealed({"format": FORMAT, **manifest, "files": files})
        (staged / MANIFEST).write_text(content)
        flush(staged / MANIFEST)
        flush(staged)
        # Of the same step there is only one that was passed over as damaged, before the restart.
        check()
        put_in_place(staged, target)
    except OSError as error:
        raise StorageError(f"cannot save the checkpoint {target}: {error}") from error
    return sum(entry["bytes"] for entry in files.values()) + len(content)


def recover(checkpoints_dir: Path) -> None:
    """Put back a checkpoint whose replacement was cut short; only while nobody saves.

    Raises:
        StorageError: it cannot be put back.
    """
    for aside in checkpoints_dir.glob(f"{_REPLACED}step-*"):
        target = aside.with_name(aside.name.removeprefix(_REPLACED))
        if os.path.lexists(target):
            remove(aside)
            continue
        try:
            aside.rename(target)
        except OSError as error:
            raise StorageError(
                f"cannot put the checkpoint {aside} back as {target.name}: {error.strerror}"
            ) from error


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint.

    Raises:
        ValueError: it is missing, unreadable, damaged or of a newer format.
    """
    if path.is_symlink() or not path.is_dir():
        raise ValueError("is a symbolic link" if path.is_symlink() else "is not a folder")
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except FileNotFoundError as error:
        raise ValueError("has no manifest.json") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"manifest.json cannot be read: {error}") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise ValueError("manifest.json is not a manifest")
    found = manifest.get("format")
    if isinstance(found, int) and found > FORMAT:
        raise ValueError(
            f"has format {found}: it was made by a newer version of this program, which reads up "
            f"to format {FORMAT}; resume with that version"
        )
    if found != FORMAT:
        raise ValueError(f"has format {found}; this version reads {FORMAT}")
    if _MANIFEST_SUM in manifest and manifest[_MANIFEST_SUM] != _sum_of(manifest):
        raise ValueError("manifest.json does not have the content that was written")
    return manifest


def verify(path: Path, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Check every file of a checkpoint against its manifest, and return that.

    A file that the manifest does not know, such as one of the file system's own, is nobody's
    damage: it is not read.

    Args:
        path: of the checkpoint.
        progress: takes a short text, often.

    Raises:
        ValueError: what is wrong, in words that follow the folder's name.
        OSError: the folder cannot be read.
    """
    manifest = read_manifest(path)
    if _NAME.fullmatch(path.name) and manifest.get("step", step_of(path)) != step_of(path):
        raise ValueError(f"holds step {manifest['step']}: it was renamed")
    for file in path.iterdir():
        if file.is_symlink():
            raise ValueError(f"{file.name} is a symbolic link; a checkpoint holds files only")
    num_bytes = 0

    def told(count: int) -> None:
        nonlocal num_bytes
        num_bytes += count
        progress(f"{num_bytes / 1e6:,.1f} MB checked")

    for name, entry in manifest["files"].items():
        _verify_file(path, name, entry, told)
    return manifest


def _verify_file(path: Path, name: str, entry: Any, told: Callable[[int], None]) -> None:
    if name in ("", ".", "..") or "/" in name:
        raise ValueError(f"manifest.json names {name!r}, which is not a file of this folder")
    if not isinstance(entry, dict) or not {"bytes", "sha256"} <= entry.keys():
        raise ValueError(f"manifest.json does not say what {name} is")
    file = path / name
    if not file.is_file():
        raise ValueError(f"{name} is missing")
    size = file.stat().st_size
    if size != entry["bytes"]:
        raise ValueError(f"{name} has {size} bytes instead of {entry['bytes']}")
    if _sha256(file, told) != entry["sha256"]:
        raise ValueError(f"{name} does not have the content that was written")


def list_checkpoints(checkpoints_dir: Path) -> list[Path]:
    """Return the checkpoint folders, newest first, valid or not.

    Raises:
        StorageError: the folder cannot be read.
    """
    try:
        found = [path for path in checkpoints_dir.iterdir() if _NAME.fullmatch(path.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StorageError(
            f"cannot look for checkpoints in {checkpoints_dir}: {error.strerror}"
        ) from error
    return sorted(found, key=step_of, reverse=True)


def attempt_of(path: Path) -> int | None:
    """Return the attempt that saved a checkpoint; None where its manifest does not tell."""
    try:
        attempt = read_manifest(path).get("attempt")
    except ValueError:
        return None
    return attempt if isinstance(attempt, int) else None


def evaluation_of(path: Path) -> EvaluationState | None:
    """Return what became of the evaluation after a checkpoint's step; None if there was none."""
    try:
        return EvaluationState(read_manifest(path)[_EVALUATION])
    except (ValueError, KeyError):
        return None


def newest_valid(
    checkpoints_dir: Path,
    accepts: Callable[[Path], bool] = lambda path: True,
    progress: Callable[[str], None] = lambda text: None,
) -> Search:
    """Find the newest checkpoint to go on from whose every byte is as written.

    Args:
        checkpoints_dir: the folder of all checkpoints.
        accepts: tells which of them to look at.
        progress: takes a short text, often.
    """
    damaged = []
    for path in filter(accepts, list_checkpoints(checkpoints_dir)):
        try:
            if verify(path, progress).get(WEIGHTS_ONLY):
                continue
        except ValueError as error:
            damaged.append(Damage(path, str(error)))
        except OSError as error:
            damaged.append(Damage(path, f"cannot be read: {error.strerror}"))
        else:
            return Search(path, tuple(damaged))
    return Search(None, tuple(damaged))


def prune(
    checkpoints_dir: Path, keep: int, best_step: int | None = None, newest: int | None = None
) -> list[Path]:
    """Remove all but the newest `keep` checkpoints and that of `best_step`; return the removed.

    Args:
        checkpoints_dir: where they are.
        keep: how many stay.
        best_step: of one more that stays.
        newest: the step that was written last. Later ones were passed over as damaged before
            training went back: they stay, and do not count.
    """
    found = list_checkpoints(checkpoints_dir)
    older = [path for path in found if newest is None or step_of(path) <= newest][keep:]
    removed = [path for path in older if step_of(path) != best_step]
    for path in removed:
        remove(path)
    return removed


def _sealed(manifest: Mapping[str, Any]) -> str:
    """Return a manifest as JSON, with a sum of its own content."""
    return json.dumps({**manifest, _MANIFEST_SUM: _sum_of(manifest)}, indent=1)


def _sum_of(manifest: Mapping[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != _MANIFEST_SUM}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path, told: Callable[[int], None] = lambda count: None) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
            told(len(chunk))
    return digest.hexdigest()
