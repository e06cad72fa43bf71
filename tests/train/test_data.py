"""The order of examples depends on the seed and the position, and on nothing else."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from orchestrator.errors import JobError
from orchestrator.spec.plan import split_evenly
from orchestrator.train.data import (
    Feeder,
    Order,
    evaluation_ids,
    fetch_block,
    ledger_hash,
    make_shards,
)
from orchestrator.train.sources import ArraySource, Feature, Source

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


class Watched(ArraySource):
    """Remembers which examples were fetched, and by which threads."""

    def __init__(self, n: int):
        super().__init__({"x": np.arange(n) * 10})
        self.fetched: list[np.ndarray] = []
        self.threads: set[int] = set()

    def fetch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        self.fetched.append(indices)
        self.threads.add(threading.get_ident())
        return super().fetch(indices)


@pytest.mark.parametrize("n", [50, 20_011])
def test_blocks_of_any_length_fetch_each_example_once_by_one_thread(n: int) -> None:
    source, order = Watched(n), Order(0, n)
    feeder = Feeder(source, order, make_shards((8,), range(1)), 8, resident=False)
    # Each block is prepared with the length of the one before it, as the loop does.
    lengths = [1, 16, 5, 9, 4, 20, 20, 3, 1]
    total, done, used = 0, 0, []
    for num_steps in lengths:
        feed = feeder.take(done, num_steps)
        total += ledger_hash(feed.ids[0], done)
        np.testing.assert_array_equal(feed.features[0]["x"], feed.ids[0] * 10)
        assert feed.ids[0].shape == (num_steps, 8)
        used.append(feed.ids[0].reshape(-1))
        done += num_steps
        feeder.prefetch(done, min(num_steps, sum(lengths) - done))
    feeder.close()
    np.testing.assert_array_equal(np.concatenate(source.fetched), np.concatenate(used))
    whole = order.examples(np.arange(sum(lengths) * 8, dtype=np.int64))
    np.testing.assert_array_equal(np.concatenate(used), whole)
    assert total % 2**64 == ledger_hash(whole.reshape(-1, 8), 0)
    assert len(source.threads) == 1 and threading.get_ident() not in source.threads


def test_steps_that_are_left_out_are_not_given_to_later_blocks() -> None:
    feeder = make_feeder()
    feeder.prefetch(4, 5)
    for first, num_steps in ((6, 2), (8, 3), (2, 1)):  # a rollback goes on after the bad step
        feed, plain = feeder.take(first, num_steps), make_feeder().take(first, num_steps)
        np.testing.assert_array_equal(feed.ids[1], plain.ids[1])
        np.testing.assert_array_equal(feed.features[1]["x"], feed.ids[1] * 10)
        feeder.prefetch(first + num_steps, 4)


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


def ledger(*batch_sizes: tuple[int, ...], num_examples: int = 50) -> int:
    """Return the ledger of 3 + 2 steps, each of the global batch that its sizes add up to.

    Args:
        batch_sizes: of the replicas of each worker.
        num_examples: of the data.
    """
    flat = tuple(size for sizes in batch_sizes for size in sizes)
    total, first = 0, 0
    for sizes in batch_sizes:
        shards = make_shards(flat, range(first, first + len(sizes)))
        first += len(sizes)
        source = ArraySource({"x": np.arange(num_examples)})
        feeder = Feeder(source, Order(3, num_examples), shards, sum(flat), resident=False)
        for done, num_steps in ((0, 3), (3, 2)):
            feed = feeder.take(done, num_steps)
            total += sum(ledger_hash(ids, done) for ids in feed.ids)
        feeder.close()
    return total % 2**64


@pytest.mark.parametrize("n", [50, 20_011])
def test_every_strategy_of_one_global_batch_size_has_the_same_ledger(n: int) -> None:
    one_device = ledger((12,), num_examples=n)
    assert ledger((6, 6), num_examples=n) == one_device  # mirrored
    assert ledger((4,), (4,), (4,), num_examples=n) == one_device  # three workers
    assert ledger((3, 3), (3, 3), num_examples=n) == one_device  # two workers of two devices
    assert ledger((5, 4, 3), num_examples=n) == one_device
    assert ledger((11,), num_examples=n) != one_device


@pytest.mark.parametrize("fault", ["lost", "read twice", "one step late"])
def test_a_shard_that_goes_wrong_changes_the_ledger(fault: str) -> None:
    shards = make_shards((4, 4, 4), range(3))
    order = Order(3, 50)

    def used(replica: int, step: int) -> np.ndarray:
        return order.examples(shards[replica].positions(step, 1, 12)[0])[None]

    steps, replicas = range(5), range(3)
    expected = sum(ledger_hash(used(r, s), s) for r in replicas for s in steps) % 2**64
    total = expected
    if fault == "lost":  # replica 1 trains without examples in step 2
        total -= ledger_hash(used(1, 2), 2)
    elif fault == "read twice":  # replica 1 takes what replica 0 has
        total += ledger_hash(used(0, 2), 2) - ledger_hash(used(1, 2), 2)
    else:
        total += ledger_hash(used(1, 3), 2) - ledger_hash(used(1, 2), 2)
    assert total % 2**64 != expected
    assert expected == ledger((4, 4, 4))


class Own(Source):
    """A user's own source, which gives something."""

    name, origin, num_examples, digest = "own", "a test", 40, "0"

    def __init__(self, give: Callable[[dict[str, np.ndarray]], Any]):
        self._give = give

    @property
    def features(self) -> dict[str, Feature]:
        return {"x": Feature("float32", (2,)), "y": Feature("int64")}

    def fetch(self, indices: np.ndarray) -> Any:
        rows = {"x": np.zeros((len(indices), 2), "float32"), "y": np.array(indices)}
        return self._give(rows)


@pytest.mark.parametrize(
    ("give", "told"),
    [
        (lambda rows: rows | {"x": rows["x"].astype("float64")}, r"'x' as float64 \[6, 2\]"),
        (lambda rows: rows | {"x": rows["x"][1:]}, r"'x' as float32 \[5, 2\] for 6 examples"),
        (lambda rows: rows | {"x": rows["x"][:, :1]}, r"is float32 \[2\] each"),
        (lambda rows: {"x": rows["x"]}, "no feature 'y' but x"),
        (lambda rows: list(rows.values()), "no feature 'x' but list"),
    ],
)
def test_what_a_source_gives_is_what_it_declares(
    give: Callable[[dict[str, np.ndarray]], Any], told: str
) -> None:
    ids = np.arange(6).reshape(3, 2)
    with pytest.raises(JobError, match=r"source 'own': fetch\(\) gives .*" + told):
        fetch_block(Own(give), ids)
    lists = fetch_block(Own(lambda rows: rows | {"y": rows["y"].tolist(), "more": 1}), ids)
    assert {name: array.shape for name, array in lists.items()} == {"x": (3, 2, 2), "y": (3, 2)}
