"""Exact evaluation over the whole eval split, under any number of replicas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from orchestrator.errors import JobError
from orchestrator.spec.plan import RunPlan
from orchestrator.spec.schema import Compile
from orchestrator.train.captured import Captured
from orchestrator.train.data import evaluation_ids, fetch_block
from orchestrator.train.inputs import Resident, feature_spec, step_features
from orchestrator.train.job import Batch, Job
from orchestrator.train.replica import local_replica
from orchestrator.train.sources import Source
from orchestrator.train.sums import Layout, weighted_sums

# Steps of one call: bounds the memory of fetched features and the time between signs of life, and
# how long a stop may wait. Always the same number: sums of other parts differ in the last bits.
_STEPS_PER_CALL = 8


class Evaluation:
    """Sums of loss and metrics over every example of the eval split, each exactly once.

    The last batch is filled up with weight zero; batches are not padded in training, but here no
    statistics depend on the batch.
    """

    def __init__(
        self,
        plan: RunPlan,
        job: Job,
        model: keras.Model,
        strategy: tf.distribute.Strategy,
        replicas: range,
        source: Source,
        resident: Resident,
        progress: Callable[[str], None] = lambda text: None,
    ):
        """Prepare; nothing is traced yet. `progress` is told how far a run has come."""
        self.num_traces = 0
        self._progress = progress
        self._plan = plan
        self._job = job
        self._model = model
        self._strategy = strategy
        self._replicas = replicas
        self._source = source
        self._resident = resident
        self._layout: Layout | None = None
        size = plan.eval_batch_size
        is_resident = resident.tables is not None
        feed = (
            tf.TensorSpec([None, size], tf.int64),
            tf.TensorSpec([None, size], tf.float32),
            feature_spec(source, size, resident=is_resident),
        )
        self._run: Any = self._block
        if plan.config.train.compile is not Compile.eager:
            self._run = tf.function(
                self._block,
                input_signature=[tf.TensorSpec([], tf.int32), [feed] * len(replicas)],
                autograph=False,
            )

    def metric_names(self) -> list[str] | None:
        """Return the names of what `run` gives, without running; None if only a run can tell.

        Traces what `run` would trace, so it costs nothing; all workers must call it alike.
        """
        if self._plan.config.train.compile is Compile.eager:
            return None
        self._run.get_concrete_function()
        assert self._layout is not None
        width = sum(width or 1 for width in self._layout.widths)
        columns = self._layout.split(np.ones([1, width]))
        try:
            return list(self._job.summarise({name: c[0] for name, c in columns.items()}, 1.0))
        except Exception:  # the user's own summary may not bear invented sums
            return None

    def run(self, is_over: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
        """Evaluate the whole split.

        Args:
            is_over: asked after every few steps whether to leave off; all workers must be told the
                same.

        Returns:
            Loss and metrics; None if it was left off.
        """
        total: Any = None
        for first in range(0, self._plan.eval_steps, _STEPS_PER_CALL):
            num_steps = min(_STEPS_PER_CALL, self._plan.eval_steps - first)
            feeds = [self._feed(first, num_steps, replica) for replica in self._replicas]
            sums = self._run(tf.constant(num_steps, tf.int32), feeds)
            part = self._strategy.experimental_local_results(sums)[0].numpy()
            total = part if total is None else total + part
            done = first + num_steps
            self._progress(f"{done:,} of {self._plan.eval_steps:,} steps")
            if done < self._plan.eval_steps and is_over():
                return None
        assert self._layout is not None
        columns = self._layout.split(total[None, 1:])
        if not total[0]:
            raise JobError(
                "the weights of all examples of the eval split add up to 0: there is nothing to "
                "divide by; look at what the job's losses() gives as weight"
            )
        sums_by_name = {name: column[0] for name, column in columns.items()}
        return dict(self._job.summarise(sums_by_name, float(total[0])))

    def _feed(self, first: int, num_steps: int, replica: int) -> Any:
        plan = self._plan
        ids, weights = evaluation_ids(
            self._source.num_examples,
            first,
            num_steps,
            plan.eval_batch_size,
            replica,
            plan.num_replicas,
        )
        features: Batch = {}
        if self._resident.tables is None:
            block = fetch_block(self._source, ids)
            features = {name: tf.constant(array) for name, array in block.items()}
        return tf.constant(ids), tf.constant(weights), features

    def _block(self, num_steps: Any, feeds: Sequence[Any]) -> Any:
        self.num_traces += 1
        return self._strategy.run(self._sum, (num_steps, feeds))

    def _sum(self, num_steps: Any, feeds: Sequence[Any]) -> Any:
        """Add up over the steps on one replica, then once over all replicas."""
        local = local_replica(self._plan)
        _, total = tf.while_loop(
            lambda i, _: i < num_steps,
            lambda i, total: (i + 1, total + self._batch_sums(local, feeds, i)),
            (tf.constant(1), self._batch_sums(local, feeds, 0)),
        )
        if self._plan.num_replicas > 1:
            context = tf.distribute.get_replica_context()
            total = context.all_reduce(tf.distribute.ReduceOp.SUM, total)
        return total

    def _batch_sums(self, local: int, feeds: Sequence[Any], i: Any) -> Any:
        """Return [weight, loss, metrics ...] summed over one batch, float64."""
        ids, weights, features = feeds[local]
        rows = self._resident.rows(local, ids[i], step_features(features, i))
        batch = self._job.prepare(rows, training=False, seeds=None)
        with Captured(discards=True):
            outcome = self._job.losses(self._model, batch, training=False)
        self._layout, sums = weighted_sums(
            outcome, self._plan.eval_batch_size, tf.float64, mask=weights[i]
        )
        return sums
