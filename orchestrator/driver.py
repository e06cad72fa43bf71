"""The command `train`, from overrides to a plan, a held run folder and workers to be."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from orchestrator.asking import listening
from orchestrator.changes import compare_settings
from orchestrator.control.group import WorkerGroup
from orchestrator.control.holding import Hold
from orchestrator.control.inline_group import InlineGroup
from orchestrator.control.launcher import TENSORFLOW_ENV, Zygote, standard_error_in, start_zygote
from orchestrator.control.preflight import run_checks
from orchestrator.control.ray_settings import apply_ray_settings
from orchestrator.control.scratch import scratch_folder
from orchestrator.errors import ExitCode, OrchestratorError, StorageError, interruptions
from orchestrator.guardian import guarded
from orchestrator.imports import uncollected
from orchestrator.job_code import job_sources, keep_code
from orchestrator.keeping import hold_for
from orchestrator.lease import Lease
from orchestrator.provenance import keep_changes
from orchestrator.runs import (
    Past,
    create_run,
    find_run,
    look_again,
    merge_overrides,
    read_overrides,
)
from orchestrator.screen import Screen
from orchestrator.signals import Stops
from orchestrator.spec.config import load_config, to_yaml
from orchestrator.spec.describe import describe, headline, params_of
from orchestrator.spec.environment import inspect_environment
from orchestrator.spec.host import local_host
from orchestrator.spec.paths import RunPaths
from orchestrator.spec.plan import Host, RunPlan, artifacts_of, make_plan
from orchestrator.spec.schema import ClusterName, RunConfig
from orchestrator.spec.secrets import mask_overrides
from orchestrator.track.journal import read
from orchestrator.track.mlflow_projection import sync as sync_run
from orchestrator.train import store
from orchestrator.training import Training
from orchestrator.weights import find_weights

# Overrides and the user's own folder -> configuration.
Load = Callable[[list[str], Path | None], RunConfig]


def train(
    overrides: list[str], config_dir: Path | None, cwd: Path, load: Load = load_config
) -> ExitCode:
    """Train what a configuration describes.

    A run that is resumed keeps the overrides it was started with; those given now come on top.

    Args:
        overrides: as typed.
        config_dir: the user's own configuration and modules.
        cwd: what relative paths are relative to.
        load: returns the configuration that overrides stand for.

    Returns:
        The exit code of the command.

    Raises:
        OrchestratorError: something the user can mend stopped the run; it is on record.
    """
    start = time.monotonic()
    stops = Stops()
    with stops:
        try:
            with interruptions():
                return _train(overrides, config_dir, cwd, load, stops, start)
        except KeyboardInterrupt:
            when = "at once" if stops.is_hurried else "before the run had begun"
            print(f"ended {when}", file=sys.stderr)
            return stops.exit_code


def _train(
    overrides: list[str],
    config_dir: Path | None,
    cwd: Path,
    load: Load,
    stops: Stops,
    start: float,
) -> ExitCode:
    config = load(overrides, config_dir)
    with ExitStack() as stack:
        past: Past | None = None
        notices: list[str] = []
        if config.resume is not None:
            past, notices = _take_up(config, cwd, stack)
        if past is not None:
            overrides = merge_overrides(read_overrides(past.paths), overrides)
            config = load(overrides, config_dir)
        if config.train.max_time_s is not None:
            stops.limit(config.train.max_time_s - (time.monotonic() - start))
        notices = [*clean_environment(config), *notices]
        hold, host = _settle(config, cwd, stack, notices)
        zygote = _start_zygote(config, stack) if hold is None else None
        make_plan(config, run="checked", host=host, cwd=cwd)  # refused before there is a folder
        # A checkpoint of the run itself goes before the weights it once began with.
        is_resumable = past is not None and store.list_checkpoints(past.paths.checkpoints_dir)
        init_from = None if is_resumable else find_weights(config, cwd)
        paths = past.paths if past is not None else _begin(config, cwd, stack)
        stack.enter_context(listening(paths, stops))

        def replan(num_workers: int) -> RunPlan:
            plan = make_plan(
                config, run=paths.root.name, host=host, cwd=cwd, num_workers=num_workers
            )
            return dataclasses.replace(plan, init_from=init_from)

        plan = replan(config.strategy.num_workers)
        if past is not None:
            notices += compare_settings(past, plan, params_of(plan))
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
        guard = stack.enter_context(guarded(plan.paths, plan.tracking_uri, plan.artifact_root))
        if hold is not None:
            hold.name(f"{config.job.name}/{plan.run}")
        group = _make_group(config, zygote, hold, screen)
        stack.callback(group.close)
        return Training(plan, replan, past, overrides, group, screen, stops, guard, start).run()


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
    """Keep the job's source files, and what is in no commit; return what has changed in them."""
    sources = job_sources(plan.config.job.class_name, plan.config.code_dirs)
    attempt = 1 + (past.attempts if past is not None else 0)
    try:
        changed = keep_code(sources, plan.paths, attempt)
        keep_changes(plan.config.code_dirs, plan.paths.uncommitted(attempt))
    except OSError as error:
        raise StorageError(f"cannot write in the run folder: {error}") from error
    return [changed] if changed else []


