"""Whether MLflow takes records: what is wrong is told apart, and nothing is written to find out."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from orchestrator.track.mlflow_reach import obstacle

TIMEOUT_S = 2.0


@contextmanager
def server(code: int) -> Iterator[str]:
    """A server that answers everything with one code."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()


def set_version(path: Path, revision: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("update alembic_version set version_num = ?", (revision,))
        connection.commit()


def test_a_database_that_is_right_is_no_obstacle(database: Path) -> None:
    before = database.read_bytes()
    assert obstacle(f"sqlite:///{database}", TIMEOUT_S) is None
    assert database.read_bytes() == before


def test_a_database_that_the_first_run_makes_is_no_obstacle(tmp_path: Path) -> None:
    assert obstacle(f"sqlite:///{tmp_path / 'mlflow.db'}", TIMEOUT_S) is None
    assert list(tmp_path.iterdir()) == []


def test_a_newer_database_is_called_that(database: Path) -> None:
    set_version(database, "fedcba987654")
    found = obstacle(f"sqlite:///{database}", TIMEOUT_S)
    assert found is not None and "newer MLflow (fedcba987654, not " in found.why


def test_an_older_database_is_told_with_the_command_that_mends_it(database: Path) -> None:
    set_version(database, "451aebb31d03")  # of MLflow 1.0
    found = obstacle(f"sqlite:///{database}", TIMEOUT_S)
    assert found is not None and "older MLflow (451aebb31d03, not " in found.why
    assert f"mlflow db upgrade sqlite:///{database}" in found.mend


def test_a_database_that_somebody_keeps_locked_is_told(database: Path) -> None:
    with closing(sqlite3.connect(database)) as holder:
        holder.execute("begin exclusive")
        found = obstacle(f"sqlite:///{database}", TIMEOUT_S)
        holder.execute("rollback")
    assert found is not None and "cannot be written: database is locked" in found.why


def test_a_file_that_is_no_database_is_told(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    path.write_text("words " * 1000)
    found = obstacle(f"sqlite:///{path}", TIMEOUT_S)
    assert found is not None and "file is not a database" in found.why


def test_a_server_that_asks_who_comes_is_told_with_the_variables() -> None:
    with server(401) as address:
        found = obstacle(address, TIMEOUT_S)
    assert found is not None and "(401)" in found.why
    assert "MLFLOW_TRACKING_TOKEN" in found.mend


def test_a_server_that_refuses_is_told_with_its_option() -> None:
    with server(403) as address:
        found = obstacle(address, TIMEOUT_S)
    assert found is not None and "(403)" in found.why
    assert "--allowed-hosts" in found.mend


def test_a_server_that_is_down_is_told_without_its_password() -> None:
    found = obstacle("http://me:hidden@127.0.0.1:1", TIMEOUT_S)
    assert found is not None and "does not answer" in found.why
    assert "hidden" not in f"{found.why} {found.mend}"
