"""One run is one run, is told how it ended before all else, and sends once what it has sent."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from orchestrator.spec.paths import RunPaths
from orchestrator.track.facts import RunFacts
from orchestrator.track.journal import Journal, read
from orchestrator.track.mlflow_projection import Projection, Report, sync
from orchestrator.track.mlflow_store import Store
from orchestrator.track.mlflow_writer import Writer
from orchestrator.track.points import Point
from orchestrator.track.record import Record
from tests.track import rig

# Fails as no broken rule does: MLflow calls any such error of a database a bad request.
TRIGGER = "create trigger no_{table}_{verb} before {verb} on {table} begin select {fails}; end"
FAILS = "hex(zeroblob(3000000000))"


def project(facts: RunFacts, *records: Mapping[str, Any], status: str = "KILLED") -> Report:
    """Train as far as the record is concerned: journal what is told, and project it."""
    journal = Journal(Path(facts.root) / "journal.jsonl")
    for record in (facts.record(rig.START), *records, rig.ended(status)):
        journal.append(record)
    projection = Projection(facts, keep=journal.append, notice=print)
    report = projection.finish(status, 60)
    journal.close()
    return report


def ask(database: Path, text: str) -> list[tuple[Any, ...]]:
    with sqlite3.connect(database) as connection:
        return connection.execute(text).fetchall()


def num_losses(database: Path) -> int:
    return int(ask(database, "select count(*) from metrics where key = 'train/loss'")[0][0])


@contextmanager
def refusing(database: Path, *tables: str) -> Iterator[None]:
    """Let the database take nothing for some tables."""
    names = [(table, verb) for table in tables for verb in ("insert", "update")]
    for table, verb in names:
        ask(database, TRIGGER.format(table=table, verb=verb, fails=FAILS))
    yield
    for table, verb in names:
        ask(database, f"drop trigger no_{table}_{verb}")


def test_a_run_of_the_same_name_that_began_at_another_time_is_another_run(
    tmp_path: Path, database: Path
) -> None:
    for number, folder in enumerate(("first", "second")):
        (tmp_path / folder).mkdir()
        root = rig.new_run(tmp_path / folder, "baseline")
        facts = rig.make_facts(root, f"sqlite:///{database}", artifact_root=str(tmp_path / "art"))
        began = facts.record(rig.START + number)
        rig.write(root, began, rig.block(0, 4), rig.ended())
        assert sync(root).missing == ""
        assert sync(root).missing == ""
    assert ask(database, "select count(*) from runs") == [(2,)]
    assert num_losses(database) == 4


def test_a_resumed_run_leaves_out_what_mlflow_has_taken_and_sync_sends_it_again(
    tmp_path: Path, database: Path
) -> None:
    root = rig.new_run(tmp_path)
    facts = rig.make_facts(root, f"sqlite:///{database}", log_every_steps="1")
    num_steps = 1200  # six points each
    project(facts, rig.block(0, num_steps))
    marks = [r["num_points"] for r in read(root / "journal.jsonl") if r["kind"] == "Sent"]
    assert len(marks) == 1 and marks[0] > 6 * num_steps  # where the time went comes besides
    assert num_losses(database) == num_steps
    # Whoever removes points shows which are sent again.
    ask(database, "delete from metrics where key = 'train/loss' and step <= 10")
    project(facts, rig.block(num_steps, 10, attempt=2))
    assert num_losses(database) == num_steps
    assert sync(root).missing == ""
    assert num_losses(database) == num_steps + 10


def test_a_run_made_anew_gets_all_points_whatever_another_one_has_taken(
    tmp_path: Path, database: Path
) -> None:
    root = rig.new_run(tmp_path)
    facts = rig.make_facts(root, f"sqlite:///{database}", log_every_steps="1")
    project(facts, rig.block(0, 1200))
    other = tmp_path / "other.db"
    project(facts.moved(f"sqlite:///{other}", facts.artifact_root), rig.block(1200, 10))
    assert num_losses(other) == 1210
    # And once more, now that the journal knows the new run too.
    project(facts.moved(f"sqlite:///{other}", facts.artifact_root), rig.block(1210, 10))
    assert num_losses(other) == 1220


def test_the_status_is_told_although_the_points_find_no_place(
    tmp_path: Path, database: Path
) -> None:
    root = rig.new_run(tmp_path)
    facts = rig.make_facts(root, f"sqlite:///{database}")
    rig.write(root, facts.record(rig.START))
    projection = Projection(facts, keep=lambda record: None, notice=print)
    assert projection.finish(None, 60).missing == ""
    assert ask(database, "select status from runs") == [("RUNNING",)]
    rig.write(root, rig.block(0, 4), rig.ended("KILLED"))
    ask(database, "alter table metrics rename to hidden")
    assert sync(root, deadline_s=20).missing != ""
    assert ask(database, "select status from runs") == [("KILLED",)]
    ask(database, "alter table hidden rename to metrics")
    assert sync(root).missing == ""
    assert num_losses(database) == 2


def test_a_run_that_was_taken_up_again_is_not_told_how_it_had_ended(
    tmp_path: Path, database: Path
) -> None:
    root = rig.new_run(tmp_path)
    facts = rig.make_facts(root, f"sqlite:///{database}")
    project(facts, rig.block(0, 4))
    assert ask(database, "select status from runs") == [("KILLED",)]
    rig.write(root, facts.record(rig.START + 200))
    late = Writer(facts, keep=lambda record: None, notice=print, is_live=False)
    ask(database, "update runs set status = 'RUNNING'")
    late.tell_status("KILLED")
    late.advance()
    late.end("KILLED")
    assert ask(database, "select status from runs") == [("RUNNING",)]


def test_points_are_not_given_up_while_the_database_takes_no_writes(
    tmp_path: Path, database: Path
) -> None:
    root = rig.new_run(tmp_path)
    facts = rig.make_facts(root, f"sqlite:///{database}")
    store = Store(facts, None, round(rig.START * 1000))
    point = Point("train/loss", 1.0, round(rig.START * 1000), 1)
    with refusing(database, "metrics", "tags"), pytest.raises(Exception, match="too big"):
        store.send([point])
    assert store.send([point]) == []


def test_a_second_export_of_the_same_step_has_no_figures_beside_those_of_the_first(
    tmp_path: Path, database: Path
) -> None:
    root = rig.new_run(tmp_path)
    facts = rig.make_facts(root, f"sqlite:///{database}")
    exported = {"kind": "Exported", "worker": 0, "attempt": 1, "time": rig.START, "step": 4}
    exported |= {"path": "saved_model", "input_dtype": "uint8", "input_shape": [None, 4]}
    paths = RunPaths(root)
    paths.mlflow_model_dir.mkdir(parents=True)
    for number in (1, 2, 2):  # the second is logged twice, as after an answer that was lost
        (paths.mlflow_model_dir / "MLmodel").write_text(f"model_uuid: {number}")
        proof = {"passed": True, "time": rig.START + number, "size_bytes": 1000 + number}
        paths.proof.write_text(json.dumps(proof))
        assert project(facts, rig.block(0, 4), exported, status="FINISHED").missing == ""
    assert ask(database, "select count(*) from logged_models") == [(2,)]
    figures = ask(database, "select step, value from metrics where key = 'model/size_bytes'")
    assert figures == [(4, 1001.0)]


def test_what_comes_after_the_end_of_a_record_is_no_trouble(tmp_path: Path, database: Path) -> None:
    root = rig.new_run(tmp_path)
    said: list[str] = []
    record = Record(
        root / "journal.jsonl", rig.make_facts(root, f"sqlite:///{database}"), notice=said.append
    )
    record.end("KILLED", "stopped", None)
    record.add({"kind": "MlflowRun", "run_id": "late"})
    assert said == [] and record.failing_s == 0.0
