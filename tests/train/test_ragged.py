"""Rows of different lengths are padded to buckets, by one trace, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from orchestrator.errors import JobError
from orchestrator.spec.schema import Compile
from orchestrator.train.data import Feeder, Order, fetch_block, make_shards
from orchestrator.train.inputs import feature_spec, step_features
from orchestrator.train.job import Batch, Job, Outcome
from orchestrator.train.ragged import RaggedSource, bucket_lengths
from orchestrator.train.sources import Feature, Source, Split
from tests.train.rig import Rig, make_rig


def make_source(n: int = 96, buckets: tuple[int, ...] = (4, 8, 16)) -> RaggedSource:
    """Return rows of which most are short: lengths 1 to 15."""
    rng = np.random.default_rng(n)
    lengths = np.minimum(rng.geometric(0.3, n), 15)
    rows = [rng.integers(1, 20, length).astype(np.int32) for length in lengths]
    return RaggedSource(rows, buckets=buckets, fixed={"y": [int(row.sum()) % 3 for row in rows]})


def test_a_row_is_fetched_whole_and_padded_with_zeros() -> None:
    rows = [np.array([1, 2, 3]), np.array([4]), np.arange(5, 12)]
    source = RaggedSource(rows, buckets=(8, 4), fixed={"y": [0, 1, 2]})
    assert source.buckets == (4, 8)
    fetched = source.fetch(np.array([1, 0]))
    np.testing.assert_array_equal(fetched["x"], [[4, 0, 0, 0], [1, 2, 3, 0]])
    np.testing.assert_array_equal(fetched["length"], [1, 3])
    np.testing.assert_array_equal(fetched["y"], [1, 0])
    assert source.fetch(np.array([2]))["x"].shape == (1, 8)
    assert source.features["x"] == Feature("int64", (None,))
    assert source.features["length"] == Feature("int32", ())


def test_rows_may_have_more_axes() -> None:
    source = RaggedSource([np.ones((2, 3)), np.ones((4, 3))], buckets=[4], feature="sound")
    assert source.features["sound"] == Feature("float64", (None, 3))
    np.testing.assert_array_equal(source.fetch(np.array([0]))["sound"].sum(axis=2), [[3, 3, 0, 0]])


def test_the_smallest_bucket_that_holds_the_longest_row_is_taken() -> None:
    lengths = np.array([[1, 4], [5, 2], [9, 16], [8, 8]])
    np.testing.assert_array_equal(bucket_lengths(lengths, (4, 8, 16)), [4, 8, 16, 8])


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([], "at least one row"),
        ([np.ones(2), np.ones(0)], "none that is empty"),
        ([np.ones(2), np.ones(9)], "row 1 has length 9.*buckets=\\(4, 8\\)"),
        ([np.ones((2, 3)), np.ones((2, 4))], "more than length"),
    ],
)
def test_rows_that_do_not_fit_are_refused(rows: list[np.ndarray], told: str) -> None:
    with pytest.raises(JobError, match=told):
        RaggedSource(rows, buckets=(4, 8))


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ({"fixed": {"length": [1, 2]}}, "'length' is the length of each row"),
        ({"fixed": {"x": [1, 2]}}, "'x' is the rows"),
        ({"feature": "length"}, "'length' is the length of each row"),
    ],
)
def test_names_that_are_taken_are_refused(names: dict[str, Any], told: str) -> None:
    with pytest.raises(JobError, match=told):
        RaggedSource([np.ones(2), np.ones(4)], buckets=[4, 8], **names)


def test_the_digest_knows_where_one_row_ends() -> None:
    first = RaggedSource([np.arange(3), np.arange(2)], buckets=[4])
    second = RaggedSource([np.arange(3), np.arange(2)], buckets=[4])
    other = RaggedSource([np.array([0, 1]), np.array([2, 0, 1])], buckets=[4])
    assert first.digest == second.digest != other.digest


def test_every_step_of_a_block_sees_its_own_bucket_in_one_trace() -> None:
    source = make_source()
    ids = np.array([[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]])
    traces = []

    @tf.function(
        input_signature=[feature_spec(source, 3, resident=False), tf.TensorSpec([], "int32")]
    )
    def row(features: Batch, i: tf.Tensor) -> Batch:
        traces.append(1)
        return step_features(features, i)

    seen = set()
    for steps in (4, 3, 1):
        block = {name: tf.constant(v) for name, v in fetch_block(source, ids[:steps]).items()}
        for i in range(steps):
            found = row(block, tf.constant(i))
            expected = source.fetch(ids[i])
            assert set(found) == set(expected)
            for name, value in expected.items():
                np.testing.assert_array_equal(found[name], value)
            seen.add(found["x"].shape[1])
    assert len(seen) > 1
    assert len(traces) == 1


class Ragged(Job):
    """Classifies the masked sum of the embeddings of a row."""

    def __init__(self, buckets: tuple[int, ...] = (4, 8, 16)):
        self.buckets = buckets
        self.widths: list[int | None] = []

    def model(self) -> keras.Model:
        tokens = keras.Input((None,), dtype="int32")
        mask = keras.Input((None, 1))
        total = keras.ops.sum(keras.layers.Embedding(20, 8)(tokens) * mask, axis=1)
        return keras.Model([tokens, mask], keras.layers.Dense(3)(total))

    def source(self, split: Split) -> Source:
        return make_source(96 if split is Split.TRAIN else 50, self.buckets)

    def losses(self, model: keras.Model, batch: Batch, *, training: bool) -> Outcome:
        self.widths.append(batch["x"].shape[1])
        mask = tf.sequence_mask(batch["length"], tf.shape(batch["x"])[1], tf.float32)
        outputs = model([batch["x"], mask[..., None]], training=training)
        loss = keras.losses.sparse_categorical_crossentropy(batch["y"], outputs, from_logits=True)
        width = tf.fill(tf.shape(loss), tf.cast(tf.shape(batch["x"])[1], tf.float32))
        return Outcome(loss=loss, metrics={"width": width})


def test_buckets_and_replicas_change_nothing_but_the_padding(tmp_path: Path) -> None:
    curves, evaluated, widths = [], [], []
    for replicas, buckets in ((1, (16,)), (1, (4, 8, 16)), (2, (4, 8, 16)), (3, (2, 5, 16))):
        rig = make_rig(tmp_path, Ragged(buckets), replicas=replicas, train__micro_batches=2)
        rig.run(3, 5, 1)
        assert rig.step.num_traces == 1
        curves.append(rig.losses)
        evaluated.append(rig.evaluation.run()["loss"])
        widths.append({float(v) for r in rig.results for v in r.sums["width"] / r.weight})
    for other in curves[1:]:
        np.testing.assert_allclose(other, curves[0], rtol=1e-5)
    np.testing.assert_allclose(evaluated, evaluated[0], rtol=1e-5)
    assert widths[0] == {16.0}
    assert widths[1] <= {4.0, 8.0, 16.0} and len(widths[1]) > 1


class Recurrent(Ragged):
    """Reads a row one after another; padding is masked."""

    def __init__(self, dropout: float):
        super().__init__()
        self.dropout = dropout

    def model(self) -> keras.Model:
        tokens, mask = keras.Input((None,), dtype="int32"), keras.Input((None, 1))
        words = keras.layers.Embedding(20, 8)(tokens)
        gru = keras.layers.GRU(6, dropout=self.dropout, recurrent_dropout=self.dropout)
        last = gru(words, mask=keras.ops.squeeze(mask, -1) > 0)
        return keras.Model([tokens, mask], keras.layers.Dense(3)(last))


def test_a_recurrent_layer_over_buckets_is_exact_whatever_the_replicas(tmp_path: Path) -> None:
    rigs = [
        make_rig(tmp_path, Recurrent(0.0), replicas=replicas, train__micro_batches=micro).run(2, 3)
        for replicas, micro in ((1, 1), (2, 2), (3, 1))
    ]
    for rig in rigs[1:]:
        np.testing.assert_allclose(rig.losses, rigs[0].losses, rtol=1e-5)


@pytest.mark.parametrize("replicas", [pytest.param(1, marks=pytest.mark.thorough), 2])
def test_dropout_of_a_recurrent_layer_repeats_on_replay(tmp_path: Path, replicas: int) -> None:
    def fresh() -> Rig:
        return make_rig(tmp_path, Recurrent(0.5), replicas=replicas, train__micro_batches=2)

    first, second = fresh().run(4), fresh().run(1, 3)
    np.testing.assert_array_equal(first.losses, second.losses)
    plain = make_rig(tmp_path, Recurrent(0.0)).run(4)
    assert not np.isclose(first.losses, plain.losses, rtol=1e-4).any()


def test_xla_says_that_it_compiles_for_each_bucket(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"train__compile": Compile.xla, "train__global_batch_size": 1}
    rig = make_rig(tmp_path, Ragged((4, 16)), **changes)
    told: list[int] = []
    rig.step._compiles = lambda: told.append(rig.done)
    for _ in range(12):
        rig.run(1)
    widths = [float(result.sums["width"][0]) for result in rig.results]
    assert told == [widths.index(width) for width in dict.fromkeys(widths)] and len(told) == 2


@pytest.mark.parametrize(("ahead", "num_steps"), [(9, 3), (9, 9), (1, 14)])
def test_a_block_cut_short_or_prolonged_keeps_its_steps(ahead: int, num_steps: int) -> None:
    source, shards = make_source(), make_shards((1,), range(1))
    feeders = [Feeder(source, Order(0, 96), shards, 1, resident=False) for _ in range(2)]
    feeders[0].prefetch(2, ahead)
    for first, length in ((2, num_steps), (2 + num_steps, 10)):
        found, plain = (feeder.take(first, length).features[0] for feeder in feeders)
        for i in range(length):
            left, right = (
                step_features({k: tf.constant(v) for k, v in part.items()}, tf.constant(i))
                for part in (found, plain)
            )
            for name in source.features:
                np.testing.assert_array_equal(left[name], right[name])
