"""What `chaos` calls a difference: each kind is planted once in what a run leaves."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from orchestrator.chaos.command import Command
from orchestrator.chaos.delays import delays, longest
from orchestrator.chaos.faults import FAULTS
from orchestrator.chaos.host_faults import late_files
from orchestrator.chaos.judge import Difference, Left, judge
from orchestrator.chaos.scene import Scene
from orchestrator.chaos.storm import Row
from orchestrator.chaos.table import Certificate, lines, write_report
from orchestrator.chaos.watch import Watch
from orchestrator.errors import StorageError
from orchestrator.spec.chaos import FaultName
from orchestrator.spec.messages import DRIVER_KILLED
from orchestrator.spec.paths import RunPaths
from orchestrator.track.journal import Journal
from orchestrator.train import store

STEPS = 4
SAMPLE = ("system/a/cpu", 50.0, 0)
GOODPUT, SIZE = ("goodput/fraction", 0.5, 4), ("model/size_bytes", 9.0, 4)
KILL, STOP = FAULTS[FaultName.kill], FAULTS[FaultName.stop]


@dataclass
class Run:
    """What a run leaves; a disturbed one was restarted at step 2 and made step 3 twice."""

    records: list[dict[str, Any]] = field(default_factory=list)
    points: list[tuple[str, float, int]] = field(default_factory=list)
    weights: bytes = b"weights"
    litter: str = ""
    states: tuple[str, ...] = ("FINISHED",)

    def write(self, folder: Path) -> Left:
        paths = RunPaths(folder / "run")
        staged = paths.checkpoints_dir / ".staged"
        staged.mkdir(parents=True)
        (staged / "variables.data-00000-of-00001").write_bytes(self.weights)
        store.commit(staged, paths.checkpoints_dir / store.checkpoint_name(STEPS), {})
        if self.litter:
            (paths.checkpoints_dir / self.litter).mkdir()
        journal = Journal(paths.journal)
        for record in self.records:
            journal.append(record)
        journal.close()
        database = folder / "mlflow.db"
        with closing(sqlite3.connect(database)) as connection, connection:
            connection.execute("create table metrics (key, value, step, is_nan)")
            connection.execute("create table runs (status)")
            connection.executemany("insert into runs values (?)", [(s,) for s in self.states])
            for key, value, step in self.points:
                connection.execute("insert into metrics values (?, ?, ?, 0)", (key, value, step))
        return Left(paths, database)


def block(step: int, attempt: int, **other: Any) -> dict[str, Any]:
    told = {"loss": [1.0 / step], "ledger": 100 * step, **other}
    return {
        "kind": "BlockDone",
        "worker": 0,
        "attempt": attempt,
        "first_step": step - 1,
        "num_steps": 1,
        **told,
    }


def began(attempt: int, step: int) -> list[dict[str, Any]]:
    return [
        {"kind": "AttemptStarted", "attempt": attempt},
        {"kind": "Ready", "worker": 0, "attempt": attempt, "start_step": step},
    ]


def points() -> list[tuple[str, float, int]]:
    return [("train/loss", 0.5, 2), ("train/loss", 0.3, 4), ("perf/step_ms", 20.0, 4)]


def undisturbed() -> Run:
    steps = [block(step, 1) for step in range(1, STEPS + 1)]
    return Run([*began(1, 0), *steps, {"kind": "RunEnded", "status": "FINISHED"}], points())


def disturbed() -> Run:
    first = [block(step, 1) for step in (1, 2, 3)]
    second = [block(step, 2) for step in (3, 4)]
    ended = {"kind": "RunEnded", "status": "FINISHED"}
    # The restarted run was slower: times are no difference.
    return Run(
        [*began(1, 0), *first, *began(2, 2), *second, ended],
        [*points()[:2], ("perf/step_ms", 90.0, 4)],
    )


def killed_driver() -> Run:
    """Let the driver be killed after two seconds; its guardian ends the run four seconds later."""
    run = disturbed()
    facts = {"params": {}, "tags": {}}
    end = {"kind": "RunEnded", "status": "KILLED", "cause": DRIVER_KILLED, "time": 106.0}
    run.records[5:5] = [
        {"kind": "Notice", "worker": 0, "attempt": 1, "text": "", "time": 102.0},
        end,
        {"kind": "RunStarted", "time": 110.0, "facts": facts},
    ]
    run.records.insert(0, {"kind": "RunStarted", "time": 100.0, "facts": facts})
    run.records[-1] = {**run.records[-1], "time": 113.0}
    return run


def found(run: Run, folder: Path) -> list[Difference]:
    left = undisturbed().write(folder / "undisturbed"), run.write(folder / "disturbed")
    return judge(*left, STEPS)


def test_a_restart_that_made_steps_again_is_no_difference(tmp_path: Path) -> None:
    assert found(disturbed(), tmp_path) == []


def test_what_a_guardian_waits_is_no_time_of_the_run(tmp_path: Path) -> None:
    assert found(killed_driver(), tmp_path) == []


def _change(index: int, **values: Any) -> Callable[[Run], None]:
    return lambda run: run.records[index].update(values)


def _clocks(run: Run) -> None:
    """Let four seconds pass, and a word of worker 1, whose time nobody accounts for, come late."""
    start = {"kind": "RunStarted", "time": 100.0, "facts": {"params": {}, "tags": {}}}
    late = {"kind": "Saving", "worker": 1, "attempt": 2, "time": 109.0}
    run.records = [start, *run.records[:-1], late, {**run.records[-1], "time": 104.0}]


@pytest.mark.parametrize(
    ("plant", "text", "step"),
    [
        (lambda run: run.records.pop(), "the run is not ended", None),
        (_change(-1, status="KILLED"), "the run is KILLED", None),
        (lambda run: run.records.pop(-2), "1 steps are missing", 4),
        (lambda run: run.records.pop(3), "1 steps are missing", 2),
        (_change(-2, loss=[0.26]), "losses: 1 steps have another one", 4),
        (_change(-3, ledger=301), "examples: other ones were used", 3),
        (lambda run: run.records.insert(-1, block(4, 1)), "attempt 1 wrote BlockDone", None),
        (lambda run: setattr(run, "weights", b"weighty"), "another SHA-256", None),
        (lambda run: run.points.append(run.points[0]), "1 points are there twice", 2),
        (lambda run: run.points.extend([SAMPLE] * 2), "twice: system/a/cpu at 0", None),
        (lambda run: run.points.extend([GOODPUT] * 2), "twice: goodput/fraction at 4", None),
        (lambda run: run.points.extend([SIZE, GOODPUT] * 2), "2 points are there twice", None),
        (lambda run: run.points.pop(0), "1 points are lost: train/loss at 2", 2),
        (lambda run: run.points.append(("eval/loss", 1.0, 3)), "have no counterpart", 3),
        (lambda run: run.points.__setitem__(1, ("train/loss", 0.4, 4)), "another value", 4),
        (lambda run: setattr(run, "states", ("FINISHED", "RUNNING")), "FINISHED, RUNNING", None),
        (lambda run: setattr(run, "states", ("KILLED",)), "there are: KILLED", None),
        (lambda run: setattr(run, "litter", ".attempt-1"), "checkpoints/.attempt-1", None),
        (_clocks, "goodput: 4.0 s are accounted for, of 9.0 s", None),
    ],
)
def test_every_kind_of_difference_is_found(
    plant: Callable[[Run], None], text: str, step: int | None, tmp_path: Path
) -> None:
    run = disturbed()
    plant(run)
    differences = found(run, tmp_path)
    assert [d.step for d in differences if text in d.text] == [step], differences


def certificate(*differences: Difference) -> Certificate:
    rows = [
        Row(KILL, step=30, detected_s=0.04, fenced_s=0.1, resumed_s=1.234, steps_lost=10),
        Row(STOP, step=70, detected_s=7.0, fenced_s=9.0, resumed_s=11.0, steps_lost=15),
        Row(FAULTS[FaultName.cut], not_run="one node"),
    ]
    return Certificate("mnist", "chaos job=mnist", rows, differences, {"keras": "3"}, 60.0)


def test_a_difference_is_laid_at_the_fault_before_it(tmp_path: Path) -> None:
    clean = certificate()
    assert clean.is_clean
    said = [clean.verdict(row) for row in clean.rows]
    assert said == ["the same", "the same, but seen late: 5 s are promised", "not run: one node"]
    late = certificate(Difference("losses differ", 80))
    assert [late.verdict(row) for row in late.rows][:2] == ["the same", "DIFFERS"]
    unknown = certificate(Difference("weights differ", is_of_all=True))
    assert [unknown.verdict(row) for row in unknown.rows][:2] == ["DIFFERS", "DIFFERS"]
    assert not late.is_clean and (late.num_bad, unknown.num_bad) == (1, 2)
    elsewhere = certificate(Difference("losses differ", 80, on_hosts=True))
    assert [elsewhere.verdict(row) for row in elsewhere.rows][:2] == said[:2]
    assert not elsewhere.is_clean
    litter = certificate(Difference("left behind"))
    assert not litter.is_clean and litter.num_bad == 0
    assert lines(clean)[1].split() == ["kill", "30", "0.04", "0.10", "1.23", "10", "the", "same"]


def test_a_block_that_was_held_up_shows_and_one_after_an_evaluation_does_not() -> None:
    # Five steps in 0.1 s; the block that ends at 10.9 is 0.3 s late, and an evaluation took 2 s.
    ends = [10.3, 10.4, 10.5, 10.9, 11.0, 13.1, 13.2]
    records = [block(step, 1, time=end, num_steps=5) for step, end in enumerate(ends, 1)]
    records.insert(5, {"kind": "Evaluated", "worker": 0, "attempt": 1, "time": 13.0})
    records.insert(2, block(9, 1, time=10.45, num_steps=5, worker=1))
    found = delays([*records, block(1, 2, time=50.0)], 1)
    assert [end for end, _ in found] == [10.4, 10.5, 10.9, 11.0, 13.2]
    assert longest(found, 10.6, 20.0) == pytest.approx(0.3)
    assert longest(found, 0.0, 10.6) == pytest.approx(0.0)
    assert longest([], 0.0, 10.0) == 0.0


@pytest.mark.parametrize(("late_s", "said"), [(4.0, ""), (6.0, "attempt 2 wrote worker-1.log")])
def test_what_a_cut_host_writes_when_it_must_be_silent_is_found(
    late_s: float, said: str, tmp_path: Path
) -> None:
    paths = RunPaths(tmp_path)
    command = Command([], tmp_path, tmp_path / "log")
    scene = Scene(Watch(paths.journal), command, paths, num_workers=2, every_steps=20)
    scene.attempt, scene.worker, scene.moment = 2, 1, 1000.0
    log = paths.worker_log(2, 1)
    log.parent.mkdir(parents=True)
    log.touch()
    os.utime(log, (1000.0 + late_s, 1000.0 + late_s))
    assert late_files(scene).startswith(said) and bool(late_files(scene)) == bool(said)


def test_a_report_keeps_the_last_section_of_each_job(tmp_path: Path) -> None:
    path = tmp_path / "RELIABILITY.md"
    path.write_text("# Reliability\n\nWords.\n\n## gan\n\nkept\n\n## mnist\n\nold\n")
    write_report(path, certificate())
    text = path.read_text()
    assert text.startswith(
        "# Reliability\n\nWords.\n\n## gan\n\nkept\n\n## mnist\n\n`orchestrator "
    )
    assert "old" not in text
    assert "| kill | 1 | 0.04 | 0.10 | 1.23 | 10 | the same |" in text
    assert "| cut | 0 |  |  |  |  | not run: one node |" in text


def test_a_report_that_cannot_be_written_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "RELIABILITY.md"
    with pytest.raises(StorageError, match=rf"chaos\.report: {path} cannot be written"):
        write_report(path, certificate())
