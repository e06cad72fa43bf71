"""The page and the plots of a run, from a journal."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import pytest

from orchestrator.spec.paths import RunPaths
from orchestrator.track import plots
from orchestrator.track.account import MAX_EVENTS, Account, account
from orchestrator.track.journal import read
from orchestrator.track.report import render, summarise, write_report
from tests.track import rig

EVALUATED = {
    "kind": "Evaluated",
    "worker": 0,
    "attempt": 1,
    "time": rig.START + 5,
    "step": 4,
    "metrics": {"loss": 0.25, "accuracy": 0.9},
    "num_examples": 10,
    "wall_s": 1.0,
}
DEATH = {
    "kind": "Death",
    "worker": 1,
    "attempt": 1,
    "time": rig.START + 6,
    "error": "its process was ended by SIGKILL & <gone>",
}
NODE = {
    "kind": "NodeFound",
    "worker": 0,
    "attempt": 0,
    "time": rig.START,
    "node": "host-1",
    "system": "Linux",
    "processor": "Fast",
    "num_cpus": 8,
    "memory_bytes": 64e9,
    "gpus": [],
}


def attempt(number: int, time: float, restore_from: str | None = None) -> dict[str, Any]:
    record = {"kind": "AttemptStarted", "attempt": number, "time": rig.START + time}
    return record | {"restore_from": restore_from}


def run_with(folder: Path, *records: dict[str, Any]) -> RunPaths:
    """Leave a run that evaluated, lost a worker, went back to step 4 and ended."""
    root = rig.new_run(folder)
    facts = rig.make_facts(root, f"sqlite:///{folder}/mlflow.db")
    commands = [["resume", "make train conf=tiny"]]
    ended = rig.ended() | {"commands": commands}
    metrics = {"metrics": {"accuracy": [0.5] * 4}}
    rig.write(
        root,
        facts.record(rig.START),
        attempt(1, 1),
        rig.block(0, 4) | metrics,
        EVALUATED,
        DEATH,
        attempt(2, 7, "/runs/x/checkpoints/step-00000004"),
        rig.block(4, 4, attempt=2) | metrics,
        NODE,
        *records,
        ended,
    )
    return RunPaths(root)


def test_the_page_tells_result_events_and_what_to_do_and_needs_no_other_file(
    tmp_path: Path,
) -> None:
    paths = run_with(tmp_path)
    write_report(paths)
    page = paths.report.read_text()
    assert "finished" in page and "at step 8" in page
    assert "<td>eval/accuracy</td>" in page and "0.9<" in page
    assert "attempt 2 from step-00000004" in page
    assert "<td>host-1</td><td>8 CPUs (Fast), 64 GB, no GPU, Linux</td>" in page
    assert "worker 1: its process was ended by SIGKILL &amp; &lt;gone&gt;" in page
    assert "make train conf=tiny" in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page), "it points elsewhere"
    plots = sorted(path.name for path in paths.plots_dir.iterdir())
    assert plots == [
        "accuracy.png",
        "goodput.png",
        "learning_rate.png",
        "loss.png",
        "step_time.png",
        "throughput.png",
    ]
    assert page.count("data:image/png;base64,") == len(plots)


def test_the_description_is_short_and_says_the_same(tmp_path: Path) -> None:
    text = summarise(account(read(run_with(tmp_path).journal)))
    assert text.startswith("**finished** at step 8 after 1:40 of training time")
    assert "| eval/accuracy | 0.9 |" in text
    assert "2 attempt(s)" in text
    assert "make train conf=tiny" in text


def test_a_failure_is_told_with_its_cause(tmp_path: Path) -> None:
    failed = rig.ended("FAILED") | {"cause": "worker 1 failed <here>"}
    paths = run_with(tmp_path, failed)
    found = account([*read(paths.journal)][:-1])
    assert "worker 1 failed <here>" in summarise(found)


def test_a_failure_before_the_last_one_is_told_too(tmp_path: Path) -> None:
    failed = rig.ended("FAILED") | {"cause": "worker 0 failed: no room"}
    paths = run_with(tmp_path)
    found = account([*[*read(paths.journal)][:-1], failed])
    assert "first failure: attempt 1, worker 1: its process was ended by SIGKILL &amp;" in (
        render(found, [])
    )
    assert "attempt 1, worker 1: its process was ended by SIGKILL & <gone>" in summarise(found)


def test_a_run_whose_driver_was_killed_is_told_with_how_to_go_on(tmp_path: Path) -> None:
    root = rig.new_run(tmp_path / "tiny", "one")
    tags = {"orchestrator.command": "orchestrator train --config-dir '/my jobs' job=tiny"}
    facts = rig.make_facts(root, "sqlite:///x.db", tags=tags)
    found = account([facts.record(rig.START), rig.ended("KILLED")])
    where = f"--config-dir='/my jobs' runs_dir={tmp_path}"
    command = f'make train conf=tiny args="{where} resume=one"'
    assert found.commands == [("resume", command)]
    assert command in summarise(found) and html.escape(command) in render(found, [])
    assert account([facts.record(rig.START), rig.ended()]).commands == []


def test_of_many_events_the_first_and_the_last_are_told(tmp_path: Path) -> None:
    said = [
        {"kind": "Notice", "worker": 0, "time": rig.START + 10, "text": f"said {number}."}
        for number in range(MAX_EVENTS)
    ]
    paths = run_with(tmp_path, *said)
    write_report(paths)
    page = paths.report.read_text()
    assert "said 0." in page and f"said {MAX_EVENTS - 1}." in page
    assert "said 100." not in page
    assert " more</td>" in page


def test_a_run_that_failed_before_its_first_step_has_a_page(tmp_path: Path) -> None:
    root = rig.new_run(tmp_path)
    facts = rig.make_facts(root, f"sqlite:///{tmp_path}/mlflow.db")
    rig.write(root, facts.record(rig.START), rig.ended("FAILED"))
    write_report(RunPaths(root))
    assert "failed" in RunPaths(root).report.read_text()


def test_what_was_only_trained_or_only_evaluated_has_a_plot_too(tmp_path: Path) -> None:
    series = {
        "train/loss": [(1, 0.5), (2, 0.4)],
        "train/gradient_norm/dense/kernel": [(1, 0.5)],
        "eval/f1>0.5": [(2, 0.5)],
        "eval/f1<0.5": [(2, 0.5)],
        "eval/goodput": [(2, 1.0)],
    }
    drawn = plots.draw(Account(series=series), tmp_path)
    names = ["loss.png", "f1_0_5.png", "f1_0_5_.png", "goodput_.png"]
    assert [path.name for path in drawn] == names
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    many = {f"eval/{number:02}": [(1, 0.5)] for number in range(40)} | {"train/loss": [(1, 1.0)]}
    assert len(plots.draw(Account(series=many), tmp_path)) == 12
    assert plots.draw(Account(series=many), tmp_path)[0].name == "loss.png"


@pytest.mark.filterwarnings("error")
def test_of_many_workers_the_slow_ones_are_named_and_the_plot_has_room(tmp_path: Path) -> None:
    blocks = [rig.block(0, 4) | {"worker": worker, "wall_s": 1.0 + worker} for worker in range(64)]
    paths = run_with(tmp_path, *blocks)
    found = account(read(paths.journal))
    steps = {key: series for key, series in found.series.items() if key.startswith("worker/")}
    assert len(steps) == 64
    named = plots.labelled(steps)
    assert named[0] == "worker/63/step_ms" and len(named) == 6
    plots.draw(found, tmp_path / "plots")
