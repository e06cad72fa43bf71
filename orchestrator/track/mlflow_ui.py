"""MLflow's own web interface over the record, on a loopback port."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from orchestrator.errors import ConfigError, StorageError
from orchestrator.track.mlflow_client import open_client

_HOST = "127.0.0.1"
_FIRST_PORT, _LAST_PORT = 5000, 5099
_START_TIMEOUT_S = 60.0
_POLL_S = 0.1


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
        StorageError: MLflow does not start.
    """
    if not uri.startswith("sqlite:///"):
        print(_link(uri.rstrip("/"), uri, experiment), flush=True)
        return 0
    database = Path(uri.removeprefix("sqlite:///"))
    if not database.exists():
        raise ConfigError(
            f"there are no runs yet: {database} does not exist. Train one, or name another folder "
            'with runs_dir= (make: args="runs_dir=...")'
        )
    port = _free_port(port)
    address = f"http://{_HOST}:{port}"
    link = _link(address, uri, experiment)
    log = database.parent / "mlflow-ui.log"
    for number in (signal.SIGTERM, signal.SIGHUP):
        # However this ends, the server ends with it.
        signal.signal(number, signal.default_int_handler)
    server = _start(_command(uri, artifact_root, port), log)
    try:
        _await(server, address, log)
        print(f"MLflow shows the runs at\n\n  {link}\n\nCtrl-C ends it.", flush=True)
        server.wait()
    except KeyboardInterrupt:
        print(flush=True)
    finally:
        _end(server)
    return 0


def _free_port(asked: int | None) -> int:
    ports = range(_FIRST_PORT, _LAST_PORT + 1) if asked is None else [asked]
    for port in ports:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            # As servers do: a connection that was closed a minute ago does not hold the port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((_HOST, port))
                return port
            except (OSError, OverflowError):
                continue
    if asked is not None:
        raise ConfigError(f"port={asked} is taken or not allowed; name another one, or none")
    raise ConfigError(f"the ports {_FIRST_PORT} to {_LAST_PORT} are all taken; name one: port=...")


def _link(address: str, uri: str, experiment: str | None) -> str:
    """Return a link that lands on the runs: MLflow's start page shows something else."""
    client = open_client(uri, 5.0)
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
        f"--host={_HOST}",
        f"--port={port}",
        "--workers=1",
    ]


def _start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    # Job execution and more workers cost a second gigabyte and serve nothing here.
    env = {
        **os.environ,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    with log.open("w") as output:
        # A session of its own: Ctrl-C reaches this process alone, which ends the whole group.
        return subprocess.Popen(
            command, stdout=output, stderr=output, env=env, start_new_session=True
        )


def _await(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    # A proxy in the environment is not asked for a loopback address.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        try:
            opener.open(f"{address}/health", timeout=1.0).close()
            return
        except OSError as error:
            if server.poll() is not None or time.monotonic() > deadline:
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
                raise StorageError(f"MLflow's server did not start; {log}:\n{tail}") from error
        time.sleep(_POLL_S)


def _end(server: subprocess.Popen[bytes]) -> None:
    """End the server and the workers it forked."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if server.poll() is not None:
            break
        try:
            os.killpg(server.pid, number)
            server.wait(3.0)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