def _discard_unused(paths: RunPaths) -> None:
    """Remove the folder of a run that was refused before anything was on record."""
    if not paths.journal.exists():
        shutil.rmtree(paths.root, ignore_errors=True)


def sync(paths: RunPaths, uri: str | None = None) -> ExitCode:
    """Write a run's journal into MLflow once more.

    Args:
        paths: of the run.
        uri: of MLflow; by default the one that the run was recorded with.
    """
    artifact_root = None if uri is None else artifacts_of(uri, paths.root.parents[1])
    report = sync_run(paths.root, uri=uri, artifact_root=artifact_root)
    if report.missing:
        raise OrchestratorError(f"not everything could be written: {report.missing}")
    print(f"MLflow has all of run {paths.root.name}: {report.run_id}")
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


def _join_cluster(config: RunConfig, tell: Callable[[str], None]) -> Host:
    from orchestrator.control.ray_join import join

    return join(config.cluster, config.code_dirs, tell)


def _settle(
    config: RunConfig, cwd: Path, stack: ExitStack, notices: list[str]
) -> tuple[Hold | None, Host]:
    """Come to the cluster as far as plans need it: what is kept here, and what a node offers."""
    if config.cluster.name is ClusterName.existing:
        apply_ray_settings(config.cluster.name)
        return None, _join_cluster(config, notices.append)
    host = local_host()
    hold, told = hold_for(config, make_plan(config, run="checked", host=host, cwd=cwd))
    notices += told
    apply_ray_settings(config.cluster.name, Path(hold.kept.token) if hold is not None else None)
    scratch = stack.enter_context(scratch_folder())
    if hold is not None:
        stack.callback(hold.close)
        hold.write_surroundings(scratch / "surroundings.json")
    return hold, host


def _make_group(
    config: RunConfig, zygote: Zygote | None, hold: Hold | None, screen: Screen
) -> WorkerGroup:
    if config.cluster.name is ClusterName.inline:
        # This process becomes the worker's; TensorFlow reads these when it is imported.
        os.environ.update(TENSORFLOW_ENV)
        # What TensorFlow says while it is imported heeds no log level.
        with (
            screen.timed("importing TensorFlow"),
            open(os.devnull, "wb") as nowhere,
            standard_error_in(nowhere),
        ):
            from orchestrator.train.later import put_off

            put_off()
            with uncollected():
                from orchestrator.train.worker import run

        return InlineGroup(run)
    from orchestrator.control.ray_group import RayGroup

    return RayGroup(
        config.cluster, zygote=zygote, hold=hold, timed=screen.timed, notice=screen.notice
    )


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
