"""The compiled block: K steps of gradients, one reduction each, one decision each.

One all-reduce (SUM) carries, for each dtype, the gradients of `replica.py`, the moving state of
layers divided by R, and the sums of weights, loss and metrics. Multiplied by G / (s sum w), the
reduced gradient is that of the weighted mean loss plus the terms, whatever the number R of
replicas is and however the global batch of G was split.

Everything that decides anything is computed from reduced values and between two `strategy.run`s:
a `tf.cond` around an optimizer inside a replica fails under every strategy (TensorFlow 2.21).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from orchestrator.spec.plan import RunPlan
from orchestrator.spec.schema import Compile
from orchestrator.train.data import Feed, Shard
from orchestrator.train.inputs import Resident, feature_spec, step_features
from orchestrator.train.job import Job, flatten_groups
from orchestrator.train.optimizer import Optimizers
from orchestrator.train.replica import Replicas, local_replica, summed_over_replicas
from orchestrator.train.sources import Source
from orchestrator.train.sums import Layout

# XLA is tried when at least so much time is left, because compiling costs about a second ...
_WORTH_TRYING_S = 5.0
# ... and more for larger graphs: about 4 ms a node.
_MOST_NODES = 1_500
_TRIAL_S = 0.1


@dataclass(frozen=True, slots=True)
class BlockResult:
    """What a block of n steps reports, on the host.

    Attributes:
        sums: for `loss` and each metric the weighted sums over the global batch, [n] or [n, k].
        weight: the sums of the weights, [n].
        gradient_norm: global norm of the mean gradient before it is clipped, [n].
        loss_scale: of each step, [n]; 1 without float16.
        finite: whether the update was applied, bool [n].
        overflowed: not applied because float16 overflowed, which the loss scale expects, bool [n].
        bad_variable: path of the first variable whose gradient is not finite; "" without one.
        local_finite: whether the loss of each local replica was finite, bool [n, local replicas].
        ids: for each local replica the examples as the steps used them, int64 [n, batch].
    """

    sums: Mapping[str, np.ndarray]
    weight: np.ndarray
    gradient_norm: np.ndarray
    loss_scale: np.ndarray
    finite: np.ndarray
    overflowed: np.ndarray
    bad_variable: list[str]
    local_finite: np.ndarray
    ids: list[np.ndarray]


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
        tell: Callable[[str], None] = lambda text: None,
    ):
        """Prepare the functions; nothing is traced before the first block.

        Args:
            tell: takes a sentence about how blocks are executed, once it is decided.
        """
        self.num_traces = 0
        self.mode = Compile.graph
        self._plan = plan
        self._model = model
        self._optimizers = optimizers
        self._strategy = strategy
        self._shards = shards
        self._resident = resident
        self._replicas = Replicas(plan, job, model, optimizers.groups, shards)
        self._layout: Layout | None = None
        self._groups = optimizers.groups
        self._variables = flatten_groups(optimizers.groups)
        self._moving: list[keras.Variable] = []
        self._tell = tell
        self._undecided = False
        self._last = (0, 0.0)  # steps and seconds of the last block that was not the first
        self._is_traced = False
        asked = plan.config.train.compile
        if asked is Compile.auto:
            # Several replicas cannot be compiled as a whole; results differ in the last bits.
            self._undecided = plan.num_replicas == 1 and not plan.config.train.deterministic
        else:
            self.mode = asked
        is_resident = resident.tables is not None
        feeds = [
            (
                tf.TensorSpec([None, shard.size], tf.int64),
                feature_spec(source, shard.size, resident=is_resident),
            )
            for shard in shards
        ]
        signature = [tf.TensorSpec([], tf.int64), tf.TensorSpec([], tf.int32), feeds]
        self._functions: dict[Compile, Any] = {
            Compile.eager: self._block,
            Compile.graph: tf.function(self._block, input_signature=signature, autograph=False),
            Compile.xla: tf.function(
                self._chosen_block, input_signature=signature, autograph=False, jit_compile=True
            ),
        }

    def run(self, first_step: int, num_steps: int, feed: Feed) -> BlockResult:
        """Run the steps after `first_step`.

        Raises:
            JobError: the job's losses, metrics or gradients have the wrong form.
        """
        if self._undecided:
            self._decide(first_step, num_steps, feed)
        start = time.monotonic()
        rows, finite, ids = self._call(self.mode, first_step, num_steps, feed)
        result = self._result(rows.numpy(), finite.numpy(), [part.numpy() for part in ids])
        if self._is_traced:
            self._last = (num_steps, time.monotonic() - start)
        self._is_traced = True
        return result

    def _call(self, mode: Compile, first_step: int, num_steps: int, feed: Feed) -> Any:
        """Run a block in one of the modes; return its rows, finite flags and ids as tensors."""
        length = num_steps
        if mode is Compile.xla:
            # One program for blocks of any length: shapes are part of what XLA compiles.
            length = max(num_steps, self._longest())
        feeds = [
            (_filled(ids, length), {name: _filled(rows, length) for name, rows in features.items()})
            for ids, features in zip(feed.ids, feed.features, strict=True)
        ]
        rows, finite, ids = self._functions[mode](
            tf.constant(first_step, tf.int64), tf.constant(num_steps, tf.int32), feeds
        )
        return rows[:num_steps], finite[:num_steps], [part[:num_steps] for part in ids]

    def _longest(self) -> int:
        train = self._plan.config.train
        return min(train.max_block_steps, self._plan.total_steps)

    def _result(self, rows: np.ndarray, finite: np.ndarray, ids: list[np.ndarray]) -> BlockResult:
        """Take the columns of a block's rows apart: see `_row`."""
        assert self._layout is not None
        columns = rows.astype(np.float64)
        norm, bad, scale = columns[:, 0], columns[:, 1], columns[:, 2]
        local = columns[:, 3 : 3 + len(self._shards)]
        weight, sums = columns[:, 3 + len(self._shards)], columns[:, 4 + len(self._shards) :]
        split = self._layout.split(sums)
        names = ["", *(variable.path for variable in self._variables)]
        return BlockResult(
            sums=split,
            weight=weight,
            gradient_norm=norm,
            loss_scale=scale,
            finite=finite,
            # At a scale of 1 it is not the scale's doing any more.
            overflowed=~finite & np.isfinite(split["loss"]) & (scale > 1),
            bad_variable=[names[int(index)] for index in bad],
            local_finite=np.isfinite(local),
            ids=ids,
        )

    def _chosen_block(self, first_step: Any, num_steps: Any, feeds: Any) -> Any:
        """Run a block in the form that XLA compiles well."""
        return self._block(first_step, num_steps, feeds, choose=True)

    def _block(self, first_step: Any, num_steps: Any, feeds: Any, *, choose: bool = False) -> Any:
        """Run `num_steps` steps; a Python function of tensors, traced once.

        Args:
            choose: decide about an update at each assignment instead of around all of them.
        """
        self.num_traces += 1
        length = tf.shape(feeds[0][0])[0]
        rows = tf.TensorArray(self._replicas.sum_dtype, length, infer_shape=True)
        finite = tf.TensorArray(tf.bool, length, element_shape=[])
        ids = [
            tf.TensorArray(tf.int64, length, element_shape=[shard.size]) for shard in self._shards
        ]

        def one_step(i: Any, rows: Any, finite: Any, ids: Any) -> Any:
            reduced, local_loss, used = self._strategy.run(self._reduce, (first_step, i, feeds))
            values = self._first(reduced)
            sums = values[-1]
            squares = self._squares(values[: len(self._variables)], compiled=choose)
            norm = tf.sqrt(tf.reduce_sum(squares))
            # The norm tells more than the loss, which a ReLU can keep finite; check both.
            ok = tf.math.is_finite(norm) & tf.math.is_finite(sums[1])
            local = self._strategy.experimental_local_results(local_loss)
            row = self._row(squares, norm, sums, local)
            if choose:
                self._update(reduced, norm, ok)
            else:
                tf.cond(ok, lambda: self._update(reduced, norm), lambda: tf.constant(0))
            if self._optimizers.loss_scale is not None:
                self._optimizers.loss_scale.update(ok)
            parts = self._strategy.experimental_local_results(used)
            ids = [array.write(i, part) for array, part in zip(ids, parts, strict=True)]
            return i + 1, rows.write(i, row), finite.write(i, ok), ids

        # Not AutoGraph: translating this file takes seconds, at every start of a worker.
        _, rows, finite, ids = tf.while_loop(
            lambda i, *_: i < num_steps, one_step, (tf.constant(0), rows, finite, ids)
        )
        return rows.stack(), finite.stack(), [array.stack() for array in ids]

    def _row(self, squares: Any, norm: Any, sums: Any, local: Sequence[Any]) -> Any:
        """Return what one step reports: norm, bad variable, loss scale, local losses, sums."""
        wrong = ~tf.math.is_finite(squares)
        # Counted from 1, so that 0 means none.
        bad = tf.where(tf.reduce_any(wrong), tf.argmax(tf.cast(wrong, tf.int32)) + 1, 0)
        scale = self._optimizers.loss_scale
        scale = tf.ones_like(norm) if scale is None else tf.cast(scale.value, sums.dtype)
        mean = norm * self._factor(sums)
        return tf.concat([[mean, tf.cast(bad, sums.dtype), scale], tf.stack(local), sums], 0)

    def _squares(self, gradients: Sequence[Any], *, compiled: bool) -> Any:
        """Return the sum of squares of each gradient, [number of variables]."""
        dtype = self._replicas.sum_dtype
        squares = []
        for gradient in gradients:
            values = tf.cast(gradient, dtype)
            if compiled and len(values.shape) > 1:
                # XLA on CPUs adds all elements one by one; columns at a time it does in vectors.
                # The abs keeps it from making one sum of two again.
                columns = tf.reduce_sum(tf.square(tf.reshape(values, [-1, values.shape[-1]])), 0)
                squares.append(tf.reduce_sum(tf.abs(columns)))
            else:
                squares.append(2 * tf.nn.l2_loss(values))
        return tf.stack(squares)

    def _reduce(self, first_step: Any, i: Any, feeds: Any) -> Any:
        """Differentiate on one replica and add up over all of them.

        Returns:
            The reduced values (gradients, moving state, sums), the local loss, the local ids.
        """
        local = local_replica(self._plan)
        block_ids, block_features = feeds[local]
        ids = block_ids[i]
        raw = self._resident.rows(local, ids, step_features(block_features, i))
        step = first_step + tf.cast(i, tf.int64)
        share = self._replicas.share(local, step, raw, self._scale())
        self._layout = share.layout
        self._moving = [variable for variable, _ in share.moved]
        num_replicas = self._plan.num_replicas
        gradients, are_reduced = self._replicas.all_dense(local, share.gradients)
        values = [*gradients, *(value / num_replicas for _, value in share.moved), share.sums]
        if num_replicas > 1:
            are_reduced += [False] * (len(values) - len(gradients))
            open_values = [v for v, done in zip(values, are_reduced, strict=True) if not done]
            summed = iter(summed_over_replicas(open_values))
            values = [
                v if done else next(summed) for v, done in zip(values, are_reduced, strict=True)
            ]
        return values, share.sums[1], ids

    def _update(self, reduced: Sequence[Any], norm: Any, ok: Any = None) -> Any:
        """Update all variables; with `ok` only if it is true."""
        self._strategy.run(self._apply, (reduced, norm, ok))
        if self._optimizers.averages is not None:
            self._optimizers.averages.update(ok)
        return tf.constant(0)  # both branches of a cond return something alike

    def _apply(self, reduced: Sequence[Any], norm: Any, ok: Any) -> None:
        """Update the variables of one replica from reduced values."""
        count = len(self._variables)
        config = self._plan.config.optimizer
        factor = self._factor(reduced[-1])
        if config.clip_global_norm is not None:
            limit = tf.constant(config.clip_global_norm, norm.dtype)
            factor *= limit / tf.maximum(norm * factor, limit)
        scaled = [gradient * tf.cast(factor, gradient.dtype) for gradient in reduced[:count]]
        if config.clip_value is not None:
            limit = config.clip_value
            scaled = [tf.clip_by_value(gradient, -limit, limit) for gradient in scaled]
        flat = iter(scaled)
        grouped = {name: [next(flat) for _ in group] for name, group in self._groups.items()}
        if ok is None:
            self._optimizers.apply(grouped)
        else:
            self._optimizers.apply_if(ok, grouped)
        for variable, value in zip(self._moving, reduced[count:-1], strict=True):
            new = tf.cast(value, variable.dtype)
            variable.value.assign(new if ok is None else tf.where(ok, new, variable.value))

    def _factor(self, sums: Any) -> Any:
        """Return what makes the reduced gradient that of the mean: G / (s sum w)."""
        scale = self._scale()
        scale = tf.cast(scale, sums.dtype) if tf.is_tensor(scale) else scale
        return tf.math.divide_no_nan(tf.ones_like(sums[0]), scale * sums[0])

    def _scale(self) -> Any:
        """Return s / G: a plain number, which loses no bits in float64, unless s changes."""
        scale = self._optimizers.loss_scale
        batch = self._plan.config.train.global_batch_size
        return 1.0 / batch if scale is None else scale.value / batch

    def _first(self, reduced: Sequence[Any]) -> list[Any]:
        return [self._strategy.experimental_local_results(value)[0] for value in reduced]

    def _decide(self, first_step: int, num_steps: int, feed: Feed) -> None:
        """Choose between graph and XLA by running both, once a block's time is known."""
        steps, seconds = self._last
        if seconds < _TRIAL_S or self._resident.tables is None:
            return
        self._undecided = False
        left_s = (self._plan.total_steps - first_step) * seconds / steps
        if left_s < _WORTH_TRYING_S:
            return  # too short to win compiling back; nothing that anybody needs to read
        reason = self._why_not_xla()
        if reason:
            self._tell(f"train.compile=auto: graph ({reason})")
            return
        state = [*self._model.variables]
        state += [v for section in self._optimizers.variables.values() for v in section]
        before = [tf.identity(tf.convert_to_tensor(variable.value)) for variable in state]
        rates = {}
        for mode in (Compile.xla, Compile.xla, Compile.graph):  # the first one compiles
            start = time.monotonic()
            self._call(mode, first_step, num_steps, feed)[0].numpy()
            rates[mode] = num_steps / (time.monotonic() - start)
            for variable, value in zip(state, before, strict=True):
                variable.assign(value)
        self.mode = max(rates, key=lambda mode: rates[mode])
        shown = " against ".join(f"{rate:,.0f} steps/s as {m.value}" for m, rate in rates.items())
        self._tell(f"train.compile=auto: {self.mode.value} ({shown})")

    def _why_not_xla(self) -> str:
        """Return why XLA need not be tried; empty if it should be."""
        graph = self._functions[Compile.graph].get_concrete_function().graph.as_graph_def()
        nodes = [n.op for f in graph.library.function for n in f.node_def]
        if self._plan.device_kind == "CPU" and any("Conv" in op for op in nodes):
            return "convolutions on CPUs are slower under XLA"
        if len(nodes) > _MOST_NODES:
            return f"{len(nodes):,} operations would take long to compile"
        return ""


def _filled(array: np.ndarray, length: int) -> Any:
    """Return an array as a tensor of `length` steps; what is added is never run."""
    if len(array) < length:
        array = np.concatenate(
            [array, np.zeros((length - len(array), *array.shape[1:]), array.dtype)]
        )
    return tf.constant(array)
