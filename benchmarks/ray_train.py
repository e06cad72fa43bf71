"""The same job under Ray Train's TensorflowTrainer: one `tf.function` call a step in each worker.

python -m benchmarks.ray_train SPEC
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def train(config: dict[str, str]) -> None:
    """Train in one worker; rank 0 writes what its stopwatch saw."""
    # ray.train sets this for TensorFlow's old Keras; the model is made with Keras 3.
    os.environ.pop("TF_USE_LEGACY_KERAS", None)
    import ray.train
    import tensorflow as tf

    from benchmarks.spec import Spec
    from benchmarks.subject import Rows, Stopwatch, Subject, bound_threads

    spec = Spec.from_json(config["spec"])
    bound_threads(spec)
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    with strategy.scope():
        subject = Subject(spec)
    rank, size = ray.train.get_context().get_world_rank(), spec.batch_size // spec.num_workers
    watch = Stopwatch(spec.seconds)
    rows = Rows(subject)

    @tf.function
    def train_step(batch: dict[str, Any]) -> Any:
        per_replica = strategy.run(subject.step, (batch, spec.num_workers))
        return strategy.experimental_local_results(per_replica)[0][0]

    @tf.function
    def agreed(number: Any) -> Any:
        def add_up(own: Any) -> Any:
            context = tf.distribute.get_replica_context()
            # The identity lies on this replica's device; an argument of the function on none.
            return context.all_reduce(tf.distribute.ReduceOp.SUM, tf.identity(own))

        return strategy.experimental_local_results(strategy.run(add_up, (number,)))[0]

    def run(num_steps: int) -> float:
        begin = time.perf_counter()
        for ids in rows.take(num_steps):
            own = ids[rank * size : (rank + 1) * size]
            loss = train_step({name: array[own] for name, array in subject.arrays.items()})
        loss.numpy()
        return time.perf_counter() - begin

    run(1)
    watch.goes_on(1)
    # All must run equally many steps, or the rest waits for ever: look at rank 0's clock together.
    num_steps = spec.block_steps
    go_on = True
    while go_on:
        run(num_steps)
        own = float(watch.goes_on(num_steps)) if rank == 0 else 0.0
        go_on = agreed(tf.constant(own)).numpy() > 0
    if rank == 0:
        Path(config["report"]).write_text(watch.report())


def main(text: str) -> None:
    """Start Ray and the trainer, and print what rank 0 saw."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.tensorflow import TensorflowTrainer

    from benchmarks.spec import Spec

    spec = Spec.from_json(text)
    cpus = spec.num_workers * spec.num_threads
    # Train's controller asks for no CPU of its own, so workers get all there are.
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory(prefix="bench-train-") as folder:
        report = Path(folder) / "report.json"
        TensorflowTrainer(
            train,
            train_loop_config={"spec": text, "report": str(report)},
            scaling_config=ScalingConfig(
                num_workers=spec.num_workers, resources_per_worker={"CPU": spec.num_threads}
            ),
            run_config=RunConfig(storage_path=folder, name="bench"),
        ).fit()
        print(report.read_text())
    ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
