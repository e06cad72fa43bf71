"""Checkpoint folders: commit, verify, find, prune. No TensorFlow.

A checkpoint appears whole: its files are written aside, each is flushed to the device, a manifest
with their sizes and SHA-256 is written last, the folder is renamed into place and the parent is
flushed. Whoever sees `step-00001200/` sees all of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import StorageError

FORMAT = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8,})$")
_READ_BYTES = 1 << 20


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


def step_of(path: Path) -> int:
    """Return the step of a checkpoint folder."""
    match = _NAME.search(path.name)
    if match is None:
        raise ValueError(f"{path} is not named like a checkpoint (step-00001200)")
    return int(match.group(1))


def commit(staged: Path, target: Path, manifest: Mapping[str, Any]) -> int:
    """Make a staged folder durable and rename it into place.

    Args:
        staged: the folder as written, on the same file system.
        target: where it shall appear; replaced if it is there.
        manifest: what the manifest says besides format and files.

    Returns:
        The size of all files in bytes.

    Raises:
        StorageError: a file cannot be flushed or the folder not renamed; nothing has appeared.
    """
    files: dict[str, dict[str, Any]] = {}
    try:
        for path in sorted(staged.iterdir()):
            _flush(path)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        content = json.dumps({"format": FORMAT, **manifest, "files": files}, indent=1)
        (staged / MANIFEST).write_text(content)
        _flush(staged / MANIFEST)
        _flush(staged)
        if target.exists():
            # Only a checkpoint of the same step, written before a restart that went back.
            aside = staged.with_name(f"{staged.name}.replaced")
            target.rename(aside)
            shutil.rmtree(aside)
        staged.rename(target)
        _flush(target.parent)
    except OSError as error:
        raise StorageError(f"cannot save the checkpoint {target}: {error}") from error
    return sum(entry["bytes"] for entry in files.values()) + len(content)


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint.

    Raises:
        ValueError: it is missing, unreadable or of a newer format.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except FileNotFoundError as error:
        raise ValueError("has no manifest.json") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"manifest.json cannot be read: {error}") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise ValueError("manifest.json is not a manifest")
    if manifest.get("format") != FORMAT:
        raise ValueError(f"has format {manifest.get('format')}; this version reads {FORMAT}")
    return manifest


def verify(path: Path) -> None:
    """Check every file of a checkpoint against its manifest.

    Raises:
        ValueError: what is wrong, in words that follow the folder's name.
    """
    for name, entry in read_manifest(path)["files"].items():
        file = path / name
        if not file.is_file():
            raise ValueError(f"{name} is missing")
        size = file.stat().st_size
        if size != entry["bytes"]:
            raise ValueError(f"{name} has {size} bytes instead of {entry['bytes']}")
        if _sha256(file) != entry["sha256"]:
            raise ValueError(f"{name} does not have the content that was written")


def list_checkpoints(checkpoints_dir: Path) -> list[Path]:
    """Return the checkpoint folders, newest first, valid or not."""
    if not checkpoints_dir.is_dir():
        return []
    found = [path for path in checkpoints_dir.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def newest_valid(checkpoints_dir: Path) -> Search:
    """Find the newest checkpoint whose every byte is as written."""
    damaged = []
    for path in list_checkpoints(checkpoints_dir):
        try:
            verify(path)
        except (ValueError, OSError) as error:
            damaged.append(Damage(path, str(error)))
        else:
            return Search(path, tuple(damaged))
    return Search(None, tuple(damaged))


def prune(checkpoints_dir: Path, keep: int, best_step: int | None = None) -> list[Path]:
    """Remove all but the newest `keep` checkpoints and that of `best_step`; return the removed."""
    older = list_checkpoints(checkpoints_dir)[keep:]
    removed = [path for path in older if step_of(path) != best_step]
    for path in removed:
        shutil.rmtree(path, ignore_errors=True)
    return removed


def _flush(path: Path) -> None:
    """Force a file or folder to the device."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
