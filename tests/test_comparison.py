"""What two journals say about two runs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.__main__ import main
from orchestrator.spec.paths import RunPaths
from orchestrator.track.journal import Journal
from orchestrator.train.data import Order, ledger_hash, make_shards

BATCH = 6


def started(**params: str) -> dict[str, Any]:
    tags = {"mlflow.source.git.commit": "a" * 40}
    facts = {"params": {"train.seed": "0", "run_name": "x", **params}, "tags": tags}
    return {"kind": "RunStarted", "time": 1.0, "facts": facts}


def ready(attempt: int, start_step: int) -> dict[str, Any]:
    return {"kind": "Ready", "worker": 0, "attempt": attempt, "start_step": start_step}


def blocks(
    borders: Sequence[int], *, workers: int = 1, same_shard: bool = False, loss: float = 1.0
) -> list[dict[str, Any]]:
    """Return what workers tell of blocks between borders; `same_shard` loses all but the first."""
    order, told = Order(0, 20), []
    shards = make_shards((BATCH // workers,) * workers, range(workers))
    for first, end in itertools.pairwise(borders):
        for worker in range(workers):
            shard = shards[0 if same_shard else worker]
            positions = shard.positions(first, end - first, BATCH)
            ids = order.examples(positions.reshape(-1)).reshape(positions.shape)
            losses = [loss / (step + 1) for step in range(first, end)] if worker == 0 else []
            told.append(
                {
                    "kind": "BlockDone",
                    "worker": worker,
                    "first_step": first,
                    "num_steps": end - first,
                    "ledger": ledger_hash(ids, first),
                    "loss": losses,
                }
            )
    return told


def write(folder: Path, name: str, *records: dict[str, Any]) -> None:
    paths = RunPaths(folder / "runs" / "job" / name)
    paths.root.mkdir(parents=True)
    journal = Journal(paths.journal)
    for record in records:
        journal.append(record)
    journal.close()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that commands run in, with one run of 12 steps."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "one", started(), ready(1, 0), *blocks([0, 1, 7, 12]))
    return tmp_path


def compared(capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str]:
    code = main(["runs", "compare", "job/one", "job/other", *more])
    return code, capsys.readouterr().out


def test_workers_blocks_and_replayed_steps_do_not_matter(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Killed after step 9, resumed from the checkpoint of step 7 in other blocks.
    lost = blocks([0, 4, 7, 9], workers=2, loss=1.0)
    again = blocks([7, 8, 12], workers=2)
    write(here, "other", started(), ready(1, 0), *lost, ready(2, 7), *again)
    code, out = compared(capsys)
    assert code == 0, out
    assert "examples: the same in all steps up to 12" in out
    assert "configuration, data and code: the same" in out
    assert out.endswith("they computed the same\n")


def test_a_lost_shard_is_seen_though_losses_agree(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = blocks([0, 7], workers=2), blocks([7, 10, 12], workers=2, same_shard=True)
    write(here, "other", started(), ready(1, 0), *good, *bad)
    code, out = compared(capsys)
    assert code == 1
    assert "examples: others in steps 8 to 12, the first that differ" in out
    assert out.endswith("they did not compute the same\n")


def test_losses_settings_and_lengths_are_told(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(here, "other", started(**{"train.seed": "1"}), ready(1, 0), *blocks([0, 7], loss=1.001))
    code, out = compared(capsys)
    assert code == 1 and "train.seed: 0 and 1" in out and "job/other: not ended, 7 steps" in out
    assert "losses: at most 1.0e-03 apart; more than 1e-05 from step 1 on" in out
    # Steps that only one of them has made are a difference whatever the tolerance.
    code, out = compared(capsys, "tolerance=0.01")
    assert code == 1 and "more than" not in out


def test_a_loss_that_is_no_number_in_one_run_only_differs(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(here, "other", started(), ready(1, 0), *blocks([0, 1, 7, 12], loss=np.nan))
    code, out = compared(capsys)
    assert code == 1 and "losses: at most inf apart" in out


def leave_code(run: Path, text: str, changed: str, attempt: int = 1) -> None:
    """Leave a job's file and what was in no commit at a start, as a driver does."""
    paths = RunPaths(run)
    (paths.code_dir / "jobs").mkdir(parents=True, exist_ok=True)
    (paths.code_dir / "jobs" / "mine.py").write_text(text)
    diff = "# /code since abc\n"
    for name, line in (("jobs/mine.py", text), ("x.py", changed)):
        diff += f"diff --git a/{name} b/{name}\nindex {attempt}0..34\n+{line}\n"
    paths.uncommitted(attempt).write_text(diff)


def test_code_that_is_in_no_commit_is_compared_by_file(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dirty = started()
    dirty["facts"]["tags"]["orchestrator.git.dirty"] = "true"
    for name in ("dirty", "other"):
        write(here, name, dirty, ready(1, 0), *blocks([0, 12]))

    def said() -> str:
        main(["runs", "compare", "dirty", "other"])
        return capsys.readouterr().out

    one, other = (here / "runs" / "job" / name for name in ("dirty", "other"))
    leave_code(one, "a = 1", "")
    leave_code(other, "a = 2", "", attempt=9)
    leave_code(other, "a = 1", "", attempt=10)  # started again: this is what it runs
    assert "configuration, data and code: the same" in said()
    leave_code(other, "a = 2", "+b = 2", attempt=10)
    lines = [line for line in said().splitlines() if line.startswith("c")]
    assert lines == [
        "code: jobs/mine.py: other content",
        "code: x.py: other changes that are in no commit",
    ]
    journal = Journal(RunPaths(other).journal)
    journal.append(started())  # from the commit alone; the diffs of earlier starts are still there
    journal.close()
    leave_code(one, "a = 1", "")
    (one / "uncommitted-before-attempt-1.diff").unlink()
    leave_code(other, "a = 1", "", attempt=10)
    assert "configuration, data and code: the same" in said()


def test_runs_are_named_as_for_the_other_words(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["one", str(here / "elsewhere" / "job" / "one"), "tolerance=0"]
    (here / "runs").rename(here / "elsewhere")
    assert main(["runs", "compare", *arguments, "runs_dir=elsewhere"]) == 0
    assert capsys.readouterr().out.startswith("job/one: not ended, 12 steps\n" * 2)


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (("job/one", "job/nothing"), "job/nothing: there is no such run"),
        (("job/one", "job/unused"), "job/unused is no run with a journal"),
        (("job/one", "job/one", "tolerance=much"), "tolerance=NUMBER is meant"),
        (("job/one",), "runs compare RUN RUN"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], fragment: str
) -> None:
    (here / "runs" / "job" / "unused").mkdir()
    (here / "runs" / "job" / "unused" / ".lease").touch()
    assert main(["runs", "compare", *arguments]) == 2
    assert fragment in capsys.readouterr().err
