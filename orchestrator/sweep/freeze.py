"""Overrides with several values -> a frozen sweep: every child composed, planned and checked."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from orchestrator.errors import ConfigError, OrchestratorError
from orchestrator.runs import new_run_name
from orchestrator.spec.config import Choice, change_kept, compose_config, expand
from orchestrator.spec.host import local_host
from orchestrator.spec.overrides import key_of
from orchestrator.spec.paths import SWEEPS, SweepPaths
from orchestrator.spec.plan import Host, RunPlan, make_plan
from orchestrator.spec.schema import ClusterName, RunConfig
from orchestrator.spec.sweep import children_at_once, refuse_given, refuse_swept
from orchestrator.sweep.folder import (
    Child,
    Sweep,
    find_sweep,
    identity,
    typed_runs_dir,
    values_text,
    write_sweep,
)

_SHOWN_CHILDREN = 6


def freeze_sweep(overrides: list[str], config_dir: Path | None, cwd: Path) -> Sweep:
    """Compose and check every child, then write them down.

    Raises:
        ConfigError: the errors of all children, each with the values it comes with.
        StorageError: the folder cannot be written.
    """
    refuse_given([key_of(text) for text in overrides])
    choices = expand(overrides, config_dir)
    if len(choices) < 2:
        raise ConfigError(
            "a sweep wants a key with several values, such as optimizer.learning_rate=1e-3,1e-2; "
            "`train` trains with one of each"
        )
    refuse_swept(list(choices[0].values))
    composed, errors = _compose_all(choices, config_dir)
    config = next((item[0] for item in composed if item is not None), None)
    if config is None:
        raise _refusal(errors, len(choices))
    if config.cluster.name is ClusterName.inline:
        raise ConfigError("cluster=inline: children are processes of their own; leave it out")
    machine = _machine(config)
    name = config.sweep.name or new_run_name(datetime.now(), secrets.token_hex(2))
    plans = []
    for index, (choice, item) in enumerate(zip(choices, composed, strict=True)):
        run = f"{name}-{_child_name(index, len(choices))}"
        if item is not None:
            with _collecting(errors, choice):
                plans.append(make_plan(item[0], run=run, host=machine.host, cwd=cwd))
    if errors:
        raise _refusal(errors, len(choices))
    texts = [item[1] for item in composed if item is not None]
    root = (cwd / config.runs_dir).resolve()
    # Where a file names another runs_dir than the command line, it was not looked for there.
    if root != typed_runs_dir(overrides, cwd) and (
        found := find_sweep(overrides, config_dir, root)
    ):
        return found
    for plan in plans:
        # A child that finds a run there would go on with it, or take it for its own result.
        if plan.paths.root.exists():
            raise ConfigError(
                f"sweep.name={name}: {plan.paths.root} exists already, and is none of this sweep; "
                "choose another name, or remove the runs of the earlier one"
            )
    sweep, texts = _frozen(choices, plans, texts, machine, SweepPaths(root / SWEEPS / name))
    sweep = dataclasses.replace(
        sweep,
        overrides=identity(overrides),
        config_dir=None if config_dir is None else config_dir.resolve(),
        cwd=cwd,
    )
    write_sweep(sweep, texts)
    return sweep


def _frozen(
    choices: Sequence[Choice],
    plans: Sequence[RunPlan],
    texts: Sequence[str],
    machine: _Machine,
    paths: SweepPaths,
) -> tuple[Sweep, list[str]]:
    """Return the sweep and the configuration of each child, with its share of the machine."""
    config = plans[0].config
    parallel = children_at_once(
        config.sweep.parallel,
        plans,
        cpus=machine.cpus,
        gpus=machine.gpus,
        has_own_cpus=config.cluster.cpus_per_worker is not None or not machine.is_own,
    )
    jobs = list(dict.fromkeys(plan.config.job.name for plan in plans))
    children, kept = [], []
    for index, (choice, plan, text) in enumerate(zip(choices, plans, texts, strict=True)):
        changes: dict[str, Any] = {}
        if config.cluster.cpus_per_worker is None and machine.is_own:
            share = max(1, machine.cpus // (parallel * plan.num_workers))
            changes["cluster.cpus_per_worker"] = share
        if len(jobs) > 1 and config.tracking.experiment is None:
            # MLflow shows a tree of runs within one experiment.
            changes["tracking.experiment"] = "-".join(jobs)
        kept.append(change_kept(text, changes))
        child = Child(
            name=_child_name(index, len(choices)),
            job=plan.config.job.name,
            run=plan.run,
            values=choice.values,
            overrides=[*choice.overrides, *(f"{key}={value}" for key, value in changes.items())],
            total_steps=plan.total_steps,
        )
        children.append(child)
    sweep = Sweep(
        paths=paths,
        overrides=[],
        config_dir=None,
        cwd=paths.root,
        began=time.time(),
        parallel=parallel,
        children=children,
    )
    return sweep, kept


@dataclass(frozen=True, slots=True)
class _Machine:
    """What there is for all children together; `is_own` where it is this host alone."""

    host: Host
    cpus: int
    gpus: int
    is_own: bool


def _machine(config: RunConfig) -> _Machine:
    if config.cluster.name is not ClusterName.existing:
        host = local_host()
        return _Machine(host, host.num_cpus, host.num_gpus, True)
    from orchestrator.control.ray_settings import apply_ray_settings

    apply_ray_settings(config.cluster.name)
    from orchestrator.control.ray_join import join
    from orchestrator.control.ray_nodes import cluster_total

    host = join(config.cluster)
    return _Machine(host, *cluster_total(), False)


Errors = dict[str, list[Choice]]


@contextmanager
def _collecting(errors: Errors, choice: Choice) -> Iterator[None]:
    """Keep the lines of an error with the children that it is about."""
    try:
        yield
    except OrchestratorError as error:
        for line in str(error).splitlines():
            errors.setdefault(line, []).append(choice)


def _compose_all(
    choices: Sequence[Choice], config_dir: Path | None
) -> tuple[list[tuple[RunConfig, str] | None], Errors]:
    """Return configuration and YAML of every child, None where it is refused, and the errors."""
    errors: Errors = {}
    composed: list[tuple[RunConfig, str] | None] = []
    for choice in choices:
        composed.append(None)
        with _collecting(errors, choice):
            composed[-1] = config, _ = compose_config(choice.overrides, config_dir)
            limit = config.sweep.max_children
        if composed[-1] is not None and len(choices) > limit:
            raise ConfigError(
                f"{len(choices)} children are more than sweep.max_children={limit}; give fewer "
                "values, or raise it"
            )
    return composed, errors


def _refusal(errors: Errors, count: int) -> ConfigError:
    return ConfigError("\n".join(_told(line, by, count) for line, by in errors.items()))


def _told(line: str, choices: Sequence[Choice], count: int) -> str:
    """Return an error with the children that it is about."""
    if len(choices) == count:
        return f"{line} (all {count} children)"
    shown = [values_text(choice.values) for choice in choices[:_SHOWN_CHILDREN]]
    more = f" and {len(choices) - len(shown)} more" if len(choices) > len(shown) else ""
    return f"{line} (with {'; '.join(shown)}{more})"


def _child_name(index: int, count: int) -> str:
    return f"{index + 1:0{max(2, len(str(count)))}}"
