"""Runs the real command in a process of its own and reads what it leaves behind."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.spec.paths import RunPaths
from orchestrator.track.journal import read
from tests.databases import with_tables

ROOT = Path(__file__).parents[2]
MINE = Path(__file__).parent / "mine"
JOB = ("job=blobs", f"--config-dir={MINE}")
_PATIENCE_S = 150.0


@dataclass(frozen=True)
class Ended:
    """What a command said and left."""

    code: int
    out: str
    folder: Path

    @property
    def run(self) -> RunPaths:
        """The folder of the newest run."""
        return runs_in(self.folder)[-1]


def runs_in(folder: Path) -> list[RunPaths]:
    """Return the run folders below `folder`, oldest first."""
    journals = (folder / "runs").glob("*/*/journal.jsonl")
    return [RunPaths(path.parent) for path in sorted(journals, key=lambda p: p.stat().st_ctime)]


def start(
    verb: str,
    *arguments: str,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    is_first: bool = False,
) -> subprocess.Popen[str]:
    """Start a command; its standard error comes with its output.

    The first command of a folder makes MLflow's tables; `is_first` leaves that to it.
    """
    database = cwd / "runs" / "mlflow.db"
    if verb in ("train", "sweep") and not is_first and not database.exists():
        with_tables(database)
    environ = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
    return subprocess.Popen(
        [sys.executable, "-m", "orchestrator", verb, *arguments],
        cwd=cwd,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], cwd: Path) -> Ended:
    """Wait for a command's end."""
    try:
        out, _ = process.communicate(timeout=_PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        out, _ = process.communicate()
        raise AssertionError(f"it did not end:\n{out}") from None
    return Ended(process.returncode, out, cwd)


def train(*arguments: str, cwd: Path, env: Mapping[str, str] | None = None) -> Ended:
    """Train the blobs with some overrides."""
    return finish(start("train", *JOB, *arguments, cwd=cwd, env=env), cwd)


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = 60.0) -> Any:
    """Return what `condition` returns once it is true."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {what}"
        time.sleep(0.05)
    return found


def wait_for_step(folder: Path, step: int) -> RunPaths:
    """Wait until the newest run below `folder` has made a step."""

    def reached() -> RunPaths | None:
        runs = runs_in(folder)
        return runs[-1] if runs and last_step(runs[-1]) >= step else None

    found: RunPaths = wait_for(reached, f"step {step}")
    return found


def records(run: RunPaths, kind: str) -> list[dict[str, Any]]:
    """Return the journal's records of a kind."""
    return [record for record in read(run.journal) if record["kind"] == kind]


def last_step(run: RunPaths) -> int:
    """Return the last step that the journal knows."""
    return max((r["first_step"] + r["num_steps"] for r in records(run, "BlockDone")), default=0)


def losses(run: RunPaths) -> np.ndarray:
    """Return the loss of each step; of a step made twice, the later one."""
    found: dict[int, float] = {}
    for record in records(run, "BlockDone"):
        if record["worker"] == 0:
            found |= dict(enumerate(record["loss"], record["first_step"]))
    assert sorted(found) == list(range(len(found))), "steps are missing"
    return np.array([found[step] for step in sorted(found)])


def ledger(run: RunPaths, attempt: int = 1) -> int:
    """Return the sum of all workers' ledgers in an attempt."""
    blocks = [r for r in records(run, "BlockDone") if r["attempt"] == attempt]
    return int(sum(r["ledger"] for r in blocks)) % 2**64


def worker_pids(run: RunPaths) -> dict[int, int]:
    """Return the processes of the newest attempt's workers."""
    return {record["worker"]: record["pid"] for record in records(run, "Ready")}


def is_alive(pid: int) -> bool:
    """Tell whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def database(folder: Path) -> list[dict[str, Any]]:
    """Return MLflow's runs in the database below `folder`."""
    with sqlite3.connect(f"file:{folder}/runs/mlflow.db?mode=ro", uri=True) as connection:
        connection.row_factory = sqlite3.Row
        rows = connection.execute("select * from runs order by start_time").fetchall()
    return [dict(row) for row in rows]


def statuses(folder: Path) -> list[str]:
    """Return the status of each of MLflow's runs; none while there is no database."""
    if not (folder / "runs" / "mlflow.db").exists():
        return []
    return [row["status"] for row in database(folder)]


def wait_until_known_as(folder: Path, *expected: str) -> None:
    """Wait for the status of each of MLflow's runs: what a stopped run had no time for follows."""
    wait_for(lambda: statuses(folder) == [*expected], f"MLflow to say {expected}")


def interrupt(process: subprocess.Popen[str], number: int = signal.SIGINT) -> None:
    """Send a signal to the command itself."""
    process.send_signal(number)
