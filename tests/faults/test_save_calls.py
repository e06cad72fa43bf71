"""One save, killed or failing at every single call it makes to the file system."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestrator.control.folders import prepare
from orchestrator.spec.paths import RunPaths
from orchestrator.train import store
from tests.faults.saves import FILES, save
from tests.faults.strace import Call, Traced, needs_strace, trace

pytestmark = needs_strace
SCRIPT = Path(__file__).with_name("saves.py")
NAME = store.checkpoint_name(20)
# What a file system without an exchange of folders answers.
NO_EXCHANGE = "renameat2:error=EINVAL"


def begun(root: Path, *, again: bool) -> RunPaths:
    """Make a run with checkpoints of steps 5 and 10, and of step 20 if it is to be saved again."""
    paths = RunPaths(root)
    for step in (5, 10, 20) if again else (5, 10):
        save(paths, 1, step, keep=3)
    return paths


def saving(calls: list[Call], root: Path) -> list[Call]:
    """Return the calls that change something in the run's folder, or make it durable.

    Before a call that only reads, the disk is as after the call before it.
    """
    return [call for call in calls if str(root) in call.text and "O_RDONLY" not in call.text]


def check_restart(paths: RunPaths, *, has_20: bool) -> None:
    """Do what a restart does, and see that it finds a whole checkpoint and no litter."""
    store.recover(paths.checkpoints_dir)
    found = store.newest_valid(paths.checkpoints_dir).path
    assert found is not None
    # One interval is lost at most; nothing that was there or was announced.
    assert store.step_of(found) == 20 or (store.step_of(found) == 10 and not has_20)
    prepare(paths, 3)
    assert {path.name for path in paths.root.iterdir()} == {"checkpoints", ".export-3"}
    names = {path.name for path in paths.checkpoints_dir.iterdir()}
    assert {name for name in names if not name.startswith("step-")} == {".attempt-3"}
    save(paths, 4, 30, keep=2)
    left = store.list_checkpoints(paths.checkpoints_dir)
    assert store.step_of(left[0]) == 30 and len(left) == 2
    store.verify(left[0])


@pytest.mark.parametrize(
    ("again", "more"),
    [
        pytest.param(False, [], id="a new step"),
        pytest.param(True, [], id="a step saved before"),
        pytest.param(True, [NO_EXCHANGE], id="a step saved before, without exchange"),
    ],
)
def test_a_kill_at_any_call_of_a_save_leaves_a_whole_checkpoint_and_no_litter(
    tmp_path: Path, again: bool, more: list[str]
) -> None:
    whole = begun(tmp_path / "whole", again=again)
    undisturbed = trace(SCRIPT, str(whole.root), inject=more)
    assert undisturbed.out == "announced\n" and undisturbed.status == 0
    calls = saving(undisturbed.calls, whole.root)
    if more:
        calls = calls[[call.name for call in calls].index("renameat2") :]
    assert len(calls) > (5 if more else 20)

    def kill(index: int) -> Traced:
        # Equal lengths of paths: the same calls.
        paths = begun(tmp_path / f"kil{index:02}", again=again)
        call = calls[index]
        blow = f"{call.name}:signal=SIGKILL:when={call.number}"
        kept = [] if call.name == "renameat2" else more
        killed = trace(SCRIPT, str(paths.root), inject=[*kept, blow])
        assert killed.status == -9, (call, killed)
        check_restart(paths, has_20=again or "announced" in killed.out)
        shutil.rmtree(paths.root)
        return killed

    with ThreadPoolExecutor(2) as pool:
        outs = {killed.out for killed in pool.map(kill, range(len(calls)))}
    # Kills came before the announcement and after it.
    assert outs == {"", "announced\n"}


def test_everything_is_flushed_before_the_rename_and_the_folder_after_it(tmp_path: Path) -> None:
    paths = begun(tmp_path / "run", again=False)
    calls = saving(trace(SCRIPT, str(paths.root)).calls, paths.root)
    staged = f"{paths.staging_dir(2)}/{NAME}"
    [rename] = [i for i, c in enumerate(calls) if c.name == "rename" and f'"{staged}"' in c.text]
    flushed = [(i, c.text) for i, c in enumerate(calls) if c.name == "fsync"]
    for name in (*FILES, store.MANIFEST):
        written = max(i for i, c in enumerate(calls) if c.name == "write" and name in c.text)
        assert any(written < i < rename and f"{staged}/{name}>" in text for i, text in flushed)
    assert any(i < rename and f"{staged}>" in text for i, text in flushed)
    assert any(i > rename and f"{paths.checkpoints_dir}>" in text for i, text in flushed)


@pytest.mark.parametrize("again", [False, True])
def test_a_flush_that_fails_is_a_failed_save_which_nobody_sees(tmp_path: Path, again: bool) -> None:
    whole = begun(tmp_path / "whole", again=again)
    calls = saving(trace(SCRIPT, str(whole.root)).calls, whole.root)
    flushes = [call for call in calls if call.name == "fsync"]
    assert len(flushes) == len(FILES) + 3  # the manifest, the folder, its parent
    for call in flushes:
        paths = begun(tmp_path / f"eio{call.number:02}", again=again)
        before = sorted(path.name for path in paths.checkpoints_dir.glob("step-*"))
        failed = trace(SCRIPT, str(paths.root), inject=[f"fsync:error=EIO:when={call.number}"])
        assert "StorageError: cannot save the checkpoint" in failed.out, call
        assert "announced" not in failed.out
        assert sorted(path.name for path in paths.checkpoints_dir.glob("step-*")) == before
        found = store.newest_valid(paths.checkpoints_dir).path
        assert found is not None and store.step_of(found) == (20 if again else 10)
