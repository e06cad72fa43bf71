"""The supervisor, played through on scripts and a clock that only polls move."""

from __future__ import annotations

import contextlib
import itertools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from orchestrator.control.supervisor import Interrupted, Supervisor
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
from orchestrator.spec.messages import Cause, Death, Failed, Message, Outcome, Phase, Request, Saved
from orchestrator.spec.plan import Host, RunPlan, make_plan
from orchestrator.spec.schema import StrategyName
from tests.control.scripted import (
    Line,
    Script,
    ScriptedGroup,
    Silence,
    beacon,
    block,
    death,
    draining,
    ended,
    failed,
    ready,
    saved,
    stacks,
)
from tests.plans import tiny_config

START_PATIENCE_S = 120.0
STEP_PATIENCE_S = 10.0
# An attempt of one worker from start to end.
WELL: list[Line] = [ready(), block(), ended()]


class Desk:
    """A supervisor with everything it is given, and what it told."""

    def __init__(
        self,
        folder: Path,
        *scripts: Script,
        workers: int = 1,
        first_attempt: int = 1,
        checkpoint: Saved | None = None,
        **changes: Any,
    ):
        """Make a desk.

        Args:
            folder: where the run folder is.
            scripts: what each attempt brings.
            workers: how many workers the plan has.
            first_attempt: later than 1 for a resumed run.
            checkpoint: one that is there from the beginning.
            changes: of the configuration, as `tiny_plan` takes them.
        """
        if workers > 1:
            changes["strategy__name"] = StrategyName.multi_worker
            changes["strategy__num_workers"] = workers
        if "recovery__max_restarts" in changes:
            changes.setdefault("recovery__max_start_restarts", changes["recovery__max_restarts"])
        self.config = tiny_config(
            recovery__start_patience_s=START_PATIENCE_S,
            recovery__step_patience_s=STEP_PATIENCE_S,
            **changes,
        )
        self.folder = folder
        self.plan = self.replan(workers)
        self.group = ScriptedGroup(*scripts)
        self.told: list[Message] = []
        self.began: list[tuple[int, str | None]] = []
        self.records: list[Mapping[str, Any]] = []
        self.notices: list[str] = []
        self._checkpoint = checkpoint
        self.supervisor = Supervisor(
            self.group,
            self.plan,
            observe=self.told.append,
            began=lambda attempt, path, num_workers: self.began.append((attempt, path)),
            notice=self.notices.append,
            newest_checkpoint=self.newest_checkpoint,
            journal=self.records.append,
            replan=self.replan,
            first_attempt=first_attempt,
            clock=self.group.clock,
            sleep=self.group.sleep,
        )

    def replan(self, num_workers: int) -> RunPlan:
        return make_plan(
            self.config,
            run="20260101-000000-abcd",
            host=Host(num_cpus=2, num_gpus=0),
            cwd=self.folder,
            num_workers=num_workers,
        )

    def newest_checkpoint(self) -> tuple[int, str] | None:
        told = [message for message in self.told if isinstance(message, Saved)]
        newest = told[-1] if told else self._checkpoint
        return None if newest is None else (newest.step, newest.path)

    def run(self) -> Outcome:
        return self.supervisor.run()

    def stop(self) -> None:
        self.supervisor.stop()

    def story(self, error: type[OrchestratorError] = OrchestratorError) -> str:
        """Run to a bitter end and return what the user reads; the error is of just this class."""
        with pytest.raises(error) as raised:
            self.run()
        assert error in (raised.type, OrchestratorError)
        return str(raised.value)


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


def test_a_first_block_that_compiles_for_minutes_is_not_waited_for(tmp_path: Path) -> None:
    tracing = beacon(phase=Phase.tracing)
    desk = Desk(tmp_path, [[ready(), tracing], lambda: desk.stop(), Silence(8.0), Silence(8.0)])
    assert desk.run() is Outcome.stopped
    assert desk.group.requests == [Request.SAVE_AND_STOP]


