"""A worker's whole life in this process: what it tells, saves, restores and exports."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from orchestrator.control.folders import bury, prepare
from orchestrator.spec.messages import (
    Beacon,
    BlockDone,
    Cause,
    Ended,
    Evaluated,
    Exported,
    Failed,
    Message,
    Outcome,
    Phase,
    Ready,
    Request,
    Saved,
    WorkerOrder,
)
from orchestrator.spec.schema import BestMode, Compile, OptimizerName, Weights
from orchestrator.train import evaluate, store, worker
from orchestrator.train.best import MANIFEST_KEY
from orchestrator.train.checkpoint import read_model, read_section
from tests.plans import tiny_plan
from tests.train.tiny import Tiny


def live(
    folder: Path,
    *,
    attempt: int = 1,
    restore_from: str | None = None,
    pending: Callable[[], set[Request]] = set,
    on_message: Callable[[Message], None] = lambda message: None,
    **changes: Any,
) -> list[Message]:
    """Run a worker of the tiny plan and return what it told."""
    plan = tiny_plan(folder, **changes)
    told: list[Message] = []
    prepare(plan.paths, attempt)
    order = WorkerOrder(
        plan=plan,
        worker=0,
        attempt=attempt,
        addresses=(),
        visible_gpus="",
        restore_from=restore_from,
    )

    def send(message: Message) -> None:
        told.append(message)
        on_message(message)

    worker.run(order, send, pending)
    return told


def test_a_rate_that_was_changed_counts_from_the_checkpoint_on(tmp_path: Path) -> None:
    plain = {"optimizer__name": OptimizerName.sgd, "checkpoint__every_steps": 4}
    (saved, *_) = only(live(tmp_path, train__steps=4, **plain), Saved)
    slow = {**plain, "optimizer__learning_rate": 1e-12}
    told = live(tmp_path, attempt=2, restore_from=saved.path, train__steps=8, **slow)
    last = only(told, Saved)[-1]
    assert saved.step == 4 and last.step == 8
    before, after = (read_model(Path(path)) for path in (saved.path, last.path))
    for name, weight in before.items():
        np.testing.assert_allclose(after[name], weight, rtol=1e-6)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"name": OptimizerName.sgd, "momentum": 0.9}, {"name": OptimizerName.rmsprop}),
        ({"name": OptimizerName.adam}, {"name": OptimizerName.adamax}),
    ],
)
def test_the_slots_of_another_optimizer_are_refused_though_they_have_the_same_shapes(
    tmp_path: Path, before: dict[str, Any], after: dict[str, Any]
) -> None:
    first, second = ({f"optimizer__{k}": v for k, v in o.items()} for o in (before, after))
    (saved, *_) = only(live(tmp_path, train__steps=4, export__enabled=False, **first), Saved)
    told = live(tmp_path, attempt=2, restore_from=saved.path, train__steps=8, **second)
    [failed] = only(told, Failed)
    assert failed.cause is Cause.restore
    assert re.search(r"all/2:\S+_kernel_m\w+ in the checkpoint, \S+all/2:\S+ here", failed.error)
    assert "schedule" not in failed.error


def test_a_schedule_that_was_switched_on_is_named(tmp_path: Path) -> None:
    (saved, *_) = only(live(tmp_path, train__steps=4, export__enabled=False), Saved)
    more = {"train__steps": 8, "schedule__warmup_steps": 2}
    [failed] = only(live(tmp_path, attempt=2, restore_from=saved.path, **more), Failed)
    assert failed.error.endswith("a schedule is not: look at schedule.*")


class Twins(Tiny):
    """Two layers of one shape, in the order of their names or the other way round."""

    def __init__(self, names: tuple[str, str]):
        super().__init__()
        self.names = names

    def model(self) -> keras.Model:
        layers = [keras.layers.Dense(8, name=name) for name in self.names]
        return keras.Sequential([keras.layers.Input((8,)), *layers, keras.layers.Dense(3)])


def test_layers_of_one_shape_that_have_changed_places_are_refused(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"job__class_name": f"{__name__}.Twins", "export__enabled": False}
    told = live(tmp_path, train__steps=4, job__args={"names": ["one", "two"]}, **changes)
    again = {"attempt": 2, "restore_from": only(told, Saved)[0].path, **changes}
    told = live(tmp_path, job__args={"names": ["two", "one"]}, **again)
    [failed] = only(told, Failed)
    assert re.search(r"model/0:\S*one/kernel in the checkpoint, \S*two/kernel here", failed.error)
    assert not only(live(tmp_path, job__args={"names": ["one", "two"]}, **again), Failed)


class Summarised(Tiny):
    """Gives metrics that are no plain numbers."""

    def __init__(self, what: str):
        super().__init__()
        self.what = what

    def summarise(self, sums: Any, weight: float) -> Any:
        odd = {"tensor": tf.constant(0.5), "numpy": np.float32(0.5), "rows": tf.zeros([2])}
        return {**super().summarise(sums, weight), "odd": odd[self.what]}


@pytest.mark.parametrize("what", ["tensor", "numpy", "rows"])
def test_metrics_of_a_summary_are_told_as_plain_numbers(tmp_path: Path, what: str) -> None:
    job = {"job__class_name": f"{__name__}.Summarised", "job__args": {"what": what}}
    told = live(tmp_path, best__metric="odd", best__mode=BestMode.max, **job)
    if what == "rows":
        [failed] = only(told, Failed)
        assert failed.cause is Cause.job
        assert "summarise() gives the metric 'odd' as" in failed.error
        return
    [evaluated] = only(told, Evaluated)
    assert all(type(value) is float for value in evaluated.metrics.values())
    best = store.read_manifest(Path(only(told, Saved)[-1].path))[MANIFEST_KEY]
    assert best["value"] == 0.5


def only(told: list[Message], kind: type) -> list[Any]:
    return [message for message in told if isinstance(message, kind)]


def test_a_whole_run_tells_blocks_evaluation_checkpoint_and_export(tmp_path: Path) -> None:
    told = live(tmp_path)
    blocks = only(told, BlockDone)
    assert sum(block.num_steps for block in blocks) == 12
    assert all(len(block.loss) == block.num_steps for block in blocks)
    [evaluated] = only(told, Evaluated)
    assert evaluated.step == 12 and evaluated.metrics["accuracy"] > 0.9
    [saved] = only(told, Saved)
    assert saved.step == 12
    [ready] = only(told, Ready)
    assert ready.replica_batch_sizes == (16,) and ready.num_parameters == 195
    [ended] = only(told, Ended)
    assert (ended.step, ended.outcome) == (12, Outcome.completed)
    [exported] = only(told, Exported)
    loaded = tf.saved_model.load(exported.path)
    plan = tiny_plan(tmp_path)
    golden = np.load(plan.paths.golden)
    for size in (1, 7, 64):
        answers = loaded(tf.constant(golden["inputs"][:size]))
        np.testing.assert_allclose(answers, golden["outputs"][:size], atol=1e-6)


def losses(told: list[Message]) -> dict[int, float]:
    return {
        block.first_step + i + 1: loss
        for block in only(told, BlockDone)
        for i, loss in enumerate(block.loss)
    }


def ledger(told: list[Message]) -> int:
    return sum(block.ledger for block in only(told, BlockDone)) % 2**64


def test_a_stopped_and_resumed_run_is_the_run_that_was_never_stopped(tmp_path: Path) -> None:
    job = {"job__args": {"normalise": True, "dropout": 0.3}}
    whole = live(tmp_path / "whole", **job)
    calls = iter([set(), {Request.SAVE_AND_STOP}])
    first = live(tmp_path / "parts", pending=lambda: next(calls), **job)
    [ended] = only(first, Ended)
    assert ended.outcome is Outcome.stopped and 0 < ended.step < 12
    [saved] = only(first, Saved)
    assert saved.step == ended.step
    assert not only(first, Exported)
    second = live(tmp_path / "parts", attempt=2, restore_from=saved.path, **job)
    assert only(second, Ready)[0].start_step == saved.step
    assert losses(first) | losses(second) == losses(whole)
    assert (ledger(first) + ledger(second)) % 2**64 == ledger(whole)
    assert only(second, Evaluated)[0].metrics == only(whole, Evaluated)[0].metrics


@pytest.mark.parametrize("at", [4, 12])
def test_a_stop_cuts_an_evaluation_short_which_the_resumed_run_makes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    monkeypatch.setattr(evaluate, "_STEPS_PER_CALL", 1)
    changes = {"train__eval_every_steps": 4, "best__metric": "loss", "export__enabled": False}
    whole = live(tmp_path / "whole", **changes)
    asked: set[Request] = set()
    done = [0]

    def watch(message: Message) -> None:
        if isinstance(message, BlockDone):
            done.append(message.last_step)
        elif isinstance(message, Beacon) and message.phase is Phase.evaluating and done[-1] == at:
            asked.add(Request.SAVE_AND_STOP)

    def pending() -> set[Request]:
        taken = set(asked)
        asked.clear()
        return taken

    first = live(tmp_path / "parts", pending=pending, on_message=watch, **changes)
    [ended] = only(first, Ended)
    assert (ended.step, ended.outcome) == (at, Outcome.stopped)
    assert [e.step for e in only(first, Evaluated)] == list(range(4, at, 4))
    path = only(first, Saved)[-1].path
    second = live(tmp_path / "parts", attempt=2, restore_from=path, **changes)
    [ended] = only(second, Ended)
    assert (ended.step, ended.outcome) == (12, Outcome.completed)
    evaluated = [(e.step, e.metrics) for e in only(first, Evaluated) + only(second, Evaluated)]
    assert evaluated == [(e.step, e.metrics) for e in only(whole, Evaluated)]
    assert losses(first) | losses(second) == losses(whole)
    manifests = [
        store.read_manifest(tiny_plan(tmp_path / name).paths.checkpoints_dir / "step-00000012")
        for name in ("whole", "parts")
    ]
    assert len({manifest[MANIFEST_KEY]["step"] for manifest in manifests}) == 1


def test_a_checkpoint_of_another_model_is_refused_with_a_list(tmp_path: Path) -> None:
    [saved] = only(live(tmp_path), Saved)
    told = live(tmp_path, restore_from=saved.path, job__args={"normalise": True})
    [failed] = only(told, Failed)
    assert failed.cause is Cause.restore
    assert "does not fit" in failed.error and "only in the model" in failed.error


def failure(tmp_path: Path, name: str, **changes: Any) -> Failed:
    [failed] = only(live(tmp_path, job__class_name=f"{__name__}.{name}", **changes), Failed)
    return failed


class Unbuilt(Tiny):
    def model(self) -> keras.Model:
        return keras.Sequential([keras.layers.Dense(3)])


class NoModel(Tiny):
    def model(self) -> Any:
        return "model"


class Raising(Tiny):
    def loss(self, batch: Any, outputs: Any) -> Any:
        return outputs["logits"]


class NotAJob:
    pass


class Short(Tiny):
    def source(self, split: Any) -> Any:
        from tests.train.tiny import clusters

        return clusters(split, 20)


@pytest.mark.parametrize(
    ("name", "changes", "error"),
    [
        ("Unbuilt", {}, "not built: it has no variables yet"),
        ("NoModel", {}, "model() returned builtins.str; return a keras.Model"),
        ("NotAJob", {}, "is not a subclass of orchestrator.train.job.Job"),
        ("Short", {}, "data.num_examples=96 but source(TRAIN) has 20 examples"),
        ("Missing", {}, "is not a subclass of orchestrator.train.job.Job"),
        ("Tiny", {"job__args": {"depth": 3}}, "unexpected keyword argument 'depth'"),
    ],
)
def test_a_job_that_cannot_be_used_is_the_jobs_fault(
    tmp_path: Path, name: str, changes: dict[str, Any], error: str
) -> None:
    failed = failure(tmp_path, name, **changes)
    assert failed.cause is Cause.job
    assert error in failed.error


def test_an_error_while_tracing_names_the_users_own_line(tmp_path: Path) -> None:
    failed = failure(tmp_path, "Raising")
    assert failed.cause is Cause.job
    assert failed.user_frame.startswith(f"{__file__}:")
    assert 'return outputs["logits"]' in failed.user_frame
    assert len(failed.error.splitlines()) == 1


def test_a_loss_that_is_not_finite_stops_with_step_worker_and_examples(tmp_path: Path) -> None:
    told = live(tmp_path, optimizer__learning_rate=1e30)
    [failed] = only(told, Failed)
    assert failed.cause is Cause.job
    assert "not finite at step" in failed.error
    assert "worker 0, examples [" in failed.error
    assert "train.on_nan=skip" in failed.error


@pytest.mark.parametrize("weights", ["ema", "best"])
def test_the_average_of_the_weights_is_exported_on_request(tmp_path: Path, weights: str) -> None:
    changes: dict[str, Any] = {
        "optimizer__ema_decay": 0.9,
        "train__evaluate_ema": True,
        "export__weights": Weights[weights],
        "checkpoint__every_steps": 4,
    }
    if weights == "best":
        # The first evaluation is the best one for ever: it is not the last weights' either.
        changes |= {
            "best__metric": "loss",
            "best__mode": BestMode.max,
            "train__eval_every_steps": 4,
        }
    told = live(tmp_path, **changes)
    [exported] = only(told, Exported)
    assert exported.step == (12 if weights == "ema" else 4)
    plan = tiny_plan(tmp_path)
    path = plan.paths.checkpoints_dir / store.checkpoint_name(exported.step)
    twin = Tiny().model()
    for variable, value in zip(twin.variables, read_section(path, "averages")[1:], strict=True):
        variable.assign(value)
    golden = np.load(plan.paths.golden)
    np.testing.assert_allclose(golden["outputs"], twin(golden["inputs"]), atol=1e-6)
    loaded = tf.saved_model.load(exported.path)
    np.testing.assert_allclose(loaded(golden["inputs"]), golden["outputs"], atol=1e-6)
    for variable, value in zip(twin.variables, read_model(path).values(), strict=True):
        variable.assign(value)
    assert np.abs(golden["outputs"] - twin(golden["inputs"])).max() > 1e-3


@pytest.mark.parametrize("made_again", [False, True])
def test_an_attempt_that_is_over_puts_no_export_into_place(
    tmp_path: Path, made_again: bool
) -> None:
    paths = tiny_plan(tmp_path).paths

    def over(message: Message) -> None:
        if isinstance(message, Beacon) and message.phase is Phase.exporting:
            bury(paths, 1)
            if made_again:  # as TensorFlow does on the way to a file
                paths.export_staging_dir(1).mkdir()

    told = live(tmp_path, on_message=over)
    [failed] = only(told, Failed)
    assert failed.cause is Cause.storage
    assert not only(told, Exported) and not paths.export_dir.exists()


def test_compiling_in_the_midst_of_steps_is_told_as_tracing(tmp_path: Path) -> None:
    told = live(tmp_path, train__compile=Compile.xla, export__enabled=False)
    phases = [(m.phase, m.detail) for m in only(told, Beacon) if m.begins]
    at = phases.index((Phase.tracing, "XLA"))
    assert phases[at - 1][0] is Phase.tracing and phases[at + 1][0] is Phase.stepping


def test_a_checkpoint_that_is_being_written_is_not_lost_with_an_error(tmp_path: Path) -> None:
    folder = tiny_plan(tmp_path).paths.chaos_dir
    folder.mkdir(parents=True)
    (folder / "hold-save").touch()

    def release(message: Message) -> None:
        if isinstance(message, BlockDone) and message.last_step > 6:  # the error follows
            threading.Timer(0.5, (folder / "release-save").touch).start()

    told = live(
        tmp_path,
        on_message=release,
        job__class_name="tests.train.faulty.Poisoned",
        job__args={"steps": [7]},
        checkpoint__every_steps=6,
        chaos__step_ms=0.0,
    )
    kinds = [type(message) for message in told if isinstance(message, Saved | Failed)]
    assert kinds == [Saved, Failed]


def test_a_best_evaluation_that_waits_for_the_save_before_tells_how_far_that_is(
    tmp_path: Path,
) -> None:
    folder = tiny_plan(tmp_path).paths.chaos_dir
    folder.mkdir(parents=True)
    (folder / "hold-save").touch()
    waited: list[str] = []

    def release(message: Message) -> None:
        if isinstance(message, Beacon) and message.phase is Phase.saving and not message.begins:
            waited.append(message.detail)
            (folder / "release-save").touch()

    told = live(
        tmp_path,
        on_message=release,
        best__metric="loss",
        train__eval_every_steps=4,
        train__steps=8,
        chaos__step_ms=0.0,
        export__enabled=False,
    )
    assert [saved.step for saved in only(told, Saved)] == [4, 8]
    assert waited and waited[0].endswith(" MB written")
