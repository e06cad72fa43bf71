"""`chaos`: trains a job undisturbed, then under faults, and proves that both left the same.

Both runs are the real train command in a process of its own, paced so that faults fall between
steps. A fault is injected when the one before it is over; its moment is a step drawn from
`chaos.seed`. What is compared, and how, is in chaos_judge.py.
"""

from __future__ import annotations

import random
import secrets
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from orchestrator.chaos_command import Command, Server
from orchestrator.chaos_faults import FAULTS, Fault, Scene
from orchestrator.chaos_judge import Difference, Left, judge
from orchestrator.chaos_storm import Row, Storm
from orchestrator.chaos_table import Certificate, lines, write_report
from orchestrator.chaos_watch import Watch
from orchestrator.errors import ConfigError, ExitCode, OrchestratorError
from orchestrator.runs import merge_overrides
from orchestrator.spec.chaos import FaultName
from orchestrator.spec.config import load_config
from orchestrator.spec.overrides import key_of
from orchestrator.spec.paths import RunPaths
from orchestrator.spec.schema import ClusterName, RunConfig
from orchestrator.track.journal import read

MakeCommand = Callable[[Sequence[str], Path, Path], Command]

# What a job of many faults needs in place of its own; the command line goes before it.
_DEFAULTS = (
    "strategy=multi_worker",
    "strategy.num_workers=2",
    "train.deterministic=true",
    "train.max_block_steps=5",
    "train.eval_every_steps=100",
    "checkpoint.every_steps=20",
    "checkpoint.every_s=null",
    "tracking.log_every_steps=10",
    "export.enabled=false",
    "chaos.step_ms=20",
)
# Steps before the first fault and after the last one.
_MARGIN_STEPS = 60
_UNDISTURBED_S = 600.0
_LEFTOVER_S = 15.0


def chaos(
    overrides: list[str],
    config_dir: Path | None,
    cwd: Path,
    make_command: MakeCommand = Command,
) -> ExitCode:
    """Compare a job under faults with the same job left alone.

    Args:
        overrides: as typed.
        config_dir: the user's own configuration and modules.
        cwd: what relative paths are relative to.
        make_command: makes the command under test of its arguments, its folder and its log.

    Returns:
        DONE if nothing differs, else DIFFERENCE.

    Raises:
        OrchestratorError: the configuration is refused, or the undisturbed run fails.
    """
    given = _with_defaults(overrides)
    config = load_config(given, config_dir)
    _refuse(config)
    faults = _schedule(config)
    start = time.monotonic()
    parent = (cwd / config.runs_dir).resolve() / config.job.name
    folder = parent / f"chaos-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    folder.mkdir(parents=True)
    arguments = [*given, *([f"--config-dir={config_dir}"] if config_dir is not None else [])]
    steps = _MARGIN_STEPS + sum(fault.num_steps for fault in faults)
    if config.train.steps is not None and "train.steps" in map(key_of, overrides):
        steps = config.train.steps
    arguments = merge_overrides(arguments, ["train.epochs=null", f"train.steps={steps}"])
    trial = _Trial(config, arguments, steps, cwd, folder, make_command)
    _tell(config, overrides, faults, steps)
    undisturbed = trial.undisturbed()
    rows, differences = trial.disturbed(faults, undisturbed)
    certificate = Certificate(
        job=config.job.name,
        command=" ".join(["chaos", *(o for o in overrides if key_of(o) != "chaos.report")]),
        rows=rows,
        differences=differences,
        versions=_versions(undisturbed.paths),
        wall_s=time.monotonic() - start,
    )
    return _conclude(certificate, config, cwd, folder)


def _with_defaults(overrides: list[str]) -> list[str]:
    """Return the overrides with those of `chaos` before them."""
    defaults = list(_DEFAULTS)
    if any(key_of(o) == "strategy" and o != _DEFAULTS[0] for o in overrides):
        defaults.remove(_DEFAULTS[1])  # only multi_worker has several workers
    return merge_overrides(defaults, overrides)


def _refuse(config: RunConfig) -> None:
    if config.cluster.name is not ClusterName.local:
        raise ConfigError(
            f"cluster={config.cluster.name.value}: chaos ends processes of this host, and starts "
            "a Ray of its own; leave it out"
        )
    for key in ("resume", "run_name"):
        if getattr(config, key) is not None:
            raise ConfigError(f"{key}={getattr(config, key)}: chaos makes runs of its own")
    if config.tracking.uri is not None:
        raise ConfigError("tracking.uri: chaos has a record of its own; leave it out")
    if config.checkpoint.every_steps is None:
        raise ConfigError("checkpoint.every_steps=null: chaos needs checkpoints by steps")
    if not _chosen(config):
        raise ConfigError("chaos.faults=[]: name at least one fault, or set chaos.full=true")


