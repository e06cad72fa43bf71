"""What a job draws follows from the step; what it assigns is kept, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from orchestrator.errors import JobError
from orchestrator.spec.schema import Compile
from orchestrator.train.job import Batch, Gradients, Outcome
from orchestrator.train.sources import Split
from tests.train.rig import Rig, make_rig
from tests.train.tiny import Tiny

BATCH = 4


class Drawing(Tiny):
    """Draws a number for each example, and reports in which place of the global batch it fell."""

    def __init__(self, draw: Callable[[Any], Any], *, in_prepare: bool = False):
        super().__init__(dropout=0.5)
        self._draw = draw
        self._in_prepare = in_prepare

    def prepare(self, batch: Batch, *, training: bool, seeds: Any) -> Batch:
        if not training:
            return batch
        drawn = self._draw([batch["y"].shape[0], 1]) if self._in_prepare else tf.zeros([1, 1])
        return {**batch, "drawn": drawn, "place": seeds[:, 0] % BATCH}

    def losses(self, model: keras.Model, batch: Batch, *, training: bool) -> Outcome:
        outcome = super().losses(model, batch, training=training)
        drawn = batch["drawn"] if self._in_prepare else self._draw([batch["y"].shape[0], 1])
        place = tf.one_hot(batch["place"], BATCH)
        return Outcome(loss=outcome.loss, metrics={"drawn": place * drawn})


def draws(rig: Rig) -> np.ndarray:
    """Return what was drawn for each place of each step, [steps, BATCH]."""
    return np.concatenate([result.sums["drawn"] for result in rig.results])


def held() -> Callable[[Any], Any]:
    seeds = keras.random.SeedGenerator(5)
    return lambda shape: keras.random.normal(shape, seed=seeds)


def layer() -> Callable[[Any], Any]:
    noise = keras.layers.GaussianNoise(1.0)
    return lambda shape: noise(tf.zeros(shape), training=True)


@pytest.mark.parametrize(
    ("make", "in_prepare"),
    [(held, False), (lambda: keras.random.normal, False), (layer, False), (layer, True)],
    ids=["generator", "no seed", "layer", "layer in prepare"],
)
def test_a_jobs_own_draws_differ_everywhere_and_repeat_on_replay(
    tmp_path: Path, make: Callable[[], Callable[[Any], Any]], in_prepare: bool
) -> None:
    def fresh() -> Rig:
        job = Drawing(make(), in_prepare=in_prepare)
        changes = {"train__global_batch_size": BATCH, "train__micro_batches": 2}
        return make_rig(tmp_path, job, replicas=2, **changes)

    rig = fresh().run(1, 5)
    # One number for each of 6 steps, 2 replicas and 2 micro-batches of one example.
    assert draws(rig).shape == (6, BATCH) and len(np.unique(draws(rig))) == 6 * BATCH
    resumed = fresh()
    resumed.done = 3
    resumed.run(3)
    np.testing.assert_array_equal(draws(resumed), draws(rig)[3:])


def twins() -> Callable[[Any], Any]:
    left, right = (keras.layers.GaussianNoise(1.0, seed=7) for _ in range(2))
    return lambda shape: (
        left(tf.zeros(shape), training=True) - right(tf.zeros(shape), training=True)
    )


@pytest.mark.parametrize("replicas", [1, 2])
def test_two_generators_of_one_seed_draw_alike(tmp_path: Path, replicas: int) -> None:
    job = Drawing(twins(), in_prepare=True)
    rig = make_rig(tmp_path, job, replicas=replicas, train__global_batch_size=BATCH).run(1, 2)
    assert not draws(rig).any()


def one_by_one() -> Callable[[Any], Any]:
    noise = keras.layers.GaussianNoise(1.0)
    return lambda shape: tf.map_fn(lambda x: noise(x, training=True), tf.zeros(shape))


@pytest.mark.parametrize("in_prepare", [True, False])
def test_a_draw_in_a_loop_over_examples_is_refused(tmp_path: Path, in_prepare: bool) -> None:
    rig = make_rig(tmp_path, Drawing(one_by_one(), in_prepare=in_prepare))
    with pytest.raises(JobError, match=r"seed_generator_state in tf.map_fn, a loop or a condition"):
        rig.run(1)


class Looping(Tiny):
    """Has a dropout in a loop over positions, and calls it again after the loop."""

    def model(self) -> keras.Model:
        drop = keras.layers.Dropout(0.5)

        class Loop(keras.layers.Layer):
            def call(self, x: Any, training: bool = False) -> Any:
                # Like a sampling cell: it draws in evaluation too.
                rows = tf.map_fn(lambda row: drop(row, training=True), x)
                return drop(rows, training=training)

        inputs = keras.Input((8,))
        loop = Loop()
        loop.drop = drop
        return keras.Model(inputs, keras.layers.Dense(3)(loop(inputs)))


def test_a_random_layer_in_a_loop_of_the_model_is_no_fault(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, Looping()).run(3)
    losses = rig.losses
    assert np.isfinite(rig.evaluation.run()["loss"])
    assert np.isfinite(losses).all() and len(np.unique(losses)) == 3
    np.testing.assert_array_equal(make_rig(tmp_path, Looping()).run(3).losses, losses)


def test_a_draw_without_a_seed_is_possible_after_training(tmp_path: Path) -> None:
    make_rig(tmp_path, Drawing(keras.random.normal), train__global_batch_size=BATCH).run(1)
    first, second = (keras.random.normal([3]).numpy() for _ in range(2))
    assert (first != second).any()


class Counter(keras.layers.Layer):
    """Counts its calls in a variable of some type."""

    def __init__(self, dtype_of_count: str):
        super().__init__()
        self._dtype_of_count = dtype_of_count

    def build(self, shape: Any) -> None:
        self.count = self.add_weight(
            shape=(), dtype=self._dtype_of_count, trainable=False, name="count", initializer="zeros"
        )

    def call(self, inputs: Any, training: bool = False) -> Any:
        if training:
            self.count.assign(self.count + 1)
        return inputs


class Counting(Tiny):
    """Has a layer that counts."""

    def __init__(self, dtype: str):
        super().__init__()
        self._dtype = dtype

    def model(self) -> keras.Model:
        layers = [keras.Input((8,)), Counter(self._dtype), keras.layers.Dense(3)]
        return keras.Sequential(layers)


@pytest.mark.parametrize("compile_", [Compile.graph, Compile.eager, Compile.xla])
def test_integer_state_of_a_layer_is_refused(tmp_path: Path, compile_: Compile) -> None:
    rig = make_rig(tmp_path, Counting("int64"), replicas=2, train__compile=compile_)
    with pytest.raises(JobError, match=r"counter\w*/count, which is int64: let it be float32"):
        rig.run(1)


def test_float_state_of_a_layer_is_the_mean_over_the_replicas(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, Counting("float32"), replicas=2, train__micro_batches=2).run(1, 2)
    assert np.asarray(rig.model.layers[0].count.value) == 3 * 2  # steps x micro-batches


class Following(keras.layers.Layer):
    """Follows the mean of its inputs with a rate of 1/4, and adds it to them."""

    def build(self, shape: Any) -> None:
        self.mean = self.add_weight(
            shape=(shape[-1],), trainable=False, name="mean", initializer="zeros"
        )

    def call(self, inputs: Any, training: bool = False) -> Any:
        if training:
            self.mean.assign(0.75 * self.mean + 0.25 * keras.ops.mean(inputs, axis=0))
        return inputs + self.mean


@pytest.mark.usefixtures("float64")
def test_float_state_follows_micro_batches_and_is_averaged_over_uneven_replicas(
    tmp_path: Path,
) -> None:
    class Follower(Tiny):
        def model(self) -> keras.Model:
            return keras.Sequential([keras.Input((8,)), Following(), keras.layers.Dense(3)])

    rig = make_rig(tmp_path, Follower(), replicas=3, train__micro_batches=2)
    mean = np.zeros(8)
    for step in range(3):
        ids = [part[0] for part in rig.feeder.take(step, 1).ids]
        after = []
        for part in ids:
            own = mean
            # 16 examples are 6, 5 and 5; in two micro-batches 3 + 3 and 3 + 2.
            for micro in np.split(part, [3]):
                x = rig.job.source(Split.TRAIN).fetch(micro)["x"].astype("float64")
                own = 0.75 * own + 0.25 * x.mean(axis=0)
            after.append(own)
        mean = np.mean(after, axis=0)
    rig.run(1, 2)
    (found,) = (v for v in rig.model.non_trainable_variables if v.path.endswith("mean"))
    for local in rig.strategy.experimental_local_results(found.value):
        np.testing.assert_allclose(local.numpy(), mean, rtol=1e-12)


def test_a_layer_that_assigns_a_trained_variable_is_refused(tmp_path: Path) -> None:
    class Spectral(Tiny):
        def model(self) -> keras.Model:
            dense = keras.layers.SpectralNormalization(keras.layers.Dense(3))
            return keras.Sequential([keras.Input((8,)), dense])

    with pytest.raises(JobError, match=r"kernel, which is trained: .*constraint"):
        make_rig(tmp_path, Spectral()).run(1)


def test_weights_that_a_job_clips_itself_are_refused(tmp_path: Path) -> None:
    class Clipped(Tiny):
        def gradients(
            self, model: keras.Model, batch: Batch, scale: Any
        ) -> tuple[Gradients, Outcome]:
            for variable in model.trainable_variables:
                variable.assign(tf.clip_by_value(variable, -0.01, 0.01))
            return super().gradients(model, batch, scale)

    with pytest.raises(JobError, match=r"dense\w*/kernel, which is trained"):
        make_rig(tmp_path, Clipped()).run(1)


def test_a_metric_object_is_refused(tmp_path: Path) -> None:
    class Metric(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self._mean = keras.metrics.Mean(name="mine")

        def losses(self, model: keras.Model, batch: Batch, *, training: bool) -> Outcome:
            outcome = super().losses(model, batch, training=training)
            self._mean.update_state(outcome.loss)
            return outcome

    with pytest.raises(JobError, match=r"which is not the model's.* return .* as a metric"):
        make_rig(tmp_path, Metric()).run(1)
