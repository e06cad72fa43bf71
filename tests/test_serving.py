"""`serve`: whose model is meant, and how to ask it. What is served is in tests/cluster."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.__main__ import _ui
from orchestrator.errors import ConfigError, StorageError
from orchestrator.serving import find_run, require_export, serve
from orchestrator.spec.paths import RunPaths
from orchestrator.track.mlflow_serve import ask
from tests.track import rig


def run_in(folder: Path, job: str, name: str, status: str | None = "FINISHED") -> RunPaths:
    """Make a run folder with a journal."""
    root = rig.new_run(folder / "runs" / job, name)
    facts = rig.make_facts(root, f"sqlite:///{folder}/runs/mlflow.db")
    rig.write(root, facts.record(rig.START), *([rig.ended(status)] if status else []))
    return RunPaths(root)


def refusal(*arguments: str, cwd: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        serve(list(arguments), cwd)
    return str(caught.value)


@pytest.mark.parametrize("spelling", ["mnist/one", "one", "runs/mnist/one"])
def test_a_run_is_named_by_folder_job_and_run_or_run(tmp_path: Path, spelling: str) -> None:
    paths = run_in(tmp_path, "mnist", "one")
    assert find_run(spelling, tmp_path / "runs", tmp_path).root == paths.root


def test_a_folder_may_begin_with_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = run_in(tmp_path, "mnist", "one")
    assert find_run("~/runs/mnist/one", tmp_path / "else", tmp_path / "else").root == paths.root
    elsewhere = tmp_path / "mine"
    said = refusal("run=other", "runs_dir=~/runs", cwd=elsewhere)
    assert f"there is no such run in {tmp_path / 'runs'}" in said
    with pytest.raises(ConfigError, match=f"{tmp_path}/nothing/mlflow.db does not exist"):
        _ui(["runs_dir=~/nothing"], None)


def test_a_name_that_two_jobs_have_is_refused(tmp_path: Path) -> None:
    for job in ("mnist", "gan"):
        run_in(tmp_path, job, "one")
    assert "several of this name: gan/one, mnist/one" in refusal("run=one", cwd=tmp_path)


@pytest.mark.parametrize("spelling", ["20260101-120000-abce", "mnist/20260101-120000-abdd"])
def test_of_an_unknown_run_the_nearest_is_named(tmp_path: Path, spelling: str) -> None:
    run_in(tmp_path, "mnist", "20250202-120000-1234")
    run_in(tmp_path, "mnist", "20260101-120000-abcd")
    said = refusal(f"run={spelling}", cwd=tmp_path)
    assert "the nearest is mnist/20260101-120000-abcd" in said


def test_without_runs_that_is_said(tmp_path: Path) -> None:
    assert f"there are no runs in {tmp_path / 'runs'}" in refusal("run=one", cwd=tmp_path)
    assert "mlflow.db does not exist" in refusal("model=one", cwd=tmp_path)


@pytest.mark.parametrize(
    "command", [lambda uri, cwd: serve(["model=one", uri], cwd), lambda uri, cwd: _ui([uri], None)]
)
def test_a_server_that_is_down_is_told_without_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[[str, Path], int]
) -> None:
    monkeypatch.setenv("MINE", "hunter2")
    with pytest.raises(StorageError) as caught:
        command("tracking.uri=http://me:${oc.env:MINE}@127.0.0.1:9", tmp_path)
    said = str(caught.value)
    assert "MLflow at http://***@127.0.0.1:9 does not answer" in said and "tracking.uri=" in said
    assert "hunter2" not in said


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        ("FINISHED", "export.enabled=false"),
        ("KILLED", "it is killed, and a model is exported when training is complete"),
        (None, "it is not at its end"),
    ],
)
def test_a_run_without_a_model_is_refused_with_the_reason(
    tmp_path: Path, status: str | None, reason: str
) -> None:
    paths = run_in(tmp_path, "mnist", "one", status)
    with pytest.raises(ConfigError, match="no model to serve") as caught:
        require_export(paths)
    assert reason in str(caught.value)


def test_a_refused_export_is_told_with_what_the_proof_found(tmp_path: Path) -> None:
    paths = run_in(tmp_path, "mnist", "one", "FAILED")
    paths.export_dir.mkdir()
    paths.proof.write_text(json.dumps({"passed": False, "error": "asked twice"}))
    with pytest.raises(ConfigError, match="its export was refused: asked twice"):
        require_export(paths)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "name either run=RUN"),
        (["run=a", "model=b"], "name either run=RUN"),
        (["rnu=a"], "rnu=a: takes run=, model=, port="),
        (["run=a", "port=x"], "port=x: must be a whole number"),
    ],
)
def test_what_is_no_question_is_refused(tmp_path: Path, arguments: list[str], error: str) -> None:
    assert error in refusal(*arguments, cwd=tmp_path)


@pytest.mark.parametrize(("size", "is_short"), [(3, True), (500, False)])
def test_a_long_example_is_read_from_its_file(
    tmp_path: Path, size: int, is_short: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "it's a folder"
    folder.mkdir()
    example = {"inputs": [list(range(size))]}
    (folder / "serving_input_example.json").write_text(json.dumps(example))
    monkeypatch.chdir(tmp_path)
    line = ask(folder, "http://127.0.0.1:1")
    assert ("-d '{" in line) is is_short and len(line) < 300
    # What curl would send, told by a shell: the line is pasted as it is.
    echo = 'curl() { cat <<<"${@: -1}"; }; '
    sent = subprocess.run(["bash", "-c", echo + line], capture_output=True, text=True).stdout
    sent = sent.strip()
    text = sent if is_short else (tmp_path / sent.removeprefix("@")).read_text()
    assert json.loads(text) == example


def test_a_proxy_is_not_asked_for_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "serving_input_example.json").write_text("{}")
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert "--noproxy" not in ask(tmp_path, "http://127.0.0.1:1")
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    assert "--noproxy '*'" in ask(tmp_path, "http://127.0.0.1:1")
