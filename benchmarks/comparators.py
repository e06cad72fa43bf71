"""What one would write by hand on one device, without any orchestration.

python -m benchmarks.comparators MODE SPEC

* graph: the best loop with the same graph: one call trains a block of steps over data that lies
  on the device; xla: the same, compiled by XLA.
* tutorial: NumPy slices and one `tf.function` call a step, as in TensorFlow's guides.
* fit: `keras.Model.fit`; fit-10 and fit-100: with steps_per_execution=10 and 100; fit-graph and
  fit-graph-100: the same with jit_compile=False, because Keras decides by itself whether it
  compiles with XLA.
* save: the steps wait while `tf.train.Checkpoint.save` writes all state.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from benchmarks.spec import Spec
from benchmarks.subject import Rows, Stopwatch, Subject, bound_threads

_STEPS_BETWEEN_LOOKS = 50  # at the clock; a look waits for the device
_SAVES = 5


def same_graph(subject: Subject, watch: Stopwatch, *, jit: bool) -> None:
    """Train blocks of steps in graph."""
    tables = {name: tf.constant(array) for name, array in subject.arrays.items()}
    num_steps = subject.spec.block_steps
    width = 1 + len(_metric_names(subject))

    @tf.function(jit_compile=jit or None)
    def block(ids: Any) -> Any:
        columns = tf.TensorArray(tf.float32, num_steps, element_shape=[width])
        for i in tf.range(num_steps):
            rows = ids[i]
            batch = {name: tf.gather(table, rows) for name, table in tables.items()}
            columns = columns.write(i, subject.step(batch))
        return columns.stack()

    rows = Rows(subject)
    while True:
        block(tf.constant(rows.take(num_steps))).numpy()
        if not watch.goes_on(num_steps):
            return


def tutorial(subject: Subject, watch: Stopwatch) -> None:
    """Call the step once for each batch of NumPy slices."""

    @tf.function
    def train_step(batch: dict[str, Any]) -> Any:
        return subject.step(batch)[0]

    rows = Rows(subject)
    num_steps = 1
    while True:
        for ids in rows.take(num_steps):
            loss = train_step({name: array[ids] for name, array in subject.arrays.items()})
        loss.numpy()
        if not watch.goes_on(num_steps):
            return
        num_steps = _STEPS_BETWEEN_LOOKS


class _Enough(Exception):
    """Ends `fit` in the middle of an epoch."""


class _Looks(keras.callbacks.Callback):
    """Lets the stopwatch look at the clock whenever Keras comes by."""

    async_safe = True  # else Keras waits for the device after every batch

    def __init__(self, watch: Stopwatch):
        super().__init__()
        self._watch = watch
        self._counted = -1
        self._epoch = 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Count the batches since the last look; `batch` is the index of the last one done."""
        total = self.params["steps"] * self._epoch + batch
        if not self._watch.goes_on(total - self._counted):
            raise _Enough
        self._counted = total

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Remember which epoch it is: Keras counts batches from zero in each."""
        self._epoch = epoch


def fit(subject: Subject, watch: Stopwatch, *, steps_per_execution: int, jit: Any) -> None:
    """Let Keras do it; the data is prepared once, before."""
    job, model = subject.job, subject.model
    data = job.prepare(
        {name: tf.constant(array) for name, array in subject.arrays.items()},
        training=True,
        seeds=None,
    )

    def loss(y: Any, outputs: Any) -> Any:
        return job.loss({"y": y}, outputs)

    model.compile(
        optimizer=subject.optimizer("all"),
        loss=loss,
        metrics=[_metric(job, name) for name in _metric_names(subject)],
        steps_per_execution=steps_per_execution,
        jit_compile=jit,
    )
    try:
        model.fit(
            data["x"].numpy(),
            data["y"].numpy(),
            batch_size=subject.spec.batch_size,
            epochs=1_000_000,
            verbose=0,
            callbacks=[_Looks(watch)],
        )
    except _Enough:
        return


def save(subject: Subject, watch: Stopwatch) -> None:
    """Save everything several times, a step between; the stall is the median."""
    rows = Rows(subject)
    train_step = tf.function(subject.step)
    checkpoint = tf.train.Checkpoint(model=subject.model, **subject.optimizers)
    seconds = []
    with tempfile.TemporaryDirectory(prefix="bench-save-") as folder:
        for number in range(_SAVES):
            [ids] = rows.take(1)
            train_step({name: array[ids] for name, array in subject.arrays.items()}).numpy()
            watch.goes_on(1)
            begin = time.perf_counter()
            path = checkpoint.save(f"{folder}/{number}")
            seconds.append(time.perf_counter() - begin)
            for file in Path(folder).glob(f"{Path(path).name}.*"):
                file.unlink()
    watch.stall_s = statistics.median(seconds)


def _metric_names(subject: Subject) -> list[str]:
    """Return the job's metrics by running one example eagerly."""
    raw = {name: tf.constant(array[:1]) for name, array in subject.arrays.items()}
    batch = subject.job.prepare(raw, training=False, seeds=None)
    return list(subject.job.losses(subject.model, batch, training=False).metrics)


def _metric(job: Any, name: str) -> Callable[[Any, Any], Any]:
    def metric(y: Any, outputs: Any) -> Any:
        return job.metrics({"y": y}, outputs)[name]

    metric.__name__ = name
    return metric


MODES: dict[str, Callable[[Subject, Stopwatch], None]] = {
    "graph": partial(same_graph, jit=False),
    "xla": partial(same_graph, jit=True),
    "tutorial": tutorial,
    "fit": partial(fit, steps_per_execution=1, jit="auto"),
    "fit-10": partial(fit, steps_per_execution=10, jit="auto"),
    "fit-100": partial(fit, steps_per_execution=100, jit="auto"),
    "fit-graph": partial(fit, steps_per_execution=1, jit=False),
    "fit-graph-100": partial(fit, steps_per_execution=100, jit=False),
    "save": save,
}


def main(mode: str, text: str) -> None:
    """Train in one mode and print what the stopwatch saw."""
    spec = Spec.from_json(text)
    bound_threads(spec)
    watch = Stopwatch(spec.seconds)
    MODES[mode](Subject(spec), watch)
    print(watch.report())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
