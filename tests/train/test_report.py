"""What a worker tells of itself: phases, signs of life, and whose fault an error is."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf

from orchestrator.errors import RestoreError, StorageError
from orchestrator.spec.messages import Beacon, Cause, Failed, Message, Phase, WorkerOrder
from orchestrator.spec.schema import StrategyName
from orchestrator.train.report import Reporter, Stopped, folder_gauge
from tests.plans import tiny_plan

INTERVAL_S = 0.01
PATIENCE_S = 30.0


class Heard:
    """A reporter and what it told."""

    def __init__(self, folder: Path, workers: int = 1):
        changes: dict[str, Any] = {}
        if workers > 1:
            changes = {
                "strategy__name": StrategyName.multi_worker,
                "strategy__num_workers": workers,
            }
        order = WorkerOrder(
            plan=tiny_plan(folder, train__micro_batches=2, **changes),
            worker=0,
            attempt=1,
            addresses=(),
            visible_gpus="",
            restore_from=None,
        )
        self.told: list[Message] = []
        self.came = threading.Condition()
        self.reporter = Reporter(order, self.hear)

    def hear(self, message: Message) -> None:
        with self.came:
            self.told.append(message)
            self.came.notify_all()

    @property
    def beacons(self) -> list[Beacon]:
        return [message for message in self.told if isinstance(message, Beacon)]

    def wait_for(self, phase: Phase, detail: str = "") -> Beacon:
        """Return a sign of life of a phase that comes from now on."""
        start = len(self.told)

        def found() -> Beacon | None:
            new = [m for m in self.told[start:] if isinstance(m, Beacon) and not m.begins]
            return next((b for b in new if (b.phase, b.detail) == (phase, detail)), None)

        with self.came:
            assert self.came.wait_for(found, PATIENCE_S), self.beacons
            beacon = found()
        assert beacon is not None
        return beacon

    def failed(self, error: BaseException) -> Failed:
        self.reporter.failed(error)
        last = self.told[-1]
        assert isinstance(last, Failed)
        return last


def test_a_sign_of_life_comes_again_and_again_and_begins_nothing(tmp_path: Path) -> None:
    heard = Heard(tmp_path)
    heard.reporter.step = 7
    with heard.reporter.beating(INTERVAL_S):
        heard.reporter.enter(Phase.stepping)
        first, second = heard.wait_for(Phase.stepping), heard.wait_for(Phase.stepping)
    assert first.step == second.step == 7 and second.time >= first.time
    assert [beacon.phase for beacon in heard.beacons if beacon.begins] == [Phase.stepping]
    told = len(heard.told)
    assert not any(thread.name == "beacon" for thread in threading.enumerate())
    assert len(heard.told) == told


def test_progress_is_told_with_the_next_sign_of_life_until_another_phase_begins(
    tmp_path: Path,
) -> None:
    heard = Heard(tmp_path)
    with heard.reporter.beating(INTERVAL_S):
        heard.reporter.enter(Phase.evaluating)
        heard.reporter.progress("64 of 128 steps")
        heard.wait_for(Phase.evaluating, "64 of 128 steps")
        heard.reporter.enter(Phase.stepping)
        heard.wait_for(Phase.stepping)


def test_a_phase_within_a_phase_is_told_by_signs_of_life_alone(tmp_path: Path) -> None:
    heard = Heard(tmp_path)
    (tmp_path / "file").write_bytes(bytes(1_500_000))
    with heard.reporter.beating(INTERVAL_S):
        heard.reporter.enter(Phase.stepping)
        with heard.reporter.within(Phase.saving, folder_gauge(tmp_path)):
            heard.wait_for(Phase.saving, "1.5 MB written")
        heard.wait_for(Phase.stepping)
    assert [beacon.phase for beacon in heard.beacons if beacon.begins] == [Phase.stepping]


def test_an_error_within_a_phase_is_told_with_it(tmp_path: Path) -> None:
    heard = Heard(tmp_path)
    heard.reporter.enter(Phase.stepping)
    with pytest.raises(ValueError), heard.reporter.within(Phase.calling_back):
        raise ValueError("of the job's own")
    assert heard.failed(ValueError("of the job's own")).phase is Phase.calling_back


def test_a_gauge_of_a_folder_that_is_not_there_stands_at_nothing(tmp_path: Path) -> None:
    assert folder_gauge(tmp_path / "missing")() == "0.0 MB written"


def test_a_gauge_bears_folders_that_come_and_go_under_its_eyes(tmp_path: Path) -> None:
    is_over = threading.Event()

    def come_and_go() -> None:
        while not is_over.is_set():
            (tmp_path / "a" / "b" / "c").mkdir(parents=True)
            shutil.rmtree(tmp_path / "a")

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        for _ in range(2000):
            assert folder_gauge(tmp_path)() == "0.0 MB written"
    finally:
        is_over.set()
        thread.join()


def test_a_gauge_that_fails_ends_no_signs_of_life(tmp_path: Path) -> None:
    def broken() -> str:
        raise RuntimeError("out of order")

    heard = Heard(tmp_path)
    with heard.reporter.beating(INTERVAL_S):
        heard.reporter.enter(Phase.stepping)
        with heard.reporter.within(Phase.saving, broken):
            heard.wait_for(Phase.saving)
            heard.wait_for(Phase.saving)
        heard.wait_for(Phase.stepping)


OOM = tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor on /device:GPU:0")


@pytest.mark.parametrize(
    ("error", "alone", "among_others"),
    [
        (tf.errors.UnavailableError(None, None, "a peer"), Cause.job, Cause.collateral),
        (tf.errors.DeadlineExceededError(None, None, "a peer"), Cause.job, Cause.collateral),
        (tf.errors.AbortedError(None, None, "a peer"), Cause.job, Cause.collateral),
        (tf.errors.InternalError(None, None, "a peer"), Cause.job, Cause.collateral),
        (tf.errors.CancelledError(None, None, "a peer"), Cause.job, Cause.collateral),
        (OOM, Cause.job, Cause.job),
        (tf.errors.InvalidArgumentError(None, None, "shapes"), Cause.job, Cause.job),
        (tf.errors.OutOfRangeError(None, None, "no more"), Cause.job, Cause.job),
        (MemoryError("Unable to allocate"), Cause.job, Cause.job),
        (ValueError("the user's"), Cause.job, Cause.job),
        (Stopped("another tells"), Cause.collateral, Cause.collateral),
        (RestoreError("damaged"), Cause.restore, Cause.restore),
        (StorageError("full"), Cause.storage, Cause.storage),
    ],
    ids=lambda value: getattr(value, "value", type(value).__name__),
)
def test_whose_fault_an_error_is(
    tmp_path: Path, error: BaseException, alone: Cause, among_others: Cause
) -> None:
    for workers, cause in ((1, alone), (2, among_others)):
        heard = Heard(tmp_path, workers)
        heard.reporter.enter(Phase.stepping)
        assert heard.failed(error).cause is cause


@pytest.mark.parametrize("phase", [Phase.starting, Phase.connecting])
def test_what_fails_before_the_strategy_is_a_failed_start(tmp_path: Path, phase: Phase) -> None:
    heard = Heard(tmp_path, 2)
    heard.reporter.enter(phase)
    for error in (tf.errors.UnavailableError(None, None, "a peer"), ValueError("anything")):
        assert heard.failed(error).cause is Cause.start


def test_a_lack_of_memory_is_told_with_what_helps(tmp_path: Path) -> None:
    heard = Heard(tmp_path)
    on_gpu = heard.failed(OOM).error
    assert "the memory of a GPU of worker 0 is full: a step needs less with" in on_gpu
    # 16 examples on one replica, in 2 parts.
    assert "train.micro_batches=4, 4 example(s) at a time instead of 8, or" in on_gpu
    on_host = heard.failed(MemoryError("Unable to allocate 8 EiB")).error
    assert on_host.startswith("MemoryError: Unable to allocate 8 EiB; worker 0 held ")
    assert "the limit of " in on_host and "train.micro_batches=4" in on_host
    assert "micro_batches" not in heard.failed(ValueError("memory")).error


def test_an_error_is_told_without_the_password_it_quotes(tmp_path: Path) -> None:
    heard = Heard(tmp_path)
    failed = heard.failed(ValueError("cannot connect to postgresql://me:hunter2@db/x"))
    assert failed.error == "ValueError: cannot connect to postgresql://***@db/x"
    assert "hunter2" not in failed.traceback and "***" in failed.traceback
