"""Which examples a step uses, and how they reach the replicas.

Position `p` of the run is example `permutation(seed, epoch = p // n)[p % n]`; step `s` consumes
the positions `[s G, (s+1) G)`. Nothing else decides the order: not the number of workers, not
restarts.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from orchestrator.train.ragged import bucket_lengths
from orchestrator.train.sources import Source, bucket_key, declared

# Below this, RandomIndexShuffle's cipher works on too few bits to look random (measured).
_SMALLEST_COMPUTED = 10_000
_ROUNDS = 24
_SEED_CONSTANT = 0x6F726465  # "orde": keeps the order apart from other uses of the same seed


class Order:
    """The order of examples over the whole run, computed instead of stored."""

    def __init__(self, seed: int, num_examples: int):
        self.seed = seed
        self.num_examples = num_examples
        self._permutations: dict[int, np.ndarray] = {}

    def examples(self, positions: np.ndarray) -> np.ndarray:
        """Return which example stands at each position.

        Args:
            positions: int64 [n], positions of the run, from 0.

        Returns:
            int64 [n], each in [0, num_examples).
        """
        epochs, offsets = np.divmod(positions, self.num_examples)
        if self.num_examples < _SMALLEST_COMPUTED:
            return self._looked_up(epochs, offsets)
        seeds = np.empty((len(positions), 3), np.int64)
        seeds[:, 0] = _SEED_CONSTANT
        seeds[:, 1] = self.seed
        seeds[:, 2] = epochs
        with tf.device("CPU:0"):
            shuffled = tf.raw_ops.RandomIndexShuffle(
                index=offsets, seed=seeds, max_index=self.num_examples - 1, rounds=_ROUNDS
            )
        return shuffled.numpy()

    def _looked_up(self, epochs: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        examples = np.empty_like(offsets)
        wanted = np.unique(epochs)
        for epoch in wanted:
            here = epochs == epoch
            examples[here] = self._permutation(int(epoch))[offsets[here]]
        self._permutations = {epoch: self._permutation(epoch) for epoch in map(int, wanted)}
        return examples

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._permutations:
            key = np.random.SeedSequence([_SEED_CONSTANT, self.seed, epoch])
            generator = np.random.Generator(np.random.Philox(key))
            self._permutations[epoch] = generator.permutation(self.num_examples)
        return self._permutations[epoch]


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of each global batch that one replica takes."""

    offset: int
    size: int

    def positions(self, first_step: int, num_steps: int, global_batch_size: int) -> np.ndarray:
        """Return the positions of this replica in the steps after `first_step`: [steps, size]."""
        steps = np.arange(first_step, first_step + num_steps, dtype=np.int64)[:, None]
        return steps * global_batch_size + self.offset + np.arange(self.size, dtype=np.int64)


def make_shards(replica_batch_sizes: tuple[int, ...], replicas: range) -> list[Shard]:
    """Return the shards of some replicas; the order of a batch is the order of the replicas."""
    offsets = np.concatenate([[0], np.cumsum(replica_batch_sizes)])
    return [Shard(int(offsets[r]), replica_batch_sizes[r]) for r in replicas]


@dataclass(frozen=True, slots=True)
class Feed:
    """The input of one block for the local replicas.

    Attributes:
        ids: for each local replica the examples it uses, int64 [steps, batch of the replica].
        features: for each local replica what `fetch_block` returns; empty dicts when the data is
            resident and gathered in graph.
    """

    ids: list[np.ndarray]
    features: list[dict[str, np.ndarray]]


