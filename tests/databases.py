"""MLflow databases whose tables exist already: MLflow takes two seconds to make them."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path


@cache
def _empty() -> bytes:
    from orchestrator.track.mlflow_client import open_client

    with tempfile.TemporaryDirectory() as folder:
        open_client(f"sqlite:///{folder}/mlflow.db", 5.0)
        return Path(folder, "mlflow.db").read_bytes()


def with_tables(database: Path) -> Path:
    """Make a database without experiments, runs and models; return its path."""
    database.parent.mkdir(parents=True, exist_ok=True)
    database.write_bytes(_empty())
    return database
