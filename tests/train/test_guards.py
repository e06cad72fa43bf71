"""Steps that are not finite, and replicas that drift apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from orchestrator.errors import JobError
from orchestrator.spec.messages import BlockDone, Cause, Ended, Failed, Message, Notice
from orchestrator.spec.schema import OnNan, OptimizerName, StrategyName
from orchestrator.train import store
from orchestrator.train.audit import Audit
from orchestrator.train.checkpoint import read_model
from orchestrator.train.job import Batch
from tests.faults.saves import save
from tests.plans import tiny_plan
from tests.train.faulty import Poisoned
from tests.train.rig import Rig, make_rig
from tests.train.test_worker import live, only
from tests.train.tiny import Tiny

TWO: dict[str, Any] = {
    "strategy__name": StrategyName.mirrored,
    "strategy__devices_per_worker": "2",
}
ROLLBACK: dict[str, Any] = {
    "job__class_name": "tests.train.faulty.Poisoned",
    "train__on_nan": OnNan.rollback,
    "optimizer__name": OptimizerName.adam,
    "export__enabled": False,
    "data__num_eval_examples": 0,
}


def saved_weights(folder: Path, step: int) -> list[np.ndarray]:
    paths = tiny_plan(folder).paths
    return list(read_model(paths.checkpoints_dir / store.checkpoint_name(step)).values())


def steps_told(told: list[Message]) -> list[int]:
    return [b.first_step + i + 1 for b in only(told, BlockDone) for i in range(b.num_steps)]


@pytest.mark.parametrize("replicas", [pytest.param(1, marks=pytest.mark.thorough), 2])
def test_rollback_takes_back_what_was_done_since_the_checkpoint_and_goes_on(
    tmp_path: Path, replicas: int
) -> None:
    changes = {**ROLLBACK, **(TWO if replicas == 2 else {}), "job__args": {"steps": [7]}}
    for longest in (1, 8):
        told = live(
            tmp_path / str(longest),
            checkpoint__every_steps=4,
            train__max_block_steps=longest,
            **changes,
        )
        assert steps_told(told) == list(range(1, 13))
        assert [b.skipped_steps for b in only(told, BlockDone) if b.skipped_steps] == [(7,)]
        [notice] = [m.text for m in only(told, Notice) if "not finite" in m.text]
        assert "the loss was not finite at step 7" in notice
        assert "the weights are those of step 4 again" in notice
    # By hand: steps 1 to 4, then the examples of steps 8 to 12.
    rig = make_rig(tmp_path, Poisoned(), replicas=replicas, optimizer__name=OptimizerName.adam).run(
        4
    )
    rig.done = 7
    rig.run(1, 4)
    for longest in (1, 8):
        for left, right in zip(
            saved_weights(tmp_path / str(longest), 12), rig.weights, strict=True
        ):
            np.testing.assert_array_equal(left, right)


def test_rollback_takes_back_the_whole_block_of_a_stream_which_cannot_be_read_again(
    tmp_path: Path,
) -> None:
    told = live(
        tmp_path,
        checkpoint__every_steps=4,
        **{**ROLLBACK, "job__class_name": "tests.train.faulty.PoisonedStream"},
        job__args={"steps": [6]},
    )
    assert only(told, Ended) and steps_told(told) == list(range(1, 13))
    [notice] = [m.text for m in only(told, Notice) if "not finite" in m.text]
    assert "at step 6" in notice and "the weights are those of step 4 again" in notice
    # Steps 5 to 8 were a block: the checkpoint behind it holds what the one before it held.
    for left, right in zip(saved_weights(tmp_path, 4), saved_weights(tmp_path, 8), strict=True):
        np.testing.assert_array_equal(left, right)
    assert any(
        (left != right).any()
        for left, right in zip(saved_weights(tmp_path, 8), saved_weights(tmp_path, 12), strict=True)
    )


def test_rollback_takes_no_checkpoint_that_another_attempt_left_behind(tmp_path: Path) -> None:
    save(tiny_plan(tmp_path).paths, attempt=9, step=6, keep=9)
    told = live(tmp_path, checkpoint__every_steps=4, **ROLLBACK, job__args={"steps": [7]})
    [notice] = [m.text for m in only(told, Notice) if "not finite" in m.text]
    assert "the weights are those of step 4 again" in notice and only(told, Ended)


def test_rollback_without_a_checkpoint_stops(tmp_path: Path) -> None:
    told = live(tmp_path, job__args={"steps": [3]}, checkpoint__every_steps=8, **ROLLBACK)
    [failed] = only(told, Failed)
    assert failed.cause is Cause.job and "no checkpoint to go back to" in failed.error
    assert "step 3, worker 0, examples [" in failed.error
    assert "train.on_nan=skip" in failed.error


def test_rollback_that_does_not_help_stops(tmp_path: Path) -> None:
    told = live(
        tmp_path, job__args={"steps": list(range(5, 13))}, checkpoint__every_steps=4, **ROLLBACK
    )
    [failed] = only(told, Failed)
    # Steps 5, 6 and 7 were taken back; 8 saves the weights of step 4 and counts anew.
    assert failed.cause is Cause.job and "does not help" in failed.error
    assert len([m for m in only(told, Notice) if "again" in m.text]) == 3


def test_stop_names_examples_and_variable(tmp_path: Path) -> None:
    told = live(tmp_path, **{**ROLLBACK, "train__on_nan": OnNan.stop}, job__args={"steps": [3]})
    [failed] = only(told, Failed)
    ids = make_rig(tmp_path, Tiny()).feeder.take(2, 1).ids[0][0].tolist()
    assert f"the loss is not finite at step 3, worker 0, examples {ids}" in failed.error
    assert "the first bad gradient is that of sequential/dense/kernel" in failed.error


@pytest.mark.parametrize("hidden", [False, True])
def test_the_last_of_two_replicas_is_named_by_its_examples_alone(
    tmp_path: Path, hidden: bool
) -> None:
    job_args = {"steps": [3], "place": 15, "hidden": hidden}
    ids = make_rig(tmp_path, Tiny(), replicas=2).feeder.take(2, 1).ids[1][0].tolist()
    what = "the gradient" if hidden else "the loss"
    for on_nan, verb in ((OnNan.stop, "is"), (OnNan.rollback, "was")):
        changes = {**ROLLBACK, **TWO, "train__on_nan": on_nan, "job__args": job_args}
        [failed] = only(live(tmp_path / on_nan.value, **changes), Failed)
        assert f"{what} {verb} not finite at step 3, worker 0, examples {ids};" in failed.error
        assert "the first bad gradient is that of sequential/dense/kernel" in failed.error


def test_a_sum_that_overflows_is_the_fault_of_no_example(tmp_path: Path) -> None:
    class Huge(Tiny):
        def loss(self, batch: Batch, outputs: tf.Tensor) -> tf.Tensor:
            # 8 examples a replica: 3e38 is finite in float32, 6e38 is not.
            return 0 * super().loss(batch, outputs) + 3e38 / 8

    rig = make_rig(tmp_path, Huge(), replicas=2).run(1)
    [result] = rig.results
    assert result.broken.all() and not result.is_guilty


def audit_of(rig: Rig) -> Audit:
    variables = {v.path: v for v in rig.model.variables}
    variables |= {v.path: v for group in rig.optimizers.variables.values() for v in group}
    return Audit(rig.strategy, rig.plan, 0, variables)


@pytest.mark.parametrize("replica", [1, 2])
def test_one_changed_bit_on_one_replica_is_found(tmp_path: Path, replica: int) -> None:
    rig = make_rig(
        tmp_path, Tiny(normalise=True), replicas=3, optimizer__name=OptimizerName.adam
    ).run(4)
    audit = audit_of(rig)
    audit.check(4)
    victim = rig.model.trainable_variables[2]
    copy = rig.strategy.experimental_local_results(victim.value)[replica]
    bits = tf.bitcast(copy, tf.int32).numpy()
    bits[0] ^= 1
    copy.assign(tf.bitcast(bits, tf.float32))
    with pytest.raises(JobError, match=rf"at step 5 {victim.path} on replica {replica} \(worker 0"):
        audit.check(5)


def test_a_run_whose_replicas_drift_apart_is_stopped_at_the_next_audit(tmp_path: Path) -> None:
    changes = {"job__class_name": "tests.train.faulty.Drifting", "export__enabled": False, **TWO}
    told = live(tmp_path / "watched", train__audit_every_steps=8, **changes)
    [failed] = only(told, Failed)
    assert failed.cause is Cause.job
    assert "replicas have drifted apart: at step 8 " in failed.error
    assert "replica 1 (worker 0, CPU:1)" in failed.error
    assert only(live(tmp_path / "unwatched", **changes), Ended)


def test_norms_of_variables_and_gradients_are_told_on_request(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, Tiny(), replicas=3, train__layer_norms=True)
    before = rig.weights
    rig.run(1, 2)
    norms = rig.results[0].norms
    paths = [f"sequential/dense{n}/{kind}" for n in ("", "_1") for kind in ("kernel", "bias")]
    assert list(norms) == [f"{what}_norm/{p}" for what in ("gradient", "weight") for p in paths]
    gradients = [norms[f"gradient_norm/{path}"][0] for path in paths]
    assert np.linalg.norm(gradients) == pytest.approx(rig.results[0].gradient_norm[0], rel=1e-6)
    for path, weights in zip(paths, before, strict=True):
        expected = float(np.linalg.norm(weights))
        assert norms[f"weight_norm/{path}"][0] == pytest.approx(expected, rel=1e-6)
    assert all(values.shape == (2,) for values in rig.results[1].norms.values())
    told = live(tmp_path, train__layer_norms=True, export__enabled=False)
    assert "weight_norm/sequential/dense/bias" in only(told, BlockDone)[0].metrics
