"""Whatever a job does with its tapes: many replicas compute what a loop by hand computes.

Each reference below is plain TensorFlow over the whole batch, with plain descent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from orchestrator.spec.schema import OptimizerGroup, Precision
from orchestrator.train.sources import Split
from tests.train import freedom
from tests.train.freedom import Free, crossentropy
from tests.train.rig import Rig, assemble, make_rig

# float64: additions in another order, 1e-16 each, times a few hundred of them.
EXACT = 1e-12
RATE = 0.1
STEPS = 4

# model, rows of the global batch -> loss, and a gradient for each variable
ByHand = Callable[[keras.Model, dict[str, np.ndarray]], tuple[Any, list[tuple[Any, Any]]]]


@pytest.fixture
def half() -> Any:
    """Build models in mixed_float16."""
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("mixed_float16")
    yield
    keras.config.set_dtype_policy("float32")


def rows_of(rig: Rig, step: int) -> dict[str, np.ndarray]:
    """Return the global batch of a step, in the order of its positions."""
    ids = np.concatenate([part[0] for part in rig.feeder.take(step, 1).ids])
    rows = freedom.rows(Split.TRAIN)
    return {name: value[ids] for name, value in rows.items()}


def descend(rig: Rig, by_hand: ByHand) -> list[float]:
    """Train the rig's untouched model by hand; return the losses."""
    losses = []
    for step in range(STEPS):
        loss, gradients = by_hand(rig.model, rows_of(rig, step))
        for variable, gradient in gradients:
            variable.assign(variable - RATE * gradient)
        losses.append(float(loss))
    return losses


def pairs(variables: Sequence[Any], tape: tf.GradientTape, loss: Any) -> list[tuple[Any, Any]]:
    """Return each variable with its gradient."""
    gradients = tape.gradient(loss, [variable.value for variable in variables])
    return list(zip(variables, map(tf.convert_to_tensor, gradients), strict=True))


def apart(left: Sequence[np.ndarray], right: Sequence[np.ndarray]) -> float:
    """Return the largest distance of two values of a variable, relative to its norm."""
    both = zip(left, right, strict=True)
    return max(float(np.linalg.norm(a - b) / max(np.linalg.norm(a), 1e-30)) for a, b in both)


def check(folder: Path, make: Callable[[], Free], by_hand: ByHand, **changes: Any) -> list[Rig]:
    """Compare one device, two replicas, three uneven ones and micro-batches with the reference."""
    reference = make_rig(folder, make(), **changes)
    losses = descend(reference, by_hand)
    rigs = []
    # 16 examples: 8 and 8; then 6, 5 and 5, each of these in two parts.
    for replicas, micro in ((1, 1), (2, 1), (3, 2)):
        rig = make_rig(folder, make(), replicas=replicas, train__micro_batches=micro, **changes)
        rig.run(1, STEPS - 1)
        assert apart(reference.weights, rig.weights) < EXACT, (replicas, micro)
        np.testing.assert_allclose(rig.losses, losses, rtol=EXACT)
        rigs.append(rig)
    return rigs


@pytest.mark.usefixtures("float64")
def test_several_inputs_outputs_and_terms(tmp_path: Path) -> None:
    def by_hand(model: keras.Model, rows: dict[str, np.ndarray]) -> Any:
        variables = model.trainable_variables
        with tf.GradientTape() as tape:
            out = model({"x": rows["x"], "word": rows["word"]})
            loss = tf.reduce_mean(crossentropy(rows["y"], out["kind"]))
            loss += 0.5 * tf.reduce_mean(tf.abs(out["size"][:, 0] - rows["z"]))
            for variable in variables:
                if variable.path.endswith("kernel"):
                    loss += 0.01 * tf.reduce_sum(tf.square(variable.value))
            loss += 0.1 * tf.reduce_mean(tf.square(out["hidden"]))
        return loss, pairs(variables, tape, loss)

    check(tmp_path, freedom.Heads, by_hand)


