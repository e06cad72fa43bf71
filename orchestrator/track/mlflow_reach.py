"""Whether MLflow takes records, found out without writing any."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import StorageError
from orchestrator.spec.secrets import mask_text
from orchestrator.track.mlflow_client import open_client

_SCHEMA = re.compile(r"found version (\w+), but expected (\w+)")
# As MLflow's client and the requests library say it; a figure of 401 in an error is none.
_REFUSED = re.compile(r"error code 401\b|\b401 Client Error|UNAUTHENTICATED")
_FORBIDDEN = re.compile(r"error code 403\b|\b403 Client Error|PERMISSION_DENIED")


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why MLflow takes no records, and what mends it."""

    why: str
    mend: str


def obstacle(uri: str, timeout_s: float) -> Obstacle | None:
    """Return what keeps MLflow from taking records; None if nothing does.

    A SQLite file that is not there yet is none: the first run makes it.

    Args:
        uri: `sqlite:///FILE` or the address of a server.
        timeout_s: of one request.
    """
    if uri.startswith("sqlite:///"):
        path = Path(uri.removeprefix("sqlite:///"))
        if not path.exists():
            return None
        if (found := _locked(path)) is not None:
            return found
    try:
        open_client(uri, timeout_s)
    except Exception as error:
        return _told_apart(uri, mask_text(str(error)) or type(error).__name__)
    return None


def _locked(path: Path) -> Obstacle | None:
    """Take the lock of a writer, and give it back."""
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=rw", uri=True, timeout=2.0)) as database:
            database.execute("begin immediate")
            database.execute("rollback")
    except sqlite3.Error as error:
        return Obstacle(
            f"{path} cannot be written: {error}",
            "make it writable, or set tracking.uri to another database or server",
        )
    return None


def _told_apart(uri: str, text: str) -> Obstacle:
    line = text.strip().splitlines()[0][:300]
    if match := _SCHEMA.search(text):
        if _is_known(match[1]):
            return Obstacle(
                f"its database is of an older MLflow ({match[1]}, not {match[2]})",
                f"copy the database, then run `mlflow db upgrade {mask_text(uri)}`",
            )
        return Obstacle(
            f"its database is of another, newer MLflow ({match[1]}, not {match[2]})",
            "install that MLflow, or set tracking.uri to another database",
        )
    return refusal(text) or Obstacle(
        f"it does not answer: {line}",
        "start it, or set tracking.uri; without it the journal keeps everything and `orchestrator "
        "runs sync` sends it later",
    )


def refusal(text: str) -> Obstacle | None:
    """Return how a server refuses who asks, read from an error's text; None if it does not."""
    if _REFUSED.search(text):
        return Obstacle(
            "it wants to know who comes (401)",
            "set MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
        )
    if _FORBIDDEN.search(text):
        return Obstacle(
            "it refuses this user, or this host name (403)",
            "ask for the right to write there, or start the server with --allowed-hosts",
        )
    return None


def one_line(error: BaseException) -> str:
    """Return what an error of MLflow's says, without passwords."""
    text = mask_text(str(error)).strip()
    if (refused := refusal(text)) is not None:
        return f"{refused.why}: {refused.mend}"
    lines = text.splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def required_client(uri: str, timeout_s: float) -> Any:
    """Return a client for a command that is nothing without MLflow.

    Raises:
        StorageError: MLflow does not answer, or refuses.
    """
    try:
        return open_client(uri, timeout_s)
    except Exception as error:
        raise StorageError(
            f"MLflow at {mask_text(uri)} does not answer: {one_line(error)}; start it, or give "
            "another address with tracking.uri="
        ) from error


def _is_known(revision: str) -> bool:
    """Tell whether the MLflow that is installed knows a version of the database."""
    import mlflow

    versions = Path(mlflow.__file__).parent / "store" / "db_migrations" / "versions"
    return any(versions.glob(f"{revision}*.py"))
