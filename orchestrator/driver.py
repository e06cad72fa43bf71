"""One training, from configuration to exit code: the only file that knows all four folders."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from orchestrator.comparison import run_folder
from orchestrator.control.group import WorkerGroup
from orchestrator.control.inline_group import InlineGroup
from orchestrator.control.launcher import TENSORFLOW_ENV, Zygote, standard_error_in, start_zygote
from orchestrator.control.preflight import run_checks
from orchestrator.control.ray_settings import apply_ray_settings
from orchestrator.control.scratch import scratch_folder
from orchestrator.control.supervisor import Supervisor
from orchestrator.errors import ExitCode, ExportError, Interrupted, OrchestratorError, StorageError
from orchestrator.guardian import guarded
from orchestrator.job_code import job_sources, keep_code
from orchestrator.lease import Lease
from orchestrator.patience import JournalPatience
from orchestrator.provenance import provenance
from orchestrator.resumption import Checkpoints
from orchestrator.runs import (
    Past,
    compare,
    create_run,
    find_run,
    look_again,
    merge_overrides,
    read_overrides,
)
from orchestrator.screen import Screen
from orchestrator.signals import Stops
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

# How long MLflow may take at the end: of a run that is done, was stopped, or must end at once.
_FINISH_DEADLINE_S = 60.0
_STOP_DEADLINE_S = 10.0
_HURRY_DEADLINE_S = 0.7


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
    stops = Stops()
    with stops:
        try:
            return _train(overrides, config_dir, cwd, stops, start)
        except KeyboardInterrupt:
            when = "at once" if stops.is_hurried else "before the run had begun"
            print(f"ended {when}", file=sys.stderr)
            return stops.exit_code


def _train(
    overrides: list[str], config_dir: Path | None, cwd: Path, stops: Stops, start: float
) -> ExitCode:
    config = load_config(overrides, config_dir)
    with ExitStack() as stack:
        past: Past | None = None
        notices: list[str] = []
        if config.resume is not None:
            past, notices = _take_up(config, cwd, stack)
        if past is not None:
            overrides = merge_overrides(read_overrides(past.paths), overrides)
            config = load_config(overrides, config_dir)
        if config.train.max_time_s is not None:
            stops.limit(config.train.max_time_s - (time.monotonic() - start))
        notices = [*clean_environment(config), *notices]
        apply_ray_settings(config.cluster.name)
        if config.cluster.name is not ClusterName.existing:
            stack.enter_context(scratch_folder())
        zygote = _start_zygote(config, stack)
        is_joining = config.cluster.name is ClusterName.existing
        host = _join_cluster(config) if is_joining else local_host()
        make_plan(config, run="checked", host=host, cwd=cwd)  # refused before there is a folder
        # A checkpoint of the run itself goes before the weights it once began with.
        is_resumable = past is not None and store.list_checkpoints(past.paths.checkpoints_dir)
        init_from = None if is_resumable else find_weights(config, cwd)
        paths = past.paths if past is not None else _begin(config, cwd, stack)

        def replan(num_workers: int) -> RunPlan:
            plan = make_plan(
                config, run=paths.root.name, host=host, cwd=cwd, num_workers=num_workers
            )
            return dataclasses.replace(plan, init_from=init_from)

        plan = replan(config.strategy.num_workers)
        if past is not None:
            notices += compare(past, plan, flatten(config))
        notices += _keep_code(plan, past)
        screen = stack.enter_context(
            Screen(
                headline(plan),
                total_steps=plan.total_steps,
                global_batch_size=config.train.global_batch_size,
                log=plan.paths.driver_log,
            )
        )
        for notice in [*notices, *run_checks(plan)]:
            screen.notice(notice)
        _write_plan(plan, overrides)
        stack.enter_context(guarded(plan.paths, plan.tracking_uri, plan.artifact_root))
        group = _make_group(config, zygote, screen)
        stack.callback(group.close)
        return _Run(plan, replan, past, overrides, group, screen, stops, start).run()


def _take_up(config: RunConfig, cwd: Path, stack: ExitStack) -> tuple[Past | None, list[str]]:
    """Find the run to resume and hold it; return it with what the user should know."""
    past = find_run(config, cwd, read)
    if past is None:
        return None, [f"resume={config.resume}: there is nothing to resume, this is a new run"]
    lease = Lease(past.paths)
    stack.callback(lease.release)
    past = look_again(past, config, read)
    return past, [notice for notice in (past.notice, lease.notice) if notice]


def _begin(config: RunConfig, cwd: Path, stack: ExitStack) -> RunPaths:
    """Make the folder of a new run and hold it."""
    paths = create_run(config, cwd)
    stack.callback(_discard_unused, paths)
    stack.callback(Lease(paths).release)
    return paths


def _keep_code(plan: RunPlan, past: Past | None) -> list[str]:
    """Keep the job's source files; return what has changed in them since the run was started."""
    sources = job_sources(plan.config.job.class_name, plan.config.code_dirs)
    try:
        changed = keep_code(sources, plan.paths, 1 + (past.attempts if past is not None else 0))
    except OSError as error:
        raise StorageError(f"cannot write in the run folder: {error}") from error
    return [changed] if changed else []


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
    texts = {
        paths.config: to_yaml(plan.config),
        paths.plan: describe(plan),
        paths.overrides: "".join(f"{line}\n" for line in mask_overrides(overrides)),
    }
    for path, text in texts.items():
        try:
            path.write_text(text)
        except OSError as error:
            raise StorageError(
                f"cannot write {path}: {error.strerror}; make room, or set runs_dir to a folder "
                "that can be written"
            ) from error


