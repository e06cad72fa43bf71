"""The compiled block: K steps of gradients, one reduction each, one decision each.

One all-reduce (SUM) carries, for each dtype, the gradients of `replica.py`, the moving state of
layers divided by R, and the sums of weights, loss and metrics. Multiplied by D / (s sum w), with
`replica.py`'s D and s, the reduced gradient is that of the weighted mean loss plus the terms,
whatever the number R of replicas is and however the global batch was split.

Everything that decides anything is computed from reduced values and between two `strategy.run`s:
a `tf.cond` around an optimizer inside a replica fails under every strategy (TensorFlow 2.21).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from orchestrator.errors import JobError
from orchestrator.spec.plan import RunPlan
from orchestrator.spec.schema import Compile
from orchestrator.train.block import BlockResult, Rows, first_bad
from orchestrator.train.choice import Choice
from orchestrator.train.compiled import CannotCompile, compiled_share, folded_square_sum, refusals
from orchestrator.train.data import Feed, Shard
from orchestrator.train.inputs import Resident, feature_spec, padded_lengths, step_features
from orchestrator.train.job import Job
from orchestrator.train.names import renamed, stable_names
from orchestrator.train.optimizer import Optimizers
from orchestrator.train.replica import Replicas, Share, local_replica, summed_over_replicas
from orchestrator.train.sources import Source
from orchestrator.train.stateful import refuse_stateful_draws
from orchestrator.train.update import Update


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
        compiles: Callable[[], None] = lambda: None,
    ):
        """Prepare the functions; nothing is traced before the first block.

        Args:
            plan: of the run.
            job: whose losses are differentiated.
            model: what it trains.
            optimizers: of the model's groups of variables.
            strategy: under which model and optimizers were made.
            shards: of this worker's replicas, in their order.
            source: the training examples.
            resident: their arrays on the devices, if they lie there.
            tell: takes a sentence about how blocks are executed, once it is decided.
            compiles: called before XLA compiles, which may take long.
        """
        self.num_traces = 0
        self._compiles = compiles
        self._compiled: set[Any] = set()  # for which lengths of features XLA has compiled
        self._plan = plan
        self._optimizers = optimizers
        self._strategy = strategy
        self._shards = shards
        self._resident = resident
        self._replicas = Replicas(plan, job, model, optimizers.groups, shards)
        self._update = Update(plan, optimizers, strategy)
        self._is_checked = not plan.config.train.deterministic
        self._tell = tell
        names = stable_names(model)
        paths = [renamed(variable.path, names) for variable in self._update.variables]
        self._rows = Rows(paths, len(shards), with_norms=plan.config.train.layer_norms)
        is_resident = resident.tables is not None
        state = [v for section in optimizers.variables.values() for v in section]
        self._choice = Choice(plan, [*model.variables, *state])
        compile_ = plan.config.train.compile
        self.mode = self._choice.mode if compile_ is Compile.auto else compile_
        # XLA compiles for each shape, and features of any number of steps would fill the memory.
        self._is_one_program = plan.num_replicas == 1 and is_resident
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
                self._xla_block,
                input_signature=signature,
                autograph=False,
                jit_compile=self._is_one_program or None,
            ),
        }

    def run(self, first_step: int, num_steps: int, feed: Feed) -> BlockResult:
        """Run the steps after `first_step`.

        Raises:
            JobError: the job's losses, metrics or gradients have the wrong form, or XLA has no
                kernel for them, or they draw numbers that `train.deterministic` cannot repeat.
        """
        self._refuse_stateful_draws()
        if self._choice.is_open:
            self._choose(first_step, num_steps, feed)
        start = time.monotonic()
        try:
            rows, ids = self._call(self.mode, first_step, num_steps, feed)
        except CannotCompile as error:
            raise JobError(
                f"train.compile=xla: {error}; train.compile=graph can run this job"
            ) from error
        result = self._rows.read(rows.numpy(), [part.numpy() for part in ids])
        self._choice.observe(num_steps, time.monotonic() - start)
        return result

    def _refuse_stateful_draws(self) -> None:
        """Look once, before the first block, for what would break `train.deterministic`."""
        if self._is_checked or self.mode is Compile.eager:
            return
        self._is_checked = True
        refuse_stateful_draws(self._graph(self.mode))

    def _graph(self, mode: Compile) -> Any:
        """Return the GraphDef of a block; it is traced once, here or when it runs."""
        return self._functions[mode].get_concrete_function().graph.as_graph_def()

    def _call(self, mode: Compile, first_step: int, num_steps: int, feed: Feed) -> Any:
        """Run a block in one of the modes; return its rows and ids as tensors."""
        length = num_steps
        if mode is Compile.xla:
            if self._is_one_program:
                train = self._plan.config.train
                length = max(num_steps, min(train.max_block_steps, self._plan.total_steps))
            if lengths := padded_lengths(feed.features) - self._compiled:
                self._compiled |= lengths
                self._compiles()
        feeds = [
            (_filled(ids, length), {name: _filled(rows, length) for name, rows in features.items()})
            for ids, features in zip(feed.ids, feed.features, strict=True)
        ]
        numbers = tf.constant(first_step, tf.int64), tf.constant(num_steps, tf.int32)
        with refusals():
            rows, ids = self._functions[mode](*numbers, feeds)
        return rows[:num_steps], [part[:num_steps] for part in ids]

    def _xla_block(self, first_step: Any, num_steps: Any, feeds: Any) -> Any:
        """Run a block in the form that XLA compiles well, or what it can of it."""
        return self._block(first_step, num_steps, feeds, xla=True)

    def _block(self, first_step: Any, num_steps: Any, feeds: Any, *, xla: bool = False) -> Any:
        """Run `num_steps` steps; a Python function of tensors, traced once.

        Args:
            first_step: steps done before the block, int64.
            num_steps: how many to run, int32.
            feeds: for each local replica the ids and features of at least so many steps.
            xla: decide about an update at each assignment instead of around all of them if the
                block is one program, else have a replica's share compiled by itself.
        """
        choose = xla and self._is_one_program
        reduce = functools.partial(self._reduce, compiled=xla and not self._is_one_program)
        self.num_traces += 1
        length = tf.shape(feeds[0][0])[0]
        rows = tf.TensorArray(self._replicas.sum_dtype, length, infer_shape=True)
        ids = [
            tf.TensorArray(tf.int64, length, element_shape=[shard.size]) for shard in self._shards
        ]

        def one_step(i: Any, rows: Any, ids: Any) -> Any:
            reduced, local, used = self._strategy.run(reduce, (first_step, i, feeds))
            row = self._decide(reduced, *local, choose=choose)
            parts = self._strategy.experimental_local_results(used)
            ids = [array.write(i, part) for array, part in zip(ids, parts, strict=True)]
            return i + 1, rows.write(i, row), ids

        # Not AutoGraph: translating this file takes seconds, at every start of a worker.
        _, rows, ids = tf.while_loop(
            lambda i, *_: i < num_steps, one_step, (tf.constant(0), rows, ids)
        )
        return rows.stack(), [array.stack() for array in ids]

    def _decide(
        self, reduced: Sequence[Any], losses: Any, gradients: Sequence[Any], *, choose: bool
    ) -> Any:
        """Update all variables if everything is finite; return the row that tells about it.

        Args:
            reduced: what `_reduce` returns.
            losses: of the local replicas.
            gradients: of the local replicas, looked at only if something is not finite.
            choose: see `_block`'s `xla`.
        """
        values = self._first(reduced)
        sums, count = values[-1], len(self._update.variables)
        squares = self._squares(values[:count], compiled=choose)
        norm = tf.sqrt(tf.reduce_sum(squares))
        # The norm tells more than the loss, which a ReLU can keep finite; check both.
        ok = tf.math.is_finite(norm) & tf.math.is_finite(sums[1])
        factor, scale = self._update.factor(sums), self._optimizers.loss_scale
        told = {"mean_norm": norm * factor, "scale": 1.0 if scale is None else scale.value}
        norms = []
        if self._rows.with_norms:
            weights = [tf.convert_to_tensor(variable.value) for variable in self._update.variables]
            weight_squares = self._squares(weights, compiled=choose)
            norms = [tf.sqrt(squares) * factor, tf.sqrt(weight_squares)]
        if choose:
            self._update.apply(reduced, norm, ok)
            bad = first_bad(squares)
            sound = [bad == 0]  # there is one replica
        else:
            bad, sound = tf.cond(
                ok,
                lambda: (self._update.apply(reduced, norm), [True] * len(self._shards)),
                lambda: (first_bad(squares), self._sound(gradients)),
            )
        if scale is not None:
            scale.update(ok)
        local = self._strategy.experimental_local_results(losses)
        return self._rows.write(
            ok=ok, bad=bad, local=local, sound=sound, norms=norms, sums=sums, **told
        )

    def _sound(self, gradients: Sequence[Any]) -> list[Any]:
        """Return for each local replica whether its own gradients are finite."""
        bad = self._strategy.run(
            lambda arrays: first_bad(self._squares(arrays, compiled=False)), (gradients,)
        )
        return [number == 0 for number in self._strategy.experimental_local_results(bad)]

    def _squares(self, gradients: Sequence[Any], *, compiled: bool) -> Any:
        """Return the sum of squares of each array, [number of variables]."""
        arrays = [tf.cast(gradient, self._replicas.sum_dtype) for gradient in gradients]
        if compiled:
            return tf.stack([folded_square_sum(values) for values in arrays])
        return tf.stack([2 * tf.nn.l2_loss(values) for values in arrays])

    def _reduce(self, first_step: Any, i: Any, feeds: Any, *, compiled: bool) -> Any:
        """Differentiate on one replica and add up over all of them.

        Returns:
            The reduced values (gradients, moving state, sums), the local loss and gradients, the
            local ids.
        """
        local = local_replica(self._plan)
        block_ids, block_features = feeds[local]
        ids = block_ids[i]
        raw = self._resident.rows(local, ids, step_features(block_features, i))
        step = first_step + tf.cast(i, tf.int64)

        def trace() -> Share:
            return self._replicas.share(local, step, raw, self._update.scale())

        share = compiled_share(trace) if compiled else trace()
        self._rows.layout = share.layout
        self._update.learn(share)
        num_replicas = self._plan.num_replicas
        gradients, are_reduced = self._replicas.all_dense(share.gradients)
        values = [*gradients, *(value / num_replicas for _, value in share.moved), share.sums]
        if num_replicas > 1:
            are_reduced += [False] * (len(values) - len(gradients))
            open_values = [v for v, done in zip(values, are_reduced, strict=True) if not done]
            packed = self._plan.config.strategy.bytes_per_pack
            summed = iter(summed_over_replicas(open_values, packed))
            values = [
                v if done else next(summed) for v, done in zip(values, are_reduced, strict=True)
            ]
        own = [g.values if isinstance(g, tf.IndexedSlices) else g for g in share.gradients]
        return values, (share.sums[1], own), ids

    def _first(self, reduced: Sequence[Any]) -> list[Any]:
        return [self._strategy.experimental_local_results(value)[0] for value in reduced]

    def _choose(self, first_step: int, num_steps: int, feed: Feed) -> None:
        """Settle `train.compile=auto`, once there is something to judge by."""
        found = self._choice.decide(
            self._plan.total_steps - first_step,
            num_steps,
            lambda: self._graph(Compile.graph),
            lambda mode: self._call(mode, first_step, num_steps, feed)[0].numpy(),
        )
        if found is not None:
            self.mode, sentence = found
            if sentence:
                self._tell(sentence)


def _filled(array: np.ndarray, length: int) -> Any:
    """Return an array as a tensor of `length` steps; what is added is never run."""
    if len(array) < length:
        array = np.concatenate(
            [array, np.zeros((length - len(array), *array.shape[1:]), array.dtype)]
        )
    return tf.constant(array)
