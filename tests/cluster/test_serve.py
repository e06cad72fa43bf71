"""The exported model in MLflow and out of it: lineage, registry, serving, and refused exports."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import psutil
import pytest
import tensorflow as tf

from orchestrator.errors import ConfigError
from orchestrator.track import mlflow_serve
from orchestrator.track.mlflow_projection import sync
from orchestrator.train.store import list_checkpoints
from tests.cluster import rig
from tests.cluster.conftest import free_port
from tests.cluster.rig import Ended
from tests.train.conftest import four_devices

__all__ = ["four_devices"]  # TensorFlow is split before it is used, for the folders that follow


def test_the_logged_model_answers_raw_inputs(
    run: Any, client: Any, golden: dict[str, np.ndarray]
) -> None:
    (output,) = run.outputs.model_outputs
    model = mlflow.pyfunc.load_model(f"models:/{output.model_id}")
    assert golden["inputs"].dtype == np.uint8
    np.testing.assert_allclose(
        model.predict(golden["inputs"]), golden["outputs"], rtol=1e-5, atol=1e-5
    )
    assert model.metadata.signature.inputs.inputs[0].shape == (-1, 8)


def test_the_saved_model_answers_without_any_of_this(
    one_device: Ended, golden: dict[str, np.ndarray]
) -> None:
    model = tf.saved_model.load(str(one_device.run.saved_model_dir))
    answer = model.signatures["serving_default"](inputs=tf.constant(golden["inputs"][:5]))
    np.testing.assert_allclose(answer["outputs"], golden["outputs"][:5], rtol=1e-5, atol=1e-5)


def test_the_logged_model_tells_where_it_comes_from(
    run: Any, client: Any, one_device: Ended
) -> None:
    (output,) = run.outputs.model_outputs
    model = client.get_logged_model(output.model_id)
    assert model.source_run_id == run.info.run_id
    (train,) = [r for r in rig.records(one_device.run, "DataUsed") if r["split"] == "train"]
    assert model.params | {"code": "", "config_fingerprint": ""} == {
        "run": one_device.run.root.name,
        "job": "blobs.Blobs",
        "checkpoint_step": "120",
        "weights": "last",
        "ledger": f"{rig.ledger(one_device.run):016x}",
        "train_data": f"blobs {train['digest']}",
        "eval_data": model.params["eval_data"],
        "config_fingerprint": "",
        "code": "",
    }
    assert len(model.params["config_fingerprint"]) == 64
    figures = {metric.key: metric.value for metric in model.metrics}
    proof = json.loads(one_device.run.proof.read_text())
    assert (
        figures["model/size_bytes"] == proof["size_bytes"] == run.data.metrics["model/size_bytes"]
    )
    assert figures["model/latency_1_ms"] > 0 and figures["model/latency_64_ms"] > 0
    (accuracy,) = [metric for metric in model.metrics if metric.key == "eval/accuracy"]
    assert accuracy.value == run.data.metrics["eval/accuracy"]
    assert (accuracy.step, accuracy.dataset_name) == (120, "blobs")


def test_the_model_is_registered_with_its_alias(run: Any, client: Any) -> None:
    version = client.get_model_version_by_alias("blobs", "champion")
    assert (str(version.version), version.run_id) == ("1", run.info.run_id)
    model_id = run.outputs.model_outputs[0].model_id
    assert version.source == f"models:/{model_id}"
    linked = client.get_logged_model(model_id).tags["mlflow.modelVersions"]
    assert json.loads(linked) == [{"name": "blobs", "version": "1"}]


@pytest.mark.parametrize(
    ("model", "answer"),
    [
        ("blobs", "models:/blobs/1"),
        ("blobs/1", "models:/blobs/1"),
        ("blobs@champion", "models:/blobs/1"),
        ("blob", "did you mean blobs?"),
        ("blobs@champ", "its aliases: champion"),
        ("blobs/2", "it has 1"),
        ("blobs/²", "it has 1"),
        ("models:/m-0123", "not found"),
    ],
)
def test_a_registered_model_is_found_or_named(
    one_device: Ended, client: Any, model: str, answer: str
) -> None:
    uri = f"sqlite:///{one_device.folder}/runs/mlflow.db"
    try:
        with mlflow_serve.registered(uri, model) as (folder, name):
            assert (folder / "MLmodel").exists()
            said = name
    except ConfigError as error:
        said = str(error)
    assert answer in said


@contextmanager
def served(command: str, ended: Ended) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """Run a command that serves, and return what it says up to its last line."""
    server = subprocess.Popen(
        ["bash", "-c", f"exec {command}"],
        cwd=ended.folder,
        env={**os.environ, "PYTHONPATH": str(rig.ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert server.stdout is not None
        said: list[str] = []
        while not said or ("Ctrl-C ends it" not in said[-1] and said[-1]):
            said.append(server.stdout.readline())
        yield server, said
    finally:
        server.kill()
        server.wait()


def ask(said: list[str], ended: Ended) -> np.ndarray:
    """Paste the curl line that was printed; return what the model answers."""
    (line,) = [line for line in said if line.strip().startswith("curl ")] or [f"false {said}"]
    shown = subprocess.run(
        ["bash", "-c", line], cwd=ended.folder, capture_output=True, text=True, timeout=60
    )
    assert shown.returncode == 0, (line, shown.stderr)
    return np.asarray(json.loads(shown.stdout)["predictions"])


def hint(ended: Ended, word: str) -> str:
    """Return the command that a run's end names for something."""
    (line,) = [line for line in ended.out.splitlines() if line.strip().startswith(f"{word} ")]
    return line.strip().removeprefix(word).strip()


