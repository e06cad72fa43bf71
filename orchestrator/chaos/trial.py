"""The runs of `chaos`: one that nobody disturbs, and those under fire that are compared with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.chaos.command import Command, OnHosts, Server
from orchestrator.chaos.hosts import Hosts
from orchestrator.chaos.judge import Difference, Left, judge
from orchestrator.chaos.scene import Fault, Scene
from orchestrator.chaos.storm import Row, Storm
from orchestrator.chaos.watch import Watch
from orchestrator.errors import ExitCode, OrchestratorError
from orchestrator.runs import merge_overrides
from orchestrator.spec.chaos import FaultName
from orchestrator.spec.paths import RunPaths
from orchestrator.spec.schema import RunConfig
from orchestrator.track.journal import read

MakeCommand = Callable[[Sequence[str], Path, Path], Command]

_UNDISTURBED_S = 600.0
_LEFTOVER_S = 15.0


@dataclass(frozen=True, slots=True)
class Trial:
    """The runs that are compared."""

    config: RunConfig
    arguments: list[str]
    steps: int
    cwd: Path
    folder: Path
    make_command: MakeCommand

    def undisturbed(self) -> Left:
        """Make the run that nobody disturbs."""
        with ExitStack() as stack:
            scene, left = self._scene("undisturbed", None, stack)
            start = time.monotonic()
            scene.command.start("run_name=undisturbed")
            scene.watch.until(lambda: scene.command.code is not None, _UNDISTURBED_S)
            if scene.command.code != 0:
                raise _failed(scene.command)
            print(
                f"undisturbed: {self.steps:,} steps, {time.monotonic() - start:.0f} s", flush=True
            )
            return left

    def disturbed(
        self, faults: Sequence[Fault], undisturbed: Left
    ) -> tuple[list[Row], list[Difference]]:
        """Make the runs under fire and compare them."""
        here = [fault for fault in faults if not fault.needs_hosts]
        struck = [fault for fault in faults if fault.needs_hosts]
        rows: list[Row] = []
        differences: list[Difference] = []
        if here or not struck:
            with ExitStack() as stack:
                server = None
                if any(fault.name is FaultName.tracking_down for fault in here):
                    server = Server(self.folder / "server")
                    stack.callback(server.stop)
                scene, left = self._scene("disturbed", server, stack)
                rows, differences = self._strike("disturbed", scene, left, here, undisturbed)
        if struck:
            with ExitStack() as stack:
                # One host is to spare.
                num_hosts = self.config.strategy.num_workers + 1
                threads = ready(undisturbed.paths)["cpu_threads"]
                hosts = stack.enter_context(Hosts(num_hosts, num_cpus=threads))
                scene, left = self._scene("hosts", None, stack, hosts)
                more, found = self._strike("hosts", scene, left, struck, undisturbed)
                rows += more
                differences += [
                    replace(other, on_hosts=True, text=f"on several hosts: {other.text}")
                    for other in found
                ]
        return rows, differences

    def _strike(
        self, name: str, scene: Scene, left: Left, faults: Sequence[Fault], undisturbed: Left
    ) -> tuple[list[Row], list[Difference]]:
        rows, why = Storm(scene, name, self.config.chaos.seed, tell_row).go(faults)
        differences = [Difference(why)] if why else []
        differences += judge(undisturbed, left, self.steps)
        for line in scene.command.leftovers(_LEFTOVER_S):
            differences.append(Difference(f"left running: {line}"))
        scene.aim()  # at workers on other hosts, which the command did not start itself
        for process in scene.group:
            if process.is_alive:
                differences.append(Difference(f"left running: {process.pid}, a worker"))
        return rows, differences

    def _scene(
        self, name: str, server: Server | None, stack: ExitStack, hosts: Hosts | None = None
    ) -> tuple[Scene, Left]:
        runs_dir = self.folder / name
        paths = RunPaths(runs_dir / self.config.job.name / name)
        arguments = merge_overrides(self.arguments, [f"runs_dir={runs_dir}"])
        database, log = runs_dir / "mlflow.db", self.folder / f"{name}.log"
        if server is not None:
            arguments.append(f"tracking.uri={server.uri}")
            database = server.database
        if hosts is not None:
            command: Command = OnHosts(hosts, arguments, self.cwd, log)
        else:
            command = self.make_command(arguments, self.cwd, log)
        stack.callback(command.close)
        scene = Scene(
            watch=Watch(paths.journal),
            command=command,
            paths=paths,
            num_workers=self.config.strategy.num_workers,
            every_steps=self.config.checkpoint.every_steps or self.steps,
            server=server,
            hosts=hosts,
        )
        return scene, Left(paths, database if command.has_record else None)


def _failed(command: Command) -> OrchestratorError:
    """Return the undisturbed run's own error, with its exit code."""
    code = command.code
    why = "did not end" if code is None else f"ended with exit code {code}"
    error = OrchestratorError(f"{command.tail()}\nthe undisturbed run {why}; see {command.log}")
    error.exit_code = ExitCode.CLUSTER_FAILED
    if code is not None and code in list(ExitCode):
        error.exit_code = ExitCode(code)
    return error


def tell_row(row: Row) -> None:
    """Say what became of a fault as soon as it is over; the verdict comes at the end."""
    if row.not_run:
        print(f"{row.fault.name.value}: not run: {row.not_run}", flush=True)
        return
    went = f"resumed after {row.resumed_s:.2f} s" if row.resumed_s is not None else "went on"
    print(f"{row.fault.name.value} at step {row.step:,}: {row.trouble or went}", flush=True)


def ready(paths: RunPaths) -> dict[str, Any]:
    """Return what the first worker told of itself; empty if none did."""
    return next((record for record in read(paths.journal) if record["kind"] == "Ready"), {})
