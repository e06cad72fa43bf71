"""The supervisor: attempts, their failures and stories, budgets, stops."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path

import pytest

from orchestrator.control.supervisor import Interrupted
from orchestrator.errors import (
    BudgetSpent,
    ClusterError,
    ExportError,
    JobError,
    OrchestratorError,
    RestoreError,
    StartFailed,
    StorageError,
)
from orchestrator.spec.messages import Cause, Failed, Outcome, Phase, Request
from tests.control.desk import WELL, Desk
from tests.control.scripted import (
    Line,
    Script,
    Silence,
    beacon,
    block,
    death,
    draining,
    ended,
    failed,
    ready,
    saved,
)


def test_a_run_ends_when_every_worker_has_ended(tmp_path: Path) -> None:
    desk = Desk(tmp_path, [[ready(0), ready(1)], block(), ended(1), ended(0)], workers=2)
    assert desk.run() is Outcome.completed
    assert desk.group.starts == [(desk.plan, 1, None)]
    assert desk.began == [(1, None)]


def test_every_message_is_observed_in_the_order_it_came(tmp_path: Path) -> None:
    desk = Desk(tmp_path, [ready(), [block(), saved(4)], ended()])
    desk.run()
    kinds = [type(message).__name__ for message in desk.told]
    assert kinds == ["Ready", "BlockDone", "Saved", "Ended"]


def test_the_export_is_proven_once_after_everyone_has_ended(tmp_path: Path) -> None:
    before_the_last: list[str] = []
    script: list[Line] = [
        [ready(0), ready(1)],
        ended(0),
        lambda: before_the_last.extend(desk.group.calls),
        ended(1),
    ]
    desk = Desk(tmp_path, script, workers=2)
    desk.run()
    assert before_the_last == ["start 1 from None"]
    assert desk.group.calls == ["start 1 from None", "kill", "prove_export", "kill"]


def test_a_proof_that_was_killed_is_made_again(tmp_path: Path) -> None:
    desk = Desk(tmp_path, WELL)
    desk.group.proofs = ["killed"]
    assert desk.run() is Outcome.completed
    assert desk.group.calls.count("prove_export") == 2 and len(desk.group.starts) == 1


def test_a_proof_that_is_killed_each_time_is_left_to_who_looks_for_it(tmp_path: Path) -> None:
    desk = Desk(tmp_path, WELL)
    desk.group.proofs = ["killed"] * 9
    assert desk.run() is Outcome.completed
    assert desk.group.calls.count("prove_export") == 2


def test_an_agent_that_is_lost_with_the_proof_costs_an_attempt_and_not_the_run(
    tmp_path: Path,
) -> None:
    last: list[Line] = [[ready(), block(), saved(8)], ended()]
    desk = Desk(tmp_path, last, [ready(0, 8), ended()])
    desk.group.proofs = [StartFailed("worker 0: its agent is gone")]
    assert desk.run() is Outcome.completed
    assert [start[2] for start in desk.group.starts] == [None, "step-8"]
    assert desk.group.calls.count("prove_export") == 2
    assert any("its agent is gone" in m.error for m in desk.told if isinstance(m, Failed))


def test_a_run_without_export_proves_none(tmp_path: Path) -> None:
    desk = Desk(tmp_path, WELL, export__enabled=False)
    desk.run()
    assert desk.group.calls == ["start 1 from None", "kill"]


def test_a_dead_worker_ends_the_group_which_restarts_from_the_newest_checkpoint(
    tmp_path: Path,
) -> None:
    first: list[Line] = [[ready(0), ready(1)], block(), saved(4), saved(8), death(1)]
    second: list[Line] = [[ready(0, 8), ready(1, 8)], [ended(0), ended(1)]]
    desk = Desk(tmp_path, first, second, workers=2)
    assert desk.run() is Outcome.completed
    assert desk.group.calls == [
        "start 1 from None",
        "kill",
        "start 2 from step-8",
        "kill",
        "prove_export",
        "kill",
    ]
    assert desk.began == [(1, None), (2, "step-8")]


def test_a_restart_is_told_with_its_budget_and_its_step(tmp_path: Path) -> None:
    desk = Desk(tmp_path, [ready(), block(), saved(1200), death()], WELL, recovery__max_restarts=3)
    desk.run()
    assert desk.notices == ["retry 1 of 3 from step 1,200"]


def test_attempts_of_a_resumed_run_are_numbered_on(tmp_path: Path) -> None:
    desk = Desk(tmp_path, [ready(), death()], WELL, first_attempt=4, checkpoint=saved(8))
    desk.run()
    assert desk.began == [(4, "step-8"), (5, "step-8")]


def test_every_new_checkpoint_gives_the_whole_budget_back(tmp_path: Path) -> None:
    scripts = [[ready(), block(), saved(step), death()] for step in (2, 4, 6, 8)]
    desk = Desk(tmp_path, *scripts, WELL, recovery__max_restarts=1)
    assert desk.run() is Outcome.completed
    assert desk.notices[-1] == "retry 1 of 1 from step 8"


def test_a_start_that_fails_is_tried_again(tmp_path: Path) -> None:
    desk = Desk(tmp_path, StartFailed("no process"), WELL)
    assert desk.run() is Outcome.completed
    assert desk.group.calls[:3] == ["start 1 from None", "kill", "start 2 from None"]


@pytest.mark.parametrize(
    "script",
    [
        pytest.param([ready(), death()], id="a worker dies"),
        pytest.param([ready(), failed()], id="a worker fails"),
        pytest.param([ready(), block(), Silence(11.0)], id="a worker is silent"),
        pytest.param(StartFailed("no process"), id="a process does not start"),
        pytest.param(ClusterError("no node"), id="a node is missing"),
        pytest.param(RuntimeError("a bug"), id="start breaks"),
        pytest.param([ended()], id="all ends well"),
    ],
)
def test_the_group_is_killed_however_an_attempt_ends(tmp_path: Path, script: Script) -> None:
    desk = Desk(tmp_path, script, recovery__max_restarts=0, export__enabled=False)
    with contextlib.suppress(OrchestratorError, RuntimeError):
        desk.run()
    assert desk.group.calls[0] == "start 1 from None"
    assert desk.group.calls[-1] == "kill" and desk.group.calls.count("kill") == 1


def test_the_staging_folder_of_a_dead_attempt_is_gone_before_the_next_begins(
    tmp_path: Path,
) -> None:
    left: list[list[Path]] = []
    desk = Desk(
        tmp_path,
        [ready(), death()],
        [lambda: left.append(list(desk.plan.paths.checkpoints_dir.iterdir())), *WELL],
    )
    staging = desk.plan.paths.staging_dir(1)
    staging.mkdir(parents=True)
    (staging / "half.data").write_bytes(b"half")
    desk.run()
    assert [path.name for path in left[0]] == [".attempt-2"]


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param([failed(0, Cause.collateral), death(1)], id="a poll later"),
        pytest.param([death(1), failed(0, Cause.collateral)], id="a poll earlier"),
        pytest.param([[failed(0, Cause.collateral), death(1)]], id="in the same poll"),
        pytest.param([[death(1), failed(0, Cause.collateral)]], id="in the same poll before"),
    ],
)
def test_a_death_is_told_and_not_what_its_peers_suffered(tmp_path: Path, lines: list[Line]) -> None:
    script = [[ready(0), ready(1)], block(), *lines]
    desk = Desk(tmp_path, script, workers=2, recovery__max_restarts=0)
    story = desk.story(BudgetSpent)
    assert story.startswith("worker 1 on host-1 failed")
    assert story.index("death of worker 1") < story.index("also: worker 0: collateral error")


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param([death(0), failed(1)], id="a poll later"),
        pytest.param([failed(1), death(0)], id="a poll earlier"),
        pytest.param([[death(0), failed(1)]], id="in the same poll"),
        pytest.param([failed(0, Cause.collateral), failed(1)], id="after collateral"),
    ],
)
def test_a_job_error_is_told_and_not_the_death_it_brought(
    tmp_path: Path, lines: list[Line]
) -> None:
    desk = Desk(tmp_path, [[ready(0), ready(1)], *lines], workers=2)
    story = desk.story(JobError)
    assert story.startswith("worker 1 on host-1 failed")
    told, _, rest = story.partition("also: ")
    assert "job error of worker 1" in told
    assert "worker 0" not in told and "job error" not in rest


def test_of_two_deaths_the_earlier_is_told(tmp_path: Path) -> None:
    deaths = [death(0, time=5.0), death(1, time=4.0)]
    desk = Desk(tmp_path, [*deaths], workers=2, recovery__max_restarts=0)
    assert "death of worker 1" in desk.story()


def test_what_is_heard_after_the_first_failure_is_observed_too(tmp_path: Path) -> None:
    script: list[Line] = [death(0), [failed(1, Cause.collateral)]]
    desk = Desk(tmp_path, script, workers=2, recovery__max_restarts=0)
    desk.story()
    assert [type(message).__name__ for message in desk.told] == ["Death", "Failed"]


def test_the_users_own_line_comes_before_the_error(tmp_path: Path) -> None:
    frame = "jobs/mnist.py:30 in loss: return batch['label']"
    desk = Desk(tmp_path, [ready(), failed(user_frame=frame, error="KeyError: 'label'")])
    first, second, third, *_ = desk.story(JobError).splitlines()
    assert first == "worker 0 on host-0 failed at step 4 while stepping"
    assert second.strip() == frame
    assert third.strip() == "KeyError: 'label'"


def test_the_log_of_the_worker_and_attempt_that_failed_is_named(tmp_path: Path) -> None:
    desk = Desk(tmp_path, [ready(1), failed(1)], workers=2, first_attempt=3)
    log = desk.plan.paths.worker_log(3, 1)
    assert f"log: {log}" in desk.story(JobError).splitlines()


def test_the_last_lines_of_a_dead_workers_log_are_told(tmp_path: Path) -> None:
    script: list[Line] = [ready(), death(log_tail="loading\nout of memory")]
    desk = Desk(tmp_path, script, recovery__max_restarts=0)
    assert "  | loading\n  | out of memory\n" in desk.story()


def test_a_start_that_fails_for_good_is_told_without_a_log(tmp_path: Path) -> None:
    desk = Desk(tmp_path, StartFailed("no process"), recovery__max_restarts=0)
    budget = "0 restarts (recovery.max_start_restarts) brought no new checkpoint"
    assert desk.story(StartFailed) == f"no process\n{budget}"


def test_a_job_error_before_the_first_step_is_not_retried(tmp_path: Path) -> None:
    desk = Desk(tmp_path, [ready(), failed(phase=Phase.tracing)], recovery__max_restarts=9)
    assert "before its first step" in desk.story(JobError)
    assert len(desk.group.starts) == 1


def test_a_job_error_that_comes_again_at_the_same_step_ends_the_run(tmp_path: Path) -> None:
    script: list[Line] = [ready(), block(), failed()]
    desk = Desk(tmp_path, script, script, recovery__max_restarts=9)
    assert "twice in the same way at the same step" in desk.story(JobError)
    assert len(desk.group.starts) == 2


@pytest.mark.parametrize(
    ("script", "error"),
    [
        pytest.param([failed(cause=Cause.job)], JobError, id="job"),
        pytest.param([failed(cause=Cause.restore)], RestoreError, id="restore"),
        pytest.param([failed(cause=Cause.storage)], StorageError, id="storage"),
        pytest.param([failed(cause=Cause.export)], ExportError, id="export"),
        pytest.param([failed(cause=Cause.start)], StartFailed, id="start"),
        pytest.param([death()], StartFailed, id="death before a step"),
        pytest.param([block(), death()], BudgetSpent, id="death after a step"),
        pytest.param(StartFailed("no process"), StartFailed, id="start raises StartFailed"),
        pytest.param(ClusterError("no node"), ClusterError, id="start raises ClusterError"),
    ],
)
def test_a_run_that_is_given_up_raises_the_error_of_its_cause(
    tmp_path: Path, script: Script, error: type[OrchestratorError]
) -> None:
    Desk(tmp_path, script, recovery__max_restarts=0).story(error)


def test_what_the_group_does_not_expect_itself_is_not_swallowed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        Desk(tmp_path, RuntimeError("a bug")).run()


def test_a_stop_asks_the_workers_once_to_save_and_stop(tmp_path: Path) -> None:
    desk = Desk(
        tmp_path,
        [ready(), lambda: desk.stop(), block(), saved(4), ended(outcome=Outcome.stopped)],
    )
    assert desk.run() is Outcome.stopped
    assert desk.group.requests == [Request.SAVE_AND_STOP]


def test_an_export_that_was_stopped_before_is_not_proven(tmp_path: Path) -> None:
    desk = Desk(tmp_path, [ready(), lambda: desk.stop(), ended(outcome=Outcome.stopped)])
    desk.run()
    assert "prove_export" not in desk.group.calls


def test_a_run_is_stopped_when_any_of_its_workers_was(tmp_path: Path) -> None:
    last = [ended(0, Outcome.completed), ended(1, Outcome.stopped)]
    desk = Desk(tmp_path, [ready(), lambda: desk.stop(), last], workers=2)
    assert desk.run() is Outcome.stopped


def test_a_stop_before_any_worker_is_ready_ends_the_run_at_once(tmp_path: Path) -> None:
    desk = Desk(tmp_path, [beacon(phase=Phase.building), lambda: desk.stop()])
    assert desk.run() is Outcome.stopped
    assert desk.group.calls == ["start 1 from None", "kill"]


def test_a_second_stop_ends_everything_at_once(tmp_path: Path) -> None:
    desk = Desk(tmp_path, [ready(), lambda: desk.stop(), block(), lambda: desk.stop()])
    with pytest.raises(Interrupted):
        desk.run()
    assert desk.group.calls == ["start 1 from None", "request save_and_stop", "kill"]


def test_a_worker_that_dies_while_stopping_is_not_started_again(tmp_path: Path) -> None:
    # What ends a host ends driver and workers in any order: the run is stopped, not broken.
    desk = Desk(tmp_path, [ready(), block(), lambda: desk.stop(), death()])
    assert desk.run() is Outcome.stopped
    assert "it failed while stopping; the newest checkpoint is" in desk.notices[-1]
    assert len(desk.group.starts) == 1


def test_a_budget_is_not_asked_for_when_nobody_wants_to_go_on(tmp_path: Path) -> None:
    events = [ready(), block(), lambda: desk.stop(), death()]
    desk = Desk(tmp_path, events, recovery__max_restarts=0)
    assert desk.run() is Outcome.stopped
    assert len(desk.group.starts) == 1


def test_a_job_that_fails_while_stopping_has_failed(tmp_path: Path) -> None:
    desk = Desk(tmp_path, [ready(), block(), lambda: desk.stop(), failed()])
    assert "it failed while stopping" in desk.story(JobError)


def test_a_stop_while_exporting_leaves_the_export_to_the_next_start(tmp_path: Path) -> None:
    exporting = beacon(phase=Phase.exporting, step=12)
    desk = Desk(tmp_path, [ready(), block(0, 0, 12), saved(12), exporting, lambda: desk.stop()])
    assert desk.run() is Outcome.stopped
    assert desk.group.calls == ["start 1 from None", "kill"]


def test_a_stop_that_comes_with_the_last_word_does_not_wait_for_the_proof(tmp_path: Path) -> None:
    desk = Desk(tmp_path, [ready(), lambda: desk.stop(), ended(outcome=Outcome.completed)])
    assert desk.run() is Outcome.stopped
    assert "prove_export" not in desk.group.calls


@pytest.mark.parametrize(("cause", "error"), [(Cause.storage, StorageError), (Cause.job, JobError)])
def test_a_failure_while_stopping_is_told_as_what_it_is(
    cause: Cause, error: type[OrchestratorError], tmp_path: Path
) -> None:
    stops: list[Desk] = []
    script: list[Line] = [ready(), block(), lambda: stops[0].stop(), failed(cause=cause)]
    stops.append(Desk(tmp_path, script))
    stops[0].story(error)


def test_a_death_before_ready_is_told_at_the_step_the_attempt_began_at(tmp_path: Path) -> None:
    desk = Desk(tmp_path, [death()], checkpoint=saved(1200), recovery__max_restarts=0)
    assert "at step 1,200" in desk.story()


def test_a_late_beacon_does_not_take_a_step_back(tmp_path: Path) -> None:
    script: list[Line] = [ready(), block(0, 0, 8), beacon(0, step=0), death()]
    assert "at step 8" in Desk(tmp_path, script, recovery__max_restarts=0).story()


def test_a_group_that_did_not_start_is_on_record(tmp_path: Path) -> None:
    desk = Desk(tmp_path, StartFailed("no process"), WELL)
    assert desk.run() is Outcome.completed
    assert any(getattr(message, "error", "") == "no process" for message in desk.told)


def test_a_story_says_from_where_the_run_can_go_on(tmp_path: Path) -> None:
    script: list[Line] = [ready(), block(), saved(4), failed()]
    desk = Desk(tmp_path, script, recovery__max_restarts=0)
    assert desk.story(JobError).endswith(f"it can go on from step 4: resume={desk.plan.run}")


def test_the_end_of_the_log_is_told_with_a_jobs_own_error(tmp_path: Path) -> None:
    desk = Desk(tmp_path, [ready(), failed()], recovery__max_restarts=0)
    log = desk.plan.paths.worker_log(1, 0)
    log.parent.mkdir(parents=True)
    log.write_text("".join(f"line {number}\n" for number in range(9)))
    assert "  | line 5\n  | line 6\n  | line 7\n  | line 8\n" in desk.story(JobError)


def test_a_stop_while_a_node_is_left_ends_the_run(tmp_path: Path) -> None:
    lines: list[Line] = [ready(), block(), draining(), lambda: desk.stop()]
    desk = Desk(tmp_path, [*lines, ended(0, Outcome.stopped)])
    assert desk.run() is Outcome.stopped
    assert len(desk.group.starts) == 1


def test_of_many_other_failures_a_few_are_told_and_the_rest_is_counted(tmp_path: Path) -> None:
    others = [failed(worker, Cause.collateral, error=f"error {worker}") for worker in range(1, 6)]
    alike = [failed(worker, Cause.collateral, error="lost") for worker in range(6, 9)]
    script: list[Line] = [[death(0), *alike, *others]]
    desk = Desk(tmp_path, script, workers=9, recovery__max_restarts=0, train__global_batch_size=32)
    lines = [line for line in desk.story().splitlines() if line.startswith("also: ")]
    assert lines == [
        "also: 3 workers: lost",
        "also: worker 1: error 1",
        "also: worker 2: error 2",
        "also: and 3 more",
    ]


def test_a_lost_node_is_told_and_not_the_processes_that_died_of_it(tmp_path: Path) -> None:
    lines = [death(0, time=1.0), death(1, time=2.0, cause=Cause.node, error="its node is gone")]
    desk = Desk(tmp_path, [lines], workers=2, recovery__max_node_restarts=0)
    assert desk.story().splitlines()[1].strip() == "its node is gone"


def test_the_groups_name_for_a_host_is_the_one_that_is_told(tmp_path: Path) -> None:
    desk = Desk(tmp_path, [ready(), death()], recovery__max_restarts=0)
    desk.group.places = {0: "vm (10.0.0.1)"}
    assert desk.story().startswith("worker 0 on vm (10.0.0.1) failed")


# What follows a failure: pauses, budgets, records.


def test_every_failure_is_on_record_with_what_was_decided(tmp_path: Path) -> None:
    desk = Desk(tmp_path, [ready(), block(), death()], [ready(), death()])
    desk.story()
    kinds = [record for record in desk.records if record["kind"] == "Decided"]
    assert [(r["attempt"], r["cause"], r["decision"]) for r in kinds] == [
        (1, "worker", "retry"),
        (2, "worker", "give up"),
    ]
    assert (kinds[0]["number"], kinds[0]["limit"], kinds[0]["num_workers"]) == (1, 1, 1)
    assert "recovery.max_restarts" in kinds[1]["reason"]


def test_the_first_retry_does_not_wait_and_the_others_wait_longer_and_longer(
    tmp_path: Path,
) -> None:
    began: list[float] = []
    errors = [StartFailed("no process")] * 4
    desk = Desk(tmp_path, *errors, WELL, recovery__max_start_restarts=4)
    start = desk.group.start
    desk.group.start = lambda *args: (began.append(desk.group.now), start(*args))[1]  # type: ignore
    assert desk.run() is Outcome.completed
    pauses = [later - earlier for earlier, later in itertools.pairwise(began)]
    # Between half and all of 1, 2 and 4 s; a failed start is listened to for 1.5 s.
    heard_s = pauses[0]
    assert heard_s < 2.0
    for pause_s, most in zip(pauses[1:], (1.0, 2.0, 4.0), strict=True):
        assert most / 2 <= pause_s - heard_s <= most
    waits = [r["seconds"] for r in desk.records if r["kind"] == "Waiting"]
    assert waits == pytest.approx([pause_s - heard_s for pause_s in pauses[1:]], abs=1e-3)


def test_a_stop_ends_a_pause_at_once(tmp_path: Path) -> None:
    desk = Desk(
        tmp_path,
        *[StartFailed("no process")] * 2,
        recovery__max_start_restarts=9,
        recovery__backoff_s=50.0,
    )
    desk.group.on_sleep = lambda now: desk.stop() if now > 1010.0 else None
    assert desk.run() is Outcome.stopped
    assert desk.group.now < 1012.0
    assert len(desk.group.starts) == 2
