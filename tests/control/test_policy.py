"""The policy: which decision follows which failures."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.control.policy import Failure, GiveUp, Retry, decide
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


def failure(cause: Cause = Cause.worker, **changes: Any) -> Failure:
    """Return a failure at step 7 of a worker that made steps, without any checkpoint."""
    values: dict[str, Any] = {
        "attempt": 1,
        "worker": 0,
        "host": "host-0",
        "error": "boom",
        "phase": Phase.stepping,
        "step": 7,
        "began_at": 0,
        "made_steps": True,
        "checkpoint_step": None,
    }
    return Failure(cause=cause, **(values | changes))


def decision(history: list[Failure], max_restarts: int = 2) -> Retry | GiveUp:
    config = RecoveryConfig(
        max_restarts=max_restarts, start_patience_s=120.0, step_patience_s=120.0
    )
    return decide(history, config)


DEATH = failure()
JOB = failure(Cause.job)


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        pytest.param([DEATH], Retry(1, 2), id="a first death"),
        pytest.param([DEATH] * 2, Retry(2, 2), id="a second death without a checkpoint"),
        pytest.param([failure(Cause.start)], Retry(1, 2), id="a worker that did not start"),
        pytest.param(
            [failure(Cause.collateral)], Retry(1, 2), id="collateral of nobody knows what"
        ),
        pytest.param([JOB], Retry(1, 2), id="a first job error after a step"),
        pytest.param(
            [JOB, failure(Cause.job, step=8)], Retry(2, 2), id="a job error at another step"
        ),
        pytest.param(
            [JOB, failure(Cause.job, error="crash")], Retry(2, 2), id="another job error there"
        ),
        pytest.param([DEATH, JOB], Retry(2, 2), id="a job error where a worker died"),
        pytest.param(
            [DEATH, DEATH, failure(checkpoint_step=4)],
            Retry(1, 2),
            id="a death after the first checkpoint",
        ),
        pytest.param(
            [DEATH, failure(checkpoint_step=4), failure(checkpoint_step=8)],
            Retry(1, 2),
            id="a death after a newer checkpoint",
        ),
        pytest.param(
            [DEATH, failure(checkpoint_step=4), failure(checkpoint_step=4)],
            Retry(2, 2),
            id="the second death since a checkpoint",
        ),
    ],
)
def test_what_a_restart_may_mend_is_retried(history: list[Failure], expected: Retry) -> None:
    assert decision(history) == expected


@pytest.mark.parametrize(
    ("history", "error"),
    [
        pytest.param([DEATH] * 3, BudgetSpent, id="deaths after steps"),
        pytest.param([failure(made_steps=False)] * 3, StartFailed, id="deaths before any step"),
        pytest.param(
            [failure(Cause.start, made_steps=False)] * 3, StartFailed, id="no worker ever started"
        ),
        pytest.param(
            [DEATH, *[failure(Cause.start, made_steps=False)] * 2],
            BudgetSpent,
            id="no start after an attempt that made steps",
        ),
        pytest.param(
            [failure(checkpoint_step=4), *[failure(checkpoint_step=8)] * 3],
            BudgetSpent,
            id="no checkpoint after the second one",
        ),
    ],
)
def test_a_spent_budget_ends_the_run_and_names_its_key(
    history: list[Failure], error: type[OrchestratorError]
) -> None:
    assert decision(history) == GiveUp(
        error, "2 restarts (recovery.max_restarts) brought no new checkpoint"
    )


def test_without_restarts_the_first_death_ends_the_run() -> None:
    assert decision([DEATH], max_restarts=0) == GiveUp(
        BudgetSpent, "0 restarts (recovery.max_restarts) brought no new checkpoint"
    )


@pytest.mark.parametrize("between", [[], [DEATH], [failure(checkpoint_step=4)]])
def test_the_same_job_error_at_the_same_step_twice_is_the_jobs_fault(
    between: list[Failure],
) -> None:
    assert decision([JOB, *between, JOB], max_restarts=9) == GiveUp(
        JobError, "it failed twice in the same way at the same step"
    )


def test_a_job_error_before_the_first_step_is_not_retried() -> None:
    decided = decision([failure(Cause.job, made_steps=False)])
    assert isinstance(decided, GiveUp)
    assert decided.error is JobError
    assert "before its first step" in decided.reason


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
