"""Run folders: which one a command trains in, who holds it, and what may change on resume."""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from orchestrator.changes import compare_data, compare_settings
from orchestrator.errors import ConfigError, RestoreError, StorageError
from orchestrator.runs import (
    Past,
    create_run,
    find_run,
    look_again,
    look_back,
    merge_overrides,
    new_run_name,
    read_overrides,
)
from orchestrator.spec.config import flatten
from orchestrator.spec.messages import DataUsed
from orchestrator.spec.paths import RunPaths
from orchestrator.track.facts import FORMAT
from orchestrator.track.journal import Journal, read
from tests.plans import tiny_config, tiny_plan

STARTED = {"kind": "RunStarted", "time": 1.0, "facts": {"params": {}}}


def ended(status: str) -> dict[str, Any]:
    return {"kind": "RunEnded", "time": 9.0, "status": status, "cause": ""}


def block(first_step: int, num_steps: int) -> dict[str, Any]:
    return {"kind": "BlockDone", "worker": 0, "first_step": first_step, "num_steps": num_steps}


def write_run(folder: Path, name: str, *records: Mapping[str, Any]) -> RunPaths:
    """Make the run folder `runs/tiny/<name>` with a journal."""
    paths = RunPaths(folder / "runs" / "tiny" / name)
    paths.root.mkdir(parents=True)
    journal = Journal(paths.journal)
    for record in records:
        journal.append(record)
    journal.close()
    return paths


def found_name(folder: Path, resume: str) -> str | None:
    past = find_run(tiny_config(resume=resume), folder, read)
    return past.name if past is not None else None


# New folders.


def test_a_runs_name_sorts_by_time() -> None:
    assert new_run_name(datetime(2026, 3, 1, 14, 25, 1), "3fa9") == "20260301-142501-3fa9"


def test_a_new_run_gets_a_folder_below_its_job(tmp_path: Path) -> None:
    paths = create_run(tiny_config(), tmp_path)
    assert paths.root.is_dir()
    assert paths.root.parent == tmp_path / "runs" / "tiny"
    assert re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{4}", paths.root.name)


def test_runs_started_in_the_same_second_get_folders_of_their_own(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: create_run(tiny_config(), tmp_path).root, range(64)))
    assert len(set(made)) == 64


def test_a_run_may_be_given_a_name(tmp_path: Path) -> None:
    paths = create_run(tiny_config(run_name="first"), tmp_path)
    assert paths.root == tmp_path / "runs" / "tiny" / "first"


def test_a_name_that_is_taken_is_refused_with_both_ways_out(tmp_path: Path) -> None:
    create_run(tiny_config(run_name="first"), tmp_path)
    with pytest.raises(ConfigError, match=r"run_name=first.* exists already.*resume=first"):
        create_run(tiny_config(run_name="first"), tmp_path)


@pytest.mark.parametrize("run_name", [None, "first"])
def test_a_folder_that_cannot_be_made_is_a_failure_of_storage(
    run_name: str | None, tmp_path: Path
) -> None:
    (tmp_path / "runs").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match=r"runs/tiny.*Not a directory.*runs_dir"):
        create_run(tiny_config(run_name=run_name), tmp_path)


# Looking back.


def test_a_journal_tells_how_far_a_run_came(tmp_path: Path) -> None:
    paths = write_run(
        tmp_path,
        "a",
        STARTED,
        {"kind": "AttemptStarted", "attempt": 1},
        {"kind": "MlflowRun", "run_id": "0123abcd"},
        block(0, 8),
        block(8, 4),
        {"kind": "AttemptStarted", "attempt": 2},
        # From the checkpoint at 8: the run had been at 12 before.
        block(8, 2),
        ended("FAILED"),
    )
    past = look_back(paths, read)
    assert (past.status, past.attempts, past.mlflow_run, past.last_step) == (
        "FAILED",
        2,
        "0123abcd",
        12,
    )


def test_a_run_that_never_ended_has_no_status(tmp_path: Path) -> None:
    assert look_back(write_run(tmp_path, "a", STARTED, block(0, 8)), read).status is None


def test_a_run_that_was_started_again_has_not_ended(tmp_path: Path) -> None:
    paths = write_run(tmp_path, "a", STARTED, ended("KILLED"), STARTED)
    assert look_back(paths, read).status is None


def test_a_run_is_compared_with_its_first_start(tmp_path: Path) -> None:
    first, second = ({**STARTED, "facts": {"params": {"train.seed": seed}}} for seed in "12")
    past = look_back(write_run(tmp_path, "a", first, second), read)
    assert past.facts["facts"]["params"] == {"train.seed": "1"}


def data_used(split: str, digest: str) -> dict[str, Any]:
    return {"kind": "DataUsed", "split": split, "digest": digest}


