"""The process of one child of a sweep: the train command on a configuration that was frozen.

    python -m orchestrator.sweep.child SWEEP_FOLDER CHILD

Whoever starts it keeps the other end of its standard input open. When that breaks, as the sweep
has died, the child saves and stops; the same sweep command resumes it.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from orchestrator.__main__ import told
from orchestrator.driver import train
from orchestrator.spec.config import load_kept
from orchestrator.spec.schema import RunConfig
from orchestrator.sweep.folder import read_sweep


def main(argv: list[str]) -> int:
    """Train a child, or go on with it."""
    root, name = argv
    threading.Thread(target=_follow_the_sweep, name="sweep", daemon=True).start()
    return told(lambda: _train(Path(root), name))


def _train(root: Path, name: str) -> int:
    sweep = read_sweep(root)
    child = next(child for child in sweep.children if child.name == name)
    text = sweep.paths.config(name).read_text()
    paths = sweep.run_of(child)
    if paths.root.exists() and not paths.journal.exists():
        shutil.rmtree(paths.root)  # its first command was killed before anything was on record
    key = "resume" if paths.journal.exists() else "run_name"
    changes: dict[str, Any] = {key: child.run}

    def load(overrides: list[str], config_dir: Path | None) -> RunConfig:
        return load_kept(text, changes, config_dir)

    given = [*child.overrides, f"{key}={child.run}"]
    return int(train(given, sweep.config_dir, sweep.cwd, load))


def _follow_the_sweep() -> None:
    """Ask this process to save and stop when nobody holds the other end of its input any more."""
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
