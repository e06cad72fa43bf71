"""With `train.deterministic` a run gives the same bits again, also when it was stopped."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from orchestrator.control.folders import prepare
from orchestrator.errors import JobError
from orchestrator.spec.schema import OptimizerName, Precision
from orchestrator.train import store
from orchestrator.train.checkpoint import named_variables, restore
from orchestrator.train.job import Batch
from orchestrator.train.saver import Saver
from tests.train.rig import Rig, make_rig
from tests.train.test_ragged import Ragged
from tests.train.tiny import Tiny

STEPS = 20
CHANGES: dict[str, Any] = {
    "train__deterministic": True,
    "train__steps": STEPS,
    "optimizer__name": OptimizerName.adam,
    "optimizer__learning_rate": 0.01,
    "optimizer__ema_decay": 0.9,
    "precision__policy": Precision.mixed_float16,
    # The first steps overflow: the scale is state that a resumed run must have.
    "precision__initial_loss_scale": 2.0**24,
}


@pytest.fixture(autouse=True)
def deterministic_half() -> Iterator[None]:
    """Compute as a worker with these settings does."""
    from tensorflow.python.framework.config import disable_op_determinism

    keras.config.set_dtype_policy("mixed_float16")
    tf.config.experimental.enable_op_determinism()
    yield
    disable_op_determinism()
    keras.config.set_dtype_policy("float32")


def fresh(folder: Path, replicas: int) -> Rig:
    return make_rig(folder, Tiny(normalise=True, dropout=0.3), replicas=replicas, **CHANGES)


def digest(rig: Rig) -> str:
    """Return the SHA-256 of every variable that there is, but for the seeds of layers."""
    digests = hashlib.sha256()
    for variable in named_variables(rig.model, rig.optimizers).values():
        for local in rig.strategy.experimental_local_results(variable.value):
            digests.update(np.asarray(tf.convert_to_tensor(local)).tobytes())
    return digests.hexdigest()


def saved(rig: Rig) -> Path:
    """Save all state as a worker does; return the checkpoint."""
    paths = rig.plan.paths
    prepare(paths, 1)
    variables = named_variables(rig.model, rig.optimizers)
    saver = Saver(paths, 1, variables, keep=9, facts={}, announce=lambda *told, **more: None)
    saver.save(rig.done)
    saver.close()
    return paths.checkpoints_dir / store.checkpoint_name(rig.done)


class Drawing(Tiny):
    """Adds noise to the loss, under a condition so that the draw lies in a function of its own."""

    def __init__(self, draw: Callable[[], Any]):
        super().__init__()
        self._draw = draw

    def loss(self, batch: Batch, outputs: Any) -> Any:
        losses = super().loss(batch, outputs)
        noise = tf.cond(losses[0] > 0, self._draw, lambda: tf.zeros([]))
        return losses + tf.cast(noise, losses.dtype)


@pytest.mark.parametrize(
    ("draw", "op"),
    [
        (lambda: tf.random.normal([]), "RandomStandardNormal"),
        (lambda: tf.random.uniform([]), "RandomUniform"),
        (lambda: tf.random.shuffle(tf.range(3.0))[0], "RandomShuffle"),
        (lambda: tf.cast(tf.random.categorical([[0.0, 0.0]], 1)[0, 0], tf.float32), "Multinomial"),
    ],
)
@pytest.mark.parametrize("replicas", [1, 2])
def test_draws_that_a_restart_changes_are_refused(
    tmp_path: Path, draw: Callable[[], Any], op: str, replicas: int
) -> None:
    with pytest.raises(JobError, match=rf"deterministic=true: the step has {op} \(.*stateless"):
        make_rig(tmp_path, Drawing(draw), replicas=replicas, **CHANGES).run(1)
    make_rig(tmp_path, Drawing(draw), replicas=replicas).run(1)


def test_draws_from_seeds_are_deterministic(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, Drawing(lambda: tf.random.stateless_normal([], [1, 2])), **CHANGES)
    assert rig.run(1, 2).step.num_traces == 1


@pytest.mark.parametrize(
    ("replicas", "stops"),
    [pytest.param(1, (1, 7, 13), marks=pytest.mark.thorough), (2, (9,))],
)
def test_neither_blocks_nor_stops_change_a_bit(
    tmp_path: Path, replicas: int, stops: tuple[int, ...]
) -> None:
    whole = fresh(tmp_path, replicas).run(STEPS)
    scales = whole.results[0].loss_scale
    assert scales[0] > scales[-1] and whole.results[0].finite[-1]
    assert digest(fresh(tmp_path, replicas).run(7, 7, 6)) == digest(whole)
    rig = fresh(tmp_path, replicas)
    for stop in stops:
        # Blocks of one step up to every other stop.
        steps = stop - rig.done
        rig.run(*([1] * steps if stop % 2 else [steps]))
        checkpoint = saved(rig)
        rig = fresh(tmp_path, replicas)
        assert digest(rig) != digest(whole)
        rig.done = restore(checkpoint, named_variables(rig.model, rig.optimizers))
    rig.run(STEPS - rig.done)
    assert digest(rig) == digest(whole)


def test_a_stop_changes_no_bit_where_rows_differ_in_length(tmp_path: Path) -> None:
    def fresh() -> Rig:
        return make_rig(tmp_path, Ragged(), replicas=2, **CHANGES)

    whole = fresh().run(STEPS)
    rig = fresh()
    rig.feeder.prefetch(0, 4)
    rig.run(4)
    rig.feeder.prefetch(4, 5)  # more than is used before the stop
    checkpoint = saved(rig.run(3))
    resumed = fresh()
    resumed.done = restore(checkpoint, named_variables(resumed.model, resumed.optimizers))
    resumed.feeder.prefetch(7, 2)
    resumed.run(6, STEPS - 13)
    assert resumed.done == STEPS and whole.results[0].finite.any()
    assert digest(resumed) == digest(whole)
    assert (rig.ledger + resumed.ledger) % 2**64 == whole.ledger
