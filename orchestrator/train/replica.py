"""One replica's share of a step: its gradients, what its layers moved, and its sums.

For global batch size G, weights w and losses l, a replica differentiates

    (s / D) (sum_i w_i l_i  +  sum_i w_i  x  sum of terms)

in which the scale s / D only keeps the numbers in range: D is G, or with halves the power of two
from there on, and s the loss scale with float16, else 1.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from orchestrator.errors import JobError
from orchestrator.spec.plan import RunPlan, split_evenly
from orchestrator.train.captured import Captured
from orchestrator.train.data import Shard
from orchestrator.train.job import Batch, Gradients, Job, flatten_groups
from orchestrator.train.stateful import assignments_refused
from orchestrator.train.sums import Layout, weighted_sums

# Below this a dense all-reduce of an embedding's gradient is faster (measured, 2 workers, gRPC).
_SPARSE_FROM_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Share:
    """What one replica adds to a step, not yet reduced.

    Attributes:
        gradients: one for each variable, dense or IndexedSlices.
        moved: the state that layers assigned, by its variable.
        sums: [sum of weights, weighted loss with its terms, weighted metrics ...].
        layout: names and widths of the sums after the first.
        is_unweighted: no example has a weight: the sum of weights is the number of examples.
    """

    gradients: list[Any]
    moved: list[tuple[keras.Variable, Any]]
    sums: Any
    layout: Layout
    is_unweighted: bool


class Replicas:
    """Differentiates on this worker's replicas, micro-batch after micro-batch."""

    def __init__(
        self,
        plan: RunPlan,
        job: Job,
        model: keras.Model,
        groups: Mapping[str, Sequence[keras.Variable]],
        shards: Sequence[Shard],
    ):
        self._plan = plan
        self._job = job
        self._model = model
        self._groups = groups
        self._shards = shards
        self._seeds = [v for v in model.variables if is_layer_seed(v)]
        self._moving = [v for v in model.non_trainable_variables if is_moving(v)]
        self._kept = {id(variable) for variable in self._moving}
        self._origins: dict[int, Any] = {}  # of the job's own seed generators
        # Keras makes its own generator at the first draw without a seed; made while a batch is
        # computed it would have no value outside (keras 3.15, random/seed_generator.py).
        keras.random.uniform(())
        self.sum_dtype = _widest(flatten_groups(groups))

    def share(self, local: int, step: Any, raw: Batch, scale: Any) -> Share:
        """Accumulate over the micro-batches of one replica; call in replica context.

        Args:
            local: which of this worker's replicas.
            step: steps done before this one, int64.
            raw: the features of the replica's examples, not yet prepared.
            scale: s / D, a number or a scalar.
        """
        plan, shard = self._plan, self._shards[local]
        positions = step * plan.config.train.global_batch_size + shard.offset
        gradients: list[Any] = []
        sums: Any = 0.0
        moved: dict[int, Any] = {}  # index in self._moving -> the state after the micro-batch
        start, is_unweighted = 0, True
        for micro, size in enumerate(split_evenly(shard.size, plan.config.train.micro_batches)):
            rows = {name: value[start : start + size] for name, value in raw.items()}
            seeds = self._example_seeds(positions + start, size)
            seed_state = self._layer_seeds(local, step, micro)
            state = [
                *((self._moving[index], value) for index, value in moved.items()),
                *((variable, seed_state(variable)) for variable in self._seeds),
            ]
            with Captured(state, seed_state) as scope, assignments_refused():
                batch = self._job.prepare(rows, training=True, seeds=seeds)
                grouped, outcome = self._job.gradients(self._model, batch, scale)
            scope.refuse_lost(self._is_kept, self._model.variables)
            moved = {
                index: scope.state_mapping[id(variable)]
                for index, variable in enumerate(self._moving)
                if id(variable) in scope.state_mapping
            }
            parts = self._checked(grouped)
            if micro:
                parts = [_plus(a, b) for a, b in zip(gradients, parts, strict=True)]
            gradients = parts
            layout, part = weighted_sums(outcome, size, self.sum_dtype)
            sums += part
            start += size
            is_unweighted = is_unweighted and outcome.weight is None
        state = [(self._moving[index], value) for index, value in moved.items()]
        return Share(self._overflown(shard, step, gradients), state, sums, layout, is_unweighted)

    def _overflown(self, shard: Shard, step: Any, gradients: list[Any]) -> list[Any]:
        """Make the last replica's first gradient infinite in `plan.overflow_step`."""
        config = self._plan.config.train
        if self._plan.overflow_step is None:
            return gradients
        if shard.offset + shard.size < config.global_batch_size:
            return gradients
        first, *others = gradients
        extra = tf.where(step + 1 == self._plan.overflow_step, math.inf, 0.0)
        extra = tf.cast(extra, first.dtype)
        if isinstance(first, tf.IndexedSlices):
            first = tf.IndexedSlices(first.values + extra, first.indices, first.dense_shape)
        else:
            first += extra
        return [first, *others]

    def all_dense(self, gradients: Sequence[Any]) -> tuple[list[Any], list[bool]]:
        """Make sparse gradients dense; large ones are first brought together from all replicas.

        Dense gradients make the update equal to that of one device (Keras's own update from
        slices is a lazy Adam). Of a large embedding only the rows that were used are sent, if the
        replicas divide the global batch.

        Returns:
            The dense gradients, and for each whether it is added up over the replicas already.
        """
        dense, reduced = [], []
        context = tf.distribute.get_replica_context()
        for gradient in gradients:
            gather = isinstance(gradient, tf.IndexedSlices) and self._is_worth_it(gradient)
            if gather:
                values = context.all_gather(gradient.values, axis=0)
                indices = context.all_gather(gradient.indices, axis=0)
                gradient = tf.IndexedSlices(values, indices, gradient.dense_shape)
            dense.append(tf.convert_to_tensor(gradient))
            reduced.append(gather)
        return dense, reduced

    def _is_worth_it(self, slices: tf.IndexedSlices) -> bool:
        """Compare what either way sends; every replica must answer alike."""
        rows = slices.values.shape[0]
        shape = tf.get_static_value(slices.dense_shape)
        if self._plan.num_replicas == 1 or rows is None or shape is None:
            return False
        # Where batches differ by an example replicas may have other numbers of rows, and one that
        # answered otherwise would wait for ever.
        if len(set(self._plan.replica_batch_sizes)) > 1:
            return False
        num_bytes = int(shape.prod()) * slices.dtype.size
        all_rows = rows * self._plan.num_replicas
        return num_bytes >= _SPARSE_FROM_BYTES and 2 * all_rows < int(shape[0])

    def _checked(self, grouped: Gradients) -> list[Any]:
        """Return the gradients in the order of the variables, none missing."""
        checked, missing = [], []
        for name, variables in self._groups.items():
            if len(grouped.get(name, ())) != len(variables):
                raise JobError(
                    f"gradients() returned {len(grouped.get(name, ()))} gradients for the "
                    f"parameter group {name!r} of {len(variables)} variables; return one a variable"
                )
            for variable, gradient in zip(variables, grouped[name], strict=True):
                if gradient is None:
                    missing.append(variable.path)
                    gradient = tf.zeros(variable.shape, variable.dtype)
                checked.append(gradient)
        if missing and not self._plan.config.train.allow_missing_gradients:
            raise JobError(
                f"the loss does not depend on {', '.join(missing)}: no gradient; set "
                "`trainable=False` there, leave it out of parameter_groups(), or take zero for it "
                "with train.allow_missing_gradients=true"
            )
        return checked

    def _example_seeds(self, first_position: Any, size: int) -> Any:
        positions = first_position + tf.range(size, dtype=tf.int64)
        seed = tf.fill([size], tf.constant(self._plan.config.train.seed, tf.int64))
        return tf.stack([positions, seed], axis=1)

    def _layer_seeds(self, local: int, step: Any, micro: int) -> Callable[[keras.Variable], Any]:
        """Return what tells the state of each seed generator for one replica, step and micro-batch.

        Layers have generators, and jobs: those that a job holds itself, and Keras's own for draws
        without a seed. A generator changes its state with every draw within a step: Keras adds to
        the second word, so the step goes into the first.
        """
        replica = self._shards[local].offset  # distinct for each replica of the run
        indices: dict[Any, int] = {id(v): index for index, v in enumerate(self._seeds)}

        def state(variable: keras.Variable) -> Any:
            if not is_layer_seed(variable):
                return None
            # The job's own come after the model's, in the order of their first draws.
            index = indices.get(id(variable))
            if index is None:
                index = indices.setdefault(self._origin(variable), len(indices))
            text = f"{self._plan.config.train.seed} {index} {replica} {micro}".encode()
            first, second = struct.unpack("<II", hashlib.sha256(text).digest()[:8])
            word = tf.cast((step + first) % 2**32, variable.dtype)
            return tf.stack([word, tf.cast(second, variable.dtype)])

        return state

    def _origin(self, variable: keras.Variable) -> Any:
        """Return what a generator of the job began with: two of the same seed draw alike.

        So Keras has it, for an image and its mask, say; without a seed each has another.
        """
        value = variable._value  # `value` asks the scope
        if value is None:
            return id(variable)  # Keras's own, made while something else was traced
        if id(variable) not in self._origins:
            with tf.init_scope():
                self._origins[id(variable)] = tuple(tf.convert_to_tensor(value).numpy().tolist())
        return self._origins[id(variable)]

    def _is_kept(self, variable: keras.Variable) -> bool:
        """Tell whether what is assigned to a variable lives on, or follows from the step."""
        return id(variable) in self._kept or is_layer_seed(variable)


