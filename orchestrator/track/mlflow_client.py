"""MLflow's client, opened so that it fails soon and writes nowhere else."""

from __future__ import annotations

import fcntl
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from orchestrator.imports import uncollected


def open_client(uri: str, timeout_s: float) -> Any:
    """Return a client that fails soon instead of retrying for minutes.

    Variables such as MLFLOW_TRACKING_URI do not change where it writes.
    """
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(max(1, round(timeout_s)))
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    # Only the screen draws.
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    # It imports the half of itself, and what makes tables, when it is first used.
    with nullcontext() if "mlflow" in sys.modules else uncollected():
        return _open(uri)


def _open(uri: str) -> Any:
    import mlflow

    # SQLite's migrations and the client's hints would land on the user's terminal.
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # It logs what a database refuses with its traceback, and raises it: who asked tells it.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    # Registering a model asks the global address, not the client's: without this it would make a
    # database in the working folder (mlflow 3.17, store/artifact/models_artifact_repo.py).
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    with _first_use(uri):
        client = mlflow.MlflowClient(uri, registry_uri=uri)
        client.search_experiments(max_results=1)
    return client


@contextmanager
def _first_use(uri: str) -> Iterator[None]:
    """Let one process at a time make the tables of a SQLite file: two at once crash."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    database = Path(uri.removeprefix("sqlite:///"))
    database.parent.mkdir(parents=True, exist_ok=True)
    with database.with_name(f"{database.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not database.exists():
            _make(database)
        yield


def _make(database: Path) -> None:
    """Make a SQLite file aside, so that it appears with all its tables or not at all.

    MLflow makes them by a chain of migrations, which takes seconds. Killed in the middle, they
    cannot be taken up again: "table _alembic_tmp_experiments already exists" (mlflow 3.17).
    """
    import mlflow

    aside = database.with_name(f"{database.name}.new")
    for left in (aside, aside.with_name(f"{aside.name}-journal")):
        left.unlink(missing_ok=True)
    mlflow.MlflowClient(f"sqlite:///{aside}").search_experiments(max_results=1)
    aside.replace(database)
