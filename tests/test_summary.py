"""What a run says at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.spec.messages import BlockDone
from orchestrator.spec.paths import PROJECT_DIR
from orchestrator.summary import Tally, next_commands, summarise
from orchestrator.track.mlflow_projection import Report
from tests.plans import tiny_plan


@pytest.mark.parametrize(
    ("last_step", "status", "changes", "command"),
    [
        (12, "FINISHED", {}, "train.steps=24"),
        (12, "FINISHED", {"best__metric": "loss", "best__patience": 3}, "train.steps=24"),
        # More steps would change nothing: it had no patience left.
        (8, "FINISHED", {"best__metric": "loss", "best__patience": 3}, "best.patience=6"),
        (8, "KILLED", {"best__metric": "loss", "best__patience": 3}, "resume=20260101"),
    ],
)
def test_the_command_to_train_on_is_one_that_does(
    tmp_path: Path, last_step: int, status: str, changes: dict[str, Any], command: str
) -> None:
    tally = Tally()
    block = BlockDone(
        worker=0,
        attempt=1,
        time=0.0,
        first_step=0,
        num_steps=last_step,
        wall_s=1.0,
        data_wait_s=0.0,
        ledger=0,
    )
    tally.observe(block)
    plan = tiny_plan(tmp_path, **changes)
    summary = summarise(plan, tally, status, Report(None, None, ""), wall_s=2.0)
    word, text = summary.commands[-1]
    assert word == ("train on" if status == "FINISHED" else "resume")
    assert command in text and ("train.steps" in command) == ("train.steps" in text)


@pytest.mark.parametrize(
    ("runs_dir", "at_home", "command"),
    [
        ("runs", True, "make serve run=tiny/20260101-000000-abcd"),
        ("/elsewhere", True, 'make serve run=tiny/20260101-000000-abcd args="runs_dir=/elsewhere"'),
        ("runs", False, "orchestrator serve run=tiny/20260101-000000-abcd"),
        (
            "/elsewhere",
            False,
            "orchestrator serve run=tiny/20260101-000000-abcd runs_dir=/elsewhere",
        ),
    ],
)
def test_the_command_to_serve_is_one_for_this_folder(
    tmp_path: Path,
    runs_dir: str,
    at_home: bool,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(PROJECT_DIR if at_home else tmp_path)
    plan = tiny_plan(tmp_path, runs_dir=runs_dir)
    [found] = [text for word, text in next_commands(plan, 12, finished=True) if word == "serve"]
    command = command.replace("RUN", f"tiny/{plan.run}")
    assert found == command if at_home else found.endswith(f"/{command}")


def test_without_a_model_there_is_nothing_to_serve_or_load(tmp_path: Path) -> None:
    plan = tiny_plan(tmp_path, export__enabled=False)
    for commands in (
        next_commands(plan, 12, finished=True),
        next_commands(tiny_plan(tmp_path), 12, finished=False),
    ):
        assert [word for word, _ in commands if word in ("serve", "load")] == []
