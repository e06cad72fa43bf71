"""What the tests of this folder share: finished runs, a Ray cluster, an MLflow server."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest

from tests.cluster.rig import JOB, ROOT, Ended, finish, start, wait_for
from tests.databases import with_tables


@pytest.fixture(scope="session")
def one_device(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """A finished run on one device with a registered model; nobody changes its folder."""
    registered = ("export.register=blobs", "export.alias=champion")
    sampled = "tracking.system_metrics_every_s=0.5"  # it ends soon
    folder = tmp_path_factory.mktemp("one-device")
    return finish(start("train", *JOB, *registered, sampled, cwd=folder, is_first=True), folder)


@pytest.fixture(scope="package")
def kept_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of commands that begin with what `up` keeps.

    For runs whose own start is not what a test is about: it takes ten seconds of a processor.
    """
    folder = tmp_path_factory.mktemp("kept")
    env = {"XDG_RUNTIME_DIR": str(folder)}
    ended = finish(start("up", cwd=folder, env=env), folder)
    assert ended.code == 0, ended.out
    yield env
    ended = finish(start("down", cwd=folder, env=env), folder)
    assert ended.code == 0, ended.out


@pytest.fixture(scope="module")
def client(one_device: Ended) -> Iterator[Any]:
    before = mlflow.get_tracking_uri()
    uri = f"sqlite:///{one_device.folder}/runs/mlflow.db"
    mlflow.set_tracking_uri(uri)
    yield mlflow.MlflowClient(uri)
    mlflow.set_tracking_uri(before)


@pytest.fixture(scope="module")
def run(client: Any) -> Any:
    """The one MLflow run of the training."""
    experiment = client.get_experiment_by_name("blobs")
    (found,) = client.search_runs([experiment.experiment_id])
    return found


@pytest.fixture(scope="module")
def golden(one_device: Ended) -> dict[str, np.ndarray]:
    """Raw inputs and the live model's answers."""
    with np.load(one_device.run.golden) as arrays:
        return dict(arrays)


@dataclass(frozen=True)
class Cluster:
    """A Ray that was started by `ray start`, as a user would."""

    address: str
    dashboard: str
    env: dict[str, str]


def free_port() -> int:
    """Return a port that nobody has right now."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="package")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of one node with four CPUs and something to choose it by, with a token."""
    token = tmp_path_factory.mktemp("ray") / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    env = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    port, dashboard, agent = free_port(), free_port(), free_port()
    ray = Path(sys.executable).with_name("ray")
    # --block: ending this process ends the cluster; `ray stop` would end every Ray here.
    head = subprocess.Popen(
        [
            *(
                str(ray),
                "start",
                "--head",
                "--block",
                "--num-cpus=4",
                "--node-ip-address=127.0.0.1",
            ),
            *(f"--port={port}", f"--dashboard-port={dashboard}", "--include-dashboard=true"),
            f"--dashboard-agent-listen-port={agent}",
            *("--labels=zone=a", '--resources={"accelerator_type:H100": 1}'),
        ],
        # The nodes have the project, for cluster.code=installed; an upload goes before it.
        env={**os.environ, **env, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        for number in (port, dashboard):
            wait_for(lambda n=number: is_open(n), f"Ray on port {number}")
        yield Cluster(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", env)
    finally:
        head.send_signal(signal.SIGTERM)
        try:
            head.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
            head.wait()


def is_open(port: int) -> bool:
    """Tell whether something listens on a loopback port."""
    with closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="package")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real MLflow server."""
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    with_tables(folder / "mlflow.db")
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "mlflow", "server", "--host=127.0.0.1", f"--port={port}"),
            *(f"--backend-store-uri=sqlite:///{folder}/mlflow.db", "--workers=1"),
            f"--artifacts-destination={folder}/artifacts",
        ],
        cwd=folder,
        env={
            **os.environ,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: answers(f"{address}/health"), "MLflow's server")
        yield address
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def answers(address: str) -> bool:
    """Tell whether a page is there."""
    try:
        urllib.request.urlopen(address, timeout=2).close()
        return True
    except OSError:
        return False
