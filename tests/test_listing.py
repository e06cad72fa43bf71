"""`runs list`, on journals as drivers leave them."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import ConfigError
from orchestrator.lease import Lease
from orchestrator.listing import age, list_runs
from orchestrator.spec.paths import RunPaths
from orchestrator.track.journal import Journal


def leave(
    folder: Path, name: str, *records: dict[str, Any], began: float, **params: str
) -> RunPaths:
    """Write the journal of a run `<job>/<run>` below `folder`."""
    paths = RunPaths(folder / "runs" / name)
    paths.root.mkdir(parents=True)
    journal = Journal(paths.journal)
    journal.append({"kind": "RunStarted", "time": began, "facts": {"params": params}})
    for record in records:
        journal.append(record)
    journal.close()
    return paths


def block(first: int, steps: int) -> dict[str, Any]:
    return {"kind": "BlockDone", "worker": 0, "first_step": first, "num_steps": steps, "loss": []}


def evaluated(step: int, **metrics: float) -> dict[str, Any]:
    return {"kind": "Evaluated", "step": step, "metrics": metrics}


ENDED = {"kind": "RunEnded", "status": "FINISHED"}


def test_runs_are_listed_newest_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    now = time.time()
    results = [evaluated(900, loss=0.2, accuracy=0.97), evaluated(1800, loss=0.1, accuracy=0.98)]
    leave(tmp_path, "mnist/a", block(0, 1800), *results, ENDED, began=now - 7200)
    leave(tmp_path, "gan/b", block(0, 40), began=now - 100)
    list_runs([], tmp_path)
    assert capsys.readouterr().out.splitlines() == [
        "run      status    steps  result         age",
        "gan/b    died         40                 2 min",
        "mnist/a  finished  1,800  accuracy 0.98  2 h",
    ]


def test_a_journal_that_cannot_be_read_keeps_the_others_in_the_list(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave(tmp_path, "mnist/a", block(0, 10), ENDED, began=time.time() - 100)
    (tmp_path / "runs/mnist/b/journal.jsonl").mkdir(parents=True)  # as unreadable for root, too
    torn = tmp_path / "runs/mnist/c/journal.jsonl"
    torn.parent.mkdir()
    torn.touch()  # killed before its first record
    list_runs([], tmp_path)
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert rows["mnist/a"][1:] == ["finished", "10", "2", "min"]
    assert rows["mnist/b"][1:3] == ["unreadable", "0"]
    assert (rows["mnist/c"][1], rows["mnist/c"][-1]) == ("died", "s")


def test_the_best_value_is_told_where_the_run_has_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = (math.nan, 0.2, 0.1, 0.3)
    results = [evaluated(step, loss=loss) for step, loss in enumerate(losses)]
    settings = {"best.metric": "loss", "best.mode": "min"}
    leave(tmp_path, "mnist/a", *results, ENDED, began=time.time(), **settings)
    list_runs(["job=mnist"], tmp_path)
    assert "best loss 0.1" in capsys.readouterr().out


def test_a_run_that_is_held_is_running_until_its_driver_is_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lease = Lease(leave(tmp_path, "mnist/a", block(0, 1), began=time.time()))
    list_runs([], tmp_path)
    assert "running" in capsys.readouterr().out
    lease.release()
    list_runs([], tmp_path)
    assert "died" in capsys.readouterr().out


def test_steps_that_were_taken_back_do_not_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = {"kind": "Ready", "worker": 0, "start_step": 20}
    leave(tmp_path, "mnist/a", block(0, 35), again, block(20, 4), began=time.time())
    list_runs([], tmp_path)
    assert " 24 " in capsys.readouterr().out


def test_a_metric_that_was_recorded_as_text_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd: dict[str, Any] = {"kind": "Evaluated", "step": 1, "metrics": {"n": "tf.Tensor", "f1": 0.5}}
    leave(tmp_path, "mnist/a", block(0, 1), odd, began=time.time())
    list_runs([], tmp_path)
    assert "f1 0.5" in capsys.readouterr().out


def test_jobs_can_be_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leave(tmp_path, "mnist/a", began=time.time())
    list_runs(["job=gan"], tmp_path)
    assert "no runs in" in capsys.readouterr().out


def test_a_folder_may_begin_with_the_home_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    leave(tmp_path, "mnist/a", began=time.time())
    list_runs(["runs_dir=~/runs"], Path("/"))
    assert "mnist/a" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["jobs=mnist"], ["mnist"], ["runs_dir=nowhere"]])
def test_what_is_not_known_is_refused(arguments: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="runs_dir="):
        list_runs(arguments, tmp_path)


@pytest.mark.parametrize(
    ("seconds", "words"), [(-1, "0 s"), (59, "59 s"), (61, "1 min"), (7300, "2 h"), (1e6, "12 d")]
)
def test_age_is_told_in_its_largest_unit(seconds: float, words: str) -> None:
    assert age(seconds) == words
