"""One training, from configuration to exit code: the only file that knows all four folders."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from orchestrator.comparison import run_folder
from orchestrator.control.group import WorkerGroup
from orchestrator.control.inline_group import InlineGroup
from orchestrator.control.launcher import TENSORFLOW_ENV, Zygote, standard_error_in, start_zygote
from orchestrator.control.preflight import run_checks
from orchestrator.control.ray_settings import apply_ray_settings
from orchestrator.control.supervisor import Interrupted, Supervisor
from orchestrator.errors import ExitCode, ExportError, OrchestratorError, RestoreError
from orchestrator.provenance import provenance
from orchestrator.runs import (
    Lease,
    Past,
    compare,
    create_run,
    find_run,
    merge_overrides,
    read_overrides,
)
from orchestrator.screen import Screen
from orchestrator.spec.config import PROJECT_DIR, flatten, load_config, to_yaml
from orchestrator.spec.describe import describe, experiment_name, headline
from orchestrator.spec.environment import inspect_environment
from orchestrator.spec.host import local_host
from orchestrator.spec.messages import (
    BlockDone,
    Message,
    Outcome,
    is_kept,
    to_record,
)
from orchestrator.spec.paths import RunPaths
from orchestrator.spec.plan import RunPlan, make_plan
from orchestrator.spec.schema import ClusterName, RunConfig
from orchestrator.spec.secrets import mask_overrides, mask_text
from orchestrator.summary import Tally, next_commands, summarise
from orchestrator.track.facts import RunFacts
from orchestrator.track.journal import read
from orchestrator.track.mlflow_projection import Report, check
from orchestrator.track.mlflow_projection import sync as sync_run
from orchestrator.track.record import Record
from orchestrator.train import store
from orchestrator.weights import find_weights

_FINISH_DEADLINE_S = 60.0


def train(overrides: list[str], config_dir: Path | None, cwd: Path) -> ExitCode:
    """Train what a configuration describes.

    A run that is resumed keeps the overrides it was started with; those given now come on top.

    Args:
        overrides: as typed.
        config_dir: the user's own configuration and modules.
        cwd: what relative paths are relative to.

    Returns:
        The exit code of the command.

    Raises:
        OrchestratorError: something the user can mend stopped the run; it is on record.
    """
    start = time.monotonic()
    config = load_config(overrides, config_dir)
    past = find_run(config, cwd, read) if config.resume is not None else None
    if past is not None:
        overrides = merge_overrides(read_overrides(past.paths), overrides)
        config = load_config(overrides, config_dir)
    notices = clean_environment(config)
    apply_ray_settings(config.cluster.name)
    with ExitStack() as stack:
        zygote = _start_zygote(config, stack)
        is_joining = config.cluster.name is ClusterName.existing
        host = _join_cluster(config) if is_joining else local_host()
        make_plan(config, run="checked", host=host, cwd=cwd)  # refused before there is a folder
        # A checkpoint of the run itself goes before the weights it once began with.
        is_resumable = past is not None and store.list_checkpoints(past.paths.checkpoints_dir)
        init_from = None if is_resumable else find_weights(config, cwd)
        paths = past.paths if past is not None else create_run(config, cwd)
        if past is None:
            stack.callback(_discard_unused, paths)
        stack.callback(Lease(paths).release)
        plan = make_plan(config, run=paths.root.name, host=host, cwd=cwd)
        plan = dataclasses.replace(plan, init_from=init_from)
        if past is not None:
            notices += compare(past, plan, flatten(config))
        screen = stack.enter_context(
            Screen(
                headline(plan),
                total_steps=plan.total_steps,
                global_batch_size=config.train.global_batch_size,
                log=plan.paths.driver_log,
            )
        )
        if config.resume == "auto" and past is None:
            notices.append("resume=auto: there is nothing to resume, this is a new run")
        for notice in [*notices, *run_checks(plan)]:
            screen.notice(notice)
        _write_plan(plan, overrides)
        group = _make_group(config, zygote, screen)
        stack.callback(group.close)
        return _Run(plan, past, overrides, group, screen, start).run()


def _discard_unused(paths: RunPaths) -> None:
    """Remove the folder of a run that was refused before anything was on record."""
    if not paths.journal.exists():
        shutil.rmtree(paths.root, ignore_errors=True)


def sync(run: str, cwd: Path) -> ExitCode:
    """Write a run's journal into MLflow once more.

    Args:
        run: the run's folder, or `<job>/<run>` below `runs/`.
        cwd: what relative paths are relative to.
    """
    folder = run_folder(run, cwd)
    report = sync_run(folder)
    if report.missing:
        raise OrchestratorError(f"not everything could be written: {report.missing}")
    print(f"MLflow has all of run {folder.name}: {report.run_id}")
    return ExitCode.DONE


def clean_environment(config: RunConfig) -> list[str]:
    """Drop variables that would change what workers do; return what to say about them."""
    notices, changes = inspect_environment(os.environ, config)
    for name, value in changes.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    return notices


def _start_zygote(config: RunConfig, stack: ExitStack) -> Zygote | None:
    """Let TensorFlow be imported from the first moment on, while everything else starts too."""
    if config.cluster.name is not ClusterName.local or not config.cluster.fork:
        return None
    zygote = start_zygote()
    stack.callback(zygote.close)
    return zygote


def _join_cluster(config: RunConfig) -> Any:
    from orchestrator.control.ray_join import join

    return join(config.cluster)


def _make_group(config: RunConfig, zygote: Zygote | None, screen: Screen) -> WorkerGroup:
    if config.cluster.name is ClusterName.inline:
        # This process becomes the worker's; TensorFlow reads these when it is imported.
        os.environ.update(TENSORFLOW_ENV)
        # What TensorFlow says while it is imported heeds no log level.
        with (
            screen.timed("importing TensorFlow"),
            open(os.devnull, "wb") as nowhere,
            standard_error_in(nowhere),
        ):
            from orchestrator.train.worker import run

        return InlineGroup(run)
    from orchestrator.control.ray_group import RayGroup

    return RayGroup(config.cluster, zygote=zygote, timed=screen.timed)


def _write_plan(plan: RunPlan, overrides: list[str]) -> None:
    paths = plan.paths
    paths.config.write_text(to_yaml(plan.config))
    paths.plan.write_text(describe(plan))
    paths.overrides.write_text("".join(f"{line}\n" for line in mask_overrides(overrides)))


class _Run:
    """A run while this driver holds it: record, supervisor and screen wired together."""

    def __init__(
        self,
        plan: RunPlan,
        past: Past | None,
        overrides: list[str],
        group: WorkerGroup,
        screen: Screen,
        start: float,
    ):
        self._plan = plan
        self._past = past
        self._screen = screen
        self._start = start
        self._tally = Tally()
        self._signals: list[int] = []
        self._group = group
        facts = make_facts(plan, mask_overrides(overrides))
        if plan.config.tracking.required:
            check(facts)
        self._record = Record(plan.paths.journal, facts, notice=screen.notice)
        self._tracking = False
        self._supervisor = Supervisor(
            group,
            plan,
            observe=self._observe,
            began=self._began,
            notice=screen.notice,
            newest_checkpoint=self._newest_checkpoint,
            first_attempt=1 + (past.attempts if past is not None else 0),
        )

    def run(self) -> ExitCode:
        """Train, and leave a true record however it ends."""
        status, cause = "FAILED", "the driver failed"
        try:
            self._install_signals()
            outcome = self._supervise()
            status = "FINISHED" if outcome is Outcome.completed else "KILLED"
            cause = "" if outcome is Outcome.completed else "stopped"
            self._check_proof(outcome)
        except (Interrupted, KeyboardInterrupt):
            status, cause = "KILLED", "interrupted twice"
        except OrchestratorError as error:
            status, cause = "FAILED", str(error)
            self._screen.keep(cause)
            raise
        finally:
            report = self._end(status, cause)
        self._summarise(status, report)
        if status == "FINISHED":
            return ExitCode.DONE
        return ExitCode.TERMINATED if self._last_signal == signal.SIGTERM else ExitCode.INTERRUPTED

    def _supervise(self) -> Outcome:
        if isinstance(self._group, InlineGroup):
            return self._group.serve(self._supervisor.run)
        return self._supervisor.run()

    @property
    def _last_signal(self) -> int | None:
        return self._signals[-1] if self._signals else None

    def _observe(self, message: Message) -> None:
        if is_kept(message):
            self._record.add(to_record(message))
        self._tally.observe(message)
        self._screen.observe(message)
        if not self._tracking and isinstance(message, BlockDone):
            # Importing MLflow costs seconds of CPU: not before a step has been made.
            self._tracking = True
            self._record.start_tracking()

    def _began(self, attempt: int, restore_from: str | None) -> None:
        self._record.add(
            {
                "kind": "AttemptStarted",
                "time": time.time(),
                "attempt": attempt,
                "restore_from": restore_from,
            }
        )

    def _newest_checkpoint(self) -> tuple[int, str] | None:
        search = store.newest_valid(self._plan.paths.checkpoints_dir)
        for damage in search.damaged:
            self._screen.notice(f"checkpoint {damage.path.name} is not used: {damage.reason}")
        if search.path is not None:
            return store.step_of(search.path), str(search.path)
        resumed = self._past is not None and self._past.last_step > 0
        if search.damaged or (resumed and store.list_checkpoints(self._plan.paths.checkpoints_dir)):
            listed = "\n".join(f"  {d.path.name}: {d.reason}" for d in search.damaged)
            raise RestoreError(
                f"no valid checkpoint in {self._plan.paths.checkpoints_dir}:\n{listed}\n"
                "remove the damaged folders to start the run again from step 0"
            )
        return None

    def _install_signals(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        self._signals.append(number)
        self._supervisor.stop()
        if len(self._signals) == 1:
            self._screen.notice(
                f"{signal.Signals(number).name}: saving, then stopping; again ends it at once"
            )
        else:
            # Whatever the main thread waits for: end it there.
            raise Interrupted

    def _check_proof(self, outcome: Outcome) -> None:
        """Raise ExportError if the clean process refused the exported model."""
        if outcome is not Outcome.completed or not self._plan.config.export.enabled:
            return
        path = self._plan.paths.proof
        try:
            proof = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ExportError(
                f"the exported model was not proven: {path} is missing ({error}); see "
                f"{self._plan.paths.logs_dir}. The checkpoints are whole"
            ) from error
        if not proof.get("passed"):
            raise ExportError(
                f"the exported model does not answer like the trained one: {proof.get('error')}; "
                f"see {path}. The checkpoints are whole"
            )

    def _end(self, status: str, cause: str) -> Report:
        finished = status == "FINISHED"
        commands = next_commands(self._plan, self._tally.last_step, finished=finished)
        with self._screen.timed("writing the record"):
            return self._record.end(status, cause, _FINISH_DEADLINE_S, commands)

    def _summarise(self, status: str, report: Report) -> None:
        if report.missing:
            self._screen.notice(
                f"MLflow lacks the last records ({report.missing}); when it is back: "
                f"orchestrator runs sync {self._plan.paths.root}"
            )
        wall_s = time.monotonic() - self._start
        self._screen.finish(summarise(self._plan, self._tally, status, report, wall_s))


def make_facts(plan: RunPlan, overrides: list[str]) -> RunFacts:
    """Collect what the record needs to know of a plan."""
    config = plan.config
    return RunFacts(
        run=plan.run,
        job=config.job.name,
        experiment=experiment_name(plan),
        tracking_uri=plan.tracking_uri,
        artifact_root=plan.artifact_root,
        root=str(plan.paths.root),
        log_every_steps=config.tracking.log_every_steps,
        global_batch_size=config.train.global_batch_size,
        timeout_s=config.tracking.timeout_s,
        register=config.export.register,
        params=flatten(config),
        tags={
            **provenance(overrides, PROJECT_DIR),
            "orchestrator.strategy": config.strategy.name.value,
            "orchestrator.replicas": str(plan.num_replicas),
            "orchestrator.tracking_uri": mask_text(plan.tracking_uri),
        },
    )