@pytest.mark.usefixtures("float64")
def test_a_gradient_of_a_gradient_with_two_optimizers(tmp_path: Path) -> None:
    def by_hand(model: keras.Model, rows: dict[str, np.ndarray]) -> Any:
        with tf.GradientTape() as of_maker:
            cost = -tf.reduce_mean(model.critic(model.maker(rows["noise"])))
        made = model.maker(rows["noise"])
        with tf.GradientTape() as of_critic:
            between = rows["x"] + rows["mix"] * (made - rows["x"])
            with tf.GradientTape() as inner:
                inner.watch(between)
                judged = tf.reduce_sum(model.critic(between))
            slope = tf.sqrt(tf.reduce_sum(tf.square(inner.gradient(judged, between)), axis=1))
            real = model.critic(rows["x"])
            loss = tf.reduce_mean(model.critic(made)) - tf.reduce_mean(real)
            loss += 10.0 * tf.reduce_mean(tf.square(slope - 1.0))
            loss += 0.001 * tf.reduce_mean(tf.square(real))
        # The critic learns at half the rate.
        its = pairs(model.critic.trainable_variables, of_critic, loss)
        return loss, [
            *pairs(model.maker.trainable_variables, of_maker, cost),
            *((variable, 0.5 * gradient) for variable, gradient in its),
        ]

    groups = {"critic": OptimizerGroup(learning_rate=RATE / 2)}
    rigs = check(tmp_path, freedom.Wasserstein, by_hand, optimizer__groups=groups)
    parts = [
        sum(r.sums[name][0] for name in ("distance", "slope", "drift"))
        for r in (rig.results[0] for rig in rigs)
    ]
    np.testing.assert_allclose(parts, rigs[0].losses[0] * 16, rtol=EXACT)


@pytest.mark.usefixtures("float64")
def test_one_persistent_tape_for_two_losses(tmp_path: Path) -> None:
    def by_hand(model: keras.Model, rows: dict[str, np.ndarray]) -> Any:
        body = [v for layer in model.body for v in layer.trainable_variables]
        with tf.GradientTape() as first:
            kind, domain = model(rows["x"])
            loss = tf.reduce_mean(crossentropy(rows["y"], kind))
            cost = loss - 0.3 * tf.reduce_mean(crossentropy(rows["domain"], domain))
        with tf.GradientTape() as second:
            probed = tf.reduce_mean(crossentropy(rows["domain"], model(rows["x"])[1]))
        probe = pairs(model.probe.trainable_variables, second, probed)
        return loss, [*pairs(body, first, cost), *probe]

    check(tmp_path, freedom.Probed, by_hand)


@pytest.mark.usefixtures("float64")
def test_a_gradient_of_the_jobs_own(tmp_path: Path) -> None:
    def by_hand(model: keras.Model, rows: dict[str, np.ndarray]) -> Any:
        trunk, head = model.body
        with tf.GradientTape(persistent=True) as tape:
            kind, domain = model(rows["x"])
            first = tf.reduce_mean(crossentropy(rows["y"], kind))
            second = tf.reduce_mean(crossentropy(rows["domain"], domain))
            against = first - 0.3 * second
        return first + second, [
            *pairs(trunk.trainable_variables, tape, against),
            *pairs(head.trainable_variables, tape, first),
            *pairs(model.probe.trainable_variables, tape, second),
        ]

    check(tmp_path, freedom.Reversed, by_hand)


