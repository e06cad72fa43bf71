"""Which folder or file `train.init_from` means."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any

from orchestrator.errors import RestoreError
from orchestrator.spec.paths import RunPaths
from orchestrator.spec.schema import RunConfig
from orchestrator.train import store

_KERAS_FILE = ".weights.h5"
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
    asked = config.train.init_from
    if asked is None:
        return None
    runs_dir = (cwd / config.runs_dir).resolve()
    path = (cwd / asked).resolve()
    if path.name.endswith(_KERAS_FILE) and path.is_file():
        return str(path)
    if (path / store.MANIFEST).is_file():
        return str(_checked(path, asked))
    roots = [path, runs_dir / asked]
    if Path(asked).name == asked:
        roots += sorted(runs_dir.glob(f"*/{glob.escape(asked)}"))
    for root in roots:
        checkpoints_dir = RunPaths(root).checkpoints_dir
        if checkpoints_dir.is_dir():
            return str(_of_run(checkpoints_dir, asked))
    raise RestoreError(
        f"train.init_from={asked}: neither a run in {runs_dir}, nor a checkpoint folder, nor a "
        f"{_KERAS_FILE} file; {_candidates(runs_dir)}"
    )


def _checked(path: Path, asked: str) -> Path:
    try:
        store.verify(path)
    except (OSError, ValueError) as error:
        raise RestoreError(f"train.init_from={asked}: the checkpoint {path} {error}") from error
    return path


def _of_run(checkpoints_dir: Path, asked: str) -> Path:
    search = store.newest_valid(checkpoints_dir)
    if search.path is None:
        reasons = "".join(f"\n  {d.path.name}: {d.reason}" for d in search.damaged)
        raise RestoreError(
            f"train.init_from={asked}: no valid checkpoint in {checkpoints_dir}{reasons}"
        )
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