def test_a_block_that_is_long_is_waited_for_once_one_was_made(tmp_path: Path) -> None:
    told = [ready(), beacon(phase=Phase.tracing), block()]
    slow: list[Line] = [Silence(8.0), block(0, 4, 1), Silence(8.0), block(0, 5, 1), Silence(8.0)]
    desk = Desk(tmp_path, [told, lambda: desk.stop(), *slow, ended(outcome=Outcome.stopped)])
    assert desk.run() is Outcome.stopped
    assert desk.group.now > 1000.0 + 24


def test_silence_beyond_patience_is_the_death_of_the_worker_that_is_behind(
    tmp_path: Path,
) -> None:
    script: list[Line] = [
        [ready(0), ready(1)],
        [block(0, 0, 4), block(1, 0, 3)],
        Silence(STEP_PATIENCE_S + 1),
    ]
    desk = Desk(tmp_path, script, workers=2, recovery__max_restarts=0)
    story = desk.story(BudgetSpent)
    assert story.startswith("worker 1 on host-1 failed at step 3 while stepping")
    assert "it is stuck on host-1 while stepping after step 3, since " in story
    assert "it has told nothing for 11 s" in story


def test_a_worker_that_waits_for_one_that_makes_progress_is_not_blamed(tmp_path: Path) -> None:
    moving: list[Line] = [
        line for step in range(1, 5) for line in (Silence(6.0), block(0, step, 1))
    ]
    script: list[Line] = [[block(0, 0, 1), block(1, 0, 8)], *moving, [ended(0), ended(1)]]
    desk = Desk(tmp_path, script, workers=2, recovery__max_restarts=0)
    assert desk.run() is Outcome.completed


def test_stacks_are_asked_for_before_a_stalled_group_is_killed(tmp_path: Path) -> None:
    desk = Desk(tmp_path, [block(), Silence(STEP_PATIENCE_S + 1)], recovery__max_restarts=0)
    desk.story()
    assert desk.group.calls == ["start 1 from None", "request stacks", "kill"]


def test_the_stacks_of_a_stalled_worker_are_told(tmp_path: Path) -> None:
    dump = 'Current thread 0x01 (most recent call first):\n  File "mine.py", line 3 in source\n'
    script: list[Line] = [block(), Silence(STEP_PATIENCE_S - 0.5), stacks(0, dump)]
    desk = Desk(tmp_path, script, recovery__max_restarts=0)
    story = desk.story()
    assert "at mine.py:3 in source" in story
    assert "  | mine.py:3 in source\n  | Python stacks of all workers: " in story


def test_a_stall_is_on_record_as_a_death(tmp_path: Path) -> None:
    desk = Desk(tmp_path, [block(), Silence(STEP_PATIENCE_S + 1)], WELL)
    desk.run()
    [stall] = [message for message in desk.told if isinstance(message, Death)]
    assert (stall.worker, stall.attempt, stall.exit_status) == (0, 1, None)


def test_a_death_heard_while_stacks_are_written_is_told_instead_of_the_stall(
    tmp_path: Path,
) -> None:
    script: list[Line] = [block(), Silence(STEP_PATIENCE_S - 0.5), death()]
    desk = Desk(tmp_path, script, recovery__max_restarts=0)
    assert "death of worker 0" in desk.story()
    assert [message.error for message in desk.told if isinstance(message, Death)] == [
        "death of worker 0"
    ]


def test_before_the_first_step_patience_is_long(tmp_path: Path) -> None:
    long: list[Line] = [beacon(phase=Phase.tracing), Silence(START_PATIENCE_S - 1)]
    assert Desk(tmp_path, [ready(), *long, block(), ended()]).run() is Outcome.completed


def test_the_long_patience_ends_too(tmp_path: Path) -> None:
    script: list[Line] = [beacon(phase=Phase.building), Silence(START_PATIENCE_S + 2)]
    desk = Desk(tmp_path, script, recovery__max_restarts=0)
    assert "stuck while building, since " in desk.story(StartFailed)


