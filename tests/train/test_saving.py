"""When a save happens that is due while another is under way, or after one that has failed."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import pytest
import tensorflow as tf

from orchestrator.control.folders import bury, prepare
from orchestrator.errors import StorageError
from orchestrator.spec.config import flatten
from orchestrator.spec.fingerprint import fingerprint
from orchestrator.spec.messages import Message, Saved, SaveFailed, WorkerOrder
from orchestrator.train import store
from orchestrator.train.agreement import Agreement
from orchestrator.train.best import Best
from orchestrator.train.checkpoint import read_model, restore
from orchestrator.train.data import Feeder, Order
from orchestrator.train.rename import remove
from orchestrator.train.report import Reporter
from orchestrator.train.saver import Saver, make_saver
from orchestrator.train.saving import Saving
from orchestrator.train.sources import Split
from orchestrator.train.stream_feeder import StreamFeeder
from orchestrator.train.streams import StreamSource
from tests.plans import tiny_plan
from tests.train import streaming
from tests.train.tiny import clusters


class Desk:
    """One worker's saving on a clock that the test moves; `gate` holds the saver's thread up."""

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 9,
        streams: bool = False,
        verifying: bool = False,
        **changes: Any,
    ):
        self.plan = replace(tiny_plan(folder, **changes), verifying=verifying)
        prepare(self.plan.paths, 1)
        self.now = 1000.0
        self.gate = threading.Event()
        self.gate.set()
        self.told: list[Message] = []
        self.variables = {"model/0:w": keras.Variable(tf.ones([4]), name="w")}
        order = WorkerOrder(
            plan=self.plan,
            worker=0,
            attempt=1,
            addresses=(),
            visible_gpus="",
            restore_from=None,
        )
        reporter = Reporter(order, self.told.append)
        self.saver = Saver(
            self.plan.paths,
            1,
            self.variables,
            keep=keep,
            has_streams=streams,
            facts={},
            announce=self._announce,
            clock=lambda: self.now,
        )
        self.feeder: Feeder | StreamFeeder
        if streams:
            stream = StreamSource(streaming.plain)
            stream.open(range(1), 1, 0, 96)
            staging_dir = self.plan.paths.staging_dir(1)
            self.feeder = StreamFeeder(stream, range(1), [4], staging_dir=staging_dir)
        else:
            source = clusters(Split.TRAIN, 96)
            self.feeder = Feeder(source, Order(0, 96), [], 16, resident=True)
        self.saving = Saving(
            self.plan,
            reporter,
            Agreement(tf.distribute.get_strategy(), self.plan, 0),
            self.saver,
            self.feeder,
            clock=lambda: self.now,
            sleep=self._sleep,
        )
        self.order, self.reporter = order, reporter

    def _announce(self, kind: Any, **fields: Any) -> None:
        self.gate.wait()
        self.told.append(kind(worker=0, attempt=1, time=0.0, **fields))

    def _sleep(self, seconds: float) -> None:
        self.now += seconds

    def only(self, kind: type[Message]) -> list[Any]:
        return [message for message in self.told if isinstance(message, kind)]

    def steps(self) -> list[int]:
        return [store.step_of(p) for p in store.list_checkpoints(self.plan.paths.checkpoints_dir)]

    def block(self, step: int) -> None:
        """Put something in the way of the checkpoint of a step: it cannot be staged."""
        (self.plan.paths.staging_dir(1) / store.checkpoint_name(step)).write_text("in the way")


def test_a_save_that_is_due_while_another_is_written_is_put_off_and_not_forgotten(
    tmp_path: Path,
) -> None:
    desk = Desk(tmp_path)
    desk.gate.clear()
    assert desk.saving.wish(by_step=True, at_once=False)
    desk.saving.save(4, None)
    assert not desk.saving.wish(by_step=True, at_once=False)
    assert not desk.saving.wish(by_step=False, at_once=False)
    # The best evaluation has no other step.
    assert desk.saving.wish(by_step=False, at_once=True)
    desk.gate.set()
    desk.saver.wait()
    assert desk.saving.wish(by_step=False, at_once=False)
    desk.saving.save(9, None)
    desk.saver.wait()
    assert not desk.saving.wish(by_step=False, at_once=False)
    assert desk.steps() == [9, 4]


def test_no_save_is_put_off_where_checkpoints_are_compared_step_by_step(tmp_path: Path) -> None:
    desk = Desk(tmp_path, verifying=True)
    desk.gate.clear()
    assert desk.saving.wish(by_step=True, at_once=False)
    desk.saving.save(4, None)
    assert not desk.saving.wish(by_step=False, at_once=False)
    assert desk.saving.wish(by_step=True, at_once=False)
    desk.gate.set()
    desk.saving.save(5, None)
    desk.saver.wait()
    assert desk.steps() == [5, 4]


def test_a_save_is_due_by_time(tmp_path: Path) -> None:
    desk = Desk(tmp_path, checkpoint__every_s=60.0)
    desk.now += 59
    assert not desk.saving.wish(by_step=False, at_once=False)
    desk.now += 1
    assert desk.saving.wish(by_step=False, at_once=False)


def test_a_save_that_failed_is_tried_again_after_a_back_off_that_doubles(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    for number, back_off_s in enumerate((1.0, 2.0, 4.0), 1):
        desk.block(number)
        desk.saving.save(number, None)
        desk.saver.wait()
        assert desk.saver.num_failed == number
        desk.now += back_off_s - 0.1
        assert not desk.saving.wish(by_step=True, at_once=False)
        desk.now += 0.2
        assert desk.saving.wish(by_step=False, at_once=False)
    desk.saving.save(4, None)
    desk.saver.wait()
    assert desk.saver.num_failed == 0
    assert not desk.saving.wish(by_step=False, at_once=False)
    assert [m.num_failed for m in desk.only(SaveFailed)] == [1, 2, 3]
    assert [m.step for m in desk.only(Saved)] == [4]
    # What was in the way of the others is gone with them.
    assert [path.name for path in desk.plan.paths.staging_dir(1).glob("step-*")] == []


def best_of(step: int) -> Best:
    return Best(metric="loss", mode="min", step=step, value=0.5)


def test_the_best_checkpoint_is_written_although_its_save_failed(tmp_path: Path) -> None:
    desk = Desk(tmp_path, keep=1)
    desk.saving.save(2, best_of(2))
    desk.saver.wait()
    desk.variables["model/0:w"].assign([2.0] * 4)
    desk.block(4)
    desk.saving.save(4, best_of(4))
    desk.saver.wait()
    assert desk.steps() == [2]  # the one that was best before is still there
    desk.variables["model/0:w"].assign([3.0] * 4)
    for step in (5, 6):
        desk.saving.save(step, best_of(4))
        desk.saver.wait()
    assert desk.steps() == [6, 4]
    (weights,) = read_model(desk.plan.paths.checkpoints_dir / store.checkpoint_name(4)).values()
    assert weights.tolist() == [2.0] * 4
    assert [message.step for message in desk.only(Saved)] == [2, 4, 5, 6]


def test_what_was_best_and_could_not_be_written_is_dropped_for_a_better_one(
    tmp_path: Path,
) -> None:
    desk = Desk(tmp_path, keep=1)
    desk.block(4)
    desk.saving.save(4, best_of(4))
    desk.saving.save(5, best_of(5))
    desk.saver.wait()
    assert desk.steps() == [5]


def test_a_manifest_says_what_the_checkpoint_was_computed_with(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    saver = make_saver(desk.order, desk.reporter, desk.variables, {"keras": "3"})
    assert saver is not None
    saver.save(4)
    saver.close()
    manifest = store.read_manifest(desk.plan.paths.checkpoints_dir / store.checkpoint_name(4))
    assert (manifest["run"], manifest["attempt"]) == (desk.plan.run, 1)
    assert manifest["versions"] == {"keras": "3"}
    assert manifest["config_fingerprint"] == fingerprint(flatten(desk.plan.config))


def test_who_restores_a_checkpoint_tells_how_far_that_is(tmp_path: Path) -> None:
    desk, told = Desk(tmp_path), list[str]()
    desk.saving.save(4, None)
    desk.saver.wait()
    path = desk.plan.paths.checkpoints_dir / store.checkpoint_name(4)
    assert restore(path, desk.variables, progress=told.append) == 4
    assert told[0].endswith(" MB checked") and told[-1] == "1 of 1 variables read"


def test_of_the_best_step_whose_streams_cannot_be_written_the_weights_are_kept(
    tmp_path: Path,
) -> None:
    desk = Desk(tmp_path, keep=1, streams=True)
    checkpoints_dir = desk.plan.paths.checkpoints_dir
    desk.feeder.take(0, 4)
    desk.block(4)
    desk.variables["model/0:w"].assign([2.0] * 4)
    desk.saving.save(4, best_of(4))
    assert desk.steps() == [] and [m.step for m in desk.only(SaveFailed)] == [4]
    desk.feeder.take(4, 1)
    desk.variables["model/0:w"].assign([3.0] * 4)
    desk.saving.save(5, best_of(4))
    desk.saver.wait()
    assert desk.steps() == [5, 4]
    newest, best = store.list_checkpoints(checkpoints_dir)
    (weights,) = read_model(best).values()
    assert weights.tolist() == [2.0] * 4
    # Without its streams nobody goes on from it.
    assert store.newest_valid(checkpoints_dir).path == newest
    remove(newest)
    assert store.newest_valid(checkpoints_dir).path is None


def test_the_last_save_that_is_tried_again_has_its_streams(tmp_path: Path) -> None:
    desk = Desk(tmp_path, streams=True)
    desk.feeder.take(0, 4)
    staged = desk.plan.paths.staging_dir(1) / store.checkpoint_name(4)
    (staged / "variables.data-00000-of-00001").mkdir(parents=True)  # the weights find no place
    desk.saving.save_last(4, best_of(4))
    assert [m.step for m in desk.only(SaveFailed)] == [4]
    [path] = store.list_checkpoints(desk.plan.paths.checkpoints_dir)
    assert "stream-0.npz" in store.read_manifest(path)["files"]
    assert store.newest_valid(path.parent).path == path


def test_too_many_failures_in_a_row_end_the_run(tmp_path: Path) -> None:
    desk = Desk(tmp_path, checkpoint__max_failed_saves=2)
    for step in (1, 2):
        desk.saving.wish(by_step=True, at_once=False)
        desk.block(step)
        desk.saving.save(step, None)
        desk.saver.wait()
    with pytest.raises(StorageError, match="2 saves in a row have failed"):
        desk.saving.wish(by_step=False, at_once=False)


def test_the_last_save_is_tried_until_it_succeeds(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.block(8)
    desk.saving.save_last(8, None)
    assert desk.steps() == [8] and desk.now == 1001.0
    assert len(desk.only(SaveFailed)) == 1


def test_an_attempt_that_is_over_ends_at_the_next_block_also_without_a_save(
    tmp_path: Path,
) -> None:
    desk = Desk(tmp_path)
    bury(desk.plan.paths, 1)
    with pytest.raises(StorageError, match="this attempt is over"):
        desk.saving.wish(by_step=False, at_once=False)


def test_checkpoints_that_cannot_fit_are_refused_before_the_first_step(tmp_path: Path) -> None:
    desk = Desk(tmp_path, checkpoint__keep=10**15)
    with pytest.raises(StorageError) as refusal:
        make_saver(desk.order, desk.reporter, desk.variables, {})
    assert "lower checkpoint.keep" in str(refusal.value)
