"""A user's own job, with dropout; on request its worker lacks what a restart needs.

The faults are planted here, where the worker imports the job: in the process that trains, nowhere
else.
"""

import keras
import numpy as np

from orchestrator.train.job import Job
from orchestrator.train.sources import ArraySource

layers = keras.layers


class Shaken(Job):
    """A dense classifier."""

    def __init__(self, fault=""):
        if fault:
            FAULTS[fault]()

    def model(self):
        hidden = [layers.Dense(16, activation="relu"), layers.Dropout(0.2)]
        return keras.Sequential([layers.Input((8,)), *hidden, layers.Dense(3)])

    def source(self, split):
        rng = np.random.default_rng(7)
        labels = rng.integers(0, 3, 96)
        centres = np.random.default_rng(3).normal(size=(3, 8))
        points = centres[labels] * 2 + rng.normal(size=(96, 8))
        return ArraySource({"x": points.astype("float32"), "y": labels}, name="shaken")

    def loss(self, batch, outputs):
        return keras.losses.sparse_categorical_crossentropy(batch["y"], outputs, from_logits=True)


def _first_step():
    """Return a list that will hold the step that this process begins with."""
    from orchestrator.train import worker

    restore, began = worker.restore, [0]

    def noted_restore(path, variables, **more):
        began[0] = restore(path, variables, **more)
        return began[0]

    worker.restore = noted_restore
    return began


def seeds_of_the_process():
    """Draw dropout masks by the steps of this process instead of those of the run."""
    from orchestrator.train.replica import Replicas

    began, seeds = _first_step(), Replicas._layer_seeds

    def own_seeds(self, local, step, micro):
        return seeds(self, local, step - began[0], micro)

    Replicas._layer_seeds = own_seeds


def one_example_late():
    """Lose the first example after a restart: every position is off by one."""
    from orchestrator.train.data import Shard

    began, positions = _first_step(), Shard.positions

    def late_positions(self, *others):
        return positions(self, *others) + (began[0] > 0)

    Shard.positions = late_positions


def seen_before_it_is_whole():
    """Let a checkpoint appear before its manifest is written and its files are flushed."""
    from orchestrator.train import saver

    write_bundle, commit = saver.write_bundle, saver.store.commit

    def write_seen(staged, values):
        described = write_bundle(staged, values)
        staged.rename(staged.parents[1] / staged.name)
        return described

    def commit_seen(staged, target, manifest, **more):
        target.rename(staged)
        return commit(staged, target, manifest, **more)

    saver.write_bundle, saver.store.commit = write_seen, commit_seen


FAULTS = {
    fault.__name__: fault
    for fault in (seeds_of_the_process, one_example_late, seen_before_it_is_whole)
}
