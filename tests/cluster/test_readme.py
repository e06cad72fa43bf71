"""The commands that the README and docs/ print are commands that work."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from orchestrator.spec.config import load_config
from tests.cluster import rig
from tests.environment import without_make
from tests.jobs.test_docs import write_example

PAGES = [rig.ROOT / "README.md", *sorted((rig.ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"```sh\n(.*?)```", re.DOTALL)
VERBS = ("train", "plan", "config", "submit")


def printed_commands() -> list[str]:
    """Return every `make` command of every page, each once."""
    lines = [
        line.split("  #")[0].strip()
        for page in PAGES
        for block in BLOCK.findall(page.read_text())
        for line in block.replace("\\\n", " ").splitlines()
    ]
    return sorted({line for line in lines if line.startswith("make ")})


def test_there_are_commands_to_check() -> None:
    assert "make train conf=mnist" in printed_commands()
    assert "make test" in printed_commands()


@pytest.mark.parametrize("command", printed_commands())
def test_a_printed_command_is_accepted(command: str, tmp_path: Path) -> None:
    shown = subprocess.run(
        ["make", "--dry-run", *shlex.split(command)[1:]],
        cwd=rig.ROOT,
        env=without_make(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert shown.returncode == 0, shown.stderr
    called = [line for line in shown.stdout.splitlines() if "-m orchestrator" in line]
    if not called:
        return  # a target that does not call the product: make knows it
    verb, *arguments = shlex.split(called[-1].partition("-m orchestrator")[2])
    if verb not in VERBS:
        return
    folder = write_example(tmp_path / "mine") if "--config-dir" in arguments else None
    overrides = [item for item in arguments if item not in ("--config-dir", "mine")]
    if verb == "submit":
        overrides.insert(0, "cluster=existing")
    load_config(overrides, folder)


@pytest.mark.parametrize(
    ("job", "goal"),
    [("mnist", 0.965), pytest.param("mnist_cnn", 0.985, marks=pytest.mark.thorough)],
)
def test_the_first_command_trains_to_what_is_promised(
    job: str, goal: float, tmp_path: Path
) -> None:
    ended = subprocess.run(
        ["make", "train", f"conf={job}", f"args=runs_dir={tmp_path / 'runs'}"],
        cwd=rig.ROOT,
        env=without_make(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stderr == ""
    (run,) = rig.runs_in(tmp_path)
    assert rig.records(run, "Evaluated")[-1]["metrics"]["accuracy"] >= goal
    assert rig.database(tmp_path)[0]["status"] == "FINISHED"