def test_the_last_step_is_the_chiefs(tmp_path: Path) -> None:
    # The driver was killed when only another worker had told of the block.
    other = {**block(8, 4), "worker": 1}
    assert look_back(write_run(tmp_path, "a", STARTED, block(0, 8), other), read).last_step == 8


def test_other_data_of_the_same_size_is_refused_unless_it_is_allowed(tmp_path: Path) -> None:
    told = [data_used("train", "0" * 64), data_used("eval", "1" * 64), data_used("train", "2" * 64)]
    past = look_back(write_run(tmp_path, "a", STARTED, *told), read)
    fields: dict[str, Any] = {"worker": 0, "attempt": 2, "time": 0.0, "name": "mnist"}
    fields |= {"source": "data", "num_examples": 8, "features": {}}
    for split, digest in (("train", "2" * 64), ("eval", "1" * 64), ("test", "7" * 64)):
        assert compare_data(past, DataUsed(split=split, digest=digest, **fields), []) == ""
    other = DataUsed(split="train", digest="3" * 64, **fields)
    with pytest.raises(RestoreError) as refused:
        compare_data(past, other, ["train.seed"])
    text = str(refused.value)
    assert "train data mnist has the digest 333333333333, was 222222222222" in text
    assert "data.path" in text and "resume_allow=[data.digest]" in text
    assert "333333333333" in compare_data(past, other, ["data.digest"])


# Which run is meant.


@pytest.mark.parametrize("resume", ["latest", "auto"])
def test_the_newest_run_that_is_not_finished_is_resumed(resume: str, tmp_path: Path) -> None:
    write_run(tmp_path, "20260101-000000-aaaa", STARTED, ended("FAILED"))
    write_run(tmp_path, "20260102-000000-aaaa", STARTED, ended("KILLED"))
    write_run(tmp_path, "20260103-000000-aaaa", STARTED, ended("FINISHED"))
    assert found_name(tmp_path, resume) == "20260102-000000-aaaa"


def test_a_run_whose_driver_died_is_resumed(tmp_path: Path) -> None:
    write_run(tmp_path, "20260101-000000-aaaa", STARTED, block(0, 8))
    assert found_name(tmp_path, "latest") == "20260101-000000-aaaa"


def test_a_run_of_another_job_is_not_resumed(tmp_path: Path) -> None:
    write_run(tmp_path, "20260101-000000-aaaa", STARTED)
    past = find_run(tiny_config(resume="auto", job__name="other"), tmp_path, read)
    assert past is None


def test_auto_starts_anew_when_all_runs_are_finished(tmp_path: Path) -> None:
    write_run(tmp_path, "20260101-000000-aaaa", STARTED, ended("FINISHED"))
    assert found_name(tmp_path, "auto") is None


def test_auto_starts_anew_when_there_are_no_runs(tmp_path: Path) -> None:
    assert found_name(tmp_path, "auto") is None


def test_latest_never_starts_anew_when_all_runs_are_finished(tmp_path: Path) -> None:
    write_run(tmp_path, "20260101-000000-aaaa", STARTED, ended("FINISHED"))
    with pytest.raises(RestoreError, match=r"resume=latest.*job tiny.*1 finished.*leave resume"):
        found_name(tmp_path, "latest")


def test_latest_says_so_when_there_are_no_runs(tmp_path: Path) -> None:
    with pytest.raises(RestoreError, match=r"resume=latest.*no runs at all"):
        found_name(tmp_path, "latest")


def test_a_run_is_found_by_its_name(tmp_path: Path) -> None:
    write_run(tmp_path, "first", STARTED, ended("FINISHED"))
    write_run(tmp_path, "second", STARTED)
    assert found_name(tmp_path, "first") == "first"


def test_a_run_is_found_by_its_mlflow_id(tmp_path: Path) -> None:
    write_run(tmp_path, "first", STARTED, {"kind": "MlflowRun", "run_id": "0123abcd"})
    write_run(tmp_path, "second", STARTED, {"kind": "MlflowRun", "run_id": "4567cdef"})
    assert found_name(tmp_path, "0123abcd") == "first"


def test_an_unknown_run_is_told_with_the_newest_ones(tmp_path: Path) -> None:
    for day in range(1, 8):
        write_run(tmp_path, f"2026010{day}-000000-aaaa", STARTED)
    with pytest.raises(RestoreError) as caught:
        found_name(tmp_path, "frist")
    text = str(caught.value)
    assert "resume=frist" in text and "job tiny" in text
    # Five of seven, the newest first.
    names = ", ".join(f"2026010{day}-000000-aaaa" for day in (7, 6, 5, 4, 3))
    assert text.endswith(names)


