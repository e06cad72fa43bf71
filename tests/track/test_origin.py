"""The lineage of an exported model, and whether it is the model that was asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.spec.fingerprint import fingerprint
from orchestrator.track.origin import Origin, origin
from tests.track import rig

BEST = {
    "export.weights": "best",
    "best.metric": "loss",
    "best.mode": "min",
    "best.min_delta": "0.0",
    "train.seed": "0",
}


def started(**params: str) -> dict[str, Any]:
    settings = {**BEST, **{key.replace("__", "."): value for key, value in params.items()}}
    facts = rig.make_facts(Path("/runs/tiny/one"), "sqlite:////x", params=settings)
    return facts.record(rig.START)


def ready(attempt: int, step: int) -> dict[str, Any]:
    return {"kind": "Ready", "worker": 0, "attempt": attempt, "start_step": step}


def evaluated(step: int, loss: float) -> dict[str, Any]:
    return {"kind": "Evaluated", "time": rig.START + step, "step": step, "metrics": {"loss": loss}}


def exported(step: int) -> dict[str, Any]:
    return {"kind": "Exported", "step": step}


def used(first: int, num: int, ledger: int, worker: int = 0) -> dict[str, Any]:
    return rig.block(first, num) | {"worker": worker, "ledger": ledger}


def test_steps_that_were_made_again_count_once() -> None:
    found = origin(
        [
            *(started(), ready(1, 0), rig.data_used()),
            *(used(0, 4, 10), used(0, 4, 5, worker=1), used(4, 2, 7)),
            *(ready(2, 4), used(4, 4, 20), used(4, 4, 2**64 - 1, worker=1), exported(8)),
        ]
    )
    params = found.params()
    assert params["ledger"] == f"{10 + 5 + 20 - 1:016x}"
    assert (params["run"], params["checkpoint_step"], params["weights"]) == ("one", "8", "best")
    assert params["train_data"] == f"mnist {'0123456789abcdef' * 4}"
    assert params["config_fingerprint"] == fingerprint(BEST)


def test_of_an_evaluation_made_again_the_charts_have_the_first() -> None:
    first, again = evaluated(8, 0.5), evaluated(8, 0.5000001) | {"time": rig.START + 99}
    found = origin(
        [started(), ready(1, 0), used(0, 8, 1), first, ready(2, 0), used(0, 8, 1), again]
    )
    assert found.told == {8: first} and found.evaluations == {8: again}


def test_the_ledger_of_an_earlier_checkpoint_ends_with_it() -> None:
    found = origin([started(), ready(1, 0), used(0, 4, 10), used(4, 4, 20), exported(4)])
    assert found.params()["ledger"] == f"{10:016x}"


@pytest.mark.parametrize(
    ("key", "value", "is_same"),
    [("train.seed", "1", False), ("run_name", "x", True), ("tracking.uri", "http://x", True)],
)
def test_the_fingerprint_is_of_what_is_computed(key: str, value: str, is_same: bool) -> None:
    assert (fingerprint({**BEST, key: value}) == fingerprint(BEST)) is is_same


RUN = (ready(1, 0), used(0, 4, 1), evaluated(4, 0.2), used(4, 4, 1), evaluated(8, 0.5))


def complaint(*records: dict[str, Any]) -> str:
    found: Origin = origin(records)
    return found.complaint()


@pytest.mark.parametrize(
    ("params", "step", "is_right"),
    [
        ({}, 4, True),
        ({}, 8, False),
        ({"best__mode": "max"}, 8, True),
        ({"best__mode": "max"}, 4, False),
        ({"best__min_delta": "0.4"}, 8, True),  # 0.2 is not so much better as to count
        ({"best__metric": "None", "export__weights": "last"}, 8, True),
        ({"best__metric": "None", "export__weights": "last"}, 4, False),
        ({"export__weights": "ema"}, 4, False),
    ],
)
def test_an_export_of_another_step_is_seen(
    params: dict[str, str], step: int, is_right: bool
) -> None:
    said = complaint(started(**params), *RUN, exported(step))
    assert (said == "") is is_right, said
    if not is_right:
        assert f"weights of step {step}" in said


def test_an_export_is_new_until_the_run_is_started_again() -> None:
    assert origin([started(), *RUN, exported(8)]).is_new
    assert not origin([started(), *RUN, exported(8), started()]).is_new
    assert origin([started(), *RUN, exported(8), started(), exported(8)]).is_new


def test_no_export_at_all_is_seen() -> None:
    assert "no worker has told" in complaint(started(), *RUN)


def test_evaluations_that_were_made_again_or_judged_otherwise_do_not_count() -> None:
    # The first 0.2 at step 4 belongs to steps that were lost with a crash.
    again = (ready(2, 0), used(0, 4, 1), evaluated(4, 0.6), used(4, 4, 1), evaluated(8, 0.5))
    assert complaint(started(), *RUN, *again, exported(8)) == ""
    # What was found before the metric was named is not what the worker chose from.
    other = started(best__metric="accuracy")
    more = (ready(2, 8), used(8, 4, 1), evaluated(12, 0.4))
    assert complaint(other, *RUN, started(), *more, exported(12)) == ""
    assert complaint(started(), *RUN, *more, exported(12)) != ""