def _chosen(config: RunConfig) -> list[FaultName]:
    return list(FaultName) if config.chaos.full else list(config.chaos.faults)


def _schedule(config: RunConfig) -> list[Fault]:
    """Return the faults in the order they are injected."""
    chance = random.Random(config.chaos.seed)
    names = _chosen(config)
    schedule: list[FaultName] = []
    for _ in range(config.chaos.repeat):
        if config.chaos.random is not None:
            here = [name for name in names if not FAULTS[name].not_here] or names
            schedule += chance.choices(here, k=config.chaos.random)
        else:
            schedule += chance.sample(names, len(names))
    # What cannot be injected is told last.
    return sorted((FAULTS[name] for name in schedule), key=lambda fault: bool(fault.not_here))


@dataclass(frozen=True, slots=True)
class _Trial:
    """The two runs."""

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
        """Make the run under fire and compare it."""
        with ExitStack() as stack:
            server = None
            if any(fault.name is FaultName.tracking_down for fault in faults):
                server = Server(self.folder / "server")
                stack.callback(server.stop)
            scene, left = self._scene("disturbed", server, stack)
            rows, why = Storm(scene, "disturbed", self.config.chaos.seed, _tell_row).go(faults)
            differences = [Difference(why)] if why else []
            differences += judge(undisturbed, left, self.steps)
            for line in scene.command.leftovers(_LEFTOVER_S):
                differences.append(Difference(f"left running: {line}"))
            return rows, differences

    def _scene(self, name: str, server: Server | None, stack: ExitStack) -> tuple[Scene, Left]:
        runs_dir = self.folder / name
        paths = RunPaths(runs_dir / self.config.job.name / name)
        arguments = merge_overrides(self.arguments, [f"runs_dir={runs_dir}"])
        database = runs_dir / "mlflow.db"
        if server is not None:
            arguments.append(f"tracking.uri={server.uri}")
            database = server.database
        command = self.make_command(arguments, self.cwd, self.folder / f"{name}.log")
        stack.callback(command.close)
        scene = Scene(
            watch=Watch(paths.journal),
            command=command,
            paths=paths,
            num_workers=self.config.strategy.num_workers,
            every_steps=self.config.checkpoint.every_steps or self.steps,
            server=server,
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


def _tell(config: RunConfig, overrides: list[str], faults: Sequence[Fault], steps: int) -> None:
    count = sum(not fault.not_here for fault in faults)
    print(f"chaos {config.job.name}: {count} faults in {steps:,} steps, seed {config.chaos.seed}")
    defaults = [line for line in _with_defaults(overrides) if line not in overrides]
    print("in place of what the job says:")
    print(textwrap.fill(" ".join(defaults), 98, initial_indent="  ", subsequent_indent="  "))
    sys.stdout.flush()


def _tell_row(row: Row) -> None:
    """Say what became of a fault as soon as it is over; the verdict comes at the end."""
    if row.not_run:
        print(f"{row.fault.name.value}: not run: {row.not_run}", flush=True)
        return
    went = f"resumed after {row.resumed_s:.2f} s" if row.resumed_s is not None else "went on"
    print(f"{row.fault.name.value} at step {row.step:,}: {row.trouble or went}", flush=True)


def _conclude(certificate: Certificate, config: RunConfig, cwd: Path, folder: Path) -> ExitCode:
    print()
    print("\n".join(lines(certificate)))
    print()
    if config.chaos.report is not None:
        write_report(cwd / config.chaos.report, certificate)
    count = sum(not row.not_run for row in certificate.rows)
    if certificate.is_clean:
        shutil.rmtree(folder, ignore_errors=True)
        print(f"{count} faults, and the same weights and record, {certificate.wall_s:.0f} s")
        return ExitCode.DONE
    for difference in certificate.differences:
        where = f", from step {difference.step:,} on" if difference.step is not None else ""
        print(f"{difference.text}{where}")
    bad, found = certificate.num_bad, len(certificate.differences)
    print(f"{bad} of {count} faults failed, {found} differences, {certificate.wall_s:.0f} s")
    print(f"runs and logs: {folder}")
    return ExitCode.DIFFERENCE


def _versions(paths: RunPaths) -> dict[str, str]:
    for record in read(paths.journal):
        if record["kind"] == "Ready":
            return dict(record["versions"])
    return {}
