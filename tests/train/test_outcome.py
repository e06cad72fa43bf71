"""What a job may return as its loss, terms and weights, and what it may not do meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from orchestrator.errors import JobError
from orchestrator.spec.schema import Compile, Precision
from orchestrator.train.job import Batch, Outcome
from orchestrator.train.sources import Split
from tests.train.rig import Rig, make_rig
from tests.train.tiny import Tiny, clusters

layers = keras.layers


class Spread(Tiny):
    """Adds what the outputs of a batch are far from zero."""

    def __init__(self, reduce: Callable[[Any], Any] = tf.reduce_mean):
        super().__init__()
        self._reduce = reduce

    def losses(self, model: keras.Model, batch: Batch, *, training: bool) -> Outcome:
        outputs = model(batch["x"], training=training)
        spread = self._reduce(tf.reduce_sum(tf.square(outputs), axis=1))
        return Outcome(loss=self.loss(batch, outputs), terms={"spread": spread})


def expected_loss(rig: Rig) -> float:
    """Return the mean over all examples of the evaluation, at once."""
    source = clusters(Split.EVAL, 50)
    rows = source.fetch(np.arange(50))
    outputs = rig.model(rows["x"])
    losses = Tiny().loss({"y": rows["y"]}, outputs)
    return float(tf.reduce_mean(losses + tf.reduce_sum(tf.square(outputs), axis=1)))


@pytest.mark.parametrize("batch", [7, 48, 2])
@pytest.mark.parametrize("replicas", [1, 3])
def test_evaluation_is_exact_where_a_term_is_a_mean_over_the_batch(
    tmp_path: Path, replicas: int, batch: int
) -> None:
    # 50 examples: 7 with one left over, 48 with two for three replicas, 2 with a replica idle.
    changes: dict[str, Any] = {"train__global_batch_size": max(batch, replicas)}
    rig = make_rig(tmp_path, Spread(), replicas=replicas, **changes).run(2)
    found = rig.evaluation.run()
    assert found is not None
    assert found["loss"] == pytest.approx(expected_loss(rig), rel=1e-5)
    assert rig.evaluation.run() == found


def test_evaluation_in_eager_mode_is_exact_too(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, Spread(), replicas=2, train__compile=Compile.eager)
    found = rig.evaluation.run()
    assert found is not None
    assert found["loss"] == pytest.approx(expected_loss(rig), rel=1e-5)


def test_a_term_of_one_value_an_example_is_refused_by_its_name(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, Spread(reduce=tf.identity))
    with pytest.raises(JobError, match=r"the term 'spread' has shape \(\d+,\): .* to `loss`"):
        rig.run(1)


class Bottleneck(layers.Layer):
    """Adds a loss of its own for what passes."""

    def call(self, x: Any) -> Any:
        self.add_loss(keras.ops.sum(keras.ops.square(x), axis=1))
        return x


class Autoencoder(Tiny):
    def model(self) -> keras.Model:
        return keras.Sequential(
            [layers.Input((8,)), layers.Dense(4), Bottleneck(), layers.Dense(3)]
        )


def test_a_loss_of_a_layer_for_each_example_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"a loss of the model \(add_loss\) has shape \(\d+,\)"):
        make_rig(tmp_path, Autoencoder()).run(1)


class Regularised(Tiny):
    """Has regularisers of activities and kernels, and a last layer in float32."""

    def model(self) -> keras.Model:
        first = layers.Dense(16, kernel_regularizer="l2", activity_regularizer="l2")
        last = layers.Dense(3, dtype="float32", kernel_regularizer="l2")
        return keras.Sequential([layers.Input((8,)), first, last])


@pytest.fixture
def policy(request: pytest.FixtureRequest) -> Precision:
    """A precision, for this test alone."""
    chosen: Precision = request.param
    kept = keras.config.dtype_policy().name, keras.config.floatx()
    request.addfinalizer(lambda: keras.config.set_dtype_policy(kept[0]))
    request.addfinalizer(lambda: keras.config.set_floatx(kept[1]))
    keras.config.set_dtype_policy(chosen.value)
    if chosen is Precision.float64:
        keras.config.set_floatx("float64")
    return chosen


@pytest.mark.parametrize(
    "policy", [Precision.mixed_bfloat16, Precision.float64], indirect=True, ids=lambda p: p.value
)
def test_losses_of_layers_of_several_dtypes_add_up(tmp_path: Path, policy: Precision) -> None:
    rig = make_rig(tmp_path, Regularised(), replicas=2, precision__policy=policy).run(2)
    assert np.isfinite(rig.losses).all()


class Waves(Tiny):
    """Has targets in float32, and does not cast them."""

    def loss(self, batch: Batch, outputs: Any) -> Any:
        return tf.square(outputs[:, 0] - batch["x"][:, 0])


@pytest.mark.parametrize("policy", [Precision.float64], indirect=True, ids=lambda p: p.value)
@pytest.mark.parametrize("host", [False, True])
def test_targets_are_float64_where_the_model_is(
    tmp_path: Path, policy: Precision, host: bool
) -> None:
    rig = make_rig(tmp_path, Waves(), host=host, precision__policy=policy).run(2)
    assert np.isfinite(rig.losses).all() and rig.evaluation.run()


class Signed(Tiny):
    """Takes examples of one class away."""

    def losses(self, model: keras.Model, batch: Batch, *, training: bool) -> Outcome:
        outputs = model(batch["x"], training=training)
        weight = tf.where(batch["y"] == 0, -0.25, 1.0)
        return Outcome(loss=self.loss(batch, outputs), weight=weight)


def test_negative_weights_count_in_the_evaluation_as_in_training(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, Signed(), replicas=2).run(2)
    rows = clusters(Split.EVAL, 50).fetch(np.arange(50))
    losses = np.asarray(Tiny().loss({"y": rows["y"]}, rig.model(rows["x"])))
    weight = np.where(rows["y"] == 0, -0.25, 1.0)
    found = rig.evaluation.run()
    assert found is not None
    assert found["loss"] == pytest.approx((weight * losses).sum() / weight.sum(), rel=1e-5)


class Foreign(Tiny):
    """Trains a variable that is not the model's."""

    def model(self) -> keras.Model:
        self.temperature = keras.Variable(0.0, name="temperature")
        return super().model()

    def parameter_groups(self, model: keras.Model) -> dict[str, list[keras.Variable]]:
        return {"all": [*model.trainable_variables, self.temperature]}