def test_a_worker_that_never_says_a_word_is_given_the_limit_of_the_start(tmp_path: Path) -> None:
    desk = Desk(tmp_path, [Silence(40.0)], recovery__max_restarts=0, cluster__start_timeout_s=30.0)
    before = desk.group.now
    assert "stuck while starting" in desk.story(StartFailed)
    assert desk.group.now - before < 30.0 + 2.0 + 1.0  # and the others' story


def test_after_the_first_step_patience_is_short(tmp_path: Path) -> None:
    quiet: list[Line] = [block(), Silence(STEP_PATIENCE_S - 1), block(0, 4), ended()]
    assert Desk(tmp_path, quiet).run() is Outcome.completed
    stalled = Desk(tmp_path, [block(), Silence(STEP_PATIENCE_S + 1)], recovery__max_restarts=0)
    assert "stuck while stepping after step 4" in stalled.story(BudgetSpent)


def test_after_a_restart_patience_is_long_again(tmp_path: Path) -> None:
    traced: list[Line] = [beacon(phase=Phase.tracing), Silence(START_PATIENCE_S - 1)]
    desk = Desk(tmp_path, [ready(), block(), death()], [ready(), *traced, block(), ended()])
    assert desk.run() is Outcome.completed


def test_a_worker_that_has_ended_is_not_blamed_for_the_others(tmp_path: Path) -> None:
    script: list[Line] = [
        [ready(0), ready(1), block(0), block(1), ended(1)],
        *[line for n in range(3) for line in (Silence(STEP_PATIENCE_S - 2), block(0, 4 + n))],
        ended(0),
    ]
    assert Desk(tmp_path, script, workers=2, recovery__max_restarts=0).run() is Outcome.completed


def test_a_worker_that_speaks_while_stacks_are_dumped_goes_on(tmp_path: Path) -> None:
    script: list[Line] = [ready(), block(), Silence(STEP_PATIENCE_S - 0.5), block(0, 4), ended()]
    desk = Desk(tmp_path, script, recovery__max_restarts=0)
    assert desk.run() is Outcome.completed
    assert desk.group.requests == [Request.STACKS]


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


# Elastic runs: room for three workers, at least two.


def elastic(
    folder: Path, *scripts: Script, room: Callable[[float], Mapping[str, int]], **changes: Any
) -> Desk:
    desk = Desk(folder, *scripts, workers=3, strategy__min_workers=2, **changes)
    desk.group.room = room
    return desk


def hosts(count: int) -> dict[str, int]:
    return {f"host-{index}": 1 for index in range(count)}


def all_ready(count: int) -> list[Message]:
    return [ready(worker) for worker in range(count)]


def all_ended(count: int, outcome: Outcome = Outcome.completed) -> list[Message]:
    return [ended(worker, outcome) for worker in range(count)]


def sizes(desk: Desk) -> list[int]:
    return [plan.num_workers for plan, _, _ in desk.group.starts]


# An attempt of two workers that waits for what comes.
TWO: list[Line] = [all_ready(2), [block(0), block(1)]]
STOPPED: list[Line] = [all_ended(2, Outcome.stopped)]


def quiet(seconds: int) -> list[Line]:
    """Return workers that only step, for so many seconds."""
    return [line for _ in range(seconds) for line in ([block(0), block(1)], Silence(0.8))]


def test_a_lost_node_leaves_a_run_with_fewer_workers_and_the_same_batch(tmp_path: Path) -> None:
    room = hosts(3)

    def lose() -> None:
        del room["host-2"]

    first: list[Line] = [all_ready(3), block(), saved(4), lose, death(2, cause=Cause.node)]
    desk = elastic(tmp_path, first, [*TWO, all_ended(2)], room=lambda now: room)
    assert desk.run() is Outcome.completed
    assert sizes(desk) == [3, 2]
    assert [sum(plan.replica_batch_sizes) for plan, _, _ in desk.group.starts] == [16, 16]
    assert desk.notices == ["retry 1 of 1 from step 4 with 2 of 3 workers"]


