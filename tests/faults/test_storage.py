"""Disks that fill up, and attempts that are over: real worker processes, real file systems."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.control.agent import Agent
from orchestrator.control.launcher import Zygote
from orchestrator.control.process_group import ProcessGroup
from orchestrator.errors import StorageError
from orchestrator.spec.messages import Death, Message, Outcome, Ready, Saved, SaveFailed
from orchestrator.train import store
from tests.control.conftest import is_gone, wait_until
from tests.disks import disk, fill
from tests.faults.training import Training

# More than the model of the paced job needs, and less than the ballast.
_BALLAST = 250_000
_TMPFS_BYTES = 16 * 2**20


def whole_steps(training: Training) -> list[int]:
    """Return the steps of the checkpoints that are whole, oldest first."""
    found = []
    for path in reversed(store.list_checkpoints(training.plan.paths.checkpoints_dir)):
        store.verify(path)
        found.append(store.step_of(path))
    return found


def test_training_goes_on_while_the_disk_is_full_and_saves_when_it_is_not(
    tmp_path: Path, zygote: Zygote
) -> None:
    at_the_worst: list[list[int]] = []

    def react(training: Training, message: Message) -> None:
        folder = training.plan.paths.checkpoints_dir
        filling = folder / "filling"
        if training.step >= 75 and not at_the_worst and not filling.exists():
            fill(folder)
        if training.step >= 125 and filling.exists():
            filling.unlink()
            at_the_worst.append(whole_steps(training))

    training = Training(
        tmp_path,
        zygote,
        react=react,
        workers=2,
        job__args={"ballast": _BALLAST},
        checkpoint__every_steps=20,
        checkpoint__keep=2,
        train__steps=320,
    )
    with disk(training.plan.paths.checkpoints_dir, _TMPFS_BYTES):
        assert training.run() is Outcome.completed
        assert len(training.only(Ready)) == 2, "nothing was started again"
        failed = training.only(SaveFailed)
        assert 1 <= len(failed) <= 3 and all(75 <= item.step <= 130 for item in failed)
        assert "No space left on device" in failed[0].error
        assert [item.num_failed for item in failed] == list(range(1, len(failed) + 1))
        # The last good ones were whole all the time, and nothing of the others stayed.
        assert at_the_worst == [[40, 60]]
        saved = [item.step for item in training.only(Saved)]
        assert saved[:3] == [20, 40, 60] and saved[-1] == 320
        assert len(saved) > 4, "the first save after the disk had room came before the last step"
        assert whole_steps(training) == saved[-2:]
        left = {path.name for path in training.plan.paths.checkpoints_dir.iterdir()}
        assert left == {store.checkpoint_name(step) for step in saved[-2:]}


def limit_files(pid: int, num_bytes: int) -> None:
    """Let the kernel refuse a process to make any file larger: a full disk for it alone."""
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))


def from_step(step: int, act: Callable[[Training], None]) -> Callable[[Training, Message], None]:
    """Return what acts once, when a step is done."""
    done: list[int] = []

    def react(training: Training, message: Message) -> None:
        if training.step >= step and not done:
            done.append(training.step)
            act(training)

    return react


def test_too_many_failed_saves_end_the_run_with_the_story(tmp_path: Path, zygote: Zygote) -> None:
    training = Training(
        tmp_path,
        zygote,
        react=from_step(30, lambda training: limit_files(training.pids[0], 0)),
        checkpoint__every_steps=20,
        checkpoint__max_failed_saves=2,
        train__steps=4000,
    )
    with pytest.raises(StorageError) as ended:
        training.run()
    assert "2 saves in a row have failed (checkpoint.max_failed_saves)" in str(ended.value)
    assert "File too large" in str(ended.value)
    assert f"resume={training.plan.run}" in str(ended.value)
    assert whole_steps(training) == [20]
    assert len(training.only(Ready)) == 1


def test_a_last_save_that_fails_is_tried_again_and_then_ends_the_run(
    tmp_path: Path, zygote: Zygote
) -> None:
    training = Training(
        tmp_path,
        zygote,
        react=from_step(30, lambda training: limit_files(training.pids[0], 0)),
        checkpoint__every_steps=20,
        checkpoint__max_failed_saves=None,
        train__steps=40,
    )
    with pytest.raises(StorageError, match="the last save, of step 40, failed 4 times"):
        training.run()
    assert whole_steps(training) == [20]


def test_a_worker_that_cannot_write_its_streams_ends_nothing_and_all_go_on_together(
    tmp_path: Path, zygote: Zygote
) -> None:
    def react(training: Training, message: Message) -> None:
        if 30 <= training.step < 70:
            limit_files(training.pids[1], 0)
        elif training.step >= 70:
            limit_files(training.pids[1], resource.RLIM_INFINITY)

    training = Training(
        tmp_path,
        zygote,
        react=react,
        workers=2,
        job__class_name="tests.faults.paced.PacedStream",
        checkpoint__every_steps=20,
        train__steps=140,
    )
    assert training.run() is Outcome.completed
    failed = training.only(SaveFailed)
    assert failed and {item.worker for item in failed} == {1}
    assert "cannot save the streams" in failed[0].error
    saved = [item.step for item in training.only(Saved)]
    assert saved[0] == 20 and not any(30 <= step < 70 for step in saved) and saved[-1] == 140
    # Every checkpoint holds the streams of both.
    for path in store.list_checkpoints(training.plan.paths.checkpoints_dir):
        store.verify(path)
        assert len(list(path.glob("stream-?.npz"))) == 2
    assert len(training.only(Ready)) == 2
    assert os.listdir(training.plan.paths.checkpoints_dir) == [
        path.name for path in training.plan.paths.checkpoints_dir.glob("step-*")
    ]


class Unreachable(ProcessGroup):
    """Workers on a host that is cut off: its processes live on, and nobody can end them.

    Attributes:
        is_cut: whether the host is cut off.
        lost: the agents there.
    """

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.is_cut = False
        self.lost: list[Agent] = []

    def poll(self, timeout_s: float) -> list[Message]:
        if not self.is_cut or self.lost:
            return super().poll(timeout_s)
        return [
            Death(
                worker=0,
                attempt=1,
                time=time.time(),
                error="its host is cut off",
                exit_status=None,
                log_path="",
                log_tail="",
            )
        ]

    def kill(self) -> None:
        if self.is_cut and not self.lost:
            self.lost, self._agents = self._agents, []
        super().kill()


def test_a_chief_stopped_in_mid_save_commits_nothing_once_its_attempt_is_over(
    tmp_path: Path, zygote: Zygote
) -> None:
    seconds: list[float] = []

    def stop_in_mid_save(training: Training) -> None:
        staged = training.plan.paths.staging_dir(1) / store.checkpoint_name(40)
        wait_until(lambda: any(staged.glob("variables.data*")), "the save of step 40 begins")
        os.kill(training.pids[0], signal.SIGSTOP)
        assert not (training.plan.paths.checkpoints_dir / staged.name).exists()
        old.append(training.pids[0])
        assert isinstance(training.group, Unreachable)
        training.group.is_cut = True

    def react(training: Training, message: Message) -> None:
        if message.attempt == 1 and training.step == 40 and not old:
            stop_in_mid_save(training)
        elif message.attempt == 2 and isinstance(message, Ready) and not seconds:
            # Soon: its agent ends what has been stopped for two seconds.
            os.kill(old[0], signal.SIGCONT)
            start = time.monotonic()
            wait_until(lambda: is_gone(old[0]), "the old chief ends")
            seconds.append(time.monotonic() - start)

    old: list[int] = []
    training = Training(
        tmp_path,
        zygote,
        react=react,
        group=Unreachable,
        job__args={"ballast": 10_000_000},
        checkpoint__every_steps=20,
        checkpoint__keep=9,
        train__steps=80,
    )
    try:
        assert training.run() is Outcome.completed
    finally:
        for pid in old:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert seconds[0] < 3.0
    ready = [item.attempt for item in training.only(Ready)]
    assert ready == [1, 2] and training.only(Ready)[1].start_step == 20
    # What the old chief told came to nobody.
    assert [m.attempt for m in training.told] == sorted(m.attempt for m in training.told)
    assert whole_steps(training) == [20, 40, 60, 80]
    for path in store.list_checkpoints(training.plan.paths.checkpoints_dir):
        attempt = 1 if store.step_of(path) == 20 else 2
        assert store.read_manifest(path)["attempt"] == attempt
    left = [*training.plan.paths.checkpoints_dir.iterdir(), *training.plan.paths.root.iterdir()]
    assert not [path for path in left if path.name.startswith(".")]
