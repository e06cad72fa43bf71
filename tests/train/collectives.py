"""One of two workers that count the collectives of a step: collectives.py WORKER ADDRESS ADDRESS.

Each worker is a process of its own and prints a line of JSON: by job, how many of each collective
operation the one traced graph has.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from orchestrator.spec.messages import WorkerOrder
from orchestrator.spec.schema import Compile, Precision, StrategyName
from orchestrator.train.devices import build_strategy, configure_devices
from tests.plans import tiny_plan
from tests.train import freedom
from tests.train.rig import Rig, assemble
from tests.train.tiny import Tiny


class TwoTypes(Tiny):
    """Has variables of two types, and so gradients of two types."""

    def model(self) -> keras.Model:
        first = keras.layers.Dense(16, activation="relu", dtype="float64")
        return keras.Sequential([keras.Input((8,)), first, keras.layers.Dense(3)])


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "dense": (Tiny, {}),
    "BatchNorm, micro-batches, float16": (
        lambda: Tiny(normalise=True),
        {"train__micro_batches": 2, "precision__policy": Precision.mixed_float16},
    ),
    "two dtypes": (TwoTypes, {}),
    "large table": (freedom.Tables, {}),
    "synchronised BatchNorm": (lambda: freedom.Normalised(synchronised=True), {}),
    # Kernels of 512 and 192 bytes, biases of 64 and 12: the sums travel with the first pack.
    "packs of 256 bytes": (Tiny, {"strategy__bytes_per_pack": 256}),
}


def count(rig: Rig) -> Counter[str]:
    """Run a step, which takes both workers, and count what is in its graph."""
    rig.run(1)
    graph = rig.step._functions[Compile.graph].get_concrete_function().graph.as_graph_def()
    nodes = [*graph.node, *(node for f in graph.library.function for node in f.node_def)]
    assert rig.step.num_traces == 1
    return Counter(node.op for node in nodes if node.op.startswith("Collective"))


def main(worker: int, addresses: tuple[str, ...]) -> None:
    """Count for each case."""
    folder = Path(tempfile.mkdtemp())
    shape = {"strategy__name": StrategyName.multi_worker, "strategy__num_workers": 2}
    order = WorkerOrder(
        plan=tiny_plan(folder, **shape),
        worker=worker,
        attempt=1,
        addresses=addresses,
        visible_gpus="",
        restore_from=None,
    )
    devices = configure_devices(order)
    strategy: tf.distribute.Strategy = build_strategy(order, devices)
    found = {}
    for name, (make, changes) in CASES.items():
        plan = tiny_plan(folder, **shape, **changes)
        keras.config.set_dtype_policy(plan.config.precision.policy.value)
        found[name] = count(assemble(plan, make(), strategy, devices, worker=worker))
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), tuple(sys.argv[2:]))
