"""The step computes the same whatever the replicas, blocks and micro-batches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from orchestrator.errors import JobError
from orchestrator.spec.schema import Compile, OptimizerName, Precision
from orchestrator.train.choice import Choice
from orchestrator.train.job import Batch, Outcome
from orchestrator.train.sources import Split
from orchestrator.train.sums import weighted_sums
from tests.plans import tiny_plan
from tests.train.rig import make_rig
from tests.train.tiny import Tiny

# float64 leaves only the order of additions: 1e-16 a step, times a few dozen steps and terms.
EXACT = 1e-12


# Only real differences are visible in it.
pytestmark = pytest.mark.usefixtures("float64")


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
    assert result.finite_losses.tolist() == [[True, False]]
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


class Halved(Tiny):
    """Computes in float32, but gives its loss as a half."""

    def __init__(self, dtype: str):
        super().__init__()
        self._dtype = dtype

    def loss(self, batch: Batch, outputs: tf.Tensor) -> tf.Tensor:
        return tf.cast(outputs[:, 0], self._dtype)


@pytest.mark.parametrize("policy", [Precision.mixed_bfloat16, Precision.mixed_float16])
def test_a_loss_in_halves_is_summed_in_float32(tmp_path: Path, policy: Precision) -> None:
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    sizes = {"train__global_batch_size": 100}
    exact = make_rig(tmp_path, Halved("float32"), **sizes).run(1)
    half = policy.value.removeprefix("mixed_")
    for replicas in (1, 3):
        rig = make_rig(
            tmp_path, Halved(half), replicas=replicas, precision__policy=policy, **sizes
        ).run(1)
        # 1 / 100 in bfloat16 is 1e-3 too large, in float16 2e-4; float32 rounds by 6e-8.
        assert rig.results[0].gradient_norm == pytest.approx(
            exact.results[0].gradient_norm, rel=2e-6
        )
        # Each loss, of about 1, was rounded by up to 2^-9; their mean is near 0.
        assert rig.losses == pytest.approx(exact.losses, abs=2e-3)


def test_weights_and_terms_of_a_loss_in_halves_keep_their_digits() -> None:
    # 257 and 1 + 2^-9 need more than the 8 bits of bfloat16.
    loss = tf.constant([1.0, 2.0], tf.bfloat16)
    outcome = Outcome(loss=loss, terms={"extra": 1 + 2.0**-9 + tf.zeros([])}, weight=[257.0, 1.0])
    _, sums = weighted_sums(outcome, 2, tf.float32)
    np.testing.assert_array_equal(sums, [258, 259 + 258 * (1 + 2.0**-9)])
    assert float(outcome.objective(1.0)) == sums[1]


@pytest.mark.parametrize("shape", [[16, 1], []])
def test_weights_of_another_shape_are_refused(tmp_path: Path, shape: list[int]) -> None:
    class Column(Tiny):
        def losses(self, model: keras.Model, batch: Batch, *, training: bool) -> Outcome:
            outcome = super().losses(model, batch, training=training)
            return Outcome(loss=outcome.loss, weight=tf.ones(shape, outcome.loss.dtype))

    with pytest.raises(JobError, match=r"the weight has shape .* for a batch of 16 .*\[16\]"):
        make_rig(tmp_path, Column()).run(1)


def test_float16_skips_an_overflow_on_all_replicas_and_lowers_the_scale(tmp_path: Path) -> None:
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("mixed_float16")
    changes: dict[str, Any] = {
        "precision__policy": Precision.mixed_float16,
        "precision__initial_loss_scale": 2.0**24,
        "train__micro_batches": 2,
    }
    rig = make_rig(tmp_path, Tiny(), replicas=2, **changes)
    before = rig.weights
    rig.run(1)
    first = rig.results[0]
    # A gradient above 65504 / 2^24 = 0.004 overflows float16.
    assert (first.finite.tolist(), first.overflowed.tolist()) == ([False], [True])
    assert difference(before, rig.weights) == 0
    rig.run(20)
    scales = np.concatenate([result.loss_scale for result in rig.results])
    finite = np.concatenate([result.finite for result in rig.results])
    assert finite[-1] and (np.diff(scales)[~finite[:-1]] == -scales[:-1][~finite[:-1]] / 2).all()
    assert rig.losses[-1] < rig.losses[0]


def test_float16_computes_nearly_what_float32_computes(tmp_path: Path) -> None:
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    exact = make_rig(tmp_path, Tiny(), replicas=2).run(5)
    keras.config.set_dtype_policy("mixed_float16")
    half = make_rig(
        tmp_path,
        Tiny(),
        replicas=2,
        precision__policy=Precision.mixed_float16,
        precision__initial_loss_scale=128.0,
    ).run(5)
    assert all(result.finite.all() for result in half.results)
    # float16 has 11 bits: 5e-4 a rounding.
    assert difference(exact.weights, half.weights) < 5e-3
    norms = [np.concatenate([r.gradient_norm for r in rig.results]) for rig in (exact, half)]
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-2)


def test_values_are_clipped_after_the_norm(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, Tiny(), optimizer__clip_value=1e-3)
    before = rig.weights
    rig.run(1)
    moved = [np.abs(a - b).max() for a, b in zip(before, rig.weights, strict=True)]
    assert max(moved) == pytest.approx(0.1 * 1e-3, rel=1e-9)  # learning rate x limit


def test_weight_decay_leaves_excluded_variables_alone(tmp_path: Path) -> None:
    class Constant(Tiny):
        def loss(self, batch: Batch, outputs: tf.Tensor) -> tf.Tensor:
            return 0.0 * super().loss(batch, outputs)

    rig = make_rig(
        tmp_path,
        Constant(),
        replicas=2,
        optimizer__weight_decay=0.5,
        optimizer__weight_decay_exclude=["*kernel"],
    )
    for variable in rig.model.trainable_variables:
        variable.assign(tf.ones_like(variable))
    rig.run(1)
    # Decay alone: 1 - learning rate x decay.
    expected = [1.0 if v.path.endswith("kernel") else 0.95 for v in rig.model.trainable_variables]
    for weights, value in zip(rig.weights, expected, strict=True):
        np.testing.assert_allclose(weights, value, rtol=1e-12)
    with pytest.raises(JobError, match=r"'\*nothing' fits no variable; they are .*kernel"):
        make_rig(
            tmp_path,
            Tiny(),
            optimizer__weight_decay=0.5,
            optimizer__weight_decay_exclude=["*nothing"],
        )


def test_weight_decay_names_layers_as_the_first_model_of_a_process_does(tmp_path: Path) -> None:
    # Keras goes on counting: the second model's layers are dense_2 and dense_3, or beyond.
    for _ in range(2):
        rig = make_rig(
            tmp_path,
            Tiny(),
            optimizer__weight_decay=0.5,
            optimizer__weight_decay_exclude=["*/dense/*", "*/dense_1/bias"],
        )
        (optimizer,) = rig.optimizers._optimizers.values()
        first, bias, second, last = rig.model.trainable_variables
        uses = [optimizer._use_weight_decay(v) for v in (first, bias, second, last)]
        assert uses == [False, False, True, False]


def test_averages_begin_at_the_weights_that_were_loaded(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, Tiny(), replicas=2, optimizer__ema_decay=0.9).run(2)
    for variable in rig.model.trainable_variables:
        variable.assign(tf.ones_like(variable.value))
    rig.optimizers.take_initial_weights()
    averages = rig.optimizers.averages
    assert averages is not None
    with averages.in_place():
        assert all((weights == 1).all() for weights in rig.weights)
    assert int(averages.variables[0].numpy()) == 0


def test_averages_follow_the_weights_whatever_the_replicas(tmp_path: Path) -> None:
    rigs = [make_rig(tmp_path, Tiny(), replicas=r, optimizer__ema_decay=0.9) for r in (1, 2)]
    expected = [w.copy() for w in rigs[0].weights]
    for n in range(5):
        keep = min(0.9, (1 + n) / (10 + n))
        for rig in rigs:
            rig.run(1)
        expected = [
            keep * a + (1 - keep) * w for a, w in zip(expected, rigs[0].weights, strict=True)
        ]
    for rig in rigs:
        averages = rig.optimizers.averages
        assert averages is not None
        trained = rig.weights
        with averages.in_place():
            # The decay is a float32 number.
            assert difference(expected, rig.weights) < 1e-7
        assert difference(trained, rig.weights) == 0


class Words(Tiny):
    """Looks words up in a table large enough that its gradient is sent as slices."""

    def model(self) -> keras.Model:
        inputs = keras.layers.Input((8,))
        words = keras.layers.Embedding(40_000, 8, name="table")(inputs)
        pooled = keras.layers.GlobalAveragePooling1D()(words)
        return keras.Model(inputs, keras.layers.Dense(3)(pooled))

    def prepare(self, batch: Batch, *, training: bool, seeds: Any) -> Batch:
        x = tf.cast(tf.math.floormod(batch["x"] * 1000.0, 40_000.0), tf.int32)
        return {**batch, "x": x}


# The dense layer's two gradients and the sums, and the table's only where the batches of replicas
# differ in length: 16 examples over 3 are 6, 5 and 5.
@pytest.mark.parametrize(("replicas", "reduced_at_once"), [(2, 3), (3, 4)])
@pytest.mark.parametrize("optimizer", [OptimizerName.sgd, OptimizerName.adam])
def test_large_embeddings_travel_as_slices_and_are_updated_as_on_one_device(
    tmp_path: Path, optimizer: OptimizerName, replicas: int, reduced_at_once: int
) -> None:
    one = make_rig(tmp_path, Words(), optimizer__name=optimizer).run(4)
    many = make_rig(
        tmp_path, Words(), replicas=replicas, optimizer__name=optimizer, train__micro_batches=2
    )
    reduced: list[int] = []

    class Counting(tf.distribute.ReductionToOneDevice):
        def batch_reduce_implementation(self, reduce_op: Any, pairs: Any, options: Any) -> Any:
            reduced.append(len(pairs))
            return super().batch_reduce_implementation(reduce_op, pairs, options)

    many.strategy.extended._cross_device_ops = Counting()
    many.strategy.extended._inferred_cross_device_ops = Counting()
    many.run(4)
    assert difference(one.weights, many.weights) < EXACT
    assert reduced == [reduced_at_once]


def test_rows_of_a_table_that_do_not_follow_from_the_batch_need_no_even_batches(
    tmp_path: Path,
) -> None:
    class Pulled(Words):
        """Pulls a thousand rows to zero in every step, whatever the batch holds."""

        def losses(self, model: keras.Model, batch: Batch, *, training: bool) -> Outcome:
            outcome = super().losses(model, batch, training=training)
            rows = model.get_layer("table")(tf.range(1000))
            return Outcome(loss=outcome.loss, terms={"pull": tf.reduce_mean(tf.square(rows))})

    changes: dict[str, Any] = {"train__global_batch_size": 17}
    one = make_rig(tmp_path, Pulled(), **changes).run(4)
    many = make_rig(tmp_path, Pulled(), replicas=3, **changes).run(4)
    assert difference(one.weights, many.weights) < EXACT


def test_a_missing_gradient_is_zero_where_that_is_allowed(tmp_path: Path) -> None:
    class Idle(Tiny):
        def model(self) -> keras.Model:
            inputs = keras.layers.Input((8,))
            model = keras.Model(inputs, keras.layers.Dense(3)(inputs))
            model.idle = model.add_weight(shape=(2,), name="idle")
            return model

    rig = make_rig(tmp_path, Idle(), replicas=2, train__allow_missing_gradients=True)
    idle = np.asarray(rig.model.idle)
    rig.run(2)
    np.testing.assert_array_equal(idle, np.asarray(rig.model.idle))


@pytest.mark.parametrize("optimizer", [name for name in OptimizerName if name.is_proven])
def test_xla_computes_what_a_graph_computes(tmp_path: Path, optimizer: OptimizerName) -> None:
    changes: dict[str, Any] = {
        "optimizer__name": optimizer,
        "optimizer__learning_rate": 0.01,
        "optimizer__weight_decay": 0.01,
        "optimizer__clip_global_norm": 0.5,
        "optimizer__ema_decay": 0.9,
    }
    job = Tiny(normalise=True)
    graph = make_rig(tmp_path, job, train__compile=Compile.graph, **changes).run(1, 7, 4)
    compiled = make_rig(tmp_path, job, train__compile=Compile.xla, **changes).run(1, 7, 4)
    assert difference(graph.weights, compiled.weights) < EXACT
    assert np.abs(graph.losses - compiled.losses).max() < EXACT
    assert compiled.step.num_traces == 1
    assert compiled.ledger == graph.ledger


@pytest.mark.parametrize(
    "kind", [pytest.param("layers", marks=pytest.mark.thorough), "embedding", "uneven"]
)
def test_xla_around_the_reduction_computes_what_a_graph_computes(tmp_path: Path, kind: str) -> None:
    changes: dict[str, Any] = {
        "replicas": 3 if kind == "uneven" else 2,
        "optimizer__name": OptimizerName.adam,
        "optimizer__learning_rate": 0.01,
        "train__micro_batches": 2,
        "train__global_batch_size": 17 if kind == "uneven" else 16,
    }
    job: Tiny = Words() if kind == "embedding" else Tiny(normalise=True)
    graph = make_rig(tmp_path, job, train__compile=Compile.graph, **changes).run(1, 7, 4)
    compiled = make_rig(tmp_path, job, train__compile=Compile.xla, **changes).run(1, 7, 4)
    assert difference(graph.weights, compiled.weights) < EXACT
    assert np.abs(graph.losses - compiled.losses).max() < EXACT
    assert compiled.ledger == graph.ledger
    assert compiled.step.num_traces == graph.step.num_traces
    text = compiled.step._functions[Compile.xla].get_concrete_function().graph.as_graph_def()
    assert "_XlaMustCompile" in str(text)


class NotForXla(Tiny):
    """A loss with an operation that XLA has no kernel for."""

    def loss(self, batch: Batch, outputs: tf.Tensor) -> tf.Tensor:
        losses = super().loss(batch, outputs)
        return losses + 0 * tf.strings.to_number(tf.strings.as_string(losses), losses.dtype)


@pytest.mark.parametrize("replicas", [1, 2])
def test_what_xla_cannot_compile_is_named_with_the_key(tmp_path: Path, replicas: int) -> None:
    rig = make_rig(tmp_path, NotForXla(), replicas=replicas, train__compile=Compile.xla)
    with pytest.raises(JobError, match=r"XLA has no AsString.*train.compile=graph"):
        rig.run(2)


class ShapesFromData(Tiny):
    """A loss with a tensor as long as the data say."""

    def loss(self, batch: Batch, outputs: tf.Tensor) -> tf.Tensor:
        losses = super().loss(batch, outputs)
        count = tf.reduce_sum(tf.range(1 + tf.reduce_max(batch["y"])))
        return losses + 0 * tf.cast(count, losses.dtype)


def test_shapes_that_depend_on_the_data_are_refused_for_xla(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, ShapesFromData(), train__compile=Compile.xla)
    with pytest.raises(JobError, match=r"those of Range do: give .*train.compile=graph"):
        rig.run(2)


@pytest.mark.parametrize(
    ("job", "reason"),
    [
        (NotForXla, "XLA has no AsString"),
        (ShapesFromData, "XLA needs shapes that do not depend"),
        # When it is tried follows from the clock, and must not decide what is dropped.
        (functools.partial(Tiny, dropout=0.5), "dropout and other random operations draw other"),
    ],
)
def test_auto_goes_on_as_a_graph_where_xla_cannot(
    tmp_path: Path, job: Callable[[], Tiny], reason: str
) -> None:
    told: list[str] = []
    endless = {"train__steps": 10_000_000, "train__max_block_steps": 2_000}
    rig = make_rig(tmp_path, job(), **endless)
    rig.step._tell = told.append
    rig.plan.paths.root.mkdir(parents=True, exist_ok=True)
    while not told:
        rig.run(2_000)
    assert told[0].startswith(f"train.compile=auto: graph ({reason}")
    assert rig.step.mode is Compile.graph


def test_a_trial_of_xla_that_fails_leaves_no_trace(tmp_path: Path) -> None:
    state = keras.Variable([1.0])
    plan = tiny_plan(tmp_path, train__steps=10_000_000)
    choice = Choice(plan, [state])
    for _ in range(2):
        choice.observe(10, 1.0)

    def run(mode: Compile) -> None:
        state.assign([7.0])
        raise tf.errors.ResourceExhaustedError(None, None, f"no memory for {mode.value}\nmore")

    found = choice.decide(10_000_000, 10, tf.compat.v1.GraphDef, run)
    assert found == (
        Compile.graph,
        "train.compile=auto: graph (under XLA it fails: no memory for xla)",
    )
    assert state.numpy().tolist() == [1.0]


@pytest.mark.parametrize("mode", [Compile.graph, Compile.xla])
def test_a_step_that_is_not_finite_changes_nothing(tmp_path: Path, mode: Compile) -> None:
    class Poisoned(Tiny):
        def loss(self, batch: Batch, outputs: tf.Tensor) -> tf.Tensor:
            losses = super().loss(batch, outputs)
            return losses / tf.cast(batch["poison"], losses.dtype)

        def prepare(self, batch: Batch, *, training: bool, seeds: Any) -> Batch:
            # The second step's positions are 16 to 31.
            bad = (seeds[:, 0] >= 16) & (seeds[:, 0] < 32) if training else seeds
            return {**batch, "poison": 1 - tf.cast(bad, tf.int32) if training else 1}

    changes: dict[str, Any] = {
        "optimizer__name": OptimizerName.adam,
        "optimizer__weight_decay": 0.1,
        "optimizer__ema_decay": 0.9,
        "train__compile": mode,
    }
    rig = make_rig(tmp_path, Poisoned(normalise=True), **changes).run(1)
    state = [v for group in rig.optimizers.variables.values() for v in group]
    before = [*rig.weights, *(np.asarray(tf.convert_to_tensor(v.value)) for v in state)]
    rig.run(1)
    assert rig.results[-1].finite.tolist() == [False]
    assert rig.results[-1].bad_variable[0].endswith("kernel")
    after = [*rig.weights, *(np.asarray(tf.convert_to_tensor(v.value)) for v in state)]
    assert difference(before, after) == 0
    rig.run(1)
    assert rig.results[-1].finite.tolist() == [True]


def test_auto_tries_xla_once_and_says_what_it_chose(tmp_path: Path) -> None:
    told: list[str] = []
    rig = make_rig(tmp_path, Tiny(), train__steps=10_000_000, train__max_block_steps=2_000)
    rig.step._tell = told.append
    rig.plan.paths.root.mkdir(parents=True, exist_ok=True)
    twin = make_rig(tmp_path, Tiny(), train__compile=Compile.graph)
    while not told:
        rig.run(2_000)
        twin.run(2_000)
    # The trial leaves no trace in the weights.
    assert difference(rig.weights, twin.weights) < 1e-9
    assert rig.ledger == twin.ledger
    assert f"auto: {rig.step.mode.value} (" in told[0]
    assert "steps/s as xla" in told[0] and "steps/s as graph" in told[0]
    # After a restart it begins with what was chosen, and asks no more.
    again = make_rig(tmp_path, Tiny(), train__steps=10_000_000, train__max_block_steps=2_000)
    again.step._tell = told.append
    again.run(1, 2_000, 2_000)
    assert again.step.mode is rig.step.mode and len(told) == 1


def test_auto_stays_a_graph_with_several_replicas_or_determinism(tmp_path: Path) -> None:
    for changes in ({"replicas": 2}, {"train__deterministic": True}):
        rig = make_rig(tmp_path, Tiny(), train__steps=10_000_000, **changes).run(1, 500, 500)
        assert rig.step.mode is Compile.graph


def test_xla_takes_fetched_features_in_blocks_of_any_length(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, Tiny(), host=True, train__compile=Compile.xla).run(3, 5, 1)
    graph = make_rig(tmp_path, Tiny(), host=True, train__compile=Compile.graph).run(3, 5, 1)
    assert difference(rig.weights, graph.weights) < EXACT
    assert rig.step.num_traces == 1
    text = rig.step._functions[Compile.xla].get_concrete_function().graph.as_graph_def()
    assert "_XlaMustCompile" in str(text)
