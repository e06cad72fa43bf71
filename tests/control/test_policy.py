"""The policy: which decision follows which failures and which room."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.control.policy import (
    Failure,
    GiveUp,
    Place,
    Retry,
    Room,
    Situation,
    Wait,
    Workers,
    avoided,
    decide,
    larger,
    place_workers,
)
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
from orchestrator.spec.messages import Cause, Phase
from orchestrator.spec.schema import RecoveryConfig

THREE = Room({"host-0": 1, "host-1": 1, "host-2": 1})


def failure(cause: Cause = Cause.worker, **changes: Any) -> Failure:
    """Return a failure at step 7 of a worker that made steps, without any checkpoint."""
    values: dict[str, Any] = {
        "attempt": 1,
        "worker": 0,
        "host": "",
        "error": "boom",
        "phase": Phase.stepping,
        "step": 7,
        "began_at": 0,
        "made_steps": True,
        "checkpoint_step": None,
    }
    return Failure(cause=cause, **(values | changes))


def config(**changes: Any) -> RecoveryConfig:
    """Return budgets of 2 for workers, 3 for starts, 4 for nodes and 5 for preemptions."""
    values: dict[str, Any] = {
        "max_restarts": 2,
        "max_start_restarts": 3,
        "max_node_restarts": 4,
        "max_preemptions": 5,
        "backoff_s": 1.0,
        "max_backoff_s": 60.0,
        "capacity_timeout_s": 600.0,
        "start_patience_s": 120.0,
        "step_patience_s": 120.0,
    }
    return RecoveryConfig(**(values | changes))


def decision(history: list[Failure], **changes: Any) -> Retry | Wait | GiveUp:
    """Decide for a run of one worker, for which there is room."""
    situation = Situation(Room({"host-0": 1}), Workers(1, 1), history)
    return decide(situation, config(**changes))


DEATH = failure()
START = failure(Cause.start, made_steps=False)
NODE = failure(Cause.node)
TAKEN = failure(Cause.preemption)
JOB = failure(Cause.job)


@pytest.mark.parametrize(
    ("history", "number", "limit"),
    [
        pytest.param([DEATH], 1, 2, id="a first death"),
        pytest.param([DEATH] * 2, 2, 2, id="a second death without a checkpoint"),
        pytest.param([START] * 3, 3, 3, id="a worker that did not start three times"),
        pytest.param([NODE] * 4, 4, 4, id="a node lost four times"),
        pytest.param([TAKEN] * 5, 5, 5, id="a node taken away five times"),
        pytest.param([DEATH, START, NODE, DEATH], 2, 2, id="each cause has a budget of its own"),
        pytest.param([failure(Cause.collateral)], 1, 2, id="collateral of nobody knows what"),
        pytest.param([JOB], 1, 2, id="a first job error after a step"),
        pytest.param([JOB, failure(Cause.job, error="crash")], 2, 2, id="another job error there"),
        pytest.param([DEATH, JOB], 2, 2, id="a job error where a worker died"),
        pytest.param(
            [DEATH, DEATH, failure(checkpoint_step=4)], 1, 2, id="a death after a checkpoint"
        ),
        pytest.param(
            [DEATH, failure(checkpoint_step=4), failure(checkpoint_step=8)],
            1,
            2,
            id="a death after a newer checkpoint",
        ),
        pytest.param(
            [DEATH, failure(checkpoint_step=4), failure(checkpoint_step=4)],
            2,
            2,
            id="the second death since a checkpoint",
        ),
        pytest.param(
            [JOB, failure(Cause.job, step=8, checkpoint_step=8)],
            1,
            2,
            id="the same job error at another step, after a new checkpoint",
        ),
    ],
)
def test_what_a_restart_may_mend_is_retried_within_the_budget_of_its_cause(
    history: list[Failure], number: int, limit: int
) -> None:
    decided = decision(history)
    assert isinstance(decided, Retry)
    assert (decided.number, decided.limit, decided.place) == (number, limit, Place(1))


@pytest.mark.parametrize(
    ("history", "error", "key"),
    [
        pytest.param([DEATH] * 3, BudgetSpent, "2 restarts (recovery.max_restarts)", id="deaths"),
        pytest.param(
            [failure(made_steps=False)] * 3,
            StartFailed,
            "2 restarts (recovery.max_restarts)",
            id="deaths before any step",
        ),
        pytest.param(
            [START] * 4, StartFailed, "3 restarts (recovery.max_start_restarts)", id="no start"
        ),
        pytest.param(
            [DEATH, *[START] * 4],
            BudgetSpent,
            "3 restarts (recovery.max_start_restarts)",
            id="no start after an attempt that made steps",
        ),
        pytest.param(
            [NODE] * 5, BudgetSpent, "4 restarts (recovery.max_node_restarts)", id="nodes"
        ),
        pytest.param(
            [TAKEN] * 6, BudgetSpent, "5 restarts (recovery.max_preemptions)", id="preemptions"
        ),
        pytest.param(
            [failure(checkpoint_step=4), *[failure(checkpoint_step=8)] * 3],
            BudgetSpent,
            "2 restarts (recovery.max_restarts)",
            id="no checkpoint after the second one",
        ),
    ],
)
def test_a_spent_budget_ends_the_run_and_names_its_key(
    history: list[Failure], error: type[OrchestratorError], key: str
) -> None:
    assert decision(history) == GiveUp(error, f"{key} brought no new checkpoint")


def test_without_restarts_the_first_death_ends_the_run() -> None:
    assert decision([DEATH], max_restarts=0) == GiveUp(
        BudgetSpent, "0 restarts (recovery.max_restarts) brought no new checkpoint"
    )


def test_without_a_limit_there_is_always_another_restart() -> None:
    decided = decision([DEATH] * 5000, max_restarts=None)
    assert isinstance(decided, Retry)
    assert (decided.number, decided.limit, decided.pause_s) == (5000, None, 60.0)


@pytest.mark.parametrize(
    ("failures", "pause_s"), [(1, 0.0), (2, 1.0), (3, 2.0), (4, 4.0), (7, 32.0), (8, 60.0)]
)
def test_the_first_restart_does_not_wait_and_each_further_one_twice_as_long(
    failures: int, pause_s: float
) -> None:
    decided = decision([START] * failures, max_start_restarts=9)
    assert isinstance(decided, Retry)
    assert decided.pause_s == pause_s


def test_a_new_checkpoint_takes_the_pause_back() -> None:
    decided = decision([DEATH, DEATH, failure(checkpoint_step=4)])
    assert isinstance(decided, Retry)
    assert decided.pause_s == 0.0


@pytest.mark.parametrize(
    ("again", "between"),
    [
        pytest.param(JOB, [], id="at once"),
        pytest.param(JOB, [DEATH], id="after a death"),
        pytest.param(
            failure(Cause.job, checkpoint_step=4),
            [failure(checkpoint_step=4)],
            id="at the same step, from a newer checkpoint",
        ),
        pytest.param(
            failure(Cause.job, step=9), [], id="from the same checkpoint, after a longer block"
        ),
        pytest.param(
            failure(Cause.job, error="boom at 0x7f", user_frame="mine.py:3"),
            [failure(Cause.job, error="boom at 0x8f", user_frame="mine.py:3")],
            id="in the same line with other words",
        ),
    ],
)
def test_the_same_job_error_twice_is_the_jobs_fault(again: Failure, between: list[Failure]) -> None:
    assert decision([JOB, *between, again], max_restarts=9) == GiveUp(
        JobError, "it failed twice in the same way at the same step"
    )


def test_a_job_error_before_the_first_step_is_not_retried() -> None:
    decided = decision([failure(Cause.job, made_steps=False)])
    assert isinstance(decided, GiveUp)
    assert decided.error is JobError
    assert "before its first step" in decided.reason


@pytest.mark.parametrize(
    "history",
    [
        pytest.param([failure(Cause.job, made_steps=False, began_at=4)], id="of a resumed run"),
        pytest.param([DEATH, failure(Cause.job, made_steps=False)], id="without a checkpoint"),
    ],
)
def test_a_job_error_before_the_first_step_of_a_later_attempt_is_retried_once(
    history: list[Failure],
) -> None:
    assert isinstance(decision(history), Retry)
    assert isinstance(decision([*history, history[-1]], max_restarts=9), GiveUp)


@pytest.mark.parametrize(
    ("cause", "error"),
    [
        (Cause.restore, RestoreError),
        (Cause.storage, StorageError),
        (Cause.export, ExportError),
        (Cause.cluster, ClusterError),
    ],
)
def test_what_no_restart_mends_ends_the_run_at_once(
    cause: Cause, error: type[OrchestratorError]
) -> None:
    assert decision([failure(cause)]) == GiveUp(error, "a restart would not help")


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        pytest.param({"a": 1, "b": 1, "c": 1}, Place(3), id="room for all"),
        pytest.param({"a": 2, "b": 4}, Place(3), id="room for more than all"),
        pytest.param({"a": 1, "b": 1, "c": 0}, Place(2), id="room for the least"),
        pytest.param({"a": 1}, Wait(2, 1), id="room for fewer"),
        pytest.param({}, Wait(2, 0), id="no room"),
    ],
)
def test_a_run_has_as_many_workers_as_there_is_room_for(
    hosts: dict[str, int], expected: Place | Wait
) -> None:
    situation = Situation(Room(hosts), Workers(2, 3))
    assert place_workers(situation, config()) == expected
    after_a_loss = decide(Situation(Room(hosts), Workers(2, 3), [NODE]), config())
    assert (after_a_loss.place if isinstance(after_a_loss, Retry) else after_a_loss) == expected


def test_workers_that_must_be_on_one_host_do_not_add_up() -> None:
    room = Room({"a": 2, "b": 1}, is_one_host=True)
    assert place_workers(Situation(room, Workers(1, 3)), config()) == Place(2)


def test_waiting_for_room_ends_with_what_was_asked_and_what_there_is() -> None:
    room = Room({"a": 1, "b": 0}, "2 CPU")
    situation = Situation(room, Workers(2, 3), waited_s=600.0)
    assert place_workers(situation, config()) == GiveUp(
        ClusterError,
        "2 worker(s) of 2 CPU each (strategy.min_workers) are needed, there is room for 1 on a, "
        "not within 600 s (recovery.capacity_timeout_s)",
    )


@pytest.mark.parametrize("history", [[failure(Cause.restore)], [DEATH] * 3])
def test_a_run_that_is_given_up_does_not_wait_for_room(history: list[Failure]) -> None:
    assert isinstance(decide(Situation(Room({}), Workers(2, 3), history), config()), GiveUp)


def at(host: str, cause: Cause = Cause.start, **changes: Any) -> Failure:
    return failure(cause, host=host, **changes)


@pytest.mark.parametrize(
    ("history", "hosts"),
    [
        pytest.param([at("host-1")], [], id="one failure"),
        pytest.param([at("host-1"), at("host-1")], ["host-1"], id="two in a row"),
        pytest.param(
            [at("host-1", Cause.node), at("host-1", Cause.worker)], ["host-1"], id="of any kind"
        ),
        pytest.param([at("host-1"), at("host-2"), at("host-1")], [], id="not in a row"),
        pytest.param([at(""), at("")], [], id="nobody knows where"),
        pytest.param([at("host-1", Cause.job), at("host-1", Cause.job)], [], id="the job's fault"),
        pytest.param(
            [at("host-1", Cause.preemption), at("host-1", Cause.preemption)], [], id="taken away"
        ),
        pytest.param(
            [at("host-1"), at("host-1", checkpoint_step=4)], [], id="with a checkpoint in between"
        ),
        pytest.param(
            [at("host-1"), at("host-1"), at("host-2", checkpoint_step=4)],
            ["host-1"],
            id="for the rest of the run",
        ),
    ],
)
def test_a_host_that_failed_twice_in_a_row_is_avoided(
    history: list[Failure], hosts: list[str]
) -> None:
    assert avoided(Situation(THREE, Workers(2, 2), history)) == frozenset(hosts)


def test_a_host_is_not_avoided_where_the_others_do_not_suffice() -> None:
    history = [at("host-1"), at("host-1")]
    assert avoided(Situation(THREE, Workers(3, 3), history)) == frozenset()


def test_of_two_bad_hosts_the_one_that_failed_last_is_avoided_if_one_is_needed() -> None:
    history = [at("host-1"), at("host-1"), at("host-2"), at("host-2")]
    assert avoided(Situation(THREE, Workers(1, 3), history)) == {"host-1", "host-2"}
    assert avoided(Situation(THREE, Workers(2, 3), history)) == {"host-2"}


def test_an_elastic_run_goes_on_with_fewer_workers_rather_than_on_a_bad_host() -> None:
    situation = Situation(THREE, Workers(2, 3), [at("host-1"), at("host-1")])
    decided = decide(situation, config())
    assert isinstance(decided, Retry)
    assert decided.place == Place(2, frozenset({"host-1"}))


@pytest.mark.parametrize(
    ("hosts", "history", "number"),
    [
        pytest.param({"host-0": 1, "host-1": 1}, [], None, id="still two"),
        pytest.param({"host-0": 1, "host-1": 1, "host-2": 1}, [], 3, id="a third"),
        pytest.param({"host-0": 9}, [], 4, id="not more than the run may have"),
        pytest.param(
            {"host-0": 1, "host-1": 1, "host-2": 1},
            [at("host-2"), at("host-2")],
            None,
            id="a bad third",
        ),
    ],
)
def test_a_smaller_attempt_grows_when_a_good_host_is_there(
    hosts: dict[str, int], history: list[Failure], number: int | None
) -> None:
    assert larger(Situation(Room(hosts), Workers(1, 4), history), 2) == number
