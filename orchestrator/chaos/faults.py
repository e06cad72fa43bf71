"""The faults that `chaos` injects: what each does to a run, and what must come of it."""

from __future__ import annotations

import math
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

from orchestrator.chaos import host_faults
from orchestrator.chaos.delays import delays, longest
from orchestrator.chaos.scene import Ends, Fault, NotRun, Scene
from orchestrator.control.processes import Process
from orchestrator.spec.chaos import FaultName
from orchestrator.track.journal import read
from orchestrator.train import store

_EXIT_S = 3.0
_LOG_ROOM_BYTES = 1 << 16
# How much later than usual a block may be while MLflow is away.
_DELAY_S = 0.05
# Training goes on while Ray starts again on a host that was lost.
_HOST_STEPS = 400


def _kill_twice(scene: Scene) -> None:
    """Kill a worker, then the chief of the attempt that follows, before its first step."""
    first = scene.watch.attempt
    scene.signal(signal.SIGKILL, scene.other)
    watch = scene.watch
    if not scene.until(lambda: watch.attempt > first and 0 in watch.pids):
        scene.trouble = "no second attempt came"
        return
    scene.signal(signal.SIGKILL, 0)


def _kill_in_save(scene: Scene) -> None:
    """Kill a chief that writes a checkpoint: what it leaves must be whole or not to be seen."""
    before = {path: _inode(path) for path in _checkpoints(scene)}
    scene.ask("hold-save")
    scene.signal(signal.SIGKILL, 0)
    for path in _checkpoints(scene):
        if before.get(path) == _inode(path):
            continue  # maybe damaged by a fault before
        try:
            store.verify(path)
        except (OSError, ValueError) as error:
            scene.trouble = f"half a checkpoint was left: {path.name} {error}"


def _damage_checkpoint(scene: Scene) -> None:
    """Change one byte in the newest checkpoint, then kill a worker."""
    # A disk that was full before has left a gap, whose steps are no loss of this fault.
    scene.until(lambda: _last_interval(scene) <= scene.every_steps)
    newest = store.list_checkpoints(scene.paths.checkpoints_dir)[0]
    path = _largest_file(newest)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 0xFF]))
    scene.signal(signal.SIGKILL, scene.other)


def _stop_in_save(scene: Scene) -> None:
    """Stop a chief that writes a checkpoint, and that does nothing else when it is woken."""
    scene.ask("hold-save")
    scene.ask("sleep-0")
    scene.signal(signal.SIGSTOP, 0)


def _let_stale_chief_go(scene: Scene) -> str:
    """Wake the stopped chief of the old attempt: it must commit nothing, and be gone."""
    stale, old = scene.struck[-1], scene.watch.attempt - 1
    before = {path: _inode(path) for path in _checkpoints(scene)}
    (scene.paths.chaos_dir / "release-save").touch()
    if stale.is_alive:
        os.kill(stale.pid, signal.SIGCONT)
    stolen: set[str] = set()

    def is_gone() -> bool:
        for path in _checkpoints(scene):  # it may be pruned in a moment
            if _attempt_of(path) <= old and before.get(path) != _inode(path):
                stolen.add(path.name)
        return not stale.is_alive

    in_time = scene.watch.until(is_gone, _EXIT_S)
    if stolen:
        return f"attempt {old} committed {', '.join(sorted(stolen))} after it was over"
    return "" if in_time else f"the chief of attempt {old} outlived it by {_EXIT_S:g} s"


def _stall_input(scene: Scene) -> None:
    scene.ask(f"sleep-{scene.other}")


def _hold_gil(scene: Scene) -> None:
    scene.ask(f"gil-{scene.other}")


def _signal_driver(number: int) -> Callable[[Scene], None]:
    def inject(scene: Scene) -> None:
        scene.moment = time.time()
        scene.command.send(number)

    return inject


def _fill_disk(scene: Scene) -> None:
    """Let every large write of the chief fail until two saves were due, as on a full disk.

    A limit of the process stands in for the disk: it needs no file system of its own, and the
    calls that write fail at the same place, with EFBIG instead of ENOSPC.
    """
    newest = store.list_checkpoints(scene.paths.checkpoints_dir)[0]
    size = _largest_file(newest).stat().st_size
    log = scene.paths.worker_log(scene.watch.attempt, 0)
    limit = size // 2
    if limit < log.stat().st_size + _LOG_ROOM_BYTES:
        raise NotRun(f"a checkpoint of {size:,} bytes is too small to fail before the log does")
    pid = scene.watch.pids[0]
    chief = Process.of(pid)
    before, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    scene.moment = time.time()
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, hard))
    attempt, until = scene.watch.attempt, scene.watch.step + 2 * scene.every_steps + 10
    scene.until(lambda: scene.watch.step >= until or scene.watch.attempt != attempt)
    if chief.is_alive:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (before, hard))
    freed = scene.watch.step
    saved = scene.until(lambda: scene.watch.saved > freed or scene.watch.attempt != attempt)
    if saved and scene.watch.attempt == attempt:
        scene.notes.append(f"saved again {scene.watch.saved - freed} steps after")
    told = [r for r in read(scene.paths.journal) if r["kind"] == "SaveFailed"]
    if not any(record["time"] >= scene.moment for record in told):
        scene.trouble = "no save failed: the disk was not full for it"
    elif not saved:
        scene.trouble = "no save succeeded once there was room again"


