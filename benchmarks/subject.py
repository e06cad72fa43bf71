"""What every comparator trains: the job's own model, data, loss and optimizer, and a stopwatch."""

from __future__ import annotations

import importlib
import json
import time
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from benchmarks.spec import Spec
from orchestrator.train.job import Split

_OPTIMIZERS = {
    "adam": keras.optimizers.Adam,
    "adamw": keras.optimizers.AdamW,
    "sgd": keras.optimizers.SGD,
    "rmsprop": keras.optimizers.RMSprop,
    "lion": keras.optimizers.Lion,
}


def bound_threads(spec: Spec) -> None:
    """Give TensorFlow as many threads as our worker has; call before TensorFlow initialises."""
    keras.config.set_dtype_policy(spec.precision)
    tf.config.threading.set_intra_op_parallelism_threads(spec.num_threads)
    tf.config.threading.set_inter_op_parallelism_threads(spec.num_threads)


class Subject:
    """A job with its model built; make it inside the strategy's scope if there is one."""

    def __init__(self, spec: Spec):
        self.spec = spec
        module, _, name = spec.class_name.rpartition(".")
        self.job = getattr(importlib.import_module(module), name)(**spec.args)
        self.job.data_dir = spec.data_dir
        source = self.job.source(Split.TRAIN)
        self.arrays = source.resident() or source.fetch(np.arange(source.num_examples))
        self.num_examples = source.num_examples
        keras.utils.set_random_seed(spec.seed)
        self.model = self.job.model()
        self.groups = self.job.parameter_groups(self.model)
        self.optimizers = {name: self.optimizer(name) for name in self.groups}
        for group, optimizer in self.optimizers.items():
            optimizer.build(self.groups[group])

    def optimizer(self, group: str) -> keras.optimizers.Optimizer:
        """Return a new optimizer for a parameter group."""
        arguments: dict[str, Any] = {**self.spec.arguments, **self.spec.groups.get(group, {})}
        if self.spec.cosine is not None:
            arguments["learning_rate"] = cosine(arguments["learning_rate"], *self.spec.cosine)
        return _OPTIMIZERS[self.spec.optimizer](**arguments)

    def step(self, raw: dict[str, Any], num_replicas: int = 1) -> Any:
        """Train on the batch of one replica and return [loss, metrics ...] of the step.

        Gradients of embeddings are made dense: from slices Keras's Adam updates only the rows of
        this batch, which is another optimizer, and not that of one device when there are several.
        """
        size = self.spec.batch_size // num_replicas
        done = tf.cast(next(iter(self.optimizers.values())).iterations, tf.int64)
        # Not constants, or augmentation would be computed once, when the graph is optimised.
        positions = done * self.spec.batch_size + tf.range(size, dtype=tf.int64)
        seeds = tf.stack([positions, tf.fill([size], tf.constant(self.spec.seed, tf.int64))], 1)
        batch = self.job.prepare(raw, training=True, seeds=seeds)
        gradients, outcome = self.job.gradients(self.model, batch, 1.0 / self.spec.batch_size)
        for name, variables in self.groups.items():
            dense = [tf.convert_to_tensor(gradient) for gradient in gradients[name]]
            self.optimizers[name].apply(dense, variables)
        columns = [outcome.loss, *outcome.metrics.values()]
        return tf.stack([tf.reduce_mean(tf.cast(column, tf.float32)) for column in columns])


def cosine(rate: float, warmup_steps: int, total_steps: int, final_factor: float) -> Any:
    """Return Keras's own schedule: linear warm-up, then half a cosine."""
    return keras.optimizers.schedules.CosineDecay(
        0.0 if warmup_steps else rate,
        max(1, total_steps - warmup_steps),
        alpha=final_factor,
        warmup_target=rate if warmup_steps else None,
        warmup_steps=warmup_steps,
    )


class Rows:
    """The examples of each step: every epoch in an order of its own."""

    def __init__(self, subject: Subject):
        self._size = subject.spec.batch_size
        self._num_examples = subject.num_examples
        self._random = np.random.default_rng(subject.spec.seed)
        self._left = np.zeros(0, np.int64)

    def take(self, num_steps: int) -> np.ndarray:
        """Return the examples of the next steps, int64 [num_steps, batch]."""
        wanted = num_steps * self._size
        if len(self._left) < wanted:
            parts = [self._left]
            while sum(map(len, parts)) < wanted:
                parts.append(self._random.permutation(self._num_examples))
            self._left = np.concatenate(parts)
        taken, self._left = self._left[:wanted], self._left[wanted:]
        return taken.reshape(num_steps, self._size)


class Stopwatch:
    """Takes the time of the first step, and the rate after a warm-up of a fifth of `seconds`.

    Attributes:
        stall_s: how long steps wait for a checkpoint; 0 where none is written.
    """

    def __init__(self, seconds: float):
        self.stall_s = 0.0
        self._seconds = seconds
        self._first_step = self._begin = self._warm = self._end = 0.0
        self._steps = 0

    def goes_on(self, num_steps: int) -> bool:
        """Count steps that are done on the device; tell whether more are wanted."""
        now = time.perf_counter()
        if not self._first_step:
            self._first_step, self._begin = time.time(), now
        elif not self._warm:
            self._warm = now if now - self._begin >= self._seconds / 5 else 0.0
        else:
            self._steps += num_steps
            self._end = now
        return not self._warm or now - self._warm < self._seconds

    def report(self) -> str:
        """Return what the benchmark reads, as JSON."""
        rate = self._steps / (self._end - self._warm) if self._steps else 0.0
        return json.dumps(
            {"first_step": self._first_step, "steps_per_s": rate, "stall_s": self.stall_s}
        )