@pytest.mark.usefixtures("float64")
def test_metrics_that_are_no_means(tmp_path: Path) -> None:
    sizes = {"data__num_examples": 100, "data__num_eval_examples": 100}
    rigs = [make_rig(tmp_path, freedom.Ranked(), replicas=r, **sizes).run(5) for r in (1, 2, 3)]
    rows = freedom.rows(Split.EVAL)
    score = rigs[0].model(rows["x"]).numpy()[:, 0]
    is_yes, said_yes = rows["domain"] == 1, score > 0.5
    precision = (is_yes & said_yes).sum() / said_yes.sum()
    recall = (is_yes & said_yes).sum() / is_yes.sum()
    # AUC is the share of pairs of a yes and a no that are ranked right; equal bins count half.
    bins = np.floor(score * freedom.NUM_BINS)
    ahead = bins[is_yes][:, None] - bins[~is_yes][None]
    expected = {
        "f1": 2 * precision * recall / (precision + recall),
        "auc": np.where(ahead == 0, 0.5, ahead > 0).mean(),
    }
    assert 0.5 < expected["auc"] < 1 and 0 < expected["f1"] < 1
    for rig in rigs:
        found = rig.evaluation.run()
        assert found.keys() == {"loss", "f1", "auc"}
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=EXACT)
    # Not what the mean over batches would have been.
    halves = [np.where(part == 0, 0.5, part > 0).mean() for part in np.array_split(ahead, 7)]
    assert abs(np.mean(halves) - expected["auc"]) > 1e-6


@pytest.mark.usefixtures("float64")
def test_shared_weights_penalties_sample_weights_and_masked_tokens(tmp_path: Path) -> None:
    def by_hand(model: keras.Model, rows: dict[str, np.ndarray]) -> Any:
        variables = model.trainable_variables
        table = model.table.trainable_variables[0]
        inputs, targets = rows["tokens"][:, :-1], rows["tokens"][:, 1:]
        known = (targets > 0).astype("float64") * rows["weight"][:, None]
        with tf.GradientTape() as tape:
            logits = tf.matmul(model(inputs), table.value, transpose_b=True)
            # A mean over tokens, not over examples.
            loss = tf.reduce_sum(known * crossentropy(targets, logits)) / known.sum()
            for variable in variables:
                if not variable.path.endswith("bias"):
                    loss += 2.0**-8 * tf.reduce_sum(tf.square(variable.value))
        return loss, pairs(variables, tape, loss)

    check(tmp_path, freedom.Tied, by_hand)


def test_slices_large_and_small_and_an_overflow_on_one_replica(tmp_path: Path, half: Any) -> None:
    changes: dict[str, Any] = {
        "precision__policy": Precision.mixed_float16,
        "precision__initial_loss_scale": 1024.0,
        "train__micro_batches": 2,
    }
    single = make_rig(tmp_path, freedom.Tables(), **changes).run(3)
    # The last example of step 2 belongs to the last replica and its second micro-batch.
    victim = float(rows_of(single, 1)["z"][-1])
    for replicas in (1, 3):
        job = freedom.Tables()
        rig = make_rig(tmp_path, job, replicas=replicas, **changes).run(3)
        assert job.kinds == [tf.IndexedSlices, tf.IndexedSlices]
        # float16 has 11 bits: 5e-4 a rounding.
        assert apart(single.weights, rig.weights) < 1e-3

        spoilt = make_rig(tmp_path, freedom.Tables(victim, 1e9), replicas=replicas, **changes)
        before = [w.copy() for w in spoilt.run(1).weights]
        spoilt.run(1)
        result = spoilt.results[-1]
        assert (result.finite.tolist(), result.overflowed.tolist()) == ([False], [True])
        assert np.isfinite(result.sums["loss"]).all()
        for variable, weights in zip(spoilt.model.variables, before, strict=True):
            for local in spoilt.strategy.experimental_local_results(variable.value):
                np.testing.assert_array_equal(local, weights)
        spoilt.run(1)
        assert [float(r.loss_scale[0]) for r in spoilt.results] == [1024.0, 1024.0, 512.0]
        assert spoilt.results[-1].finite.all()
        assert apart(before, spoilt.weights) > 0


