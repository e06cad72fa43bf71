"""How long a run will take, told from the journal of one that was cut in the same way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from orchestrator.doctor.duration import expected_duration
from orchestrator.spec.config import flatten
from orchestrator.track.journal import Journal
from tests.plans import tiny_plan

# Began at 100, made 10 steps a second from 110 on, but the first block, which was traced.
RECORDS: list[dict[str, Any]] = [
    {"kind": "AttemptStarted", "attempt": 1},
    {"kind": "BlockDone", "worker": 0, "time": 115.0, "num_steps": 2, "wall_s": 5.0},
    {"kind": "BlockDone", "worker": 1, "time": 115.0, "num_steps": 2, "wall_s": 9.0},
    {"kind": "BlockDone", "worker": 0, "time": 117.0, "num_steps": 20, "wall_s": 2.0},
    {"kind": "Evaluated", "wall_s": 4.0},
]
# A worker died an hour later.
RESTARTED: list[dict[str, Any]] = [
    {"kind": "AttemptStarted", "attempt": 2},
    {"kind": "BlockDone", "worker": 0, "time": 3715.0, "num_steps": 2, "wall_s": 5.0},
    {"kind": "BlockDone", "worker": 0, "time": 3717.0, "num_steps": 20, "wall_s": 2.0},
]


def leave(folder: Path, name: str, *more: dict[str, Any], **changes: Any) -> None:
    """Write the journal of a run of the tiny job."""
    plan = tiny_plan(folder, **changes)
    root = plan.paths.root.with_name(name)
    root.mkdir(parents=True)
    journal = Journal(root / "journal.jsonl")
    facts = {"params": flatten(plan.config)}
    for record in [{"kind": "RunStarted", "time": 100.0, "facts": facts}, *RECORDS, *more]:
        journal.append(record)
    journal.close()


def expected(folder: Path, **changes: Any) -> str:
    plan = tiny_plan(folder, **changes)
    return expected_duration(plan, flatten(plan.config))


def test_a_journal_that_cannot_be_read_is_passed_over(tmp_path: Path) -> None:
    leave(tmp_path, "before")
    (tmp_path / "runs/tiny/foreign/journal.jsonl").mkdir(parents=True)
    assert "as before did" in expected(tmp_path)


def test_a_job_that_never_ran_takes_an_unknown_time(tmp_path: Path) -> None:
    assert expected(tmp_path) == "unknown: tiny has not run here yet"


@pytest.mark.parametrize("more", [(), RESTARTED], ids=["undisturbed", "restarted"])
def test_steps_evaluations_and_start_are_those_of_the_last_run(
    tmp_path: Path, more: Sequence[dict[str, Any]]
) -> None:
    leave(tmp_path, "before", *more)
    # 500 steps at 10 a second, 5 evaluations of 4 s, 10 s to start.
    assert expected(tmp_path, train__steps=500, train__eval_every_steps=100) == (
        "about 80 s: 500 steps at 10.0 steps/s, 20 s of evaluation, 10 s to start; as before did"
    )


@pytest.mark.parametrize(
    "changes", [{"train__global_batch_size": 48}, {"job__args": {"dropout": 0.5}}]
)
def test_a_run_that_was_cut_otherwise_tells_nothing(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    leave(tmp_path, "before")
    assert expected(tmp_path, **changes).startswith("unknown: no recent run of this job")


def test_a_journal_without_a_block_tells_nothing(tmp_path: Path) -> None:
    root = tiny_plan(tmp_path).paths.root.with_name("empty")
    root.mkdir(parents=True)
    (root / "journal.jsonl").touch()
    assert expected(tmp_path).startswith("unknown: no recent run")
