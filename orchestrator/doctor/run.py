"""`doctor`: everything that can be checked before a step is run, in seconds.

What is judged is in control/: preflight.py (cheap; `train` does it too), node_checks.py and
resource_checks.py; here it is gathered, in parallel where it takes time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from orchestrator.control.node_checks import NODE_CHECKS
from orchestrator.control.node_facts import look
from orchestrator.control.preflight import CHECKS, Finding
from orchestrator.control.ray_settings import apply_ray_settings
from orchestrator.control.rehearsal import RehearsalProcess
from orchestrator.control.resource_checks import RESOURCE_CHECKS
from orchestrator.control.survey import Survey
from orchestrator.doctor.duration import expected_duration
from orchestrator.doctor.report import Report
from orchestrator.driver import clean_environment
from orchestrator.errors import (
    ClusterError,
    ConfigError,
    ExitCode,
    PlanError,
    RestoreError,
    StorageError,
    interruptions,
)
from orchestrator.signals import Stops
from orchestrator.spec.config import load_config
from orchestrator.spec.describe import headline, params_of
from orchestrator.spec.host import expected_host
from orchestrator.spec.plan import Host, RunPlan, make_plan
from orchestrator.spec.schema import ClusterName, RunConfig
from orchestrator.spec.secrets import mask_text
from orchestrator.weights import find_weights

_LOOPBACK = "127.0.0.1"
# Data that has to be fetched first may take long: a start would wait for it as well.
_REHEARSAL_S = 60.0
# Of preflight: they try things in the run folder.
_IN_FOLDER = ("run folder", "disk")


def doctor(overrides: list[str], config_dir: Path | None, cwd: Path) -> ExitCode:
    """Check everything about a training that can be checked without making a step.

    Args:
        overrides: as typed.
        config_dir: the user's own configuration and modules.
        cwd: what relative paths are relative to.

    Returns:
        DIFFERENCE if anything was found that would hinder the training, else DONE.

    Raises:
        OrchestratorError: configuration or plan are refused before there is anything to check.
    """
    with Stops() as stops:
        try:
            with interruptions():
                return _doctor(overrides, config_dir, cwd)
        except KeyboardInterrupt:
            print("ended before all was looked at", file=sys.stderr)
            return stops.exit_code


def _doctor(overrides: list[str], config_dir: Path | None, cwd: Path) -> ExitCode:
    start = time.monotonic()
    config = load_config(overrides, config_dir)
    if config.resume is not None:
        raise ConfigError(f"resume={config.resume}: doctor looks at a new start; leave it out")
    report = Report()
    with ExitStack() as stack:
        environment = clean_environment(config)
        apply_ray_settings(config.cluster.name)
        pool = stack.enter_context(ThreadPoolExecutor(2, thread_name_prefix="doctor"))
        host, unreached = _reach(config, stack)
        run = f"doctor-{secrets.token_hex(4)}"
        try:
            plan = make_plan(config, run=run, host=host, cwd=cwd)
        except PlanError as error:
            if unreached is None:
                raise
            raise ClusterError(f"{unreached.text}\n{error}") from error
        plan, weights = _begin_with(plan, cwd)
        tracking = pool.submit(_tracking, plan)
        print(f"doctor {config.job.name}: {headline(plan)[1]}", flush=True)
        missing = stack.enter_context(_run_folder(plan.paths.root))
        is_reached = config.cluster.name is ClusterName.existing and unreached is None
        alone = None if is_reached else RehearsalProcess(plan, with_model=True)
        if alone is not None:
            stack.callback(alone.close)
        surveying = pool.submit(_survey, plan, alone)
        report.row("environment", map(_from_environment, environment))
        _cheap(report, plan, missing)
        if config.run_name is not None:
            report.row("run name", [_taken(plan.paths.root.parent / config.run_name)])
        if weights is not None:
            report.row("initial weights", [weights])
        report.row("duration", [expected_duration(plan, params_of(plan))])
        report.row("upload", _upload(config, is_reached=is_reached))
        report.row("tracking", [mask_text(plan.tracking_uri), tracking.result()])
        if config.cluster.name is ClusterName.existing:
            report.row("cluster", [f"Ray at {config.cluster.address}", unreached])
        survey = surveying.result()
        for name, judge in (*RESOURCE_CHECKS, *NODE_CHECKS):
            # Of nodes that nobody could look at there is nothing to say, and nothing is well.
            if said := list(judge(survey)):
                report.row(name, said)
    report.end(time.monotonic() - start)
    return ExitCode.DIFFERENCE if report.num_problems else ExitCode.DONE


def _reach(config: RunConfig, stack: ExitStack) -> tuple[Host, Finding | None]:
    """Join the cluster there is, if one is asked for; return its nodes' size, or what hinders."""
    if config.cluster.name is not ClusterName.existing:
        return expected_host(config), None
    from orchestrator.control.ray_join import join, leave

    try:
        host = join(config.cluster, config.code_dirs)
    except ClusterError as error:
        finding = Finding(
            str(error),
            "there is nobody to train; nodes are not looked at",
            "mend it, then ask again",
            ClusterError,
        )
        return expected_host(config), finding
    stack.callback(leave)
    return host, None


