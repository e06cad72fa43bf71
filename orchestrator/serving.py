"""The command `serve`: a run's model, or one of the registry, answers over HTTP."""

from __future__ import annotations

import difflib
import json
from pathlib import Path

from orchestrator.errors import ConfigError
from orchestrator.spec.config import DEFAULT_RUNS_DIR, resolve_uri
from orchestrator.spec.paths import RunPaths, typed_path
from orchestrator.spec.plan import absolute_uri
from orchestrator.track.journal import read

_KEYS = ("run", "model", "port", "host", "runs_dir", "tracking.uri")
_LOOPBACK = "127.0.0.1"


def serve(arguments: list[str], cwd: Path) -> int:
    """Serve until interrupted.

    Args:
        arguments: `run=` or `model=`, and `port=`, `host=`, `runs_dir=`, `tracking.uri=`.
        cwd: what relative paths are relative to.

    Raises:
        ConfigError: there is no such run or model, it has no export, or the port is taken.
        StartFailed: the server does not start.
    """
    given = _given(arguments)
    port = int(given["port"]) if "port" in given else None
    host = given.get("host", _LOOPBACK)
    runs_dir = typed_path(given.get("runs_dir", DEFAULT_RUNS_DIR), cwd)
    if "run" in given:
        paths = find_run(given["run"], runs_dir, cwd)
        require_export(paths)
        from orchestrator.track import mlflow_serve

        name = f"{paths.root.parent.name}/{paths.root.name}"
        return mlflow_serve.serve(paths.mlflow_model_dir, name, host, port)
    from orchestrator.track import mlflow_serve

    asked = given.get("tracking.uri")
    uri = absolute_uri(resolve_uri(asked), cwd) if asked else _database(runs_dir)
    with mlflow_serve.registered(uri, given["model"]) as (folder, name):
        return mlflow_serve.serve(folder, name, host, port)


def _given(arguments: list[str]) -> dict[str, str]:
    given: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in _KEYS:
            raise ConfigError(f"serve: {argument}: takes {', '.join(f'{key}=' for key in _KEYS)}")
        if value:
            given[key] = value
    if ("run" in given) == ("model" in given):
        raise ConfigError(
            "serve: name either run=RUN, a run's folder, or model=NAME, model=NAME/VERSION or "
            "model=NAME@ALIAS of the registry"
        )
    if "port" in given and not given["port"].isdecimal():
        raise ConfigError(f"port={given['port']}: must be a whole number")
    return given


def find_run(run: str, runs_dir: Path, cwd: Path) -> RunPaths:
    """Return the run that is named by its folder, as `<job>/<run>`, or as `<run>` alone.

    Raises:
        ConfigError: there is none, or several jobs have a run of that name.
    """
    for folder in (typed_path(run, cwd), runs_dir / run):
        if RunPaths(folder).journal.exists():
            return RunPaths(folder.resolve())
    known = [path.parent for path in runs_dir.glob("*/*/journal.jsonl")]
    found = [folder for folder in known if folder.name == run]
    if len(found) == 1:
        return RunPaths(found[0])
    if found:
        jobs = ", ".join(sorted(f"{folder.parent.name}/{run}" for folder in found))
        raise ConfigError(f"run={run}: there are several of this name: {jobs}")
    names = sorted((f"{path.parent.name}/{path.name}" for path in known), reverse=True)
    if not names:
        raise ConfigError(f"run={run}: there are no runs in {runs_dir}; name another runs_dir=")
    # A run is mistyped with its job or without; of equally close ones the newest is meant.
    spelt = {name if "/" in run else name.rpartition("/")[2]: name for name in reversed(names)}
    close = difflib.get_close_matches(run, spelt, n=1, cutoff=0.0)
    raise ConfigError(
        f"run={run}: there is no such run in {runs_dir}; the nearest is {spelt[close[0]]} "
        "(`orchestrator runs list` shows all)"
    )


def require_export(paths: RunPaths) -> None:
    """Refuse a run without a proven model.

    Raises:
        ConfigError: with the reason, as far as the run folder tells.
    """
    if (paths.mlflow_model_dir / "MLmodel").exists():
        return
    try:
        proof = json.loads(paths.proof.read_text())
    except (OSError, ValueError):
        proof = {}
    run = f"run={paths.root.parent.name}/{paths.root.name}"
    if proof.get("error"):
        raise ConfigError(f"{run} has no model to serve: its export was refused: {proof['error']}")
    ends = [r["status"] for r in read(paths.journal) if r.get("kind") == "RunEnded"]
    if ends and ends[-1] == "FINISHED":
        raise ConfigError(
            f"{run} has no model to serve: it was trained with export.enabled=false; "
            "resume it with export.enabled=true"
        )
    raise ConfigError(
        f"{run} has no model to serve: it is {ends[-1].lower() if ends else 'not at its end'}, "
        "and a model is exported when training is complete"
    )


def _database(runs_dir: Path) -> str:
    database = runs_dir / "mlflow.db"
    if not database.exists():
        raise ConfigError(
            f"there are no models yet: {database} does not exist. Train one with "
            "export.register=NAME, or name another place with runs_dir= or tracking.uri="
        )
    return f"sqlite:///{database}"
