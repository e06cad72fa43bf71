"""Learning rates follow their formulas; groups have the optimizer they were given."""

from __future__ import annotations

import inspect
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from orchestrator.errors import JobError
from orchestrator.spec.schema import OptimizerGroup, OptimizerName, ScheduleConfig, ScheduleName
from orchestrator.spec.validate import ACCEPTED, ARGUMENTS
from orchestrator.train.optimizer import KERAS_CLASSES, LearningRate, Optimizers
from tests.plans import tiny_plan


def config(name: ScheduleName, **changes: object) -> ScheduleConfig:
    values: dict = {"warmup_steps": 0, "final_factor": 0.0, "boundaries": [], "factors": []}
    return ScheduleConfig(name=name, **{**values, **changes})


def rates(schedule: LearningRate, steps: int) -> np.ndarray:
    return np.array([float(schedule(step)) for step in range(steps)])


def test_cosine_agrees_with_keras() -> None:
    ours = LearningRate(0.3, config(ScheduleName.cosine, final_factor=0.1), 50)
    theirs = keras.optimizers.schedules.CosineDecay(0.3, 50, alpha=0.1)
    np.testing.assert_allclose(rates(ours, 60), [float(theirs(s)) for s in range(60)], rtol=1e-5)


def test_warm_up_is_linear_and_the_cosine_begins_where_it_ends() -> None:
    schedule = LearningRate(1.0, config(ScheduleName.cosine, warmup_steps=4), 104)
    np.testing.assert_allclose(rates(schedule, 5), [0.25, 0.5, 0.75, 1.0, 1.0], rtol=1e-6)
    assert float(schedule(54)) == pytest.approx(0.5, abs=1e-6)  # half of the 100 steps after
    assert float(schedule(104)) == pytest.approx(0.0, abs=1e-6)


def test_piecewise_changes_at_its_boundaries() -> None:
    schedule = LearningRate(
        2.0, config(ScheduleName.piecewise, boundaries=[3, 5], factors=[1.0, 0.5, 0.1]), 10
    )
    np.testing.assert_allclose(rates(schedule, 7), [2, 2, 2, 1, 1, 0.2, 0.2], rtol=1e-6)


def test_a_vector_of_steps_gives_what_single_steps_give() -> None:
    schedule = LearningRate(
        2.0,
        config(ScheduleName.piecewise, boundaries=[3], factors=[1.0, 0.5], warmup_steps=2),
        10,
    )
    np.testing.assert_array_equal(schedule(np.arange(7)).numpy(), rates(schedule, 7))


def test_a_group_overrides_the_arguments_of_the_optimizer(tmp_path: Path) -> None:
    left, right = keras.Variable([1.0]), keras.Variable([1.0])
    plan = tiny_plan(
        tmp_path,
        optimizer__name=OptimizerName.sgd,
        optimizer__learning_rate=0.5,
        optimizer__groups={"right": OptimizerGroup(learning_rate=0.25)},
    )
    optimizers = Optimizers(plan, {"left": [left], "right": [right]})
    one = keras.ops.convert_to_tensor([1.0])
    optimizers.apply({"left": [one], "right": [one]})
    assert (float(left[0]), float(right[0])) == (0.5, 0.75)


def test_a_group_that_the_job_does_not_have_is_refused(tmp_path: Path) -> None:
    plan = tiny_plan(tmp_path, optimizer__groups={"discriminator": OptimizerGroup()})
    with pytest.raises(JobError, match=r"optimizer\.groups\.discriminator.*has all"):
        Optimizers(plan, {"all": [keras.Variable([1.0])]})


def test_a_variable_in_two_groups_is_refused(tmp_path: Path) -> None:
    shared = keras.Variable([1.0], name="shared")
    with pytest.raises(JobError, match=r"shared is in the parameter groups 'a' and 'b'"):
        Optimizers(tiny_plan(tmp_path), {"a": [shared], "b": [shared]})


@pytest.mark.parametrize("name", list(OptimizerName), ids=lambda name: name.value)
def test_what_an_optimizer_accepts_is_what_keras_takes(name: OptimizerName) -> None:
    taken = inspect.signature(KERAS_CLASSES[name].__init__).parameters
    assert ACCEPTED[name] == {argument for argument in ARGUMENTS if argument in taken}


@pytest.mark.parametrize("name", list(OptimizerName), ids=lambda name: name.value)
def test_an_update_that_is_not_applied_leaves_everything(
    name: OptimizerName, tmp_path: Path
) -> None:
    plan = tiny_plan(tmp_path, optimizer__name=name, optimizer__weight_decay=0.01)

    def made() -> tuple[Optimizers, list[keras.Variable]]:
        variables = [
            keras.Variable(np.eye(3, 4, dtype="float32")),
            keras.Variable(np.ones(4, "float32")),
        ]
        optimizers = Optimizers(plan, {"all": variables})
        state = [v for section in optimizers.variables.values() for v in section]
        return optimizers, [*variables, *state]

    def values(variables: list[keras.Variable]) -> list[np.ndarray]:
        return [np.asarray(variable.value).copy() for variable in variables]

    plain, plain_state = made()
    chosen, chosen_state = made()
    for step in range(3):
        gradients = [tf.random.stateless_normal(shape, [step, 1]) for shape in ((3, 4), (4,))]
        plain.apply({"all": gradients})
        chosen.apply_if(tf.constant(True), {"all": gradients})
        before = values(chosen_state)
        chosen.apply_if(tf.constant(False), {"all": [g * np.nan for g in gradients]})
        for old, new in zip(before, values(chosen_state), strict=True):
            np.testing.assert_array_equal(old, new)
    # The fused kernel takes 1 - beta_2 in float32, 5e-5 off; Keras's own operations are XLA's.
    rtol = 1e-4 if name in (OptimizerName.adam, OptimizerName.adamw) else 0
    for left, right in zip(values(plain_state), values(chosen_state), strict=True):
        np.testing.assert_allclose(left, right, rtol=rtol)