def test_two_optimizers_accumulation_and_a_gradient_penalty_in_float16(tmp_path: Path) -> None:
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    changes: dict[str, Any] = {
        "replicas": 2,
        "train__micro_batches": 2,
        "optimizer__groups": {"critic": OptimizerGroup(learning_rate=RATE / 2)},
    }
    exact = make_rig(tmp_path, freedom.Wasserstein(), **changes).run(STEPS)
    keras.config.set_dtype_policy("mixed_float16")
    changes |= {
        "precision__policy": Precision.mixed_float16,
        "precision__initial_loss_scale": 128.0,
    }
    try:
        rig = make_rig(tmp_path, freedom.Wasserstein(), **changes).run(STEPS)
        # The last replica's first gradient of step 2 is infinite.
        plan = dataclasses.replace(rig.plan, overflow_step=2)
        spoilt = assemble(plan, freedom.Wasserstein(), rig.strategy, ["CPU:0", "CPU:1"]).run(1)
    finally:
        keras.config.set_dtype_policy("float32")
    # float16 has 11 bits: 5e-4 a rounding. Not relative: the gradient of the critic's last bias
    # is a difference of two sums that are nearly equal.
    assert all(result.finite.all() for result in rig.results)
    both = zip(exact.weights, rig.weights, strict=True)
    assert max(float(np.abs(a - b).max()) for a, b in both) < 5e-3

    def state() -> list[np.ndarray]:
        sections = spoilt.optimizers.variables
        own = [v for name, group in sections.items() if name != "loss_scale" for v in group]
        values = [
            local.numpy().copy()
            for variable in [*spoilt.model.variables, *own]
            for local in spoilt.strategy.experimental_local_results(variable.value)
        ]
        assert set(sections) >= {"optimizer/maker", "optimizer/critic"}
        return values

    before = state()
    spoilt.run(1)
    assert spoilt.results[-1].overflowed.tolist() == [True]
    for old, new in zip(before, state(), strict=True):
        np.testing.assert_array_equal(old, new)
    counts = [int(o.iterations.numpy()) for o in spoilt.optimizers._optimizers.values()]
    assert counts == [1, 1]
    spoilt.run(1)
    assert spoilt.results[-1].finite.all() and float(spoilt.results[-1].loss_scale[0]) == 64.0


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("synchronised", [True, False])
def test_batch_normalisation_over_uneven_batches(tmp_path: Path, synchronised: bool) -> None:
    parts = [slice(0, 50)] if synchronised else [slice(0, 17), slice(17, 34), slice(34, 50)]

    def by_hand(model: keras.Model, rows: dict[str, np.ndarray]) -> Any:
        first, normalise, _, last = model.layers
        kept: dict[str, list[Any]] = {"mean": [], "variance": []}
        with tf.GradientTape() as tape:
            loss = 0.0
            for part in parts:
                hidden = tf.matmul(rows["x"][part], first.kernel.value)
                mean = tf.reduce_mean(hidden, axis=0)
                variance = tf.reduce_mean(tf.square(hidden - mean), axis=0)
                scaled = (hidden - mean) / tf.sqrt(variance + 1e-3)
                scaled = scaled * normalise.gamma.value + normalise.beta.value
                logits = tf.matmul(tf.nn.relu(scaled), last.kernel.value) + last.bias.value
                loss += tf.reduce_sum(crossentropy(rows["y"][part], logits)) / 50
                kept["mean"].append(mean)
                kept["variance"].append(variance)
        gradients = pairs(model.trainable_variables, tape, loss)
        for name, variable in (
            ("mean", normalise.moving_mean),
            ("variance", normalise.moving_variance),
        ):
            # Every replica counts the same, also the one with an example less.
            variable.assign(0.9 * variable + 0.1 * sum(kept[name]) / len(parts))
        return loss, gradients

    changes: dict[str, Any] = {"train__global_batch_size": 50}
    reference = make_rig(tmp_path, freedom.Normalised(synchronised), **changes)
    losses = descend(reference, by_hand)
    for replicas in (1, 2, 3) if synchronised else (3,):
        rig = make_rig(tmp_path, freedom.Normalised(synchronised), replicas=replicas, **changes)
        rig.run(1, STEPS - 1)
        assert apart(reference.weights, rig.weights) < EXACT
        np.testing.assert_allclose(rig.losses, losses, rtol=EXACT)
