"""What has changed since a run was started, and what of it may when the run is resumed."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from orchestrator.errors import RestoreError
from orchestrator.runs import ONE_START, Past
from orchestrator.spec.messages import DataUsed
from orchestrator.spec.plan import RunPlan

# What decides which examples a step uses, and so what the run computes.
_SAME_RUN = ("job.class_name", "train.global_batch_size", "train.seed", "data.num_examples")
# Known only when a worker has the data: what `resume_allow` calls it.
_DATA_KEY = "data.digest"


def compare_data(past: Past, used: DataUsed, allowed: Collection[str]) -> str:
    """Compare the data of a split with what a run was trained on before it was resumed.

    Returns:
        What to tell the user of a change that `allowed`, which is `resume_allow`, names; else
        nothing.

    Raises:
        RestoreError: it is other data.
    """
    before = past.digests.get(used.split, used.digest)
    if before == used.digest:
        return ""
    change = (
        f"the {used.split} data {used.name} has the digest {used.digest[:12]}, was {before[:12]}"
    )
    if _DATA_KEY in allowed:
        return change
    raise RestoreError(
        f"resuming {past.name} with other data: {change}. Look at data.path, or say "
        f"resume_allow=[{_DATA_KEY}]"
    )


def compare_settings(past: Past, plan: RunPlan, params: Mapping[str, str]) -> list[str]:
    """Compare a run with the configuration that shall continue it.

    Returns:
        What else has changed, for the user to read.

    Raises:
        RestoreError: a key that decides what the run computes differs and `resume_allow` does not
            name it, or the run is beyond the last step already.
    """
    if plan.total_steps < past.last_step:
        raise RestoreError(
            f"resuming {past.name}: it has made {past.last_step:,} steps, the plan ends at "
            f"{plan.total_steps:,}; raise train.steps or train.epochs"
        )
    first, last = (facts.get("facts", {}).get("params", {}) for facts in (past.facts, past.last))
    changed = _changed(first, params)
    # A change that was allowed once is how the run has gone on.
    refused = [
        line
        for key, line in _changed(last, params).items()
        if key in _SAME_RUN and key not in plan.config.resume_allow
    ]
    if refused:
        names = ",".join(line.split("=")[0] for line in refused)
        raise RestoreError(
            f"resuming {past.name} with other settings: {'; '.join(refused)}. They decide which "
            f"examples each step sees; resume with the old ones, or say resume_allow=[{names}]"
        )
    return [f"since the run was started: {line}" for line in changed.values()]


def _changed(before: Mapping[str, str], now: Mapping[str, str]) -> dict[str, str]:
    return {
        key: f"{key}={value} was {before[key]}"
        for key, value in now.items()
        if key in before and before[key] != value and key not in ONE_START
    }
