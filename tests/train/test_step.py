"""The step computes the same whatever the replicas, blocks and micro-batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from orchestrator.errors import JobError
from orchestrator.spec.schema import Compile, OptimizerName, Precision
from orchestrator.train.job import Batch, Outcome
from orchestrator.train.sources import Split
from tests.train.rig import make_rig
from tests.train.tiny import Tiny

# float64 leaves only the order of additions: 1e-16 a step, times a few dozen steps and terms.
EXACT = 1e-12


@pytest.fixture(autouse=True)
def float64() -> Any:
    """Compare in float64, where nothing but real differences is visible."""
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


def difference(left: list[np.ndarray], right: list[np.ndarray]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("replicas", [2, 3, 4])
@pytest.mark.parametrize("optimizer", [OptimizerName.sgd, OptimizerName.adam])
def test_replicas_compute_what_one_device_computes(
    tmp_path: Path, replicas: int, optimizer: OptimizerName
) -> None:
    # 16 examples over 3 replicas are 6, 5 and 5: also the uneven split is exact.
    one = make_rig(tmp_path, Tiny(), optimizer__name=optimizer).run(1, 11, 8)
    many = make_rig(tmp_path, Tiny(), replicas=replicas, optimizer__name=optimizer).run(1, 11, 8)
    assert difference(one.weights, many.weights) < EXACT
    assert np.abs(one.losses - many.losses).max() < EXACT
    assert one.ledger == many.ledger


def test_blocks_of_any_length_compute_the_same_and_trace_once(tmp_path: Path) -> None:
    long = make_rig(tmp_path, Tiny()).run(20)
    short = make_rig(tmp_path, Tiny()).run(1, 7, 3, 9)
    assert difference(long.weights, short.weights) == 0
    assert long.ledger == short.ledger
    assert short.step.num_traces == 1


@pytest.mark.parametrize("replicas", [1, 3])
def test_micro_batches_compute_what_the_whole_batch_computes(tmp_path: Path, replicas: int) -> None:
    # 5 examples of a replica in 3 micro-batches are 2, 2 and 1.
    whole = make_rig(tmp_path, Tiny(), replicas=replicas).run(10)
    micro = make_rig(tmp_path, Tiny(), replicas=replicas, train__micro_batches=3).run(10)
    assert difference(whole.weights, micro.weights) < EXACT
    assert np.abs(whole.losses - micro.losses).max() < EXACT


def test_eager_blocks_compute_what_graph_blocks_compute(tmp_path: Path) -> None:
    graph = make_rig(tmp_path, Tiny(), replicas=2).run(3)
    eager = make_rig(tmp_path, Tiny(), replicas=2, train__compile=Compile.eager).run(3)
    assert difference(graph.weights, eager.weights) < EXACT


def test_data_on_the_host_gives_what_resident_data_gives(tmp_path: Path) -> None:
    resident = make_rig(tmp_path, Tiny(), replicas=2).run(4, 4)
    host = make_rig(tmp_path, Tiny(), replicas=2, host=True).run(4, 4)
    assert difference(resident.weights, host.weights) < EXACT
    assert resident.evaluation.run() == pytest.approx(host.evaluation.run(), abs=EXACT)


def test_clipping_happens_after_the_reduction(tmp_path: Path) -> None:
    # A limit far below the gradient norm: clipping each replica first would give a longer sum.
    one = make_rig(tmp_path, Tiny(), optimizer__clip_global_norm=0.05)
    many = make_rig(tmp_path, Tiny(), replicas=4, optimizer__clip_global_norm=0.05)
    before = one.weights
    one.run(1)
    many.run(1)
    assert difference(one.weights, many.weights) < EXACT
    moved = np.sqrt(sum(((a - b) ** 2).sum() for a, b in zip(before, one.weights, strict=True)))
    assert moved == pytest.approx(0.1 * 0.05, rel=1e-9)  # learning rate x limit


class Weighted(Tiny):
    """Gives every example its own weight, some of them zero."""

    def losses(self, model: keras.Model, batch: Batch, *, training: bool) -> Outcome:
        outcome = super().losses(model, batch, training=training)
        return Outcome(
            loss=outcome.loss, metrics=outcome.metrics, weight=tf.cast(batch["y"], "float64")
        )


def test_the_gradient_is_that_of_the_weighted_mean(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, Weighted(), replicas=3)
    ids = rig.feeder.take(0, 1).ids
    rows = Tiny().source(Split.TRAIN).fetch(np.concatenate([part[0] for part in ids]))
    before = rig.weights
    with tf.GradientTape() as tape:
        logits = rig.model(rows["x"])
        losses = keras.losses.sparse_categorical_crossentropy(rows["y"], logits, from_logits=True)
        weights = tf.cast(rows["y"], losses.dtype)
        mean = tf.reduce_sum(weights * losses) / tf.reduce_sum(weights)
    expected = tape.gradient(mean, [v.value for v in rig.model.trainable_variables])
    rig.run(1)
    moved = [(a - b) / 0.1 for a, b in zip(before, rig.weights, strict=True)]
    assert difference(moved, [np.asarray(g) for g in expected]) < EXACT
    assert rig.losses[0] == pytest.approx(float(mean), abs=EXACT)


class Regularised(Tiny):
    """Adds a penalty on the kernels to the loss."""

    def model(self) -> keras.Model:
        penalty = keras.regularizers.L2(0.01)
        layers = keras.layers
        return keras.Sequential(
            [
                layers.Input((8,)),
                layers.Dense(16, activation="relu", kernel_regularizer=penalty),
                layers.Dense(3, kernel_regularizer=penalty),
            ]
        )


def test_regularisation_counts_once_whatever_the_replicas(tmp_path: Path) -> None:
    one = make_rig(tmp_path, Regularised()).run(8)
    many = make_rig(tmp_path, Regularised(), replicas=3, train__micro_batches=2).run(8)
    plain = make_rig(tmp_path, Tiny()).run(8)
    assert difference(one.weights, many.weights) < EXACT
    assert difference(one.weights, plain.weights) > 1e-3


def test_moving_statistics_are_equal_on_all_replicas_and_means_of_them(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, Tiny(normalise=True), replicas=2).run(5)
    moving = [v for v in rig.model.non_trainable_variables if "moving" in v.path]
    assert moving
    for variable in moving:
        first, second = rig.strategy.experimental_local_results(variable.value)
        np.testing.assert_array_equal(first.numpy(), second.numpy())
    # The batch mean of equal halves is the mean of the two replicas' means, so the moving mean
    # follows that of one device as long as the weights before it are equal: in the first step.
    one = make_rig(tmp_path, Tiny(normalise=True)).run(1)
    two = make_rig(tmp_path, Tiny(normalise=True), replicas=2).run(1)
    means = [
        [w for w, v in zip(r.weights, r.model.variables, strict=True) if "moving_mean" in v.path]
        for r in (one, two)
    ]
    assert difference(*means) < EXACT


def test_dropout_masks_differ_between_replicas_and_steps_and_repeat_on_replay(
    tmp_path: Path,
) -> None:
    class Masks(Tiny):
        def losses(self, model: keras.Model, batch: Batch, *, training: bool) -> Outcome:
            ones = tf.ones([tf.shape(batch["x"])[0], 16], "float64")
            mask = model.layers[1](ones, training=training)
            outcome = super().losses(model, batch, training=training)
            return Outcome(loss=outcome.loss, metrics={"mask": mask})

    rig = make_rig(tmp_path, Masks(dropout=0.5), replicas=2, train__global_batch_size=2).run(4)
    again = make_rig(tmp_path, Masks(dropout=0.5), replicas=2, train__global_batch_size=2).run(2, 2)
    # With one example a replica the sum over replicas of a mask unit is 0, 2 or 4; equal masks
    # would never give 2.
    sums = np.concatenate([result.sums["mask"] for result in rig.results])
    assert (sums == 2).any()
    assert len({row.tobytes() for row in sums}) == 4
    np.testing.assert_array_equal(
        sums, np.concatenate([result.sums["mask"] for result in again.results])
    )


class Explosive(Tiny):
    """Has an infinite loss for one example."""

    def losses(self, model: keras.Model, batch: Batch, *, training: bool) -> Outcome:
        outcome = super().losses(model, batch, training=training)
        bad = tf.reduce_all(tf.abs(batch["x"] - self.victim) < 1e-6, axis=1)
        factor = tf.where(bad, tf.cast(np.inf, outcome.loss.dtype), 1.0)
        return Outcome(loss=outcome.loss * factor, metrics=outcome.metrics)

    def __init__(self, victim: np.ndarray):
        super().__init__()
        self.victim = victim


def test_an_update_that_is_not_finite_is_applied_on_no_replica(tmp_path: Path) -> None:
    source = Tiny().source(Split.TRAIN)
    ids = make_rig(tmp_path, Tiny(), replicas=2).feeder.take(0, 3).ids
    victim = source.fetch(ids[1][1, :1])["x"][0]  # step 2, second replica
    rig = make_rig(tmp_path, Explosive(victim), replicas=2).run(1)
    before = rig.weights
    rig.run(1)
    assert difference(before, rig.weights) == 0
    result = rig.results[-1]
    assert result.finite.tolist() == [False]
    assert result.local_finite.tolist() == [[True, False]]
    rig.run(1)
    assert rig.results[-1].finite.tolist() == [True]
    assert difference(before, rig.weights) > 0


def test_a_batch_is_reduced_with_one_collective_for_each_dtype(tmp_path: Path) -> None:
    calls: list[int] = []

    class Counting(tf.distribute.ReductionToOneDevice):
        def batch_reduce_implementation(self, reduce_op: Any, pairs: Any, options: Any) -> Any:
            calls.append(len(pairs))
            return super().batch_reduce_implementation(reduce_op, pairs, options)

    rig = make_rig(tmp_path, Tiny(normalise=True), replicas=2)
    rig.strategy.extended._cross_device_ops = Counting()
    rig.strategy.extended._inferred_cross_device_ops = Counting()
    rig.run(2)
    # 6 gradients, 2 moving statistics and the sums in one call of the one trace.
    assert calls == [9]


def test_a_loss_that_is_already_a_mean_is_refused(tmp_path: Path) -> None:
    class Mean(Tiny):
        def loss(self, batch: Batch, outputs: tf.Tensor) -> tf.Tensor:
            return tf.reduce_mean(super().loss(batch, outputs))

    with pytest.raises(JobError, match=r"the loss has shape \(\) for a batch of 16 .*\[16\]"):
        make_rig(tmp_path, Mean()).run(1)


def test_a_variable_without_gradient_is_named(tmp_path: Path) -> None:
    class Idle(Tiny):
        def model(self) -> keras.Model:
            inputs = keras.layers.Input((8,))
            model = keras.Model(inputs, keras.layers.Dense(3)(inputs))
            model.idle = model.add_weight(shape=(2,), name="idle")
            return model

    with pytest.raises(JobError, match=r"does not depend on .*idle"):
        make_rig(tmp_path, Idle()).run(1)


def test_evaluation_counts_every_example_once_under_any_number_of_replicas(tmp_path: Path) -> None:
    answers = [make_rig(tmp_path, Tiny(), replicas=r).evaluation.run() for r in (1, 2, 3)]
    rows = Tiny().source(Split.EVAL).fetch(np.arange(50))
    rig = make_rig(tmp_path, Tiny())
    logits = rig.model(rows["x"])
    losses = keras.losses.sparse_categorical_crossentropy(rows["y"], logits, from_logits=True)
    for answer in answers:
        assert answer["loss"] == pytest.approx(float(np.mean(losses)), abs=1e-9)


def test_augmentation_seeds_do_not_depend_on_the_replicas(tmp_path: Path) -> None:
    class Noisy(Tiny):
        def prepare(self, batch: Batch, *, training: bool, seeds: Any) -> Batch:
            if not training:
                return batch
            noise = tf.map_fn(
                lambda seed: tf.random.stateless_normal([8], seed, dtype=tf.float64),
                seeds,
                fn_output_signature=tf.float64,
            )
            return {**batch, "x": tf.cast(batch["x"], tf.float64) + noise}

    one = make_rig(tmp_path, Noisy()).run(6)
    many = make_rig(tmp_path, Noisy(), replicas=3, train__micro_batches=2).run(6)
    assert difference(one.weights, many.weights) < EXACT


def test_mixed_precision_keeps_variables_and_sums_in_float32(tmp_path: Path) -> None:
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("mixed_bfloat16")
    rig = make_rig(tmp_path, Tiny(), replicas=2, precision__policy=Precision.mixed_bfloat16).run(12)
    assert {w.dtype.name for w in rig.weights} == {"float32"}
    assert rig.losses[-1] < rig.losses[0]