def test_a_run_that_may_not_shrink_waits_for_its_node(tmp_path: Path) -> None:
    desk = Desk(
        tmp_path,
        [[ready(0), ready(1)], block(), saved(4), death(1, cause=Cause.node)],
        [[ready(0), ready(1)], [ended(0), ended(1)]],
        workers=2,
    )
    desk.group.room = lambda now: hosts(1 if now < 1100.0 else 2)
    assert desk.run() is Outcome.completed
    assert sizes(desk) == [2, 2]
    assert 1100.0 <= desk.group.now < 1103.0
    [wait] = [record for record in desk.records if record["kind"] == "Waiting"]
    assert wait["reason"] == "capacity" and 95.0 < wait["seconds"] < 100.0


def test_what_is_waited_for_is_said_now_and_again(tmp_path: Path) -> None:
    desk = elastic(tmp_path, [*TWO, all_ended(2)], room=lambda now: hosts(1 if now < 1065.0 else 2))
    assert desk.run() is Outcome.completed
    assert [note for note in desk.notices if note.startswith("waiting")] == [
        f"waiting for capacity since {since} s, at most 600 s (recovery.capacity_timeout_s): 2 "
        "worker(s) of 1 CPU each (strategy.min_workers) are needed, there is room for 1 on host-0"
        for since in (0, 30, 60)
    ]


def test_waiting_for_too_long_ends_the_run_as_the_clusters_fault(tmp_path: Path) -> None:
    first: list[Line] = [all_ready(3), block(), saved(4), death(2, cause=Cause.node)]
    desk = elastic(tmp_path, first, room=lambda now: hosts(3 if now < 1001.0 else 1))
    story = desk.story(ClusterError)
    assert "not within 600 s (recovery.capacity_timeout_s)" in story
    assert story.endswith(f"it can go on from step 4: resume={desk.plan.run}")
    assert 1600.0 <= desk.group.now < 1605.0


def test_a_stop_ends_the_waiting_at_once(tmp_path: Path) -> None:
    first: list[Line] = [all_ready(3), block(), saved(4), death(2, cause=Cause.node)]
    desk = elastic(tmp_path, first, room=lambda now: hosts(3 if now < 1001.0 else 1))
    desk.group.on_sleep = lambda now: desk.stop() if now > 1020.0 else None
    assert desk.run() is Outcome.stopped
    assert desk.group.now < 1021.0


def test_a_second_stop_ends_the_waiting_as_an_interruption(tmp_path: Path) -> None:
    desk = elastic(tmp_path, room=lambda now: {})
    desk.group.on_sleep = lambda now: (desk.stop(), desk.stop())
    with pytest.raises(Interrupted):
        desk.run()


def test_time_that_was_waited_is_on_record_however_the_waiting_ends(tmp_path: Path) -> None:
    desk = elastic(tmp_path, room=lambda now: {})
    desk.group.on_sleep = lambda now: (desk.stop(), desk.stop()) if now > 1007.0 else None
    with pytest.raises(Interrupted):
        desk.run()
    [wait] = [record for record in desk.records if record["kind"] == "Waiting"]
    assert wait["reason"] == "capacity" and 6.5 < wait["seconds"] < 8.0


class FullDisk(Desk):
    """A desk on whose disk no folder finds room: a file is where that of checkpoints would be."""

    def fill(self) -> None:
        shutil.rmtree(self.plan.paths.checkpoints_dir, ignore_errors=True)
        self.plan.paths.root.mkdir(parents=True, exist_ok=True)
        self.plan.paths.checkpoints_dir.write_bytes(b"")

    def newest_checkpoint(self) -> tuple[int, str] | None:
        """Fill the disk when the first attempt is over."""
        if any(isinstance(message, Death) for message in self.told):
            self.fill()
        return super().newest_checkpoint()


FAILING: list[Line] = [ready(), block(), saved(4), death()]