def test_an_unknown_run_is_told_when_there_are_none(tmp_path: Path) -> None:
    with pytest.raises(RestoreError, match=r"resume=first.*none"):
        found_name(tmp_path, "first")


def test_a_journal_that_cannot_be_read_stands_in_nobodys_way_but_its_own(tmp_path: Path) -> None:
    paths = write_run(tmp_path, "first", STARTED)
    paths.root.with_name("foreign").joinpath("journal.jsonl").mkdir(parents=True)
    past = find_run(tiny_config(resume="first"), tmp_path, read)
    assert past is not None and past.name == "first"
    # It may be the newest one: another is not taken for it.
    for resume in ("foreign", "latest", "auto"):
        with pytest.raises(StorageError, match="foreign"):
            find_run(tiny_config(resume=resume), tmp_path, read)


def test_it_is_said_which_unfinished_run_was_chosen(tmp_path: Path) -> None:
    write_run(tmp_path, "20260101-000000-aaaa", STARTED)
    write_run(tmp_path, "20260102-000000-aaaa", STARTED, block(0, 1200), ended("KILLED"))
    past = find_run(tiny_config(resume="latest"), tmp_path, read)
    assert past is not None
    assert past.notice == (
        "resume=latest: 20260102-000000-aaaa (KILLED, 1,200 steps), the newest of 2 unfinished runs"
    )


@pytest.mark.parametrize("resume", ["first", "0123abcd"])
def test_a_run_of_another_job_is_named_with_its_job(resume: str, tmp_path: Path) -> None:
    write_run(tmp_path, "first", STARTED, {"kind": "MlflowRun", "run_id": "0123abcd"})
    config = tiny_config(resume=resume, job__name="other")
    with pytest.raises(RestoreError, match=rf"resume={resume} is a run of job tiny, not of other"):
        find_run(config, tmp_path, read)


@pytest.mark.parametrize("resume", ["first", "latest", "auto"])
def test_a_run_of_a_newer_format_is_refused_by_name(resume: str, tmp_path: Path) -> None:
    write_run(tmp_path, "first", {**STARTED, "format": FORMAT + 1})
    with pytest.raises(RestoreError, match=r"run first was recorded in format 2.*up to 1"):
        found_name(tmp_path, resume)


def test_a_run_that_finished_before_it_was_held_is_not_trained_again(tmp_path: Path) -> None:
    paths = write_run(tmp_path, "first", STARTED)
    config = tiny_config(resume="auto")
    past = find_run(config, tmp_path, read)
    assert past is not None
    journal = Journal(paths.journal)
    journal.append(ended("FINISHED"))
    with pytest.raises(RestoreError, match=r"resume=auto: the run first has finished meanwhile"):
        look_again(past, config, read)
    # Who names a finished run means it.
    assert look_again(past, tiny_config(resume="first"), read).status == "FINISHED"


# Overrides of a run that is resumed.