class Feeder:
    """Prepares the input of blocks, the next one while the present one runs.

    All of it is done by one thread: the source of training is never asked for two things at once by
    it. An evaluation asks its own source meanwhile.
    """

    def __init__(
        self,
        source: Source,
        order: Order,
        shards: list[Shard],
        global_batch_size: int,
        *,
        resident: bool,
    ):
        self._source = source
        self._order = order
        self._shards = shards
        self._global_batch_size = global_batch_size
        self._resident = resident
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="feeder")
        self._steps = range(0)  # numbers of the steps done before each one that is prepared
        self._ahead: Future[Feed] | None = None  # their input

    def prefetch(self, first_step: int, num_steps: int) -> None:
        """Start to prepare a block that will probably be asked for, or what is missing of it."""
        wanted = range(first_step, first_step + num_steps)
        if self._ahead is None or self._steps.start != first_step:
            if self._ahead is not None:
                self._ahead.cancel()
            self._ahead, self._steps = None, range(first_step, first_step)
        missing = range(self._steps.stop, wanted.stop)
        if missing:
            self._ahead = self._thread.submit(self._prolonged, self._ahead, missing)
            self._steps = wanted

    def take(self, first_step: int, num_steps: int) -> Feed:
        """Return the input of the steps after `first_step`.

        What was prepared of it is used, and what was prepared beyond it is kept.
        """
        self.prefetch(first_step, num_steps)
        assert self._ahead is not None
        ahead, self._ahead = self._ahead, None
        feed = ahead.result()
        self._steps = self._steps[num_steps:]
        if self._steps:
            self._ahead = self._thread.submit(_cut, feed, slice(num_steps, None))
        return _cut(feed, slice(num_steps))

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _prolonged(self, ahead: Future[Feed] | None, steps: range) -> Feed:
        """Return what was prepared before, followed by some steps more."""
        if ahead is None:
            return self._prepare(steps)
        return _joined(ahead.result(), self._prepare(steps))

    def _prepare(self, steps: range) -> Feed:
        ids, features = [], []
        for shard in self._shards:
            positions = shard.positions(steps.start, len(steps), self._global_batch_size)
            chosen = self._order.examples(positions.reshape(-1))
            ids.append(chosen.reshape(positions.shape))
            features.append({} if self._resident else fetch_block(self._source, ids[-1]))
        return Feed(ids, features)


def fetch_block(source: Source, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Return the features of some steps.

    Features of different lengths are as long as the longest bucket of these steps; beside them
    stands the bucket of each step, to which `inputs.step_features` cuts them.

    Args:
        source: where the examples are.
        ids: int64 [steps, batch].

    Returns:
        For each feature an array [steps, batch, ...], and int32 [steps] for each `bucket_key`.
    """
    given = source.fetch(ids.reshape(-1))
    rows = declared(f"source {source.name!r}: fetch()", source.features, given, ids.size)
    block = {name: array.reshape(*ids.shape, *array.shape[1:]) for name, array in rows.items()}
    if source.buckets is not None:
        buckets = bucket_lengths(block["length"], source.buckets)
        free = [name for name, feature in source.features.items() if feature.is_ragged]
        block.update({bucket_key(name): buckets for name in free})
    return block


def _cut(feed: Feed, steps: slice) -> Feed:
    return Feed(
        [ids[steps] for ids in feed.ids],
        [{name: array[steps] for name, array in part.items()} for part in feed.features],
    )


def _joined(first: Feed, second: Feed) -> Feed:
    """Return the steps of one input followed by those of another."""
    return Feed(
        [np.concatenate(pair) for pair in zip(first.ids, second.ids, strict=True)],
        [
            {name: _appended(array, right[name]) for name, array in left.items()}
            for left, right in zip(first.features, second.features, strict=True)
        ],
    )


def _appended(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Join the steps of one feature; the longer of two buckets holds both."""
    sizes = [max(pair) for pair in zip(left.shape[1:], right.shape[1:], strict=True)]
    return np.concatenate([_padded(left, sizes), _padded(right, sizes)])


def _padded(array: np.ndarray, sizes: list[int]) -> np.ndarray:
    missing = [size - had for size, had in zip(sizes, array.shape[1:], strict=True)]
    return np.pad(array, [(0, 0), *((0, few) for few in missing)]) if any(missing) else array


def evaluation_ids(
    num_examples: int, first_step: int, num_steps: int, batch_size: int, replica: int, replicas: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return which examples one replica evaluates in some steps, and their weights.

    Every example is evaluated once; what is missing to fill the last batch is example 0 with
    weight zero.

    Returns:
        ids int64 [num_steps, batch_size] and weights float32 of the same shape.
    """
    steps = np.arange(first_step, first_step + num_steps, dtype=np.int64)[:, None]
    ids = (steps * replicas + replica) * batch_size + np.arange(batch_size, dtype=np.int64)
    real = ids < num_examples
    return np.where(real, ids, 0), real.astype(np.float32)


def ledger_hash(ids: np.ndarray, first_step: int) -> int:
    """Return the sum modulo 2^64 of a hash of (id, step) over the examples of a block.

    Sums over replicas and workers are independent of how the batch was split, so the ledger of
    two runs is equal exactly if each step used the same examples.

    Args:
        ids: int64 [steps, batch], as the steps really used them.
        first_step: steps done before the block.

    Source: the finalizer of SplitMix64 (Steele, Lea, Flood 2014).
    """
    steps = np.arange(first_step, first_step + len(ids), dtype=np.uint64)[:, None]
    with np.errstate(over="ignore"):
        mixed = ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + steps * np.uint64(
            0xD1B54A32D192ED03
        )
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return int((mixed ^ (mixed >> np.uint64(31))).sum(dtype=np.uint64))
