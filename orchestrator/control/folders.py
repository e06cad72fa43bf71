"""What the driver does to the folders of attempts: made before one begins, taken away after it.

Only the driver makes staging folders. A worker that outlives its attempt finds its own gone and can
put nothing into place, whenever it goes on.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from orchestrator.errors import StorageError
from orchestrator.spec.paths import STAGING_MARK, RunPaths

# What attempts, graves and replaced folders leave behind when everything is killed at once.
_LITTER = (".attempt-*", ".export-*", ".dead-*", ".replaced-*", ".probe*")


def prepare(paths: RunPaths, attempt: int) -> None:
    """Sweep what earlier attempts have left, and make the staging folders of an attempt.

    Args:
        paths: of the run; nothing else may run in it.
        attempt: its number.

    Raises:
        StorageError: the folders cannot be made, or others not taken away.
    """
    for folder in (paths.root, paths.checkpoints_dir):
        for pattern in _LITTER:
            for path in folder.glob(pattern):
                _bury(path)
    for staging in (paths.staging_dir(attempt), paths.export_staging_dir(attempt)):
        try:
            staging.mkdir(parents=True)
            (staging / STAGING_MARK).touch()
        except OSError as error:
            raise StorageError(
                f"cannot make the folder {staging}: {error.strerror}; make room, or set runs_dir "
                "to a folder that can be written"
            ) from error


def bury(paths: RunPaths, attempt: int) -> None:
    """Take its staging folders from an attempt: what it still writes can appear nowhere.

    Raises:
        StorageError: they cannot be taken: no other attempt may begin.
    """
    for staging in (paths.staging_dir(attempt), paths.export_staging_dir(attempt)):
        _bury(staging)


def _bury(path: Path) -> None:
    try:
        _take_away(path)
    except OSError as error:
        raise StorageError(
            f"cannot take {path} away, where an attempt that is over may still write: "
            f"{error.strerror}; see that its folder can be written, then resume the run"
        ) from error


def _take_away(path: Path) -> None:
    """Rename a folder, which takes it from all its writers at once, and remove it."""
    if path.is_dir() and not path.is_symlink():
        grave = path if path.name.startswith(".dead-") else path.with_name(f".dead-{path.name[1:]}")
        if grave != path:
            shutil.rmtree(grave, ignore_errors=True)
            path.rename(grave)
        shutil.rmtree(grave, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
