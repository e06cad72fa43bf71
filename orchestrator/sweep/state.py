"""How far the children of a sweep are: from their journals, and the processes that train them."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.errors import ExitCode
from orchestrator.lease import holder_of
from orchestrator.listing import Listed
from orchestrator.spec.paths import PROJECT_DIR, RunPaths
from orchestrator.spec.schema import BestConfig, BestMode
from orchestrator.sweep.folder import Child, Sweep
from orchestrator.track.journal import Journal, Reader, read


@dataclass(slots=True)
class ChildState:
    """What is known of one child.

    Attributes:
        listed: what its journal has told.
        mlflow_run: MLflow's id of its run, as far as known.
        process: trains it; None if nothing does.
        code: how its process of this command ended.
        stopped: why it was stopped before its end, in words; empty if it was not.
        judged: the rungs at which it was compared with the others.
        wall_s: how long its processes of this command have run.
    """

    child: Child
    listed: Listed
    reader: Reader
    mlflow_run: str | None = None
    process: subprocess.Popen[bytes] | None = None
    code: int | None = None
    stopped: str = ""
    judged: set[float] = field(default_factory=set)
    began_s: float = 0.0
    wall_s: float = 0.0

    @classmethod
    def of(cls, sweep: Sweep, child: Child) -> ChildState:
        """Return what a child's journal tells so far."""
        paths = sweep.run_of(child)
        state = cls(child, Listed(paths), Reader(paths.journal))
        state.look()
        return state

    @property
    def paths(self) -> RunPaths:
        """The folder of its run."""
        return self.listed.paths

    def look(self) -> None:
        """Read what its journal has gained."""
        for record in self.reader.new():
            self.listed.observe(record)
            if record.get("kind") == "MlflowRun":
                self.mlflow_run = record["run_id"]
        if self.process is not None:
            self.wall_s = time.monotonic() - self.began_s

    @property
    def status(self) -> str:
        """One word: waiting, running, finished, stopped, failed or interrupted."""
        if self.process is not None:
            return "running"
        if self.listed.status == "FINISHED":
            return "finished"
        if self.stopped:
            return "stopped"
        if self.code not in (None, 0, *_INTERRUPTIONS) or self.listed.status == "FAILED":
            return "failed"
        return "interrupted" if self.listed.began else "waiting"

    @property
    def is_open(self) -> bool:
        """Whether there is something left to be trained."""
        return self.status not in ("finished", "stopped")

    @property
    def is_taken(self) -> bool:
        """Whether another process trains it, such as one that a killed sweep has left."""
        return self.process is None and holder_of(self.paths) is not None

    def result(self, best: BestConfig) -> float | None:
        """Return the best value of `best.metric`, else the loss of the last evaluation."""
        found = self.listed.evaluated
        if not found:
            return None
        if best.metric is None:
            return found[max(found)].get("loss")
        values = [metrics[best.metric] for metrics in found.values() if best.metric in metrics]
        if not values:
            return None
        # Comparing with NaN says no, so that a first one would stay.
        numbers = [value for value in values if not math.isnan(value)] or values
        return min(numbers) if best.mode is BestMode.min else max(numbers)


_INTERRUPTIONS = (ExitCode.INTERRUPTED, ExitCode.TERMINATED, ExitCode.OUT_OF_TIME)


def states_of(sweep: Sweep) -> list[ChildState]:
    """Return what is known of all children, with those that were stopped for being behind."""
    told: dict[str, Mapping[str, Any]] = {
        record["child"]: record for record in read(sweep.paths.stopped)
    }
    states = [ChildState.of(sweep, child) for child in sweep.children]
    for state in states:
        if state.child.name in told:
            state.stopped = told[state.child.name]["why"]
    return states


def keep_stopped(sweep: Sweep, state: ChildState, why: str) -> None:
    """Write down, before it is done, that a child is stopped for being behind."""
    journal = Journal(sweep.paths.stopped)
    journal.append({"kind": "Stopped", "time": time.time(), "child": state.child.name, "why": why})
    journal.close()
    state.stopped = why


def start_child(sweep: Sweep, state: ChildState) -> None:
    """Start the process that trains a child, or goes on with it.

    It is in a session of its own: Ctrl-C reaches the sweep alone, which passes it on.
    """
    child = state.child
    paths = [str(PROJECT_DIR), os.environ.get("PYTHONPATH", "")]
    log = sweep.paths.log(child.name)
    log.parent.mkdir(exist_ok=True)
    with log.open("ab") as output:
        state.process = subprocess.Popen(
            [sys.executable, "-m", "orchestrator.sweep.child", str(sweep.paths.root), child.name],
            cwd=sweep.cwd,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    state.code, state.began_s = None, time.monotonic()


def stop_child(state: ChildState, *, at_once: bool = False) -> None:
    """Ask a child to save and stop, or to end at once. Safe in signal handlers."""
    if state.process is not None:
        state.process.send_signal(signal.SIGTERM)
        if at_once:  # SIGTERM twice in a moment counts once
            state.process.send_signal(signal.SIGINT)


def has_ended(state: ChildState) -> bool:
    """Tell whether a child's process is over; if so, take note of how it ended."""
    assert state.process is not None
    code = state.process.poll()
    if code is None:
        return False
    assert state.process.stdin is not None
    state.process.stdin.close()
    state.look()
    state.process, state.code = None, code
    return True


def last_words(sweep: Sweep, state: ChildState) -> str:
    """Return the last line that a child's commands have printed but for the exit code's."""
    log = sweep.paths.log(state.child.name)
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    told = [line for line in lines if line.strip() and not line.startswith("exit code")]
    return told[-1].strip() if told else ""
