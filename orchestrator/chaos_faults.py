"""The faults that `chaos` injects: what each does to a run, and what must come of it."""

from __future__ import annotations

import math
import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from orchestrator.chaos_command import Command, Server
from orchestrator.chaos_watch import Watch
from orchestrator.control.processes import Process
from orchestrator.spec.chaos import FaultName
from orchestrator.spec.paths import RunPaths
from orchestrator.train import store

_PATIENCE_S = 60.0
_EXIT_S = 3.0
_LOG_ROOM_BYTES = 1 << 16


class NotRun(Exception):
    """A fault cannot be injected here; the text says why."""


class Ends(Enum):
    """What a fault leads to."""

    restart = "the group restarts"
    resume = "the command ends, and goes on with resume="
    nothing = "training goes on"


@dataclass(slots=True)
class Scene:
    """A run under fire.

    Attributes:
        num_workers: of the run.
        every_steps: between checkpoints.
        moment: Unix seconds at which the fault struck; the last time, if it strikes twice.
        struck: processes that the fault is about.
        group: the workers of the attempt that it struck.
        notes: figures to tell beside the times.
    """

    watch: Watch
    command: Command
    paths: RunPaths
    num_workers: int
    every_steps: int
    server: Server | None = None
    moment: float = 0.0
    struck: list[Process] = field(default_factory=list)
    group: list[Process] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def other(self) -> int:
        """A worker that is not the chief, if there is one."""
        return min(1, self.num_workers - 1)

    def aim(self) -> None:
        """Take the workers of the present attempt for those that the fault is about."""
        self.group = [Process.of(pid) for pid in self.watch.pids.values()]

    def signal(self, number: int, *workers: int) -> None:
        """Send a signal to workers, one right after the other."""
        self.aim()
        pids = [self.watch.pids[worker] for worker in workers]
        self.struck += [Process.of(pid) for pid in pids]
        self.moment = time.time()
        for pid in pids:
            os.kill(pid, number)

    def ask(self, name: str) -> None:
        """Ask a worker for something by a file, and wait until it has taken the file."""
        folder = self.paths.chaos_dir
        taken = folder / f"{name}.taken"
        taken.unlink(missing_ok=True)
        (folder / "release-save").unlink(missing_ok=True)
        (folder / name).touch()
        if not self.until(taken.exists):
            (folder / name).unlink(missing_ok=True)
            raise NotRun(f"no worker took {folder / name}")
        self.moment = time.time()

    def until(self, condition: Callable[[], bool], timeout_s: float = _PATIENCE_S) -> bool:
        """Wait for a condition, or the command's end; False if the condition does not hold."""
        self.watch.until(lambda: condition() or self.command.code is not None, timeout_s)
        return condition()


def _all_gone(scene: Scene) -> str:
    """Say which processes outlive the attempt that was struck."""
    alive = [process.pid for process in scene.group if process.is_alive]
    return f"processes of the old attempt still live: {alive}" if alive else ""


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault.

    Attributes:
        inject: does it; `Scene.moment` is set when it has.
        ends: what must come of it.
        codes: exit codes of a command that ends by it.
        after: looks at the scene when the run has gone on; returns what is wrong.
        promised_s: how soon it must be on record; None if there is no such promise.
        num_steps: how many steps it takes, besides those that are made again.
        lost_intervals: how many intervals between checkpoints may be made again.
        not_here: why it cannot be injected; empty if it can.
    """

    name: FaultName
    inject: Callable[[Scene], None]
    ends: Ends = Ends.restart
    codes: tuple[int, ...] = ()
    after: Callable[[Scene], str] = _all_gone
    promised_s: float | None = None
    num_steps: int = 40
    lost_intervals: int = 2
    not_here: str = ""


def _kill_twice(scene: Scene) -> None:
    """Kill a worker, then the chief of the attempt that follows, before its first step."""
    first = scene.watch.attempt
    scene.signal(signal.SIGKILL, scene.other)
    watch = scene.watch
    if not scene.until(lambda: watch.attempt > first and 0 in watch.pids):
        raise NotRun("no second attempt came")
    scene.signal(signal.SIGKILL, 0)


def _kill_in_save(scene: Scene) -> None:
    scene.ask("hold-save")
    scene.signal(signal.SIGKILL, 0)


def _damage_checkpoint(scene: Scene) -> None:
    """Change one byte in the newest checkpoint, then kill a worker."""
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


def _take_tracking_down(scene: Scene) -> None:
    """Kill MLflow's server for a hundred steps."""
    assert scene.server is not None
    until = scene.watch.step + 100
    scene.moment = time.time()
    scene.server.stop()
    scene.until(lambda: scene.watch.step >= until)
    scene.server.start(wait=False)  # training does not wait for it either


def _nothing(scene: Scene) -> None:
    """Stand in for what cannot be injected here."""


def _checkpoints(scene: Scene) -> list[Path]:
    return store.list_checkpoints(scene.paths.checkpoints_dir)


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


_NEEDS_NODES = "needs Ray nodes with addresses of their own; chaos runs on one"
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
        after=lambda scene: "",
        num_steps=160,
        lost_intervals=0,
    ),
    Fault(
        FaultName.tracking_down,
        _take_tracking_down,
        Ends.nothing,
        after=lambda scene: "",
        num_steps=140,
        lost_intervals=0,
    ),
    Fault(FaultName.node_loss, _nothing, not_here=_NEEDS_NODES),
    Fault(FaultName.cut, _nothing, not_here=_NEEDS_NODES),
)
FAULTS = {fault.name: fault for fault in _FAULTS}
