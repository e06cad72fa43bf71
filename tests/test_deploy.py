"""docs/deploy: what can be said of it without the clusters it is for."""

from __future__ import annotations

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


def test_the_slurm_script_is_a_script_and_its_keys_exist() -> None:
    path = DEPLOY / "slurm.sh"
    subprocess.run(["bash", "-n", str(path)], check=True)
    keys = set(re.findall(r"\b(cluster\.\w+)=", path.read_text()))
    config = load_config(["job=mnist"])
    assert keys and all(hasattr(config.cluster, key.partition(".")[2]) for key in keys)
