"""How all workers decide alike at the end of a block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from orchestrator.spec.plan import RunPlan


@dataclass(frozen=True, slots=True)
class Wish:
    """What one worker would do after a block; `number` counts from the chief only.

    Attributes:
        save: save a checkpoint.
        stop: interrupt the run.
        finish: complete the run before its last step.
        guilty: a loss or gradient was not finite here.
        failed: what was to be saved could not be written here.
        number: steps of the next block, or whatever else the chief decides for all.
    """

    save: bool = False
    stop: bool = False
    finish: bool = False
    guilty: bool = False
    failed: bool = False
    number: int = 0


class Agreement:
    """Lets all workers decide alike at the end of a block.

    No worker acts on its own clock, signal or file: two that decide apart wait for ever in an
    all-reduce. Their wishes are added up over all workers instead, and everyone acts on the sum.
    """

    def __init__(self, strategy: tf.distribute.Strategy, plan: RunPlan, worker: int):
        self._strategy = strategy
        self._is_chief = worker == 0
        self._alone = plan.num_workers == 1
        self._replicas = plan.devices_per_worker
        # float64 holds every step number.
        self._sum = tf.function(self._reduce, input_signature=[tf.TensorSpec([6], tf.float64)])

    def decide(self, wish: Wish) -> Wish:
        """Return what all workers do; every worker must call this equally often."""
        if self._alone:
            return wish
        number = wish.number if self._is_chief else 0
        flags = (wish.save, wish.stop, wish.finish, wish.guilty, wish.failed)
        *sums, number = self._sum(tf.constant([*flags, number], tf.float64)).numpy()
        save, stop, finish, guilty, failed = (total > 0 for total in sums)
        return Wish(save, stop, finish, guilty, failed, int(number))

    def wait_for_all(self) -> None:
        """Return when every worker has come here."""
        self.decide(Wish())

    def _reduce(self, own: Any) -> Any:
        def add_up(vector: Any) -> Any:
            context = tf.distribute.get_replica_context()
            # Every local replica brings its worker's wish along: a share each.
            return context.all_reduce(tf.distribute.ReduceOp.SUM, vector / self._replicas)

        total = self._strategy.run(add_up, (own,))
        return tf.round(self._strategy.experimental_local_results(total)[0])
