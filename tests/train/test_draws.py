"""Each example has random numbers of its own, which look random."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from orchestrator.train.draws import uniform


def seeds(positions: np.ndarray, seed: int = 0) -> tf.Tensor:
    return tf.constant(np.stack([positions, np.full_like(positions, seed)], axis=1))


def test_numbers_lie_in_the_unit_interval_and_repeat() -> None:
    draws = uniform(seeds(np.arange(1000)), 3)
    assert draws.shape == (1000, 3) and draws.dtype == tf.float32
    assert float(tf.reduce_min(draws)) >= 0 and float(tf.reduce_max(draws)) < 1
    np.testing.assert_array_equal(draws, uniform(seeds(np.arange(1000)), 3))


def test_an_example_draws_the_same_in_any_batch_and_more_columns_change_none() -> None:
    whole = uniform(seeds(np.arange(100)), 3).numpy()
    np.testing.assert_array_equal(whole[40:60], uniform(seeds(np.arange(40, 60)), 3))
    np.testing.assert_array_equal(whole, uniform(seeds(np.arange(100)), 5)[:, :3])


def test_numbers_of_neighbouring_positions_seeds_and_columns_look_independent() -> None:
    n = 20_000
    columns = [uniform(seeds(np.arange(n), seed), 2).numpy() for seed in (0, 1, -5)]
    series = np.concatenate(columns, axis=1).T.astype(float)
    for values in series:
        counts = np.bincount((values * 20).astype(int), minlength=20)
        # Chi squared with 19 degrees of freedom: mean 19, 50 once in 7,000.
        assert ((counts - n / 20) ** 2 / (n / 20)).sum() < 50
    shifted = [values[1:] for values in series] + [values[:-1] for values in series]
    correlation = np.corrcoef(np.stack(shifted)) - np.eye(len(shifted))
    # Deviation 1 / sqrt(n); 5 deviations fail once in 1.7 million.
    assert np.abs(correlation).max() < 5 / np.sqrt(n - 1)
