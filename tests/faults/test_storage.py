"""Disks that fill up, and attempts that are over: real worker processes, real file systems."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator.control.launcher import Zygote, start_zygote
from orchestrator.errors import StorageError
from orchestrator.spec.messages import Message, Outcome, Ready, Saved, SaveFailed
from orchestrator.train import store
from tests.faults.training import Training

# More than the model of the paced job needs, and less than the ballast.
_BALLAST = 250_000
_TMPFS_BYTES = 16 * 2**20


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    """A zygote; the first worker waits while it imports TensorFlow."""
    started = start_zygote()
    yield started
    started.close()


@contextmanager
def disk(folder: Path, num_bytes: int) -> Iterator[None]:
    """Mount a disk of this size over a folder."""
    size = f"size={num_bytes}"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], check=False)
    if mounted.returncode != 0:
        pytest.skip("a tmpfs cannot be mounted here: not root")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder: Path) -> None:
    """Fill a disk to the last byte."""
    with (folder / "filling").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(2**16))
        except OSError:
            return


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
        assert saved[:3] == [20, 40, 60] and saved[-1] == 200
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