def _take_tracking_down(scene: Scene) -> None:
    """Kill MLflow's server for a hundred steps, which must take as long as any others."""
    assert scene.server is not None
    watch, attempt = scene.watch, scene.watch.attempt
    until = watch.step + 100
    scene.moment = time.time()
    scene.server.stop()
    if not scene.until(lambda: watch.step >= until):
        scene.trouble = "training did not go on while MLflow was away"
    # Before it starts: that takes the processors for seconds.
    late = delays(read(scene.paths.journal), attempt)
    during = longest(late, scene.moment, math.inf)
    usual = longest(late, 0.0, scene.moment)
    scene.server.start(wait=False)  # training does not wait for it either
    scene.notes.append(f"no block later than {1000 * during:.0f} ms ({1000 * usual:.0f} before)")
    if during > usual + _DELAY_S:
        scene.trouble = f"a block was {1000 * during:.0f} ms late, {1000 * usual:.0f} ms before"


def _checkpoints(scene: Scene) -> list[Path]:
    return store.list_checkpoints(scene.paths.checkpoints_dir)


def _last_interval(scene: Scene) -> int:
    """Return the steps between the two newest checkpoints."""
    newest, *older = map(store.step_of, _checkpoints(scene))
    return newest - older[0] if older else newest


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except OSError:
        return None


def _attempt_of(path: Path) -> float:
    """Return the attempt that wrote a checkpoint; infinite if it is gone meanwhile."""
    try:
        return int(store.read_manifest(path)["attempt"])
    except (ValueError, KeyError):
        return math.inf


def _largest_file(folder: Path) -> Path:
    return max(folder.iterdir(), key=lambda path: path.stat().st_size)


_FAULTS = (
    Fault(FaultName.kill, lambda s: s.signal(signal.SIGKILL, s.other), promised_s=0.5),
    Fault(FaultName.kill_chief, lambda s: s.signal(signal.SIGKILL, 0), promised_s=0.5),
    Fault(
        FaultName.kill_both,
        lambda s: s.signal(signal.SIGKILL, *range(s.num_workers)),
        promised_s=0.5,
    ),
    Fault(FaultName.kill_twice, _kill_twice, promised_s=0.5),
    Fault(FaultName.kill_in_save, _kill_in_save, promised_s=0.5, num_steps=60, lost_intervals=3),
    Fault(FaultName.damaged_checkpoint, _damage_checkpoint, promised_s=0.5, lost_intervals=3),
    Fault(FaultName.stop, lambda s: s.signal(signal.SIGSTOP, s.other), promised_s=5.0),
    Fault(FaultName.stop_chief, lambda s: s.signal(signal.SIGSTOP, 0), promised_s=5.0),
    Fault(
        FaultName.stale_chief,
        _stop_in_save,
        after=_let_stale_chief_go,
        promised_s=5.0,
        num_steps=60,
        lost_intervals=3,
    ),
    Fault(FaultName.sleep, _stall_input, promised_s=10.0),
    Fault(FaultName.gil, _hold_gil, promised_s=10.0),
    Fault(
        FaultName.sigterm,
        _signal_driver(signal.SIGTERM),
        Ends.resume,
        codes=(128 + signal.SIGTERM,),
        lost_intervals=0,
    ),
    Fault(
        FaultName.sigterm_worker,
        lambda s: s.signal(signal.SIGTERM, s.other),
        Ends.resume,
        codes=(128 + signal.SIGINT, 128 + signal.SIGTERM),
        lost_intervals=0,
    ),
    Fault(
        FaultName.driver_killed,
        _signal_driver(signal.SIGKILL),
        Ends.resume,
        codes=(-signal.SIGKILL,),
    ),
    Fault(
        FaultName.disk_full,
        _fill_disk,
        Ends.nothing,
        after=lambda scene: scene.trouble,
        num_steps=160,
        lost_intervals=0,
    ),
    Fault(
        FaultName.tracking_down,
        _take_tracking_down,
        Ends.nothing,
        after=lambda scene: scene.trouble,
        num_steps=140,
        lost_intervals=0,
    ),
    Fault(
        FaultName.node_loss,
        host_faults.lose,
        after=host_faults.give_back,
        promised_s=2.0,
        num_steps=_HOST_STEPS,
        needs_hosts=True,
    ),
    Fault(
        FaultName.cut,
        host_faults.cut,
        after=host_faults.heal,
        promised_s=5.0,
        num_steps=_HOST_STEPS,
        needs_hosts=True,
    ),
)
FAULTS = {fault.name: fault for fault in _FAULTS}
