"""Two runs agree, or the first step and the variable at which they do not are named."""

from __future__ import annotations

import dataclasses
import math

import pytest

from orchestrator.spec.messages import BlockDone
from orchestrator.spec.schema import OptimizerConfig, OptimizerName, Precision
from orchestrator.spec.variants import Comparison
from orchestrator.verify.verdict import Differences, Trace, judge, still_variables

WEIGHT, BIAS = "model/0:dense/kernel", "model/1:dense/bias"
MOMENTUM = "optimizer/all/3:adam/dense_bias_momentum"


def comparison(*, relative: bool = False) -> Comparison:
    return Comparison(
        name="exact",
        optimizer=OptimizerConfig(name=OptimizerName.sgd, learning_rate=0.01),
        precision=Precision.float64,
        steps=4,
        every_steps=2,
        limit=1e-9,
        relative=relative,
    )


def block(first: int, losses: tuple[float, ...], ledger: int, worker: int = 0) -> BlockDone:
    told = {"loss": losses, "metrics": {"gradient_norm": losses}} if worker == 0 else {}
    return BlockDone(
        worker=worker,
        attempt=1,
        time=0.0,
        first_step=first,
        num_steps=len(losses),
        wall_s=0.1,
        data_wait_s=0.0,
        ledger=ledger,
        **told,
    )


def trace(*blocks: BlockDone) -> Trace:
    made = Trace()
    for message in blocks:
        made.observe(message)
    return made


def same(*steps: int) -> Differences:
    return {step: {key: off(0.0) for key in (WEIGHT, BIAS, MOMENTUM)} for step in steps}


def off(error: float) -> dict[str, float]:
    return {"largest": error, "relative": error}


ONE = trace(block(0, (3.0, 2.0), 10), block(2, (1.5, 1.0), 20))


def test_blocks_and_workers_of_any_number_make_the_same_ledger() -> None:
    top = 2**64 - 5
    other = trace(
        block(0, (3.0,), top),
        block(0, (3.0,), 9, worker=1),  # 2^64 - 5 + 9 is 4
        block(1, (2.0, 1.5, 1.0), 6),
        block(1, (2.0, 1.5, 1.0), 20, worker=1),
    )
    verdict = judge(comparison(), ONE, other, {4: same(4)[4]})
    assert verdict.agrees and verdict.same_examples
    assert (verdict.loss, verdict.norm, verdict.variables) == (0.0, 0.0, 0.0)


def test_other_examples_are_a_difference_even_if_everything_else_agrees() -> None:
    other = trace(block(0, (3.0, 2.0), 10), block(2, (1.5, 1.0), 21))
    verdict = judge(comparison(), ONE, other, same(2, 4))
    assert (verdict.step, verdict.what) == (4, "other examples were used")


def test_the_first_step_is_named_and_the_variable_that_is_furthest_off() -> None:
    differences = {2: same(2)[2] | {WEIGHT: off(1e-6), BIAS: off(1e-3)}, 4: same(4)[4]}
    other = trace(block(0, (3.0, 2.1), 10), block(2, (1.5, 1.0), 20))
    verdict = judge(comparison(), ONE, other, differences)
    # Step 2 begins with the weights that step 1 left: its loss tells of them, before it updates.
    assert verdict.story == (
        f"first at step 2: the variables differ; after step 2 the variable {BIAS} is 1.0e-03 off"
    )
    assert verdict.loss == pytest.approx(0.05)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_differs(value: float) -> None:
    other = trace(block(0, (3.0, 2.0), 10), block(2, (value, 1.0), 20))
    verdict = judge(comparison(), ONE, other, same(2, 4))
    assert (verdict.step, verdict.loss) == (3, math.inf)


def test_missing_steps_and_missing_checkpoints_differ() -> None:
    short = trace(block(0, (3.0, 2.0), 10))
    assert judge(comparison(), ONE, short, same(2, 4)).step == 3
    assert judge(comparison(), Trace(), Trace(), {}).step == 0


def test_a_restarted_run_is_compared_from_its_new_beginning() -> None:
    other = trace(block(0, (9.0, 9.0), 1))
    other.clear()
    for message in (block(0, (3.0, 2.0), 10), block(2, (1.5, 1.0), 20)):
        other.observe(message)
    assert judge(comparison(), ONE, other, same(2, 4)).agrees


def test_a_variable_without_gradient_is_left_out_with_its_slots() -> None:
    still = still_variables({WEIGHT: 1.0, BIAS: 1e-14})
    assert still == {BIAS}
    differences = {4: {WEIGHT: off(0.0), BIAS: off(1.0), MOMENTUM: off(1.0)}}
    assert judge(comparison(relative=True), ONE, ONE, differences, still).agrees
    assert not judge(comparison(relative=True), ONE, ONE, differences).agrees


def test_the_loss_scale_itself_is_left_out_where_the_reference_has_another() -> None:
    differences = {4: same(4)[4] | {"loss_scale/0:loss_scale": off(1.0)}}
    scaled = dataclasses.replace(comparison(), loss_scale=1024.0)
    assert judge(scaled, ONE, ONE, differences).agrees
    assert not judge(comparison(), ONE, ONE, differences).agrees
    assert not judge(scaled, ONE, ONE, {4: same(4)[4] | {BIAS: off(1.0)}}).agrees
