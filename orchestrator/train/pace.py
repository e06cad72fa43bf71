"""Points at which `chaos` holds a worker; a run without `chaos.step_ms` has none of them.

Faults that nobody outside a process can time are asked for by a file in the run folder: `sleep-1`
and `gil-1` stall the input of worker 1, `hold-save` holds the chief between the writing of a
checkpoint and its rename. Whoever does what a file asks for renames it to `….taken` first: a
restarted worker does not do it again, and the one who asked knows the moment.
"""

from __future__ import annotations

import ctypes
import time
from pathlib import Path

from orchestrator.spec.plan import RunPlan

_LONG_S = 3600
_POLL_S = 0.005


class Pace:
    """Slows a worker down, and stalls it when a file says so."""

    def __init__(self, folder: Path, worker: int, step_ms: float):
        """Make the pace of one worker.

        Args:
            folder: where files are looked for; need not exist.
            worker: index in TF_CONFIG.
            step_ms: how long to sleep for each step, milliseconds.
        """
        self._folder = folder
        self._worker = worker
        self._step_s = step_ms / 1000

    def before_block(self, num_steps: int) -> None:
        """Take the time of a block, as slow input would; may never return."""
        time.sleep(num_steps * self._step_s)
        if self._is_asked(f"sleep-{self._worker}"):
            while True:
                time.sleep(_LONG_S)
        if self._is_asked(f"gil-{self._worker}"):
            # PyDLL keeps the interpreter's lock during the call: no other thread runs Python.
            library = ctypes.PyDLL(None)
            while True:
                library.sleep(_LONG_S)

    def before_commit(self) -> None:
        """Hold a save that is written but has not appeared, until `release-save` is there."""
        if not self._is_asked("hold-save"):
            return
        while not (self._folder / "release-save").exists():
            time.sleep(_POLL_S)

    def _is_asked(self, name: str) -> bool:
        try:
            (self._folder / name).rename(self._folder / f"{name}.taken")
        except OSError:
            return False
        return True


def make_pace(plan: RunPlan, worker: int) -> Pace | None:
    """Return the pace of a worker; None for full speed."""
    step_ms = plan.config.chaos.step_ms
    return None if step_ms is None else Pace(plan.paths.chaos_dir, worker, step_ms)
