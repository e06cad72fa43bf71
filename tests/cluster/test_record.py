"""What a finished run leaves in MLflow, read and served by MLflow's own means."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from orchestrator.track.mlflow_projection import sync
from tests.cluster import rig
from tests.cluster.conftest import answers, free_port
from tests.cluster.rig import Ended
from tests.track.rig import rows
from tests.train.conftest import four_devices

__all__ = ["four_devices"]  # TensorFlow is split before it is used, for the folders that follow


def test_one_training_is_one_finished_run_with_params_and_tags(run: Any, one_device: Ended) -> None:
    assert run.info.status == "FINISHED"
    assert run.info.run_name == one_device.run.root.name
    assert run.data.params["train.global_batch_size"] == "32"
    assert run.data.params["strategy.name"] == "one_device"
    assert run.data.tags["orchestrator.run"] == one_device.run.root.name
    assert any("version" in key or "python" in key for key in run.data.tags), run.data.tags
    assert any("job=blobs" in value for value in run.data.tags.values())


def test_metrics_are_there_by_their_prefixes(run: Any, client: Any) -> None:
    keys = set(run.data.metrics)
    assert {"train/loss", "eval/accuracy", "perf/examples_per_s", "worker/0/step_ms"} <= keys
    node = f"system/{socket.gethostname()}"
    assert {f"{node}/cpu_utilization_percentage", f"{node}/system_memory_usage_megabytes"} <= keys
    history = client.get_metric_history(run.info.run_id, "eval/accuracy")
    assert [point.step for point in history] == [60, 120]


def test_data_configuration_plan_and_logs_are_there(run: Any, client: Any) -> None:
    sets = {item.tags[0].value: item.dataset for item in run.inputs.dataset_inputs}
    assert set(sets) == {"train", "eval"}
    assert all(len(item.digest) >= 32 for item in sets.values())
    paths = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert {"config.yaml", "plan.txt", "overrides.txt", "logs"} <= paths
    assert {"nodes.json", "packages.txt", "code"} <= paths
    assert all(item.schema and item.source for item in sets.values())
    logs = {item.path for item in client.list_artifacts(run.info.run_id, "logs/attempt-1")}
    assert "logs/attempt-1/worker-0.log" in logs


def test_writing_the_record_again_changes_nothing(one_device: Ended) -> None:
    database = one_device.folder / "runs" / "mlflow.db"
    before = rig.database(one_device.folder), rows(database)
    assert sync(one_device.run.root).missing == ""
    assert (rig.database(one_device.folder), rows(database)) == before


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        pytest.param(signal.SIGTERM, marks=pytest.mark.thorough),
        pytest.param(signal.SIGHUP, marks=pytest.mark.thorough),
        pytest.param(signal.SIGKILL, marks=pytest.mark.thorough),
    ],
)
def test_the_interface_lands_on_the_runs_and_ends_its_server(
    one_device: Ended, tmp_path: Path, number: signal.Signals
) -> None:
    port = free_port()
    arguments = (f"runs_dir={one_device.folder / 'runs'}", f"port={port}")
    process = rig.start("ui", *arguments, cwd=tmp_path)
    try:
        assert process.stdout is not None
        printed = [process.stdout.readline() for _ in range(3)]
        link = f"http://127.0.0.1:{port}/#/experiments/1?workflowType=machine_learning"
        assert any(link in line for line in printed), printed
        if number is signal.SIGINT:  # once is enough to look at
            assert one_device.run.root.name in dump_page(link)
    finally:
        process.send_signal(number)
        assert process.wait(30) == (-number if number is signal.SIGKILL else 0)
    rig.wait_for(lambda: not answers(f"http://127.0.0.1:{port}/health"), "its server to be gone", 2)


@pytest.mark.thorough
def test_the_pages_of_a_run_and_of_its_model_show_what_is_on_record(
    one_device: Ended, run: Any, tmp_path: Path
) -> None:
    (model,) = run.outputs.model_outputs
    at, run_id = run.info.experiment_id, run.info.run_id
    node = f"system/{socket.gethostname()}"
    wanted = {
        f"experiments/{at}/runs/{run_id}": ("finished", "load:", "eval/accuracy", "goodput/"),
        f"experiments/{at}/runs/{run_id}/model-metrics": ("train", "goodput", "worker/0"),
        f"experiments/{at}/runs/{run_id}/system-metrics": (node,),
        f"experiments/{at}/runs/{run_id}/artifacts": ("report.html", "plots", "plan.txt", "code"),
        f"experiments/{at}/models/{model.model_id}": ("model/size_bytes", "config_fingerprint"),
        "models/blobs/versions/1": ("champion", one_device.run.root.name),
    }
    port = free_port()
    arguments = (f"runs_dir={one_device.folder / 'runs'}", f"port={port}")
    process = rig.start("ui", *arguments, cwd=tmp_path)
    try:
        rig.wait_for(lambda: answers(f"http://127.0.0.1:{port}/health"), "the interface")
        for page, texts in wanted.items():
            shown = dump_page(f"http://127.0.0.1:{port}/#/{page}")
            assert [text for text in texts if text not in shown] == [], page
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


def dump_page(link: str) -> str:
    """Return a page's content once its scripts have run, as headless Chromium sees it."""
    browser = next(
        (name for name in ("chromium", "chromium-browser", "google-chrome") if is_there(name)), None
    )
    if browser is None:
        pytest.skip("no Chromium to look with")
    shown = subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--virtual-time-budget=20000", "--window-size=1400,900", "--dump-dom", link),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    return shown.stdout


def is_there(name: str) -> bool:
    """Tell whether a command is on the PATH."""
    return any((Path(folder) / name).exists() for folder in os.environ["PATH"].split(os.pathsep))


def test_a_taken_port_is_named(one_device: Ended, mlflow_server: str, tmp_path: Path) -> None:
    port = mlflow_server.rpartition(":")[2]
    arguments = (f"runs_dir={one_device.folder / 'runs'}", f"port={port}")
    ended = rig.finish(rig.start("ui", *arguments, cwd=tmp_path), tmp_path)
    assert ended.code == 2, ended.out
    assert f"port={port} is taken" in ended.out


def test_an_interface_without_runs_says_so(tmp_path: Path) -> None:
    ended = rig.finish(rig.start("ui", cwd=tmp_path), tmp_path)
    assert ended.code == 2, ended.out
    assert "there are no runs yet" in ended.out


def test_a_server_that_does_not_answer_costs_no_training(tmp_path: Path) -> None:
    gone = ("tracking.uri=http://127.0.0.1:9", "tracking.timeout_s=1")
    down = (*gone, "export.enabled=false", "cluster=inline")
    ended = rig.train(*down, cwd=tmp_path)
    assert ended.code == 0, ended.out
    assert "takes no records" in ended.out
    assert f"runs sync {ended.run.root}" in ended.out
    refused = rig.train(*down, "tracking.required=true", cwd=tmp_path)
    assert refused.code == 5, refused.out
    assert "tracking.required=true" in refused.out