def test_a_disk_that_is_full_between_attempts_is_waited_for(tmp_path: Path) -> None:
    desk = FullDisk(tmp_path, FAILING, [ready(0, 4), ended()])
    desk.group.on_sleep = lambda now: (
        desk.plan.paths.checkpoints_dir.unlink(missing_ok=True) if now > 1040.0 else None
    )
    assert desk.run() is Outcome.completed
    [told] = [note for note in desk.notices if note.startswith("DEGRADED")]
    assert "cannot make the folder" in told and "recovery.capacity_timeout_s" in told
    [wait] = [record for record in desk.records if record["kind"] == "Waiting"]
    assert wait["reason"] == "storage" and 30.0 < wait["seconds"] < 42.0


def test_a_disk_that_stays_full_ends_the_run_as_the_storages_fault(tmp_path: Path) -> None:
    desk = FullDisk(tmp_path, FAILING)
    assert "cannot make the folder" in desk.story(StorageError)
    assert 600.0 < desk.group.now - 1000.0 < 610.0


def test_a_disk_that_is_full_at_the_start_is_told_at_once(tmp_path: Path) -> None:
    desk = FullDisk(tmp_path)
    desk.fill()
    assert "cannot make the folder" in desk.story(StorageError)
    assert desk.group.now == 1000.0


def test_an_elastic_run_begins_with_what_there_is(tmp_path: Path) -> None:
    desk = elastic(tmp_path, [*TWO, all_ended(2)], room=lambda now: hosts(2))
    assert desk.run() is Outcome.completed
    assert sizes(desk) == [2]
    assert desk.notices == [
        "there is room for 2 of 3 workers: training with 2 (strategy.min_workers=2)"
    ]


def test_any_other_run_begins_without_a_look_at_the_room(tmp_path: Path) -> None:
    desk = Desk(tmp_path, ClusterError("too small"), workers=2)
    desk.group.room = lambda now: {}
    assert desk.story(ClusterError) == "too small"


def test_a_smaller_attempt_saves_and_makes_way_once_there_is_room_for_a_while(
    tmp_path: Path,
) -> None:
    desk = elastic(
        tmp_path,
        [*TWO, *quiet(20), saved(8), *STOPPED],
        [all_ready(3), [block(0), block(1), block(2)], all_ended(3)],
        room=lambda now: hosts(2 if now < 1010.0 else 3),
        recovery__max_restarts=0,
    )
    assert desk.run() is Outcome.completed
    assert sizes(desk) == [2, 3]
    assert desk.group.requests == [Request.SAVE_AND_STOP]
    assert desk.began == [(1, None), (2, "step-8")]
    assert desk.notices[1] == (
        "there is room for 3 workers: saving, then going on with 3 instead of 2"
    )
    assert [r["num_workers"] for r in desk.records if r.get("decision") == "grow"] == [3]


def test_room_that_is_soon_gone_again_is_not_used(tmp_path: Path) -> None:
    desk = elastic(
        tmp_path,
        [*TWO, *quiet(30), all_ended(2)],
        # For 3 s out of every 10.
        room=lambda now: hosts(3 if now % 10.0 < 3.0 and now > 1001.0 else 2),
    )
    assert desk.run() is Outcome.completed
    assert desk.group.requests == []


def test_a_run_grows_when_the_new_host_is_ready(tmp_path: Path) -> None:
    when: list[float] = []
    desk = elastic(
        tmp_path,
        [*TWO, *quiet(40), *STOPPED],
        [all_ready(3), all_ended(3)],
        room=lambda now: hosts(2 if now < 1001.0 else 3),
    )
    desk.group.is_ready = lambda now: now > 1025.0
    notice = desk.notices.append
    desk.supervisor._notice = lambda text: (when.append(desk.group.now), notice(text))[1]  # type: ignore
    assert desk.run() is Outcome.completed
    assert 1025.0 < when[-1] < 1028.0


def test_a_stop_of_the_user_wins_over_growing(tmp_path: Path) -> None:
    desk = elastic(
        tmp_path,
        [*TWO, *quiet(20), lambda: desk.stop(), *STOPPED],
        room=lambda now: hosts(2 if now < 1005.0 else 3),
    )
    assert desk.run() is Outcome.stopped
    assert sizes(desk) == [2]


