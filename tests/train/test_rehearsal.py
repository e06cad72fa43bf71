"""What a job holds, told from one trace of it; nothing is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import pytest
import tensorflow as tf

from orchestrator.errors import JobError
from orchestrator.spec.schema import OptimizerName, StrategyName
from orchestrator.train.job import translated
from orchestrator.train.liveness import peak_bytes
from orchestrator.train.rehearsal import build, footprint, troubles
from orchestrator.train.sources import Split
from tests.plans import tiny_plan
from tests.train.tiny import Tiny

F = 4  # bytes of a float32


def traced(function: Any, *shapes: list[int | None]) -> tuple[int, bool]:
    specs = [tf.TensorSpec(shape, tf.float32) for shape in shapes]
    graph = tf.function(function, autograph=False).get_concrete_function(*specs)
    return peak_bytes(graph.graph, graph.outputs)


def test_a_tensor_is_held_until_it_was_read_last() -> None:
    # a and b of 100 numbers live together, then b and c; the input is there until a is made.
    def chain(x: Any) -> Any:
        a = tf.exp(x)
        b = tf.exp(a)
        return tf.exp(b)

    assert traced(chain, [100]) == (2 * 100 * F, False)


def test_what_the_backward_pass_reads_is_held_until_then() -> None:
    def gradient(x: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = x
            for _ in range(10):
                y = tf.exp(y)  # its gradient reads its output
        return tape.gradient(y, x)

    held, is_lower_bound = traced(gradient, [1000])
    assert not is_lower_bound
    # Ten outputs, and up to three more while they are multiplied.
    assert 10 * 1000 * F <= held <= 13 * 1000 * F


def test_what_no_output_depends_on_is_not_counted() -> None:
    def idle(x: Any) -> Any:
        _ = tf.tile(x, [1000])
        return x + 1.0

    assert traced(idle, [10])[0] <= 3 * 10 * F


def test_a_view_takes_no_memory() -> None:
    def view(x: Any) -> Any:
        return tf.reshape(tf.identity(tf.exp(x)), [10, 10]) + 1.0

    assert traced(view, [100])[0] <= 2 * 100 * F + 2 * F * 4


def test_an_unknown_size_makes_it_a_lower_bound() -> None:
    assert traced(lambda x: tf.exp(x) * 2.0, [None])[1]


def test_the_footprint_of_a_dense_model_is_its_arithmetic(tmp_path: Path) -> None:
    plan = tiny_plan(tmp_path, optimizer__name=OptimizerName.adam)
    job = translated(Tiny())
    source = job.source(Split.TRAIN)
    found = footprint(plan, job, source, build(plan, job, source))
    # 8 x 16 + 16 + 16 x 3 + 3 numbers; Adam has two more of each, and counts its updates.
    assert found.num_parameters == 195
    assert found.model_bytes == found.gradient_bytes == 195 * F
    assert 2 * 195 * F < found.optimizer_bytes < 2 * 195 * F + 32
    assert found.checkpoint_bytes == found.model_bytes + found.optimizer_bytes
    assert found.micro_batch_size == 16
    assert not found.is_lower_bound
    # At least the examples and the hidden layer, 16 x (8 + 16); at most a few times that.
    assert 16 * 24 * F < found.activation_bytes < 16 * 24 * F * 6


def test_micro_batches_hold_less(tmp_path: Path) -> None:
    job = translated(Tiny(normalise=True, dropout=0.1))
    source = job.source(Split.TRAIN)
    plans = [
        tiny_plan(tmp_path, train__global_batch_size=96, train__micro_batches=parts)
        for parts in (1, 4)
    ]
    whole, parts = (footprint(p, job, source, build(p, job, source)) for p in plans)
    assert parts.micro_batch_size == 24
    assert parts.activation_bytes < 0.6 * whole.activation_bytes


def test_a_loss_of_the_wrong_form_is_found_without_a_step(tmp_path: Path) -> None:
    class Mean(Tiny):
        def loss(self, batch: Any, outputs: Any) -> Any:
            return keras.ops.mean(super().loss(batch, outputs))

    job, plan = Mean(), tiny_plan(tmp_path)
    source = job.source(Split.TRAIN)
    with pytest.raises(JobError, match="loss"):
        footprint(plan, job, source, build(plan, job, source))


class Unserved(Tiny):
    """Answers with more than one tensor."""

    def serve(self, model: Any, inputs: Any) -> Any:
        return {"classes": super().serve(model, inputs)}


@pytest.mark.parametrize(
    ("job", "changes", "told"),
    [
        (Tiny(), {}, []),
        (
            Tiny(),
            {
                "strategy__name": StrategyName.multi_worker,
                "strategy__num_workers": 2,
                "best__metric": "accuracy",
            },
            [],
        ),
        (
            Tiny(),
            {"best__metric": "acuracy"},
            ["evaluation", "best.metric=acuracy"],
        ),
        (Unserved(), {}, ["the export", "serve() gave", "export.enabled"]),
        (Unserved(), {"export__enabled": False}, []),
        (Tiny(), {"train__init_from": "missing"}, ["initial weights", "train.init_from"]),
    ],
    ids=["sound", "several-workers", "metric", "serve", "not-served", "weights"],
)
def test_what_would_fail_besides_the_steps_is_found_without_one(
    job: Tiny, changes: dict[str, Any], told: list[str], tmp_path: Path
) -> None:
    plan, job = tiny_plan(tmp_path, **changes), translated(job)
    source, evaluated = job.source(Split.TRAIN), job.source(Split.EVAL)
    found = troubles(plan, job, source, evaluated, build(plan, job, source))
    text = "".join(f"{t.what} {t.error} {t.mend}" for t in found)
    assert len(found) == bool(told) and [part for part in told if part not in text] == []


def test_an_evaluation_that_fails_is_told_with_the_users_line(tmp_path: Path) -> None:
    class Unevaluated(Tiny):
        def prepare(self, batch: Any, *, training: bool, seeds: Any) -> Any:
            if not training:
                raise ValueError("the user's own words")
            return batch

    plan, job = tiny_plan(tmp_path, export__enabled=False), translated(Unevaluated())
    source = job.source(Split.TRAIN)
    (found,) = troubles(plan, job, source, job.source(Split.EVAL), build(plan, job, source))
    assert found.what == "the evaluation" and "the user's own words" in found.error
    assert "test_rehearsal.py" in found.user_frame
