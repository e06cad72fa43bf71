"""Exact evaluation over the whole eval split, under any number of replicas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from orchestrator.errors import JobError
from orchestrator.spec.plan import RunPlan, split_evenly
from orchestrator.spec.schema import Compile
from orchestrator.train.captured import Captured
from orchestrator.train.data import evaluation_ids, fetch_block
from orchestrator.train.inputs import Resident, feature_spec, step_features
from orchestrator.train.job import Batch, Job
from orchestrator.train.replica import local_replica
from orchestrator.train.sources import Source
from orchestrator.train.stateful import assignments_refused
from orchestrator.train.sums import Layout, weighted_sums

# Steps of one call: bounds the memory of fetched features and the time between signs of life, and
# how long a stop may wait. Always the same number: sums of other parts differ in the last bits.
_STEPS_PER_CALL = 8


class Evaluation:
    """Sums of loss and metrics over every example of the eval split, each exactly once.

    The last batch is filled up with weight zero, which changes no sum over examples. Where a job
    adds terms to its loss, which may be means over the batch, it is cut short instead.
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
        self._has_terms = False
        self._is_eager = plan.config.train.compile is Compile.eager
        self._run = self._function([plan.eval_batch_size] * len(replicas))
        self._num_full, rest = divmod(source.num_examples, plan.eval_batch_size * plan.num_replicas)
        self._rest_sizes = split_evenly(rest, plan.num_replicas)
        self._run_rest: Any = None

    def _function(self, sizes: Sequence[int]) -> Any:
        """Return what adds up steps of so many examples on each local replica."""
        if self._is_eager:
            return self._block
        is_resident = self._resident.tables is not None
        feeds = [
            (
                tf.TensorSpec([None, size], tf.int64),
                tf.TensorSpec([None, size], tf.float32),
                feature_spec(self._source, size, resident=is_resident),
            )
            for size in sizes
        ]
        signature = [tf.TensorSpec([], tf.int32), feeds]
        return tf.function(self._block, input_signature=signature, autograph=False)

    def metric_names(self) -> list[str] | None:
        """Return the names of what `run` gives, without running; None if only a run can tell.

        Traces what `run` would trace, so it costs nothing; all workers must call it alike.
        """
        if self._is_eager:
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
        num_all = self._plan.eval_steps
        num_filled = self._num_full if self._must_cut_short() else num_all
        for first in [*range(0, num_filled, _STEPS_PER_CALL), *range(num_filled, num_all)]:
            num_steps = min(_STEPS_PER_CALL, num_filled - first) if first < num_filled else 1
            if first < num_filled:
                feeds = [self._feed(*self._ids(first, num_steps, r)) for r in self._replicas]
                sums = self._run(tf.constant(num_steps, tf.int32), feeds)
            else:
                sums = self._sums_of_rest()
            part = self._strategy.experimental_local_results(sums)[0].numpy()
            total = part if total is None else total + part
            done = first + num_steps
            self._progress(f"{done:,} of {num_all:,} steps")
            if done < num_all and is_over():
                return None
        assert self._layout is not None
        columns = self._layout.split(total[None, 1:])
        if not total[0]:
            raise JobError(
                "the weights of all examples of the eval split add up to 0: there is nothing to "
                "divide by; look at what the job's losses() gives as weight"
            )
        sums_by_name = {name: column[0] for name, column in columns.items()}
        summary = self._job.summarise(sums_by_name, float(total[0]))
        return {name: _number(name, value) for name, value in summary.items()}

    def _must_cut_short(self) -> bool:
        """Tell whether what fills up the last batch could be seen in a term; traces the steps."""
        if not any(self._rest_sizes):
            return False
        if not self._is_eager:
            self._run.get_concrete_function()
        return self._is_eager or self._has_terms

    def _sums_of_rest(self) -> Any:
        """Add up the last step, whose batches are as small as what is left for them."""
        # A replica with nothing left takes an example that counts for nothing.
        sizes = [max(1, self._rest_sizes[replica]) for replica in self._replicas]
        if self._run_rest is None:
            self._run_rest = self._function(sizes)
        feeds = []
        for replica, size in zip(self._replicas, sizes, strict=True):
            start = self._source.num_examples - sum(self._rest_sizes[replica:])
            is_real = self._rest_sizes[replica] > 0
            ids = np.arange(start, start + size, dtype=np.int64) if is_real else np.zeros(1, int)
            feeds.append(self._feed(ids[None], np.full([1, size], is_real, np.float32)))
        return self._run_rest(tf.constant(1, tf.int32), feeds)

    def _ids(self, first: int, num_steps: int, replica: int) -> tuple[np.ndarray, np.ndarray]:
        plan = self._plan
        return evaluation_ids(
            self._source.num_examples,
            first,
            num_steps,
            plan.eval_batch_size,
            replica,
            plan.num_replicas,
        )

    def _feed(self, ids: np.ndarray, weights: np.ndarray) -> Any:
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
        with Captured(discards=True), assignments_refused():
            outcome = self._job.losses(self._model, batch, training=False)
        self._has_terms = bool(outcome.terms)
        self._layout, sums = weighted_sums(outcome, ids.shape[1], tf.float64, mask=weights[i])
        return sums


def _number(name: str, value: Any) -> float:
    """Return a metric as a plain number, which can be told, whatever kind of scalar it is."""
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise JobError(
            f"summarise() gives the metric {name!r} as {type(value).__name__}: return one number "
            "for each name"
        ) from error
