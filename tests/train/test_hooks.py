"""What a worker does on request: hooks of the job, a profile, debugging."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import keras
import pytest
import tensorflow as tf

from orchestrator.spec.messages import (
    BlockDone,
    Cause,
    Ended,
    Exported,
    Failed,
    Notice,
    Outcome,
    Request,
)
from orchestrator.spec.schema import Compile
from orchestrator.train import store
from orchestrator.train.job import Progress
from tests.cluster import rig
from tests.plans import tiny_plan
from tests.train.test_worker import live, only
from tests.train.tiny import Tiny


class Hooked(Tiny):
    """Remembers what it was told."""

    seen: ClassVar[list[Progress]] = []
    fail_at: int | None = None

    def on_block(self, progress: Progress) -> None:
        self.seen.append(progress)
        if progress.step == self.fail_at:
            raise ValueError("the user's own words")

    def on_end(self, model: keras.Model) -> str:
        return f"answers {model(tf.ones([1, 8])).shape[-1]}"


@pytest.fixture
def hooked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(Hooked, "seen", [])
    return {"job__class_name": f"{__name__}.Hooked"}


def test_hooks_are_called_for_each_block_and_before_the_export(
    tmp_path: Path, hooked: dict[str, Any]
) -> None:
    told = live(tmp_path, **hooked)
    blocks = only(told, BlockDone)
    assert [(p.step, p.num_steps) for p in Hooked.seen] == [
        (b.first_step + b.num_steps, b.num_steps) for b in blocks
    ]
    for progress, block in zip(Hooked.seen, blocks, strict=True):
        assert progress.loss == pytest.approx(sum(block.loss) / block.num_steps)
        accuracy = sum(block.metrics["accuracy"]) / block.num_steps
        assert progress.metrics == {"accuracy": pytest.approx(accuracy)}
    kinds = [type(m) for m in told if not isinstance(m, Notice) or m.text == "answers 3"]
    assert kinds.index(Notice) < kinds.index(Exported)


def test_a_run_that_stops_has_not_ended(tmp_path: Path, hooked: dict[str, Any]) -> None:
    told = live(tmp_path, pending=lambda: {Request.SAVE_AND_STOP}, **hooked)
    assert only(told, Ended)[0].outcome is Outcome.stopped
    assert len(Hooked.seen) == 1 and not only(told, Notice)


def test_what_a_hook_raises_ends_the_run_with_the_users_line(
    tmp_path: Path, hooked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Hooked, "fail_at", 1)
    [failed] = only(live(tmp_path, train__profile_steps="1-9", **hooked), Failed)
    assert (failed.cause, failed.error) == (Cause.job, "ValueError: the user's own words")
    assert 'raise ValueError("the user\'s own words")' in failed.user_frame
    tf.profiler.experimental.start(str(tmp_path))  # refused if the first one were still on
    tf.profiler.experimental.stop(save=False)


@pytest.mark.parametrize("first", [1, 4])
def test_the_profile_holds_exactly_the_steps_asked_for(
    tmp_path: Path, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    on: list[bool] = []
    start, stop = tf.profiler.experimental.start, tf.profiler.experimental.stop
    monkeypatch.setattr(
        tf.profiler.experimental, "start", lambda folder: (on.append(True), start(folder))
    )
    monkeypatch.setattr(tf.profiler.experimental, "stop", lambda: (on.append(False), stop()))
    told = live(tmp_path, train__profile_steps=f"{first}-6", export__enabled=False)
    ends = {b.first_step + b.num_steps for b in only(told, BlockDone)}
    assert {first - 1, 6} - {0} <= ends
    assert on == [True, False]
    assert list(tiny_plan(tmp_path).paths.profile_dir.rglob("*.xplane.pb"))


@pytest.fixture
def numerics() -> Iterator[None]:
    """End the checks, which hold for the whole process."""
    yield
    tf.debugging.disable_check_numerics()


@pytest.mark.usefixtures("numerics")
@pytest.mark.parametrize("compile_", [Compile.graph, Compile.eager])
def test_check_numerics_ends_at_the_operation(tmp_path: Path, compile_: Compile) -> None:
    told = live(
        tmp_path,
        train__check_numerics=True,
        train__compile=compile_,
        job__class_name=f"{__name__}.Logarithm",
    )
    [failed] = only(told, Failed)
    assert failed.cause is Cause.job
    assert "!!! Detected Infinity or NaN" in failed.traceback
    assert '"Log"' in failed.traceback
    assert "numerics" in failed.error.lower() or "infinity or nan" in failed.error.lower()


class Logarithm(Tiny):
    def loss(self, batch: Any, outputs: Any) -> Any:
        return tf.math.log(tf.reduce_sum(outputs, axis=-1) * 0.0 - 1.0)


def test_all_of_it_by_the_command_line(tmp_path: Path) -> None:
    early = ("best.metric=loss", "best.mode=max", "best.patience=2", "train.eval_every_steps=2")
    export = ("export.enabled=true", "export.weights=best", "train.profile_steps=2-3")
    first = rig.train("debug=eager", *early, *export, cwd=tmp_path)
    assert first.code == 0, first.out
    run = first.run
    config = run.config.read_text()
    assert "compile: eager" in config and "name: inline" in config
    assert [block["num_steps"] for block in rig.records(run, "BlockDone")] == [1] * 6
    assert "early stopping at step 6" in first.out
    assert [record["step"] for record in rig.records(run, "Exported")] == [2]
    assert run.proof.exists() and run.profile_dir.exists()

    source = f"train.init_from={run.root.name}"
    second = rig.train("cluster=inline", source, "export.enabled=false", cwd=tmp_path)
    assert second.code == 0, second.out
    best = run.checkpoints_dir / store.checkpoint_name(2)
    told = [record["text"] for record in rig.records(second.run, "Notice")]
    assert f"weights of {best}: 4 of the model's variables were loaded" in told
    assert rig.statuses(tmp_path) == ["FINISHED", "FINISHED"]