def _begin_with(plan: RunPlan, cwd: Path) -> tuple[RunPlan, Finding | str | None]:
    """Find the weights of `train.init_from`; return the plan with them, and what to say."""
    try:
        path = find_weights(plan.config, cwd)
    except RestoreError as error:
        finding = Finding(
            str(error),
            "the run would not begin",
            "name weights that are there, or leave train.init_from out",
            RestoreError,
        )
        return dataclasses.replace(plan, init_from=None), finding
    return dataclasses.replace(plan, init_from=path), path


def _taken(root: Path) -> Finding | str:
    """Refuse the name of a run that exists."""
    if not os.path.exists(root):  # also where it cannot be looked at
        return root.name
    return Finding(
        f"run_name={root.name}: {root} exists already",
        "a run has a folder of its own",
        f"choose another name, or continue it with resume={root.name}",
        ConfigError,
    )


@contextmanager
def _run_folder(root: Path) -> Iterator[Finding | None]:
    """Make a run folder to try things in; remove it, and what had to be made above it."""
    made = [folder for folder in (root, *root.parents) if not os.path.exists(folder)]
    missing = None
    try:
        root.mkdir(parents=True)
    except OSError as error:
        missing = Finding(
            f"the folder {root.parent} cannot be made or written: {error.strerror}",
            "a run keeps its checkpoints and its record there",
            "set runs_dir to a folder that can be written",
            StorageError,
        )
    try:
        yield missing
    finally:
        shutil.rmtree(root, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):  # somebody else has put something there
                folder.rmdir()


def _cheap(report: Report, plan: RunPlan, missing: Finding | None) -> None:
    """Do what `train` does too before the first worker."""
    for check in CHECKS:
        if check.name not in _IN_FOLDER:
            report.row(check.name, [check.find(plan)])
        elif missing is None:
            report.row(check.name, [str(plan.paths.root.parent), check.find(plan)])
        elif check.name == _IN_FOLDER[0]:
            report.row(check.name, [missing])


def _survey(plan: RunPlan, alone: RehearsalProcess | None) -> Survey:
    """Look at the nodes, and at the job on them.

    Args:
        plan: of the run.
        alone: the rehearsal on this host, where no cluster is asked for, or none was reached.
    """
    is_existing = plan.config.cluster.name is ClusterName.existing
    first, last = map(int, plan.config.cluster.port_range.split("-"))
    own = look(plan.paths.root, None if is_existing else (first, last), ip=_LOOPBACK)
    if alone is not None:
        rehearsal = alone.result(_REHEARSAL_S)
        nodes = () if is_existing else (own,)
        return Survey(plan=plan, own=own, nodes=nodes, rehearsals=(rehearsal,))
    from orchestrator.control.ray_survey import RaySurvey

    scouts = RaySurvey(plan, own)
    try:
        return scouts.survey(plan.paths.root, _REHEARSAL_S)
    finally:
        scouts.close()


def _tracking(plan: RunPlan) -> Finding | str | None:
    """Ask MLflow whether it would take records."""
    from orchestrator.track.mlflow_reach import obstacle

    uri = plan.tracking_uri
    if uri.startswith("sqlite:///") and not os.path.exists(uri.removeprefix("sqlite:///")):
        return "the first run makes it"
    found = obstacle(uri, plan.config.tracking.timeout_s)
    if found is None:
        return "answers"
    required = " (tracking.required=true)" if plan.config.tracking.required else ""
    return Finding(
        f"MLflow at {mask_text(uri)}: {found.why}",
        f"the record could not be written there{required}",
        found.mend,
        StorageError,
    )


def _upload(config: RunConfig, *, is_reached: bool) -> list[str | Finding]:
    """Tell what goes to the nodes of a cluster."""
    if config.cluster.name is not ClusterName.existing:
        return ["nothing: workers run here"]
    if not is_reached:
        return ["unknown: no cluster was reached"]
    from orchestrator.control.ray_join import has_upload
    from orchestrator.control.upload import contents, users_dir

    if not has_upload():
        return ["nothing: the nodes see this checkout, or it was brought by the job"]
    return [str(contents(users_dir(config.code_dirs)))]


def _from_environment(notice: str) -> Finding:
    """Return what was said of a variable as a finding."""
    seen, _, why = notice.partition(": ")
    name = seen.partition("=")[0].split()[0]
    return Finding(seen, why or "workers inherit it", f"unset {name}" if name.isupper() else "")