def test_a_run_that_completes_while_it_should_grow_is_complete(tmp_path: Path) -> None:
    desk = elastic(
        tmp_path,
        [*TWO, *quiet(20), all_ended(2)],
        room=lambda now: hosts(2 if now < 1005.0 else 3),
    )
    assert desk.run() is Outcome.completed
    assert desk.group.requests == [Request.SAVE_AND_STOP]


def test_a_stop_by_the_workers_own_clock_is_not_taken_for_growing(tmp_path: Path) -> None:
    desk = elastic(tmp_path, [*TWO, *quiet(3), *STOPPED], room=lambda now: hosts(2))
    assert desk.run() is Outcome.stopped


def test_a_failure_while_making_way_costs_a_restart_and_the_run_grows_with_it(
    tmp_path: Path,
) -> None:
    desk = elastic(
        tmp_path,
        [*TWO, *quiet(20), death(1)],
        [all_ready(3), all_ended(3)],
        room=lambda now: hosts(2 if now < 1005.0 else 3),
    )
    assert desk.run() is Outcome.completed
    assert sizes(desk) == [2, 3]
    assert desk.notices[-1] == "retry 1 of 1 from step 0"


def test_growing_costs_no_budget(tmp_path: Path) -> None:
    third: list[Line] = [all_ready(3), block(), death(2)]
    desk = elastic(
        tmp_path,
        [*TWO, *quiet(20), *STOPPED],
        third,
        [all_ready(3), all_ended(3)],
        room=lambda now: hosts(2 if now < 1005.0 else 3),
    )
    assert desk.run() is Outcome.completed
    assert desk.notices[-1] == "retry 1 of 1 from step 0"


def test_a_host_that_fails_twice_at_the_start_is_avoided_and_that_is_said(tmp_path: Path) -> None:
    error = StartFailed("no process")
    error.worker = 1
    desk = Desk(
        tmp_path,
        error,
        error,
        [[ready(0), ready(1)], [ended(0), ended(1)]],
        workers=2,
        recovery__max_start_restarts=3,
    )
    desk.group.room = lambda now: hosts(3)
    desk.group.places = {0: "host-0", 1: "host-1"}
    assert desk.run() is Outcome.completed
    assert desk.group.avoided == [frozenset(), frozenset(), frozenset({"host-1"})]
    assert "not on host-1: it failed twice in a row" in desk.notices[-1]


def test_a_node_that_goes_is_left_for_the_others_at_no_cost(tmp_path: Path) -> None:
    desk = Desk(
        tmp_path,
        [[ready(0), ready(1)], block(), draining(1), saved(4), all_ended(2, Outcome.stopped)],
        [[ready(0), ready(1)], all_ended(2)],
        workers=2,
        recovery__max_restarts=0,
        recovery__max_node_restarts=0,
    )
    desk.group.room = lambda now: hosts(3)
    assert desk.run() is Outcome.completed
    assert desk.group.requests == [Request.SAVE_AND_STOP]
    assert desk.began == [(1, None), (2, "step-4")]
    assert desk.notices == ["host-1 is to be left: saving, then going on elsewhere"]


def test_an_elastic_run_leaves_a_node_that_goes_with_fewer_workers(tmp_path: Path) -> None:
    first: list[Line] = [all_ready(3), block(), draining(2), saved(4)]
    desk = elastic(
        tmp_path,
        [*first, all_ended(3, Outcome.stopped)],
        [*TWO, all_ended(2)],
        room=lambda now: hosts(3 if now < 1000.3 else 2),
    )
    assert desk.run() is Outcome.completed
    assert sizes(desk) == [3, 2]


def test_a_run_that_can_go_nowhere_else_ends_saved_when_its_node_goes(tmp_path: Path) -> None:
    script: list[Line] = [[ready(0), ready(1)], block(), draining(1), saved(4)]
    desk = Desk(tmp_path, [*script, all_ended(2, Outcome.stopped)], workers=2)
    desk.group.room = lambda now: hosts(1)
    assert desk.run() is Outcome.stopped
    assert desk.notices[-1].startswith("there is no room elsewhere: 2 worker(s)")
    assert desk.group.now < 1005.0
