"""docs/deploy: what can be said of it without the clusters it is for."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from orchestrator.__main__ import _take_flag
from orchestrator.spec.config import load_config
from orchestrator.spec.schema import RunConfig

DEPLOY = Path(__file__).parents[1] / "docs" / "deploy"
SLURM = (DEPLOY / "slurm.sh").read_text()


def composed(command: str) -> RunConfig:
    """Compose what a command line says, with its placeholders filled."""
    for name in ("HEAD", "MLFLOW"):
        command = re.sub(rf"\b{name}\b", "10.0.0.1", command)
    words = shlex.split(command.replace("\\\n", " "))
    if words[:2] == ["make", "submit"]:
        make = dict(word.split("=", 1) for word in words[2:])
        words = [
            f"job={make['conf']}",
            f"cluster.address={make['address']}",
            *shlex.split(make["args"]),
        ]
        words = ["submit", *words]
    while words[0] not in ("train", "submit"):
        words = words[1:]
    _, overrides = _take_flag("detach", words[1:])
    own = ["cluster=existing"] if words[0] == "submit" else []
    return load_config([*own, *overrides])


def test_the_rayjobs_command_line_composes_and_asks_for_what_its_pods_have() -> None:
    job = yaml.safe_load((DEPLOY / "rayjob.yaml").read_text())
    config = composed(job["spec"]["entrypoint"])
    cluster = job["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    assert config.strategy.num_workers == workers["replicas"]
    (container,) = workers["template"]["spec"]["containers"]
    assert config.cluster.cpus_per_worker == int(container["resources"]["limits"]["cpu"])
    assert cluster["authOptions"] == {"mode": "token"}


@pytest.mark.parametrize("page", ["ssh.md", "README.md"])
def test_the_submits_of_a_page_compose(page: str) -> None:
    blocks = re.findall(r"```sh\n(.*?)```", (DEPLOY / page).read_text(), re.DOTALL)
    text = "\n".join(blocks).replace("; do", "")
    commands = re.findall(r"(?:make|orchestrator) submit (?:.*\\\n)*.*", text)
    assert commands
    for command in commands:
        assert composed(command).cluster.address == "http://10.0.0.1:8265"


def stubbed(folder: Path, name: str, text: str) -> None:
    """Put a command of our own before all others."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("shell", ["sh", "bash"])
@pytest.mark.parametrize(
    ("codes", "num_calls"),
    [
        pytest.param([6, 5, 0], 3, id="lost from sight, held, done"),
        pytest.param([137, 75, 7, 6, 0], 5, id="whatever may go better next time"),
        pytest.param([5] * 9, 5, id="a folder that stays broken ends it"),
        pytest.param([6, 2, 0], 2, id="a mistake ends it"),
        pytest.param([143, 0], 1, id="who stops it is heeded"),
    ],
)
def test_the_loop_of_the_page_repeats_what_may_go_better_and_nothing_else(
    codes: list[int], num_calls: int, shell: str, tmp_path: Path
) -> None:
    page = (DEPLOY / "README.md").read_text()
    (loop,) = (b for b in re.findall(r"```sh\n(.*?)```", page, re.DOTALL) if "until" in b)
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
    stubbed(tmp_path, "sleep", "exit 0")
    stubbed(
        tmp_path,
        "orchestrator",
        'echo "$@" >> calls; exit $(sed -n "$(wc -l < calls)p" codes)',
    )
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run([shell, "-c", loop], cwd=tmp_path, env=env, check=True, timeout=60)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == num_calls
    assert all(call.startswith("submit job=mnist resume=auto ") for call in calls)


@pytest.mark.parametrize(
    ("code", "restarts", "is_queued_again"),
    [(6, 50, True), (143, 0, True), (5, 0, True), (5, 10, False), (2, 0, False), (0, 0, False)],
)
def test_the_slurm_script_queues_again_what_may_go_better(
    code: int, restarts: int, is_queued_again: bool, tmp_path: Path
) -> None:
    (case,) = re.findall(r"^case \$code in\n.*?^esac$", SLURM, re.DOTALL | re.MULTILINE)
    stubbed(tmp_path, "scontrol", 'echo "$@" > asked')
    env = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_RESTART_COUNT": str(restarts),
        "code": str(code),
    }
    text = f"set -euo pipefail\n{case}"
    subprocess.run(["bash", "-c", text], cwd=tmp_path, env=env, check=True)
    assert (tmp_path / "asked").exists() is is_queued_again


def test_the_slurm_script_is_a_script_and_its_keys_exist() -> None:
    subprocess.run(["bash", "-n", str(DEPLOY / "slurm.sh")], check=True)
    keys = set(re.findall(r"\b(cluster\.\w+)=", SLURM))
    config = load_config(["job=mnist"])
    assert keys and all(hasattr(config.cluster, key.partition(".")[2]) for key in keys)