def test_the_printed_command_serves_and_its_curl_line_asks(
    one_device: Ended, golden: dict[str, np.ndarray]
) -> None:
    port = free_port()
    command = f"{hint(one_device, 'serve')} port={port}"
    with served(command, one_device) as (server, said):
        np.testing.assert_allclose(
            ask(said, one_device), golden["outputs"][:1], rtol=1e-4, atol=1e-4
        )
        started = psutil.Process(server.pid).children(recursive=True)
        assert any("uvicorn" in " ".join(process.cmdline()) for process in started)
        taken = rig.start(
            "serve", f"run={one_device.run.root}", f"port={port}", cwd=one_device.folder
        )
        refused = rig.finish(taken, one_device.folder)
        assert refused.code == 2 and f"port={port} is taken" in refused.out
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 0
        assert not [process for process in started if rig.is_alive(process.pid)]


@pytest.mark.thorough
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_registered_model_is_served_from_a_server_until_it_is_ended(
    one_device: Ended,
    golden: dict[str, np.ndarray],
    mlflow_server: str,
    number: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert sync(one_device.run.root, uri=mlflow_server).missing == ""
    arguments = f"model=blobs@champion tracking.uri={mlflow_server} port={free_port()}"
    command = f"{sys.executable} -m orchestrator serve {arguments}"
    with served(command, one_device) as (server, said):
        np.testing.assert_allclose(
            ask(said, one_device), golden["outputs"][:1], rtol=1e-4, atol=1e-4
        )
        started = psutil.Process(server.pid).children(recursive=True)
        assert [path.name.rpartition("-")[0] for path in sorted(tmp_path.iterdir())] == [
            "orchestrator-model",
            "orchestrator-serve",
        ]
        server.send_signal(number)
        assert server.wait(30) == (-number if number == signal.SIGKILL else 0)
        rig.wait_for(
            lambda: not [process for process in started if rig.is_alive(process.pid)],
            "its processes to be gone",
            5,
        )
        rig.wait_for(lambda: not list(tmp_path.iterdir()), "its folders to be gone", 5)


# --- Outside MLflow, as docs/tracking.md says ---

ONLY_TENSORFLOW = """
import sys
import numpy as np
import tensorflow as tf

golden = np.load(sys.argv[2])
model = tf.saved_model.load(sys.argv[1])
ask = model.signatures["serving_default"]
answers = ask(inputs=tf.constant(golden["inputs"][:7]))["outputs"]
np.testing.assert_allclose(answers, golden["outputs"][:7], rtol=1e-4, atol=1e-4)
print(sorted({"orchestrator", "mlflow", "blobs"} & sys.modules.keys()))
"""
TFLITE = """
import sys
import numpy as np
import tensorflow as tf

golden = np.load(sys.argv[2])
content = tf.lite.TFLiteConverter.from_saved_model(sys.argv[1]).convert()
runner = tf.lite.Interpreter(model_content=content).get_signature_runner("serving_default")
answers = runner(inputs=golden["inputs"][:1])["outputs"]
np.testing.assert_allclose(answers, golden["outputs"][:1], rtol=1e-3, atol=1e-3)
print([])
"""


@pytest.mark.thorough
@pytest.mark.parametrize("script", [ONLY_TENSORFLOW, TFLITE], ids=["tensorflow", "tflite"])
def test_the_saved_model_answers_in_a_process_with_tensorflow_only(
    one_device: Ended, tmp_path: Path, script: str
) -> None:
    run = one_device.run
    done = subprocess.run(
        [sys.executable, "-c", script, str(run.saved_model_dir), str(run.golden)],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.thorough
def test_the_command_to_load_that_a_run_ends_with_is_one_that_does(one_device: Ended) -> None:
    (ended,) = rig.records(one_device.run, "RunEnded")
    command = shlex.split(dict(ended["commands"])["load"])
    done = subprocess.run(
        command, cwd=one_device.folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "ConcreteFunction" in done.stdout


@pytest.mark.thorough
def test_saved_model_cli_shows_and_runs_the_model(
    one_device: Ended, tmp_path: Path, golden: dict[str, np.ndarray]
) -> None:
    cli = [str(Path(sys.executable).with_name("saved_model_cli"))]
    place = ["--dir", str(one_device.run.saved_model_dir), "--tag_set", "serve"]
    place += ["--signature_def", "serving_default"]
    shown = subprocess.run([*cli, "show", *place], capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stderr
    assert "dtype: DT_UINT8" in shown.stdout and "shape: (-1, 8)" in shown.stdout
    given = ["--inputs", f"inputs={one_device.run.golden}[inputs]", "--outdir", str(tmp_path)]
    done = subprocess.run(
        [*cli, "run", *place, *given], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    answers = np.load(tmp_path / "outputs.npy")
    np.testing.assert_allclose(answers, golden["outputs"], rtol=1e-4, atol=1e-4)


# --- Exports that are refused ---


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("dropout", "serve() calls the model with training=True"),
        pytest.param("layers", "asked twice, its answers differ", marks=pytest.mark.thorough),
        pytest.param("raw", "let it call self.prepare()", marks=pytest.mark.thorough),
        pytest.param("frozen", "it takes no batch of 1", marks=pytest.mark.thorough),
        pytest.param("untracked", "serve() uses tf.Variable", marks=pytest.mark.thorough),
    ],
)
def test_a_faulty_export_ends_the_run_and_leaves_its_checkpoints(
    tmp_path: Path, fault: str, error: str
) -> None:
    # Inline is the quicker; what takes minutes goes through Ray and its proof.
    inline = ("cluster=inline",) if fault == "dropout" else ()
    faulty = ("job.class_name=blobs.Faulty", f"job.args.fault={fault}")
    ended = rig.train(*inline, *faulty, "export.register=blobs", cwd=tmp_path)
    assert ended.code == 8, ended.out
    assert error in ended.out and "exit code 8" in ended.out
    assert [path.name for path in list_checkpoints(ended.run.checkpoints_dir)] == ["step-00000120"]
    (row,) = rig.database(tmp_path)
    assert row["status"] == "FAILED"
    uri = f"sqlite:///{tmp_path}/runs/mlflow.db"
    client = mlflow.MlflowClient(uri, registry_uri=uri)
    assert not client.search_logged_models([str(row["experiment_id"])])
    assert not client.search_registered_models()


def test_an_export_that_answers_otherwise_is_refused(one_device: Ended, tmp_path: Path) -> None:
    export = tmp_path / "export"
    subprocess.run(["cp", "-r", str(one_device.run.export_dir), str(export)], check=True)
    with np.load(export / "golden.npz") as golden:
        kept = dict(golden)
    # One thousandth of the largest answer: ten times what rounding explains.
    np.savez(export / "golden.npz", **kept | {"outputs": kept["outputs"] * 1.001})
    script = rig.ROOT / "orchestrator" / "track" / "mlflow_model.py"
    proving = subprocess.run(
        [sys.executable, str(script), str(export)], cwd=tmp_path, capture_output=True, timeout=120
    )
    proof = json.loads((export / "proof.json").read_text())
    assert proving.returncode == 1
    assert proof["passed"] is False
    assert "differs from the live model" in proof["error"]
    assert not (export / "mlflow_model").exists()
