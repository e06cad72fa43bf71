"""A run folder with a journal, real MLflow stores, and what they hold."""

from __future__ import annotations

import os
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.track.facts import RunFacts
from orchestrator.track.journal import Journal
from tests.databases import with_tables

START = 1_700_000_000.0
_SERVER_PATIENCE_S = 120.0


def make_facts(root: Path, uri: str, **changes: Any) -> RunFacts:
    values: dict[str, Any] = {
        "run": root.name,
        "job": "tiny",
        "experiment": "tiny",
        "tracking_uri": uri,
        "artifact_root": str(root.parent / "mlartifacts") if uri.startswith("sqlite") else None,
        "root": str(root),
        "log_every_steps": "2",
        "global_batch_size": 16,
        "timeout_s": 2.0,
        "register": None,
        "params": {"train.steps": "8", "optimizer.learning_rate": "0.1"},
        "tags": {"git.commit": "abc", "command": "orchestrator train"},
    }
    return RunFacts(**(values | changes))


def block(first: int, num: int, attempt: int = 1) -> dict[str, Any]:
    """Steps of 10 ms whose loss is their number."""
    steps = range(first + 1, first + num + 1)
    return {
        "kind": "BlockDone",
        "worker": 0,
        "attempt": attempt,
        "time": START + first + num + 0.001,
        "first_step": first,
        "num_steps": num,
        "wall_s": 0.01 * num,
        "data_wait_s": 0.0,
        "ledger": 0,
        "loss": [float(step) for step in steps],
        "metrics": {},
        "learning_rate": [0.1] * num,
        "skipped_steps": [],
    }


def data_used() -> dict[str, Any]:
    return {
        "kind": "DataUsed",
        "worker": 0,
        "attempt": 1,
        "time": START,
        "split": "train",
        "name": "mnist",
        "source": "data/mnist",
        "digest": "0123456789abcdef" * 4,
        "num_examples": 60000,
        "features": {"x": "uint8 [28, 28]"},
    }


def ended(status: str = "FINISHED") -> dict[str, Any]:
    return {"kind": "RunEnded", "time": START + 100, "status": status, "cause": ""}


def new_run(folder: Path, name: str = "20260101-000000-abcd") -> Path:
    root = folder / name
    (root / "logs" / "attempt-1").mkdir(parents=True)
    (root / "logs" / "attempt-1" / "worker-0.log").write_text("worker log")
    for file in ("config.yaml", "plan.txt", "overrides.txt"):
        (root / file).write_text(file)
    return root


def write(root: Path, *records: Mapping[str, Any]) -> None:
    journal = Journal(root / "journal.jsonl")
    for record in records:
        journal.append(record)
    journal.close()


def sqlite_uri(folder: Path) -> str:
    return f"sqlite:///{folder / 'mlflow.db'}"


def rows(database: Path) -> dict[str, int]:
    """Count the rows of every table that a run could add to."""
    tables = ("runs", "metrics", "params", "tags", "datasets", "inputs", "logged_models")
    tables += ("logged_model_metrics", "logged_model_params", "model_versions")
    with sqlite3.connect(database) as connection:
        counts = {t: connection.execute(f"select count(*) from {t}").fetchone()[0] for t in tables}
    connection.close()
    return counts


def losses(database: Path) -> list[tuple[int, float, int]]:
    """Return (step, value, timestamp) of train/loss."""
    with sqlite3.connect(database) as connection:
        query = "select step, value, timestamp from metrics where key = 'train/loss' order by step"
        found = connection.execute(query).fetchall()
    connection.close()
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A real `mlflow server` on a port of its own that can be killed and started again."""

    def __init__(self, folder: Path):
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.database = folder / "server.db"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *, wait: bool = True) -> None:
        if not self.database.exists():
            with_tables(self.database)
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.database}"]
        command += ["--artifacts-destination", str(self._folder / "artifacts")]
        environ = os.environ | {
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, env=environ, stdout=log, stderr=log, cwd=self._folder, process_group=0
            )
        if wait:
            wait_for_answer(f"{self.uri}/health")

    def signal(self, number: int) -> None:
        """Send a signal to the server and its workers."""
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, 9)
            self._process.wait()
            self._process = None


def wait_for_answer(url: str) -> None:
    deadline = time.monotonic() + _SERVER_PATIENCE_S
    while True:
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:
                assert answer.status == 200
                return
        except OSError:
            assert time.monotonic() < deadline, f"{url} does not answer"
            time.sleep(0.05)
