"""Starts a rehearsal of a job on this host: train/rehearsal.py as a process."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys

from orchestrator.control.launcher import TENSORFLOW_ENV
from orchestrator.control.upload import importable
from orchestrator.spec.footprint import Rehearsal
from orchestrator.spec.paths import PROJECT_DIR
from orchestrator.spec.plan import RunPlan

_SHOWN_LINES = 3
# What may change what TensorFlow does; workers do without it too.
_UNSET = ("TF_CONFIG", "TF_USE_LEGACY_KERAS")


class RehearsalProcess:
    """A process that loads a job's data, and builds and traces its model if that is wanted.

    It sees no GPU: it looks at sizes only, and takes nothing from a run that has them.
    """

    def __init__(self, plan: RunPlan, *, with_model: bool):
        """Start it.

        Args:
            plan: of the run.
            with_model: False loads the data only.
        """
        self._order = pickle.dumps((plan, with_model))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "orchestrator.train.later", "orchestrator.train.rehearsal"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_environment(plan),
        )

    def result(self, limit_s: float) -> Rehearsal:
        """Wait for what it found; one that takes longer is ended, and stays unfinished."""
        try:
            told, said = self._process.communicate(self._order, timeout=limit_s)
        except subprocess.TimeoutExpired:
            self.close()
            return Rehearsal(error=f"not done within {limit_s:g} s", is_unfinished=True)
        try:
            return Rehearsal.from_plain(json.loads(told))
        except ValueError:
            lines = said.decode(errors="replace").strip().splitlines()[-_SHOWN_LINES:]
            words = "; ".join(lines) or "it said nothing"
            status = self._process.returncode
            return Rehearsal(error=f"its process ended with status {status}: {words}")

    def close(self) -> None:
        """End it, if it has not ended by itself."""
        self._process.kill()
        self._process.wait()


def rehearse(plan: RunPlan, *, with_model: bool, limit_s: float) -> Rehearsal:
    """Start a rehearsal on this host, and wait for what it finds."""
    process = RehearsalProcess(plan, with_model=with_model)
    try:
        return process.result(limit_s)
    finally:
        process.close()


def _environment(plan: RunPlan) -> dict[str, str]:
    inherited = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    own = importable(plan.config.code_dirs)
    paths = dict.fromkeys([*own, str(PROJECT_DIR), *inherited, *sys.path[1:]])
    env = {name: value for name, value in os.environ.items() if name not in _UNSET}
    env |= {**TENSORFLOW_ENV, "CUDA_VISIBLE_DEVICES": "-1"}
    return env | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
