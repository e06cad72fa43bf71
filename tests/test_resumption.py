"""Which checkpoint an attempt goes on from, and what is said of the others."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from orchestrator.errors import RestoreError
from orchestrator.resumption import Ancestry, Checkpoints
from orchestrator.spec.paths import RunPaths
from orchestrator.track.journal import Journal, read
from orchestrator.train import store
from tests.faults.saves import save


def saved(folder: Path, *steps: int) -> RunPaths:
    """Make a run with these checkpoints, on record as its driver would have them."""
    paths = RunPaths(folder)
    for step in steps:
        save(paths, 1, step, keep=9)
    journal = Journal(paths.journal)
    for step in steps:
        journal.append({"kind": "Saved", "step": step})
    journal.close()
    return paths


def damage(paths: RunPaths, step: int) -> None:
    (paths.checkpoints_dir / store.checkpoint_name(step) / "variables.index").write_bytes(b"")


def test_the_newest_valid_one_is_taken_and_the_newer_are_told_once(tmp_path: Path) -> None:
    paths = saved(tmp_path, 10, 20, 30)
    damage(paths, 20)
    damage(paths, 30)
    said: list[str] = []
    checkpoints = Checkpoints(paths, read, said.append)
    for _ in range(2):
        assert checkpoints.newest() == (10, str(paths.checkpoints_dir / "step-00000010"))
    assert said == [
        "checkpoint step-00000030 is not used: variables.index has 0 bytes instead of 5",
        "checkpoint step-00000020 is not used: variables.index has 0 bytes instead of 5",
        "the newest valid checkpoint is step-00000010: it is used instead",
    ]


def test_none_valid_is_refused_with_every_candidate_and_its_reason(tmp_path: Path) -> None:
    paths = saved(tmp_path, 10, 20)
    damage(paths, 10)
    damage(paths, 20)
    with pytest.raises(RestoreError) as refusal:
        Checkpoints(paths, read, print).newest()
    text = str(refusal.value)
    assert "step-00000010: variables.index has 0 bytes" in text
    assert "step-00000020: variables.index has 0 bytes" in text


def test_checkpoints_that_are_gone_are_no_reason_to_begin_at_step_0(tmp_path: Path) -> None:
    paths = saved(tmp_path, 10, 20)
    shutil.rmtree(paths.checkpoints_dir)
    with pytest.raises(RestoreError, match="tells of 2, the last of step 20, and all are gone"):
        Checkpoints(paths, read, print).newest()


def test_a_run_that_never_saved_begins_at_step_0(tmp_path: Path) -> None:
    assert Checkpoints(saved(tmp_path), read, print).newest() is None


def test_one_that_is_later_than_the_record_is_left(tmp_path: Path) -> None:
    paths = saved(tmp_path, 10, 20)
    said: list[str] = []
    found = Checkpoints(paths, read, said.append, Ancestry(17)).newest()
    assert found == (10, str(paths.checkpoints_dir / "step-00000010"))
    assert said == [
        "checkpoint step-00000020 is later than the record, which ends at step 17: it is left, "
        "and its steps are made again"
    ]


def test_one_that_is_later_than_the_record_is_better_than_step_0(tmp_path: Path) -> None:
    paths = saved(tmp_path, 20)
    said: list[str] = []
    found = Checkpoints(paths, read, said.append, Ancestry(17)).newest()
    assert found == (20, str(paths.checkpoints_dir / "step-00000020"))
    assert "the steps between are on no record" in said[0]


def test_one_of_the_last_step_on_record_is_taken(tmp_path: Path) -> None:
    found = Checkpoints(saved(tmp_path, 10, 20), read, print, Ancestry(20)).newest()
    assert found is not None and found[0] == 20


def test_one_whose_steps_were_made_again_is_left_also_when_the_record_has_passed_it(
    tmp_path: Path,
) -> None:
    paths = saved(tmp_path, 10, 20)  # by attempt 1, whose driver died with step 17 on record
    ancestry, said = Ancestry(17), list[str]()
    ancestry.began(2, 10)
    ancestry.reached(25)  # attempt 2, perhaps with other settings, which has not saved yet
    found = Checkpoints(paths, read, said.append, ancestry).newest()
    assert found == (10, str(paths.checkpoints_dir / "step-00000010"))
    assert said == [
        "checkpoint step-00000020 was saved before the run went back to step 10: it is left, "
        "and its steps are made again"
    ]
    save(paths, 2, 20, keep=9)
    found = Checkpoints(paths, read, print, ancestry).newest()
    assert found is not None and found[0] == 20


def test_what_was_made_again_is_better_than_step_0(tmp_path: Path) -> None:
    paths = saved(tmp_path, 10, 20)
    damage(paths, 10)
    said: list[str] = []
    found = Checkpoints(paths, read, said.append, Ancestry(25, {1: 0, 2: 10})).newest()
    assert found == (20, str(paths.checkpoints_dir / "step-00000020"))
    assert "was saved before the run went back to step 10; there is no earlier one" in said[0]


def test_an_attempt_that_goes_on_from_the_newest_leaves_none_behind(tmp_path: Path) -> None:
    paths = saved(tmp_path, 10, 20)
    found = Checkpoints(paths, read, print, Ancestry(25, {1: 0, 2: 10, 3: 20})).newest()
    assert found is not None and found[0] == 10
    save(paths, 2, 20, keep=9)  # saved by the attempt before the one that began there
    found = Checkpoints(paths, read, print, Ancestry(25, {1: 0, 2: 10, 3: 20})).newest()
    assert found is not None and found[0] == 20


@pytest.mark.parametrize(("last_evaluation", "taken"), [(0, 10), (20, 20)])
def test_one_whose_evaluation_is_on_no_record_is_left(
    last_evaluation: int, taken: int, tmp_path: Path
) -> None:
    # The driver was killed while the workers evaluated; they ended well after their checkpoint.
    paths = saved(tmp_path, 10)
    save(paths, 1, 20, keep=9, **store.EvaluationState.told.facts())
    said: list[str] = []
    ancestry = Ancestry(20, last_evaluation=last_evaluation)
    found = Checkpoints(paths, read, said.append, ancestry).newest()
    assert found is not None and found[0] == taken
    assert ["lacks the evaluation after its step" in line for line in said] == [True][taken // 20 :]


def test_an_evaluation_that_was_passed_over_is_on_no_record_any_more(tmp_path: Path) -> None:
    paths = saved(tmp_path, 10)
    save(paths, 3, 20, keep=9, **store.EvaluationState.told.facts())
    ancestry = Ancestry(20, last_evaluation=20)
    ancestry.began(2, 10)  # step 20 and its evaluation are made again
    ancestry.reached(20)
    found = Checkpoints(paths, read, print, ancestry).newest()
    assert found is not None and found[0] == 10
    ancestry.evaluated(20)
    found = Checkpoints(paths, read, print, ancestry).newest()
    assert found is not None and found[0] == 20


def test_the_only_one_is_taken_although_its_evaluation_is_on_no_record(tmp_path: Path) -> None:
    paths, said = saved(tmp_path), list[str]()
    save(paths, 1, 20, keep=9, **store.EvaluationState.told.facts())
    found = Checkpoints(paths, read, said.append, Ancestry(20)).newest()
    assert found is not None and found[0] == 20
    assert said[0].endswith("there is no earlier one, so that evaluation is on no record")


def test_one_whose_evaluation_is_still_to_be_made_is_taken(tmp_path: Path) -> None:
    paths = saved(tmp_path, 10)
    save(paths, 1, 20, keep=9, **store.EvaluationState.owed.facts())
    found = Checkpoints(paths, read, print, Ancestry(20)).newest()
    assert found is not None and found[0] == 20
