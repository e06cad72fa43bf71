"""Fixtures of the record's tests: run folders, facts, and stores whose tables exist already."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from orchestrator.track.facts import RunFacts
from orchestrator.track.mlflow_client import open_client
from tests.track import rig


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables, which take two seconds to make."""
    folder = tmp_path_factory.mktemp("database")
    open_client(rig.sqlite_uri(folder), 5.0)
    return folder / "mlflow.db"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A run folder."""
    return rig.new_run(tmp_path)


@pytest.fixture
def facts(root: Path, tmp_path: Path, empty_database: Path) -> RunFacts:
    """The facts of that run, with a SQLite store beside its folder."""
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return rig.make_facts(root, rig.sqlite_uri(tmp_path))
