"""`runs list`: the runs below a folder, newest first, from their journals."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.errors import ConfigError, ExitCode, StorageError
from orchestrator.lease import holder_of
from orchestrator.spec.paths import RunPaths, typed_path
from orchestrator.track.journal import read

_HEADINGS = ("run", "status", "steps", "result", "age")
_UNITS = ((86400, "d"), (3600, "h"), (60, "min"))


@dataclass(slots=True)
class Listed:
    """What a line tells of a run.

    Attributes:
        began: Unix seconds at which it was first started.
        status: FINISHED, FAILED or KILLED, or UNREADABLE; None if it never ended.
        last_step: the last step done in its newest attempt.
        evaluated: metrics of each evaluation, by step.
        params: the configuration it was last started with, flattened.
    """

    paths: RunPaths
    began: float = 0.0
    status: str | None = None
    last_step: int = 0
    evaluated: dict[int, dict[str, float]] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)

    def observe(self, record: Mapping[str, Any]) -> None:
        """Take note of one record of the journal."""
        match record.get("kind"):
            case "RunStarted":
                self.began = self.began or record["time"]
                self.status, self.params = None, record["facts"]["params"]
            case "Ready" if record["worker"] == 0:
                self.last_step = record["start_step"]
            case "BlockDone" if record["worker"] == 0:
                self.last_step = record["first_step"] + record["num_steps"]
            case "Evaluated":
                numbers = {k: v for k, v in record["metrics"].items() if isinstance(v, int | float)}
                self.evaluated[record["step"]] = numbers  # others were once told as text
            case "RunEnded":
                self.status = record["status"]

    @property
    def name(self) -> str:
        """How commands call the run: `<job>/<run>`."""
        return f"{self.paths.root.parent.name}/{self.paths.root.name}"

    def state(self) -> str:
        """Return the status; a run without one is running or its driver has died."""
        if self.status is not None:
            return self.status.lower()
        return "running" if holder_of(self.paths) else "died"

    def result(self) -> str:
        """Return the best value of `best.metric`, else what the last evaluation found first."""
        if not self.evaluated:
            return ""
        metric = self.params.get("best.metric", "None")
        values = [found[metric] for found in self.evaluated.values() if metric in found]
        if values:
            # Comparing with NaN says no, so that a first one would stay.
            values = [value for value in values if not math.isnan(value)] or values
            best = max(values) if self.params.get("best.mode") == "max" else min(values)
            return f"best {metric} {best:.4g}"
        last = self.evaluated[max(self.evaluated)]
        name = next((name for name in last if name != "loss"), "loss")
        return f"{name} {last[name]:.4g}" if name in last else ""


def list_runs(arguments: list[str], cwd: Path) -> ExitCode:
    """Print the runs below `runs_dir=`, of one `job=` if it is named.

    Raises:
        ConfigError: an argument is not known, or there is no such folder.
    """
    known = {"runs_dir": "runs", "job": ""}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in known:
            raise ConfigError(f"runs list: {argument}: takes runs_dir=FOLDER and job=NAME")
        known[key] = value
    folder = typed_path(known["runs_dir"], cwd)
    if not folder.is_dir():
        raise ConfigError(f"runs list: there is no folder {folder}; name it with runs_dir=")
    runs = [listed(RunPaths(path.parent)) for path in folder.glob("*/*/journal.jsonl")]
    runs = [run for run in runs if known["job"] in ("", run.paths.root.parent.name)]
    runs.sort(key=lambda run: (run.began, run.name), reverse=True)
    if not runs:
        print(f"no runs in {folder}" + (f" of job {known['job']}" if known["job"] else ""))
        return ExitCode.DONE
    now = time.time()
    rows = [
        (r.name, r.state(), f"{r.last_step:,}", r.result(), age(now - r.began) if r.began else "")
        for r in runs
    ]
    print(table([_HEADINGS, *rows]))
    return ExitCode.DONE


def listed(paths: RunPaths) -> Listed:
    """Return what a run's journal tells for its line; one of another user may tell nothing."""
    run = Listed(paths)
    try:
        for record in read(paths.journal):
            run.observe(record)
    except StorageError:
        run.status = "UNREADABLE"
    if not run.began:  # its first start was ended before anything was on record
        with contextlib.suppress(OSError):
            run.began = paths.root.stat().st_mtime
    return run


def age(seconds: float) -> str:
    """Return a length of time in its largest unit: `3 d`, `2 h`, `5 min`, `12 s`."""
    for size, unit in _UNITS:
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def table(rows: list[tuple[str, ...]]) -> str:
    """Return rows as text with aligned columns; the number of steps to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    right = _HEADINGS.index("steps")
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column == right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
