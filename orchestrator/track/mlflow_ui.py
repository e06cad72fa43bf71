"""MLflow's own web interface over the record, on a loopback port."""

from __future__ import annotations

import sys
from pathlib import Path

from orchestrator.errors import ConfigError, StorageError
from orchestrator.spec.secrets import without_credentials
from orchestrator.track.mlflow_reach import required_client
from orchestrator.track.mlflow_server import (
    LOOPBACK,
    answers_soon,
    free_port,
    running,
    tail,
    url_of,
)

_PORTS = range(5000, 5100)
_START_TIMEOUT_S = 60.0
# Job execution costs a second gigabyte and serves nothing here.
_ENVIRONMENT = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def open_ui(uri: str, artifact_root: str, port: int | None, experiment: str | None) -> int:
    """Serve MLflow's interface until it is interrupted.

    Args:
        uri: of the record; a server is already its own interface, and only its link is printed.
        artifact_root: where a SQLite store keeps artifacts.
        port: on loopback; by default the first free one from 5000.
        experiment: whose runs the link shows; by default the one that was used last.

    Returns:
        0, after Ctrl-C too.

    Raises:
        ConfigError: there is no record yet, or the port is taken.
        StorageError: MLflow does not start, or has ended by itself.
    """
    if not uri.startswith("sqlite:///"):
        print(_link(without_credentials(uri).rstrip("/"), uri, experiment), flush=True)
        return 0
    database = Path(uri.removeprefix("sqlite:///"))
    if not database.exists():
        raise ConfigError(
            f"there are no runs yet: {database} does not exist. Train one, or name another folder "
            'with runs_dir= (make: args="runs_dir=...")'
        )
    port = free_port(LOOPBACK, port, _PORTS)
    address = url_of(LOOPBACK, port)
    link = _link(address, uri, experiment)
    log = database.parent / "mlflow-ui.log"
    try:
        with running(_command(uri, artifact_root, port), log, _ENVIRONMENT) as server:
            if not answers_soon(server, f"{address}/health", _START_TIMEOUT_S):
                raise StorageError(f"MLflow's server did not start; {tail(log)}")
            print(f"MLflow shows the runs at\n\n  {link}\n\nCtrl-C ends it.", flush=True)
            code = server.wait()
            raise StorageError(f"MLflow's server has ended by itself ({code}); {tail(log)}")
    except KeyboardInterrupt:
        print(flush=True)
    return 0


def _link(address: str, uri: str, experiment: str | None) -> str:
    """Return a link that lands on the runs: MLflow's start page shows something else."""
    client = required_client(uri, 5.0)
    if experiment is not None:
        found = client.get_experiment_by_name(experiment)
        if found is None:
            names = sorted(item.name for item in client.search_experiments())
            raise ConfigError(f"experiment={experiment}: there is none; {', '.join(names)}")
        shown = found.experiment_id
    else:
        # The default experiment, number 0, is MLflow's own and holds none of our runs.
        ids = [item.experiment_id for item in client.search_experiments()]
        ids = [identity for identity in ids if identity != "0"]
        newest = client.search_runs(ids, max_results=1, order_by=["attributes.start_time DESC"])
        shown = newest[0].info.experiment_id if newest else (ids or ["0"])[0]
    return f"{address}/#/experiments/{shown}?workflowType=machine_learning"


def _command(uri: str, artifact_root: str, port: int) -> list[str]:
    return [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        f"--backend-store-uri={uri}",
        f"--artifacts-destination={artifact_root}",
        f"--host={LOOPBACK}",
        f"--port={port}",
        "--workers=1",
    ]
