"""The compiled block: K steps of gradients, one reduction each, one decision each.

For global batch size G, R replicas, weights w and losses l, each replica differentiates

    (1 / G) (sum_i w_i l_i  +  sum_i w_i  x  sum of terms)

in which the scale 1/G only keeps the numbers small. One all-reduce (SUM) carries, for each dtype,
the gradients, the moving state of layers divided by R, and the sums of weights, loss and metrics.
Multiplied by G / sum w, the reduced gradient is that of the weighted mean loss plus the terms,
whatever R is and however G was split.

Everything that decides anything is computed from reduced values and between two `strategy.run`s:
a `tf.cond` around an optimizer inside a replica fails under every strategy (TensorFlow 2.21).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from orchestrator.errors import JobError
from orchestrator.spec.plan import RunPlan, split_evenly
from orchestrator.spec.schema import Compile
from orchestrator.train.data import Feed, Shard
from orchestrator.train.inputs import Resident, feature_spec, step_features
from orchestrator.train.job import Batch, Gradients, Job, flatten_groups
from orchestrator.train.optimizer import Optimizers
from orchestrator.train.sources import Source
from orchestrator.train.sums import Layout, weighted_sums


@dataclass(frozen=True, slots=True)
class BlockResult:
    """What a block of n steps reports, on the host.

    Attributes:
        sums: for `loss` and each metric the weighted sums over the global batch, [n] or [n, k].
        weight: the sums of the weights, [n].
        finite: whether the update was applied, bool [n].
        local_finite: whether the loss of each local replica was finite, bool [n, local replicas].
        ids: for each local replica the examples as the steps used them, int64 [n, batch].
    """

    sums: Mapping[str, np.ndarray]
    weight: np.ndarray
    finite: np.ndarray
    local_finite: np.ndarray
    ids: list[np.ndarray]


def local_replica(plan: RunPlan) -> int:
    """Return which of this worker's replicas is being traced; call in replica context."""
    context = tf.distribute.get_replica_context()
    # A constant of the graph under every strategy, though TensorFlow hands it out as a tensor.
    replica = tf.get_static_value(tf.convert_to_tensor(context.replica_id_in_sync_group))
    return int(replica) % plan.devices_per_worker


class Captured(keras.StatelessScope):
    """Catches what layers assign to their state, so that the step decides what becomes of it.

    Keras's own scope answers None for variables it was not given, which its regularisers then
    take for the value (keras 3.15, layers/layer.py:_get_regularization_losses).
    """

    def __init__(self, state: Sequence[tuple[keras.Variable, Any]] = ()):
        super().__init__(state, collect_losses=True, initialize_variables=False)

    def get_current_value(self, variable: keras.Variable) -> Any:
        """Return the value assigned in the scope, else the variable itself, which tapes watch."""
        value = super().get_current_value(variable)
        return variable._value if value is None else value


