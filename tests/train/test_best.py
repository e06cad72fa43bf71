"""The best evaluation: the policy by itself, then what a worker keeps, ends and exports."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.errors import JobError
from orchestrator.spec.messages import (
    BlockDone,
    Cause,
    Ended,
    Evaluated,
    Exported,
    Failed,
    Notice,
    Outcome,
    Request,
    Saved,
)
from orchestrator.spec.schema import BestConfig, BestMode, Compile, Weights
from orchestrator.train import store
from orchestrator.train.best import BestEvaluation
from orchestrator.train.checkpoint import read_model
from tests.plans import tiny_plan
from tests.train.rig import make_rig
from tests.train.test_worker import live, only
from tests.train.tiny import Tiny

NAN, INF = math.nan, math.inf


def best_config(**changes: Any) -> BestConfig:
    return BestConfig(
        **{"metric": "loss", "mode": BestMode.min, "min_delta": 0.0, "patience": None, **changes}
    )


POLICY: list[tuple[dict[str, Any], list[float], int | None, int, int | None]] = [
    # configuration, values at steps 1, 2, ..., best step, worse ones in a row, exhausted at
    ({}, [3, 2, 1], 3, 0, None),
    ({}, [1, 2, 3], 1, 2, None),
    ({}, [2, 2, 2], 1, 2, None),
    ({"mode": BestMode.max}, [1, 3, 2], 2, 1, None),
    ({"min_delta": 0.5}, [3, 2.5, 2.4], 3, 0, None),
    ({"min_delta": 0.5}, [3, 2.8, 2.6], 1, 2, None),
    ({"mode": BestMode.max, "min_delta": 1}, [1, 2, 2.5], 3, 0, None),
    ({}, [NAN, NAN], None, 2, None),
    ({}, [NAN, 5, NAN], 2, 1, None),
    ({}, [INF, 5], 2, 0, None),
    ({}, [-INF, -INF], 1, 1, None),
    ({"patience": 1}, [3, 2, 2], 2, 1, 3),
    ({"patience": 2}, [3, 4, 2, 3], 3, 1, None),
    ({"patience": 2}, [3, 4, 5], 1, 2, 3),
    ({"patience": 2}, [NAN, NAN], None, 2, 2),
]


@pytest.mark.parametrize(("changes", "values", "step", "num_worse", "exhausted"), POLICY)
@pytest.mark.parametrize("resumed", [False, True])
def test_policy(
    changes: dict[str, Any],
    values: list[float],
    step: int | None,
    num_worse: int,
    exhausted: int | None,
    resumed: bool,
) -> None:
    config = best_config(**changes)
    best = BestEvaluation(config, None)
    ended_at = None
    for at, value in enumerate(values, 1):
        best.observe(at, {"loss": float(value), "accuracy": 0.5})
        if resumed:
            best = BestEvaluation(config, json.loads(json.dumps(best.state.facts())))
        if best.is_exhausted and ended_at is None:
            ended_at = at
    assert (best.state.step, best.state.num_worse, ended_at) == (step, num_worse, exhausted)
    assert best.state.value == (None if step is None else values[step - 1])


@pytest.mark.parametrize("changes", [{"metric": "accuracy"}, {"mode": BestMode.max}])
def test_the_state_of_another_metric_or_mode_is_not_taken_over(changes: dict[str, Any]) -> None:
    old = BestEvaluation(best_config(), None)
    old.observe(7, {"loss": 0.1})
    assert BestEvaluation(best_config(**changes), old.state.facts()).state.step is None


def test_a_metric_that_no_evaluation_has_is_refused() -> None:
    with pytest.raises(JobError, match=r"best.metric=loss: .*it has accuracy, mae"):
        BestEvaluation(best_config(), None).observe(1, {"mae": 1.0, "accuracy": 1.0})


@pytest.mark.parametrize(
    ("keep", "best", "left"), [(2, None, [3, 4]), (2, 1, [1, 3, 4]), (2, 4, [3, 4]), (1, 9, [4])]
)
def test_prune_spares_the_best(
    tmp_path: Path, keep: int, best: int | None, left: list[int]
) -> None:
    for step in range(1, 5):
        (tmp_path / store.checkpoint_name(step)).mkdir()
    store.prune(tmp_path, keep, best)
    assert steps_in(tmp_path) == left


def steps_in(checkpoints_dir: Path) -> list[int]:
    return sorted(store.step_of(path) for path in store.list_checkpoints(checkpoints_dir))


# The loss falls at every evaluation, so with mode=max the first one stays the best.
RISING = {"best__metric": "loss", "best__mode": BestMode.max, "train__eval_every_steps": 2}


def test_the_best_checkpoint_stays_and_is_exported(tmp_path: Path) -> None:
    told = live(
        tmp_path,
        **RISING,
        checkpoint__every_steps=2,
        checkpoint__keep=1,
        export__weights=Weights.best,
    )
    values = {e.step: e.metrics["loss"] for e in only(told, Evaluated)}
    assert max(values, key=lambda step: values[step]) == 2, values
    paths = tiny_plan(tmp_path).paths
    assert steps_in(paths.checkpoints_dir) == [2, 12]
    [exported] = only(told, Exported)
    assert exported.step == 2
    golden = np.load(paths.golden)
    for step, is_same in ((2, True), (12, False)):
        found = read_model(paths.checkpoints_dir / store.checkpoint_name(step))
        same = np.allclose(answers(found, golden["inputs"]), golden["outputs"], atol=1e-5)
        assert same is is_same


def answers(weights: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """Return what the tiny model answers, by NumPy."""
    first, second = (
        [weights[f"sequential/{layer}/{name}"] for name in ("kernel", "bias")]
        for layer in ("dense", "dense_1")
    )
    hidden = np.maximum(x @ first[0] + first[1], 0)
    result: np.ndarray = hidden @ second[0] + second[1]
    return result


def test_a_new_best_is_saved_when_nothing_else_is_due(tmp_path: Path) -> None:
    told = live(tmp_path, best__metric="loss", train__eval_every_steps=4, export__enabled=False)
    values = [e.metrics["loss"] for e in only(told, Evaluated)]
    assert values == sorted(values, reverse=True)
    assert [saved.step for saved in only(told, Saved)] == [4, 8, 12]


def test_early_stopping_completes_the_run_also_when_it_was_interrupted(tmp_path: Path) -> None:
    early = {**RISING, "best__patience": 2}
    whole = live(tmp_path / "whole", **early)
    [ended] = only(whole, Ended)
    assert (ended.step, ended.outcome) == (6, Outcome.completed)
    assert any("early stopping at step 6: 2 eval" in n.text for n in only(whole, Notice))
    assert only(whole, Exported)[0].step == 6

    calls = iter([set(), set(), {Request.SAVE_AND_STOP}])
    first = live(tmp_path / "parts", pending=lambda: next(calls), **early)
    [ended] = only(first, Ended)
    assert (ended.step, ended.outcome) == (4, Outcome.stopped)
    path = only(first, Saved)[-1].path
    assert store.read_manifest(Path(path))["best"]["num_worse"] == 1
    second = live(tmp_path / "parts", attempt=2, restore_from=path, **early)
    [ended] = only(second, Ended)
    assert (ended.step, ended.outcome) == (6, Outcome.completed)

    # As after a failed export: nothing is trained any more, and the best one is still known.
    path = only(second, Saved)[-1].path
    again = live(
        tmp_path / "parts", attempt=3, restore_from=path, export__weights=Weights.best, **early
    )
    [ended] = only(again, Ended)
    assert (ended.step, ended.outcome) == (6, Outcome.completed)
    assert not only(again, BlockDone)
    assert only(again, Exported)[0].step == 2


class Guarded(Tiny):
    """Its summary cannot be made of invented sums."""

    def summarise(self, sums: Any, weight: float) -> Any:
        assert weight == 50
        return super().summarise(sums, weight)


@pytest.mark.parametrize(
    ("changes", "num_steps"),
    [
        ({}, 0),
        ({"train__compile": Compile.eager}, 2),
        ({"job__class_name": f"{__name__}.Guarded"}, 2),
    ],
    ids=["before-the-first-step", "eager", "own-summary"],
)
def test_an_unknown_metric_is_refused(
    tmp_path: Path, changes: dict[str, Any], num_steps: int
) -> None:
    told = live(tmp_path, **{**RISING, "best__metric": "acuracy"}, **changes)
    [failed] = only(told, Failed)
    assert failed.cause is Cause.job
    assert failed.error == (
        "best.metric=acuracy: the evaluation has no such metric; it has accuracy, loss"
    )
    assert sum(block.num_steps for block in only(told, BlockDone)) == num_steps


def test_a_damaged_best_checkpoint_is_not_exported(tmp_path: Path) -> None:
    told = live(tmp_path, **RISING, export__enabled=False)
    last = Path(only(told, Saved)[-1].path)
    best = last.with_name(store.checkpoint_name(2))
    (best / "variables.index").write_bytes(b"spoilt")
    told = live(tmp_path, attempt=2, restore_from=str(last), export__weights=Weights.best, **RISING)
    [failed] = only(told, Failed)
    assert "variables.index has 6 bytes" in failed.error
    assert "export.weights=last" in failed.error


class Numberless(Tiny):
    def summarise(self, sums: Any, weight: float) -> Any:
        return {**super().summarise(sums, weight), "f1": math.nan}


def test_there_is_no_best_to_export_where_no_evaluation_gave_a_number(tmp_path: Path) -> None:
    job = {"job__class_name": f"{__name__}.Numberless"}
    best = {**RISING, "best__metric": "f1", "best__patience": 2}
    told = live(tmp_path, export__weights=Weights.best, **best, **job)
    assert "2 evaluations in a row had an eval/f1 that is no number" in only(told, Notice)[-1].text
    [failed] = only(told, Failed)
    assert failed.cause is Cause.export and not only(told, Exported)
    assert "eval/f1 was a number in no evaluation" in failed.error
    assert "export.weights=last" in failed.error


@pytest.mark.parametrize("replicas", [1, 2])
def test_the_metrics_are_known_before_the_first_evaluation(tmp_path: Path, replicas: int) -> None:
    evaluation = make_rig(tmp_path, Tiny(), replicas=replicas).evaluation
    assert evaluation.metric_names() == ["loss", "accuracy"] == list(evaluation.run())
    assert evaluation.num_traces == 1
