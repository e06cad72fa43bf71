"""The command line: what each verb prints, what each mistake is told, and the exit code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.__main__ import main

ROOT = Path(__file__).parents[1]
VERBS = (
    *("train", "plan", "doctor", "config", "verify", "chaos", "sweep", "submit", "runs", "ui"),
    *("up", "down"),
)
REFUSED = "exit code 2: configuration or plan refused"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, in which a refused command must leave nothing."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a command that is refused; return what it says before the exit code."""
    code = main(list(argv))
    out, err = capsys.readouterr()
    *text, last = err.splitlines()
    assert (code, out, last) == (2, "", REFUSED)
    assert "Traceback" not in err
    return "\n".join(text)


@pytest.mark.parametrize("argv", [[], ["help"], ["-h"], ["--help"]])
def test_help_lists_the_commands(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code = main(argv)
    out = capsys.readouterr().out
    assert code == 0
    assert [verb for verb in VERBS if f"\n  {verb} " not in out] == []
    assert out.splitlines()[-1].startswith("`orchestrator config job=NAME` prints every key")


@pytest.mark.parametrize("option", ["-h", "--help"])
@pytest.mark.parametrize("verb", VERBS)
def test_a_command_explains_itself_without_running(
    verb: str, option: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb, "job=mnist", option]) == 0
    assert capsys.readouterr().out.startswith(f"{verb}: ")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("argument", ["idle_s=0", "idle_s=nan", "idle_s=two", "job=mnist"])
def test_up_takes_a_limit_of_idleness(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = refused(capsys, "up", argument)
    assert text.startswith(f"up: {argument}: ") and "idle_s=SECONDS" in text


def test_down_takes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "down", "now=true") == "down: now=true: it takes no arguments"


def test_an_unknown_command_is_told_with_the_nearest_and_all(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = refused(capsys, "trian", "job=mnist")
    assert text.startswith("trian: ") and "did you mean train?" in text
    assert all(verb in text for verb in VERBS)


def test_an_unknown_command_that_resembles_none_is_told_with_all(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = refused(capsys, "zzz")
    assert "did you mean" not in text
    assert all(verb in text for verb in VERBS)


@pytest.mark.parametrize("option", ["--jobs", "-v", "--multirun", "--config-dirs=x", "-"])
def test_an_unknown_option_is_told_with_the_manner_of_keys(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = refused(capsys, "plan", "job=mnist", option)
    assert text.startswith(f"{option}: ") and "KEY=VALUE" in text


@pytest.mark.parametrize("verb", ["train", "plan", "config"])
def test_a_command_without_a_job_lists_the_jobs(
    verb: str, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    text = refused(capsys, verb)
    assert (
        "Jobs: code_lm, fashion, flights, gan, mnist, mnist_cnn, synthetic" in text
        and "conf=NAME" in text
    )
    assert list(folder.iterdir()) == []


def test_plan_prints_the_plan_and_makes_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "job=mnist", "strategy=one_device"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].split() == ["job", "mnist", "(jobs.mnist.Mnist,", "hidden=128)"]
    assert lines[-1].endswith("experiment mnist")
    assert f"{folder}/runs/mnist/<run>" in out
    assert err == ""
    assert list(folder.iterdir()) == []


def test_plan_shows_the_name_that_a_run_will_have(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "job=mnist", "run_name=first"]) == 0
    assert f"{folder}/runs/mnist/first\n" in capsys.readouterr().out


def test_plan_takes_a_cluster_that_it_does_not_ask_to_have_what_is_asked_of_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    eight = ("cluster=existing", "strategy=multi_worker", "strategy.devices_per_worker=8")
    assert main(["plan", "job=mnist", *eight, "cluster.trusted_network=true"]) == 0
    out, _ = capsys.readouterr()
    assert "2 workers x 8 GPUs = 16 replicas" in out
    assert out.splitlines()[-1].startswith("hint: the cluster was not asked")


def test_plan_refuses_what_cannot_be_planned(capsys: pytest.CaptureFixture[str]) -> None:
    # One example for two replicas.
    text = refused(
        capsys,
        "plan",
        "job=mnist",
        "strategy=multi_worker",
        "strategy.devices_per_worker=1",
        "train.global_batch_size=1",
    )
    assert text.startswith("train.global_batch_size=1 ") and "at least 2" in text


def test_several_mistakes_are_told_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    text = refused(capsys, "plan", "job=mnist", "train.seed=-1", "checkpoint.keep=0")
    assert {line.split("=")[0] for line in text.splitlines()} == {"train.seed", "checkpoint.keep"}


def test_config_prints_the_resolved_configuration(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "job=mnist", "train.seed=7"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("job:\n  name: mnist\n") and "\n  seed: 7\n" in out
    assert (err, list(folder.iterdir())) == ("", [])


def test_config_masks_credentials(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "hunter2")
    assert main(["config", "job=mnist", "tracking.uri=https://me:${oc.env:MY_KEY}@host"]) == 0
    out = capsys.readouterr().out
    assert "https://***@host" in out and "hunter2" not in out


@pytest.mark.parametrize("form", [["--config-dir", "own"], ["--config-dir=own"]])
def test_a_folder_of_the_users_own_is_given_with_an_option(
    form: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "own" / "job").mkdir(parents=True)
    (folder / "own" / "job" / "small.yaml").write_text(
        "# @package _global_\ndefaults:\n  - mnist\njob:\n  name: small\n  args:\n    hidden: 2\n"
    )
    assert main(["config", "job=small", *form]) == 0
    assert "  name: small\n  class_name: jobs.mnist.Mnist\n" in capsys.readouterr().out


def test_a_folder_of_the_users_own_may_begin_with_the_home_folder(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(folder))
    text = refused(capsys, "plan", "job=mnist", "--config-dir=~/own")
    assert text == f"--config-dir={folder / 'own'}: there is no such folder"


def test_the_option_for_a_folder_needs_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "plan", "job=mnist", "--config-dir") == "--config-dir needs a folder"
    text = refused(capsys, "plan", "job=mnist", "--config-dir=a", "--config-dir", "b")
    assert text == "--config-dir=b: a is given already, and one is possible"


def test_submit_is_for_existing_clusters_only(capsys: pytest.CaptureFixture[str]) -> None:
    text = refused(capsys, "submit", "job=mnist", "cluster=local")
    assert text.startswith("cluster=local: ") and "existing" in text


def test_a_sweep_without_values_hints_at_train(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = refused(capsys, "sweep", "job=mnist", "train.seed=1")
    assert text.startswith("a sweep wants a key with several values") and "`train`" in text
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("argv", [["runs"], ["runs", "lists"], ["runs", "sync"]])
def test_runs_knows_only_sync_of_one_run(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "runs sync RUN" in refused(capsys, *argv)


@pytest.mark.parametrize("override", ["job=mnist", "prot=5001", "runs"])
def test_ui_tells_the_keys_it_takes(override: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = refused(capsys, "ui", override)
    keys = (override, "runs_dir=", "tracking.uri=", "port=", "experiment=")
    assert [key for key in keys if key not in text] == []


def test_ui_refuses_a_port_that_is_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "ui", "port=http").startswith("port=http: ")


def test_the_exit_code_reaches_the_shell(folder: Path) -> None:
    command = [sys.executable, "-m", "orchestrator", "plan", "job=mnits"]
    environ = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == REFUSED