class _Run:
    """A run while this driver holds it: record, supervisor and screen wired together."""

    def __init__(
        self,
        plan: RunPlan,
        replan: Callable[[int], RunPlan],
        past: Past | None,
        overrides: list[str],
        group: WorkerGroup,
        screen: Screen,
        stops: Stops,
        start: float,
    ):
        self._plan = plan
        self._past = past
        self._screen = screen
        self._stops = stops
        self._start = start
        self._tally = Tally()
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
            newest_checkpoint=Checkpoints(plan.paths, read, screen.notice).newest,
            journal=self._record.add,
            replan=replan,
            first_attempt=1 + (past.attempts if past is not None else 0),
        )
        self._patience = JournalPatience(
            self._record, plan, notice=screen.notice, stop=self._supervisor.stop
        )

    def run(self) -> ExitCode:
        """Train, and leave a true record however it ends."""
        status, cause = "FAILED", "the driver failed"
        try:
            self._stops.hand_over(self._stop)
            if self._stops.is_asked:
                raise Interrupted
            outcome = self._supervise()
            status = "FINISHED" if outcome is Outcome.completed else "KILLED"
            cause = "" if outcome is Outcome.completed else "stopped"
            if self._patience.is_over:
                status, cause = "FAILED", "the journal could not be written"
            self._check_proof(outcome)
        except KeyboardInterrupt:
            status, cause = "KILLED", "ended at once" if self._stops.is_hurried else "stopped"
        except OrchestratorError as error:
            status, cause = "FAILED", str(error)
            self._screen.keep(cause)
            raise
        finally:
            report = self._end(status, cause)
        self._stops.hand_over(lambda reason: True)  # it is leaving already
        self._patience.refuse()
        self._summarise(status, report)
        return ExitCode.DONE if status == "FINISHED" else self._stops.exit_code

    def _supervise(self) -> Outcome:
        if isinstance(self._group, InlineGroup):
            return self._group.serve(self._supervisor.run)
        return self._supervisor.run()

    def _observe(self, message: Message) -> None:
        if is_kept(message):
            self._record.add(to_record(message))
        self._patience.watch()
        self._tally.observe(message)
        self._screen.observe(message)
        if not self._tracking and isinstance(message, BlockDone):
            # Importing MLflow costs seconds of CPU: not before a step has been made.
            self._tracking = True
            self._record.start_tracking()

    def _began(self, attempt: int, restore_from: str | None, num_workers: int) -> None:
        self._tally.last_step = store.step_of(Path(restore_from)) if restore_from else 0
        self._record.add(
            {
                "kind": "AttemptStarted",
                "time": time.time(),
                "attempt": attempt,
                "restore_from": restore_from,
                "num_workers": num_workers,
            }
        )

    def _stop(self, reason: str) -> bool:
        """Ask the workers to save and stop; tell whether there are any to wait for."""
        self._supervisor.stop()
        # Inline the worker has the main thread, and looks for requests itself.
        can_save = isinstance(self._group, InlineGroup) or self._supervisor.can_save
        if can_save:
            self._screen.notice(f"{reason}: saving, then stopping; Ctrl-C ends it at once")
        else:
            self._screen.notice(f"{reason}: stopping; there is nothing to save")
        return can_save

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
        """Close the record; a signal cuts short the wait for MLflow."""
        self._stops.hand_over(None)
        finished = status == "FINISHED"
        commands = next_commands(self._plan, self._tally.last_step, finished=finished)
        limit_s: float | None = _STOP_DEADLINE_S if status == "KILLED" else _FINISH_DEADLINE_S
        if status == "KILLED" and not self._tracking:
            limit_s = None  # no step was made: MLflow has nothing to learn, and takes seconds
        with self._screen.timed("writing the record"):
            while True:
                try:
                    if self._stops.is_hurried and limit_s is not None:
                        limit_s = min(limit_s, _HURRY_DEADLINE_S)
                    return self._record.end(status, cause, limit_s, commands)
                except KeyboardInterrupt:
                    limit_s = None if limit_s is None else 0.0

    def _summarise(self, status: str, report: Report) -> None:
        limit_s = self._plan.config.train.max_time_s
        if self._stops.exit_code is ExitCode.OUT_OF_TIME and not self._tally.steps:
            self._screen.notice(
                f"train.max_time_s={limit_s:g} was over before a step was made; raise it"
            )
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
