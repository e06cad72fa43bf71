"""Fixtures of the record's tests: run folders, facts, and stores whose tables exist already."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.track.facts import RunFacts
from tests.databases import with_tables
from tests.track import rig


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A run folder."""
    return rig.new_run(tmp_path)


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """A SQLite store as MLflow makes it, without runs."""
    return with_tables(tmp_path / "mlflow.db")


@pytest.fixture
def facts(root: Path, database: Path) -> RunFacts:
    """The facts of that run, with a SQLite store beside its folder."""
    return rig.make_facts(root, rig.sqlite_uri(database.parent))
