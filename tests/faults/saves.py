"""A process that begins an attempt and saves a checkpoint, without TensorFlow, to be killed."""

from __future__ import annotations

import sys
from pathlib import Path

from orchestrator.control.folders import prepare
from orchestrator.spec.paths import RunPaths
from orchestrator.train import store

FILES = {"variables.data-00000-of-00001": b"weights" * 100, "variables.index": b"index"}


def save(paths: RunPaths, attempt: int, step: int, keep: int, **facts: str) -> None:
    """Begin an attempt, save one checkpoint in it and remove the oldest."""
    prepare(paths, attempt)
    staged = paths.staging_dir(attempt) / store.checkpoint_name(step)
    staged.mkdir()
    for name, content in FILES.items():
        (staged / name).write_bytes(content)
    store.commit(
        staged,
        paths.checkpoints_dir / store.checkpoint_name(step),
        {"step": step, "attempt": attempt, **facts},
    )
    print("announced", flush=True)
    store.prune(paths.checkpoints_dir, keep, newest=step)


if __name__ == "__main__":
    save(RunPaths(Path(sys.argv[1])), attempt=2, step=20, keep=2)
