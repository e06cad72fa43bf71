"""`train.audit_every_steps`: are all replicas still equal, bit for bit?

They begin equal and apply equal updates, so any difference is a fault: of memory or arithmetic of a
device, or of code that writes to variables on its own. It would never heal, and no loss shows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from orchestrator.errors import JobError
from orchestrator.spec.plan import RunPlan
from orchestrator.train.report import Stopped

# A hash crosses the all-reduce in four parts of 16 bits: float32 holds these exactly, and every
# kind of collective adds float32 up.
_PARTS = 4
_PART_BITS = 16
_BITS = {1: tf.uint8, 2: tf.uint16, 4: tf.int32, 8: tf.int64}


class Audit:
    """Compares a hash of every variable over all replicas."""

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        plan: RunPlan,
        worker: int,
        variables: Mapping[str, keras.Variable],
    ):
        """Prepare; `variables` are those that are equal on all replicas, by name."""
        self._strategy = strategy
        self._plan = plan
        self._worker = worker
        self._variables = dict(variables)
        self._hashes = tf.function(self._gather, autograph=False)

    def check(self, step: int) -> None:
        """Compare the replicas; every worker must call this equally often.

        Raises:
            JobError: two replicas differ; on the chief.
            Stopped: the same on the other workers.
        """
        parts = self._strategy.experimental_local_results(self._hashes())[0].numpy()
        for name, hashes in zip(self._variables, parts.transpose(1, 0, 2), strict=True):
            off = [r for r in range(len(hashes)) if (hashes[r] != hashes[0]).any()]
            if off:
                self._tell(step, name, off[0])

    def _tell(self, step: int, name: str, replica: int) -> None:
        if self._worker > 0:
            raise Stopped(f"replicas differ at step {step}; the chief tells about it")
        worker, device = divmod(replica, self._plan.devices_per_worker)
        raise JobError(
            f"replicas have drifted apart: at step {step} {name} on replica {replica} (worker "
            f"{worker}, {self._plan.device_kind}:{device}) is not that of replica 0. Look for code "
            "of the job that assigns to variables, and for a faulty device; resume goes on from "
            "the last checkpoint, which holds the values of replica 0 "
            "(train.audit_every_steps=null looks away)"
        )

    def _gather(self) -> Any:
        """Return the hashes of all replicas, float32 [replicas, variables, parts]."""
        return self._strategy.run(self._gather_here)

    def _gather_here(self) -> Any:
        context = tf.distribute.get_replica_context()
        hashes = [_hash(tf.convert_to_tensor(v.value)) for v in self._variables.values()]
        shifts = tf.range(_PARTS, dtype=tf.int64) * _PART_BITS
        parts = tf.bitwise.right_shift(tf.stack(hashes)[:, None], shifts)
        parts = tf.cast(tf.bitwise.bitwise_and(parts, 2**_PART_BITS - 1), tf.float32)
        own = tf.one_hot(context.replica_id_in_sync_group, self._plan.num_replicas)
        # Every replica fills its own row; the sum is all of them.
        return context.all_reduce(tf.distribute.ReduceOp.SUM, own[:, None, None] * parts)


def _hash(value: Any) -> Any:
    """Return the sum, modulo 2^64, of each element's bits times an odd number of its own."""
    if value.dtype is tf.bool:
        value = tf.cast(value, tf.uint8)
    elif not value.dtype.is_integer:
        value = tf.bitcast(value, _BITS.get(value.dtype.size, tf.int64))
    bits = tf.cast(tf.reshape(value, [-1]), tf.int64)
    odd = 2 * tf.range(tf.size(bits, tf.int64), dtype=tf.int64) + 1
    return tf.reduce_sum(bits * odd)
