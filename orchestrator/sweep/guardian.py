"""Ends the MLflow run of a sweep whose process was killed; guardian.py says how it comes to be.

The children are drivers of their own: each has a guardian of its own.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from orchestrator.guardian import GRACE_S, held
from orchestrator.spec.config import load_kept
from orchestrator.spec.paths import RunPaths
from orchestrator.spec.secrets import mask_text
from orchestrator.sweep.folder import read_sweep
from orchestrator.sweep.record import facts_of
from orchestrator.sweep.state import ChildState, states_of
from orchestrator.track.mlflow_sweep import end_parent


def end_sweep(root: Path) -> None:
    """Say in MLflow how a sweep that nobody works on has ended."""
    time.sleep(GRACE_S)
    sweep = read_sweep(root)
    states = states_of(sweep)
    if sweep.paths.recorded.exists() or not any(state.mlflow_run for state in states):
        return
    text = sweep.paths.config(sweep.children[0].name).read_text()
    facts = facts_of(sweep, load_kept(text, {}, sweep.config_dir))
    with held(RunPaths(root)) as is_held:
        if is_held:
            end_parent(facts, sweep.began, _status([state for state in states if state.is_open]))


def _status(left: list[ChildState]) -> str:
    """Return the status of a sweep that has such children left."""
    if not left:
        return "FINISHED"
    return "FAILED" if all(state.status == "failed" for state in left) else "KILLED"


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    try:
        end_sweep(folder)
    except Exception as error:
        told = mask_text(repr(error))
        print(f"the record of {folder} could not be ended: {told}", file=sys.stderr)
        sys.exit(1)