def local_replica(plan: RunPlan) -> int:
    """Return which of this worker's replicas is being traced; call in replica context."""
    context = tf.distribute.get_replica_context()
    # A constant of the graph under every strategy, though TensorFlow hands it out as a tensor.
    replica = tf.get_static_value(tf.convert_to_tensor(context.replica_id_in_sync_group))
    return int(replica) % plan.devices_per_worker


def summed_over_replicas(values: Sequence[Any], bytes_per_pack: int | None) -> list[Any]:
    """Add up over all replicas; call in replica context.

    TensorFlow puts a list into one collective by concatenating it, which values of two dtypes do
    not survive under MultiWorkerMirroredStrategy (2.21, cross_device_utils.py:batch_all_reduce).

    Args:
        values: dense.
        bytes_per_pack: of what travels in one collective; None for one for each dtype.
    """
    context = tf.distribute.get_replica_context()
    # Here, as packs of the strategy's own options are not made in a replica (TensorFlow 2.21,
    # collective_all_reduce_strategy.py:_replica_ctx_all_reduce).
    options = tf.distribute.experimental.CommunicationOptions(bytes_per_pack=bytes_per_pack or 0)
    summed: dict[int, Any] = {}
    for dtype in dict.fromkeys(value.dtype for value in values):
        places = [place for place, value in enumerate(values) if value.dtype == dtype]
        alike = [values[place] for place in places]
        total = context.all_reduce(tf.distribute.ReduceOp.SUM, alike, options)
        summed.update(zip(places, total, strict=True))
    return [summed[place] for place in range(len(values))]


def is_layer_seed(variable: keras.Variable) -> bool:
    """Tell whether a variable is the state of a Keras SeedGenerator: it follows from the step."""
    return variable.path.endswith("seed_generator_state")


def is_moving(variable: keras.Variable) -> bool:
    """Tell whether a variable is float state that a layer may assign, such as a moving mean."""
    return tf.as_dtype(variable.dtype).is_floating and not is_layer_seed(variable)


def _widest(variables: Sequence[keras.Variable]) -> Any:
    """Return the dtype of the sums: that of the widest gradient, so that they travel with it."""
    dtypes = {tf.as_dtype(variable.dtype) for variable in variables}
    return max([*dtypes, tf.float32], key=lambda dtype: dtype.size)


def _plus(left: Any, right: Any) -> Any:
    """Add two gradients; slices stay slices."""
    if isinstance(left, tf.IndexedSlices) and isinstance(right, tf.IndexedSlices):
        return tf.IndexedSlices(
            tf.concat([left.values, right.values], 0),
            tf.concat([left.indices, right.indices], 0),
            left.dense_shape,
        )
    return tf.convert_to_tensor(left) + tf.convert_to_tensor(right)