def test_a_runs_overrides_are_read_without_those_of_one_start(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    lines = ["job=mnist", "train.epochs=3", "run_name=a", "resume=latest", "++resume_allow=[x]"]
    paths.overrides.write_text("\n".join(lines) + "\n")
    assert read_overrides(paths) == ["job=mnist", "train.epochs=3"]


def test_a_masked_override_is_not_given_back(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    paths.overrides.write_text("job=mnist\njob.args.api_key=***\n")
    assert read_overrides(paths) == ["job=mnist"]


def test_a_run_without_a_file_of_overrides_had_none(tmp_path: Path) -> None:
    assert read_overrides(RunPaths(tmp_path)) == []


MIRRORED = ["strategy=mirrored"]


@pytest.mark.parametrize(
    ("before", "given", "merged"),
    [
        (["job=mnist", "train.epochs=3"], [], ["job=mnist", "train.epochs=3"]),
        ([], ["job=mnist"], ["job=mnist"]),
        (["job=mnist", "train.epochs=3"], ["job=mnist"], ["train.epochs=3", "job=mnist"]),
        (
            ["train.epochs=3", "train.seed=1"],
            ["train.epochs=5"],
            ["train.seed=1", "train.epochs=5"],
        ),
        (["job.args.x=1"], ["++job.args.x=2"], ["++job.args.x=2"]),
        (["job.args.x=1"], ["~job.args.x"], ["~job.args.x"]),
        (["train.epochs=3"], ["train.epoch=5"], ["train.epochs=3", "train.epoch=5"]),
        # Another choice in a group takes what was said about the earlier one with it.
        (["strategy=multi_worker", "strategy.num_workers=2"], ["strategy=mirrored"], MIRRORED),
        (["strategy.num_workers=2"], ["strategy=mirrored"], MIRRORED),
        (
            ["strategy=mirrored", "strategy.devices_per_worker=2"],
            ["strategy=mirrored"],
            ["strategy.devices_per_worker=2", "strategy=mirrored"],
        ),
    ],
)
def test_an_override_given_on_resume_replaces_the_one_of_before(
    before: list[str], given: list[str], merged: list[str]
) -> None:
    assert merge_overrides(before, given) == merged


# What may change.


def past_of(folder: Path, last_step: int = 8, **changes: Any) -> Past:
    """Return a run of `tiny_config(**changes)` that has made `last_step` of its steps."""
    params = flatten(tiny_config(**changes))
    started = {**STARTED, "facts": {"params": params}}
    return look_back(write_run(folder, "first", started, block(0, last_step)), read)


def compared(past: Past, folder: Path, **changes: Any) -> list[str]:
    plan = tiny_plan(folder, **changes)
    return compare_settings(past, plan, flatten(plan.config))


def test_a_change_that_was_allowed_is_how_the_run_goes_on(tmp_path: Path) -> None:
    starts = [
        {**STARTED, "facts": {"params": flatten(tiny_config(train__global_batch_size=size))}}
        for size in (16, 8)
    ]
    past = look_back(write_run(tmp_path, "first", *starts, block(0, 8)), read)
    told = compared(past, tmp_path, resume="first", train__global_batch_size=8)
    assert told == ["since the run was started: train.global_batch_size=8 was 16"]
    with pytest.raises(RestoreError, match=r"train\.global_batch_size=16 was 8"):
        compared(past, tmp_path, resume="first", train__global_batch_size=16)


def test_a_run_continued_as_it_was_gives_no_notice(tmp_path: Path) -> None:
    assert compared(past_of(tmp_path), tmp_path, resume="first") == []


def test_what_belongs_to_one_start_is_no_change(tmp_path: Path) -> None:
    past = past_of(tmp_path, run_name="first", resume_allow=["train.seed"])
    assert compared(past, tmp_path, resume="latest") == []


SAME_RUN = [
    ("job.class_name", "jobs.other.Other"),
    ("train.global_batch_size", 24),
    ("train.seed", 1),
    ("data.num_examples", 95),
]


@pytest.mark.parametrize(("key", "value"), SAME_RUN)
def test_what_decides_which_examples_a_step_sees_may_not_change(
    key: str, value: object, tmp_path: Path
) -> None:
    before = flatten(tiny_config())[key]
    with pytest.raises(RestoreError) as caught:
        compared(past_of(tmp_path), tmp_path, **{key.replace(".", "__"): value})
    text = str(caught.value)
    assert f"{key}={value} was {before}" in text and f"resume_allow=[{key}]" in text, text


@pytest.mark.parametrize(("key", "value"), SAME_RUN)
def test_what_resume_allow_names_may_change_and_is_said(
    key: str, value: object, tmp_path: Path
) -> None:
    before = flatten(tiny_config())[key]
    changes = {key.replace(".", "__"): value, "resume_allow": [key]}
    notices = compared(past_of(tmp_path), tmp_path, **changes)
    assert notices == [f"since the run was started: {key}={value} was {before}"]


def test_all_refused_changes_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(RestoreError) as caught:
        compared(past_of(tmp_path), tmp_path, train__seed=1, train__global_batch_size=24)
    allowed = re.search(r"resume_allow=\[(.*)\]", str(caught.value))
    assert allowed is not None
    assert set(allowed[1].split(",")) == {"train.seed", "train.global_batch_size"}


def test_resume_allow_does_not_let_other_keys_pass(tmp_path: Path) -> None:
    changes = {"train__seed": 1, "data__num_examples": 95, "resume_allow": ["train.seed"]}
    with pytest.raises(RestoreError, match=r"resume_allow=\[data.num_examples\]"):
        compared(past_of(tmp_path), tmp_path, **changes)


def test_other_changes_are_said_and_stop_nothing(tmp_path: Path) -> None:
    changes = {"train__steps": 20, "optimizer__learning_rate": 0.2}
    assert set(compared(past_of(tmp_path), tmp_path, **changes)) == {
        "since the run was started: train.steps=20 was 12",
        "since the run was started: optimizer.learning_rate=0.2 was 0.1",
    }


def test_a_plan_that_ends_before_the_steps_made_is_refused_with_both(tmp_path: Path) -> None:
    with pytest.raises(RestoreError, match=r"made 1,200 steps.*ends at 1,100.*train\.steps"):
        compared(past_of(tmp_path, last_step=1200), tmp_path, train__steps=1100)


def test_a_plan_that_ends_at_the_steps_made_is_not_refused(tmp_path: Path) -> None:
    assert compared(past_of(tmp_path, last_step=12), tmp_path) == []