class TrainStep:
    """The model's training, K steps at a time.

    Holds no state of its own: variables belong to the model and the optimizers, and the position
    in the data is the step number it is given.
    """

    def __init__(
        self,
        plan: RunPlan,
        job: Job,
        model: keras.Model,
        optimizers: Optimizers,
        strategy: tf.distribute.Strategy,
        shards: Sequence[Shard],
        source: Source,
        resident: Resident,
    ):
        self.num_traces = 0
        self._plan = plan
        self._job = job
        self._model = model
        self._optimizers = optimizers
        self._strategy = strategy
        self._shards = shards
        self._resident = resident
        self._layout: Layout | None = None
        self._groups = optimizers.groups
        self._num_gradients = len(flatten_groups(self._groups))
        self._seeds = [v for v in model.variables if is_layer_seed(v)]
        self._moving = [v for v in model.non_trainable_variables if is_moving(v)]
        self._moved: list[keras.Variable] = []
        self._scale = 1.0 / plan.config.train.global_batch_size
        signature = [tf.TensorSpec([], tf.int64), tf.TensorSpec([], tf.int32)]
        is_resident = resident.tables is not None
        feeds = [
            (
                tf.TensorSpec([None, shard.size], tf.int64),
                feature_spec(source, shard.size, resident=is_resident),
            )
            for shard in shards
        ]
        mode = plan.config.train.compile
        self._run: Any = self._block
        if mode is not Compile.eager:
            self._run = tf.function(
                self._block,
                input_signature=[*signature, feeds],
                autograph=False,
                jit_compile=True if mode is Compile.xla else None,
            )

    def run(self, first_step: int, num_steps: int, feed: Feed) -> BlockResult:
        """Run the steps after `first_step`.

        Raises:
            JobError: the job's losses, metrics or gradients have the wrong form.
        """
        feeds = [
            (tf.constant(ids), {name: tf.constant(value) for name, value in features.items()})
            for ids, features in zip(feed.ids, feed.features, strict=True)
        ]
        rows, finite, ids = self._run(
            tf.constant(first_step, tf.int64), tf.constant(num_steps, tf.int32), feeds
        )
        assert self._layout is not None
        locals_ = len(self._shards)
        columns = rows.numpy().astype(np.float64)
        reduced = columns[:, :-locals_]
        return BlockResult(
            sums=self._layout.split(reduced[:, 1:]),
            weight=reduced[:, 0],
            finite=finite.numpy(),
            local_finite=np.isfinite(columns[:, -locals_:]),
            ids=[part.numpy() for part in ids],
        )

    def _block(self, first_step: Any, num_steps: Any, feeds: Any) -> Any:
        """Run `num_steps` steps; a Python function of tensors, traced once."""
        self.num_traces += 1
        dtype = self._sum_dtype()
        rows = tf.TensorArray(dtype, num_steps, infer_shape=True)
        finite = tf.TensorArray(tf.bool, num_steps, element_shape=[])
        ids = [
            tf.TensorArray(tf.int64, num_steps, element_shape=[shard.size])
            for shard in self._shards
        ]

        def one_step(i: Any, rows: Any, finite: Any, ids: Any) -> Any:
            reduced, local_loss, used = self._strategy.run(self._reduce, (first_step, i, feeds))
            values = self._first(reduced)
            norm = tf.linalg.global_norm(
                [tf.cast(value, dtype) for value in values[: self._num_gradients]]
            )
            # The norm tells more than the loss, which a ReLU can keep finite; check both.
            ok = tf.math.is_finite(norm) & tf.math.is_finite(values[-1][1])
            tf.cond(ok, lambda: self._update(reduced, norm), lambda: tf.constant(0))
            local = self._strategy.experimental_local_results(local_loss)
            row = tf.concat([values[-1], tf.stack(list(local))], 0)
            parts = self._strategy.experimental_local_results(used)
            ids = [array.write(i, part) for array, part in zip(ids, parts, strict=True)]
            return i + 1, rows.write(i, row), finite.write(i, ok), ids

        # Not AutoGraph: translating this file takes seconds, at every start of a worker.
        _, rows, finite, ids = tf.while_loop(
            lambda i, *_: i < num_steps, one_step, (tf.constant(0), rows, finite, ids)
        )
        return rows.stack(), finite.stack(), [array.stack() for array in ids]

    def _update(self, reduced: Sequence[Any], norm: Any) -> Any:
        self._strategy.run(self._apply, (reduced, norm))
        return tf.constant(0)  # both branches of a cond return something alike

    def _reduce(self, first_step: Any, i: Any, feeds: Any) -> Any:
        """Differentiate on one replica and add up over all of them.

        Returns:
            The reduced values (gradients, moving state, sums), the local loss, the local ids.
        """
        local = local_replica(self._plan)
        block_ids, block_features = feeds[local]
        ids = block_ids[i]
        features = step_features(block_features, i)
        raw = self._resident.rows(local, ids, features)
        step = first_step + tf.cast(i, tf.int64)
        gradients, moved, sums = self._differentiate(local, step, raw)
        num_replicas = self._plan.num_replicas
        values = [*gradients, *(value / num_replicas for value in moved), sums]
        if num_replicas > 1:
            context = tf.distribute.get_replica_context()
            values = context.all_reduce(tf.distribute.ReduceOp.SUM, values)
        return values, sums[1], ids

    def _differentiate(self, local: int, step: Any, raw: Batch) -> tuple[list, list, Any]:
        """Accumulate gradients and sums over the micro-batches of one replica."""
        plan, shard = self._plan, self._shards[local]
        positions = step * plan.config.train.global_batch_size + shard.offset
        gradients: list[Any] = []
        sums: Any = 0.0
        moved: dict[int, Any] = {}  # index in self._moving -> the state after the micro-batch
        start = 0
        for micro, size in enumerate(split_evenly(shard.size, plan.config.train.micro_batches)):
            rows = {name: value[start : start + size] for name, value in raw.items()}
            seeds = self._example_seeds(positions + start, size)
            batch = self._job.prepare(rows, training=True, seeds=seeds)
            state = [
                *((self._moving[index], value) for index, value in moved.items()),
                *zip(self._seeds, self._layer_seeds(local, step, micro), strict=True),
            ]
            with Captured(state) as scope:
                grouped, outcome = self._job.gradients(self._model, batch, self._scale)
            moved = {
                index: scope.state_mapping[id(variable)]
                for index, variable in enumerate(self._moving)
                if id(variable) in scope.state_mapping
            }
            parts = self._checked_gradients(grouped)
            gradients = [a + b for a, b in zip(gradients, parts, strict=True)] if micro else parts
            self._layout, part = weighted_sums(outcome, size, self._sum_dtype())
            sums += part
            start += size
        self._moved = [self._moving[index] for index in moved]
        return gradients, list(moved.values()), sums

    def _apply(self, reduced: Sequence[Any], norm: Any) -> None:
        """Update the variables of one replica from reduced values."""
        gradients = list(reduced[: self._num_gradients])
        weight = reduced[-1][0]
        factor = tf.math.divide_no_nan(tf.ones_like(weight), self._scale * weight)
        limit = self._plan.config.optimizer.clip_global_norm
        if limit is not None:
            factor *= limit / tf.maximum(norm * factor, tf.cast(limit, norm.dtype))
        scaled = iter([gradient * tf.cast(factor, gradient.dtype) for gradient in gradients])
        self._optimizers.apply(
            {name: [next(scaled) for _ in group] for name, group in self._groups.items()}
        )
        for variable, value in zip(self._moved, reduced[self._num_gradients : -1], strict=True):
            variable.value.assign(tf.cast(value, variable.dtype))

    def _checked_gradients(self, grouped: Gradients) -> list[Any]:
        """Return the gradients as dense tensors in the order of the variables."""
        dense, missing = [], []
        for name, variables in self._groups.items():
            if len(grouped.get(name, ())) != len(variables):
                raise JobError(
                    f"gradients() returned {len(grouped.get(name, ()))} gradients for the "
                    f"parameter group {name!r} of {len(variables)} variables; return one a variable"
                )
            for variable, gradient in zip(variables, grouped[name], strict=True):
                if gradient is None:
                    missing.append(variable.path)
                else:
                    dense.append(tf.convert_to_tensor(gradient))
        if missing:
            raise JobError(
                f"the loss does not depend on {', '.join(missing)}: no gradient; set "
                "`trainable=False` there, or leave it out of parameter_groups()"
            )
        return dense

    def _sum_dtype(self) -> Any:
        """Return the dtype of the first gradient: sums then travel in the same collective."""
        return tf.as_dtype(flatten_groups(self._groups)[0].dtype)

    def _first(self, reduced: Sequence[Any]) -> list[Any]:
        return [self._strategy.experimental_local_results(value)[0] for value in reduced]

    def _example_seeds(self, first_position: Any, size: int) -> Any:
        positions = first_position + tf.range(size, dtype=tf.int64)
        seed = tf.fill([size], tf.constant(self._plan.config.train.seed, tf.int64))
        return tf.stack([positions, seed], axis=1)

    def _layer_seeds(self, local: int, step: Any, micro: int) -> list[Any]:
        """Return the state of each layer's seed generator for one replica, step and micro-batch.

        A generator adds to the second word with every call within a step, so the step goes into
        the first.
        """
        replica = self._shards[local].offset  # distinct for each replica of the run
        states = []
        for index, variable in enumerate(self._seeds):
            text = f"{self._plan.config.train.seed} {index} {replica} {micro}".encode()
            first, second = struct.unpack("<II", hashlib.sha256(text).digest()[:8])
            word = tf.cast((step + first) % 2**32, variable.dtype)
            states.append(tf.stack([word, tf.cast(second, variable.dtype)]))
        return states


def is_layer_seed(variable: keras.Variable) -> bool:
    """Tell whether a variable is the state of a Keras SeedGenerator: it follows from the step."""
    return variable.path.endswith("seed_generator_state")


def is_moving(variable: keras.Variable) -> bool:
    """Tell whether a variable is float state that a layer may assign, such as a moving mean."""
    return tf.as_dtype(variable.dtype).is_floating and not is_layer_seed(variable)