def test_a_group_with_a_variable_that_no_checkpoint_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="'all' has temperature, which is no variable of the model"):
        make_rig(tmp_path, Foreign())


class Net(keras.Model):
    """Calls a head in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.auxiliary = layers.Dense(3), layers.Dense(3)

    def call(self, x: Any, training: bool = False) -> Any:
        return self.head(x) + self.auxiliary(x) if training else self.head(x)


class Unbuilt(Tiny):
    def model(self) -> keras.Model:
        model = Net()
        model(keras.Input((8,)))
        return model


def test_a_layer_that_is_first_called_in_training_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="kernel was made while a batch was computed"):
        make_rig(tmp_path, Unbuilt()).run(1)


class Annealed(Tiny):
    """Counts its steps in a variable of TensorFlow's."""

    def __init__(self, count: Callable[[tf.Variable], Any], *, in_evaluation: bool = False):
        super().__init__()
        self._count, self._in_evaluation = count, in_evaluation

    def model(self) -> keras.Model:
        self.steps = tf.Variable(0.0, trainable=False)
        return super().model()

    def losses(self, model: keras.Model, batch: Batch, *, training: bool) -> Outcome:
        if training is not self._in_evaluation:
            self._count(self.steps)
        return super().losses(model, batch, training=training)


def _in_condition(steps: tf.Variable) -> Any:
    return tf.cond(steps < 9.0, lambda: steps.assign_add(1.0), lambda: steps.read_value())


@pytest.mark.parametrize("count", [lambda steps: steps.assign_add(1.0), _in_condition])
def test_a_variable_of_tensorflow_that_is_assigned_is_refused(
    tmp_path: Path, count: Callable[[tf.Variable], Any]
) -> None:
    said = r"changes a tf\.Variable while it computes a batch: AssignAddVariableOp"
    with pytest.raises(JobError, match=said):
        make_rig(tmp_path, Annealed(count)).run(1)
    with pytest.raises(JobError, match=said):
        make_rig(tmp_path, Annealed(count, in_evaluation=True)).run(1).evaluation.run()
