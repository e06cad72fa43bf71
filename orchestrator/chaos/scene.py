"""What a fault of `chaos` is, and the run that it strikes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from orchestrator.chaos.command import Command, Server
from orchestrator.chaos.hosts import Hosts
from orchestrator.chaos.watch import Watch
from orchestrator.control.processes import Process
from orchestrator.spec.chaos import FaultName
from orchestrator.spec.paths import RunPaths

_PATIENCE_S = 60.0


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
        attempt: the number of that attempt.
        notes: figures to tell beside the times.
        hosts: what workers run on; None if all are on this host.
        host: the one of them that the fault is about.
        worker: the worker there.
        trouble: what the fault itself saw that is wrong.
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
    attempt: int = 0
    notes: list[str] = field(default_factory=list)
    hosts: Hosts | None = None
    host: int = 0
    worker: int = 0
    trouble: str = ""

    @property
    def other(self) -> int:
        """A worker that is not the chief, if there is one."""
        return min(1, self.num_workers - 1)

    def aim(self) -> None:
        """Take the workers of the present attempt for those that the fault is about."""
        self.attempt = self.watch.attempt
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


def all_gone(scene: Scene) -> str:
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
        needs_hosts: whether it strikes a host, so that the run must have several.
    """

    name: FaultName
    inject: Callable[[Scene], None]
    ends: Ends = Ends.restart
    codes: tuple[int, ...] = ()
    after: Callable[[Scene], str] = all_gone
    promised_s: float | None = None
    num_steps: int = 40
    lost_intervals: int = 2
    needs_hosts: bool = False
