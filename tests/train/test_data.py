"""The order of examples depends on the seed and the position, and on nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from orchestrator.spec.plan import split_evenly
from orchestrator.train.data import Feeder, Order, evaluation_ids, ledger_hash, make_shards
from orchestrator.train.sources import ArraySource

SIZES = [7, 96, 9_999, 10_000, 20_011]


@pytest.mark.parametrize("n", SIZES)
def test_every_epoch_is_a_permutation_and_epochs_differ(n: int) -> None:
    order = Order(seed=3, num_examples=n)
    epochs = order.examples(np.arange(2 * n, dtype=np.int64)).reshape(2, n)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(n))
    assert (epochs[0] != epochs[1]).any()


@pytest.mark.parametrize("n", SIZES)
def test_positions_can_be_asked_for_in_any_pieces(n: int) -> None:
    positions = np.arange(3 * n, dtype=np.int64)
    whole = Order(seed=3, num_examples=n).examples(positions)
    order = Order(seed=3, num_examples=n)
    pieces = [order.examples(part) for part in np.array_split(positions, 11)]
    np.testing.assert_array_equal(whole, np.concatenate(pieces))


@pytest.mark.parametrize("n", [9_999, 60_000])
def test_the_shuffle_looks_random(n: int) -> None:
    # For a random permutation the correlation with position, and between epochs and seeds, is
    # normal with deviation 1/sqrt(n-1); 5 deviations fail once in 1.7 million.
    limit = 5 / np.sqrt(n - 1)
    epochs = [
        Order(seed, n).examples(np.arange(k * n, (k + 1) * n, dtype=np.int64)).astype(float)
        for seed in (0, 1)
        for k in (0, 1)
    ]
    series = [np.arange(n, dtype=float), *epochs]
    for i, left in enumerate(series):
        for right in series[i + 1 :]:
            assert abs(np.corrcoef(left, right)[0, 1]) < limit
    for epoch in epochs:
        assert abs(np.corrcoef(epoch[:-1], epoch[1:])[0, 1]) < limit
        # Means of batches of 100 spread as those of independent draws: uniform variance / 100,
        # itself known to sqrt(2 / batches).
        means = epoch[: n // 100 * 100].reshape(-1, 100).mean(axis=1)
        expected = (n**2 - 1) / 12 / 100
        assert abs(means.var() / expected - 1) < 5 * np.sqrt(2 / len(means))


@pytest.mark.parametrize("replicas", [1, 2, 3, 5])
def test_replicas_share_out_each_global_batch(replicas: int) -> None:
    shards = make_shards(split_evenly(16, replicas), range(replicas))
    assert sum(shard.size for shard in shards) == 16
    batches = np.concatenate([shard.positions(10, 3, 16) for shard in shards], axis=1)
    np.testing.assert_array_equal(batches, np.arange(160, 208).reshape(3, 16))


def make_feeder(n: int = 50) -> Feeder:
    source = ArraySource({"x": np.arange(n) * 10})
    shards = make_shards(split_evenly(8, 2), range(2))
    return Feeder(source, Order(0, n), shards, 8, resident=False)


@pytest.mark.parametrize("guess", [None, (4, 3), (4, 5), (4, 2), (3, 5)])
def test_prefetching_never_changes_what_a_block_gets(guess: tuple[int, int] | None) -> None:
    plain = make_feeder().take(4, 3)
    feeder = make_feeder()
    if guess:
        feeder.prefetch(*guess)
    feed = feeder.take(4, 3)
    for left, right in zip(plain.ids, feed.ids, strict=True):
        np.testing.assert_array_equal(left, right)
    for ids, features in zip(feed.ids, feed.features, strict=True):
        np.testing.assert_array_equal(features["x"], ids * 10)


@pytest.mark.parametrize(
    ("n", "size", "replicas"), [(50, 8, 3), (48, 8, 3), (1, 4, 2), (100, 7, 1)]
)
def test_evaluation_sees_each_example_once(n: int, size: int, replicas: int) -> None:
    steps = -(-n // (size * replicas))
    parts = [evaluation_ids(n, 0, steps, size, r, replicas) for r in range(replicas)]
    seen = np.concatenate([ids[weights > 0] for ids, weights in parts])
    np.testing.assert_array_equal(np.sort(seen), np.arange(n))


def test_the_ledger_is_independent_of_the_split_but_not_of_ids_or_steps() -> None:
    ids = np.random.default_rng(0).integers(0, 1000, (5, 12))
    whole = ledger_hash(ids, 7)
    split = ledger_hash(ids[:, :5], 7) + ledger_hash(ids[:, 5:], 7)
    later = ledger_hash(ids[:2], 7) + ledger_hash(ids[2:], 9)
    assert whole == split % 2**64 == later % 2**64
    assert whole != ledger_hash(ids, 8)
    changed = ids.copy()
    changed[3, 4] += 1
    assert whole != ledger_hash(changed, 7)
    swapped = ids.copy()
    swapped[[0, 1]] = ids[[1, 0]]
    assert whole != ledger_hash(swapped, 7)
