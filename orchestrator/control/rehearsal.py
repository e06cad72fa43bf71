"""Starts a rehearsal of a job on this host: train/rehearsal.py as a process."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

from orchestrator.control.launcher import TENSORFLOW_ENV
from orchestrator.spec.footprint import Rehearsal
from orchestrator.spec.plan import RunPlan

_PROJECT_DIR = str(Path(__file__).resolve().parents[2])
_SHOWN_LINES = 3
# What may change what TensorFlow does; workers do without it too.
_UNSET = ("TF_CONFIG", "TF_USE_LEGACY_KERAS")


def rehearse(plan: RunPlan, *, with_model: bool, limit_s: float) -> Rehearsal:
    """Load a job's data on this host, and build and trace its model if that is wanted.

    The process sees no GPU: it looks at sizes only, and takes nothing from a run that has them.

    Args:
        plan: of the run.
        with_model: False loads the data only.
        limit_s: how long it may take; then it is ended, and that is its error.
    """
    inherited = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    paths = dict.fromkeys([*plan.config.code_dirs, _PROJECT_DIR, *inherited, *sys.path[1:]])
    env = {name: value for name, value in os.environ.items() if name not in _UNSET}
    env |= {**TENSORFLOW_ENV, "CUDA_VISIBLE_DEVICES": "-1"}
    env["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "orchestrator.train.rehearsal"],
            input=pickle.dumps((plan, with_model)),
            capture_output=True,
            env=env,
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Rehearsal(error=f"it was not done within {limit_s:g} s")
    try:
        return Rehearsal.from_plain(json.loads(done.stdout))
    except ValueError:
        lines = done.stderr.decode(errors="replace").strip().splitlines()[-_SHOWN_LINES:]
        said = "; ".join(lines) or "it said nothing"
        return Rehearsal(error=f"its process ended with status {done.returncode}: {said}")
