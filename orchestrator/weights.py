"""Which folder or file `train.init_from` means."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any

from orchestrator.errors import RestoreError
from orchestrator.spec.paths import RunPaths, typed_path
from orchestrator.spec.schema import RunConfig
from orchestrator.train import store

KERAS_FILE = ".weights.h5"
_SHOWN = 5


def find_weights(config: RunConfig, cwd: Path) -> str | None:
    """Return the absolute path of the weights to begin with; None without `train.init_from`.

    A run stands for its best checkpoint, if it has chosen one, else for its newest valid one.

    Args:
        config: of the run that begins.
        cwd: what relative paths are relative to.

    Raises:
        RestoreError: nothing usable is there; the message lists what could have been meant.
    """
    if config.train.init_from is None:
        return None
    return find_source(config.train.init_from, config.runs_dir, cwd)


def find_source(asked: str, runs: str, cwd: Path, key: str = "train.init_from=") -> str:
    """Return the absolute path of the checkpoint folder or file that a user means.

    Args:
        asked: a run's name or folder, a checkpoint folder, or a `.weights.h5` file.
        runs: where runs are.
        cwd: what relative paths are relative to.
        key: what stands before `asked` in messages.

    Raises:
        RestoreError: nothing usable is there; the message lists what could have been meant.
    """
    runs_dir = typed_path(runs, cwd)
    path = typed_path(asked, cwd)
    asked, name = f"{key}{asked}", asked
    if path.name.endswith(KERAS_FILE) and path.is_file():
        return str(path)
    if (path / store.MANIFEST).is_file():
        return str(_checked(path, asked))
    roots = [path, runs_dir / name]
    if Path(name).name == name:
        roots += sorted(runs_dir.glob(f"*/{glob.escape(name)}"))
    for root in roots:
        checkpoints_dir = RunPaths(root).checkpoints_dir
        if checkpoints_dir.is_dir():
            return str(_of_run(checkpoints_dir, asked))
    raise RestoreError(
        f"{asked}: neither a run in {runs_dir}, nor a checkpoint folder, nor a "
        f"{KERAS_FILE} file; {_candidates(runs_dir)}"
    )


def _checked(path: Path, asked: str) -> Path:
    try:
        store.verify(path)
    except (OSError, ValueError) as error:
        raise RestoreError(f"{asked}: the checkpoint {path} {error}") from error
    return path


def _of_run(checkpoints_dir: Path, asked: str) -> Path:
    search = store.newest_valid(checkpoints_dir)
    if search.path is None:
        reasons = "".join(f"\n  {d.path.name}: {d.reason}" for d in search.damaged)
        raise RestoreError(f"{asked}: no valid checkpoint in {checkpoints_dir}{reasons}")
    best: dict[str, Any] = store.read_manifest(search.path).get("best") or {}
    if best.get("step") is not None:
        path = checkpoints_dir / store.checkpoint_name(int(best["step"]))
        if path.is_dir():
            return _checked(path, asked)
    return search.path


def _candidates(runs_dir: Path) -> str:
    found = sorted(runs_dir.glob("*/*/checkpoints/step-*/"), key=lambda path: path.stat().st_mtime)
    names = list(dict.fromkeys(path.parent.parent.name for path in reversed(found)))[:_SHOWN]
    if not names:
        return "no run there has a checkpoint"
    return f"runs that have checkpoints: {', '.join(names)}"
