"""`chaos`: trains a job undisturbed, then under faults, and proves that both left the same.

All runs are the real train command in a process of its own, paced so that faults fall between
steps. A fault is injected when the one before it is over; its moment is a step drawn from
`chaos.seed`. Faults that strike a host are injected in a third run, whose workers are on hosts of
their own (hosts.py). What is compared, and how, is in judge.py.
"""

from __future__ import annotations

import os
import random
import secrets
import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

from orchestrator.chaos.command import Command
from orchestrator.chaos.faults import FAULTS
from orchestrator.chaos.netns import why_not_here
from orchestrator.chaos.scene import Fault
from orchestrator.chaos.storm import Row
from orchestrator.chaos.table import Certificate, lines, write_report
from orchestrator.chaos.trial import MakeCommand, Trial, ready, tell_row
from orchestrator.errors import ConfigError, ExitCode
from orchestrator.runs import merge_overrides
from orchestrator.spec.chaos import FaultName
from orchestrator.spec.config import load_config
from orchestrator.spec.host import local_host
from orchestrator.spec.overrides import key_of, quoted
from orchestrator.spec.schema import ClusterName, RunConfig
from orchestrator.weights import find_weights

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
    _refuse(config, cwd)
    no_hosts = why_no_hosts(config)
    faults, not_run = _schedule(config, no_hosts)
    start = time.monotonic()
    parent = (cwd / config.runs_dir).resolve() / config.job.name
    folder = parent / f"chaos-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    arguments = [*given, *([f"--config-dir={config_dir}"] if config_dir is not None else [])]
    steps = _MARGIN_STEPS + _num_steps(faults)
    if config.train.steps is not None and "train.steps" in map(key_of, overrides):
        steps = config.train.steps
    _refuse_warmup(config, overrides, steps)
    arguments = merge_overrides(arguments, shortened(config, steps, cwd))
    folder.mkdir(parents=True)
    trial = Trial(config, arguments, steps, cwd, folder, make_command)
    _tell(config, overrides, faults, steps)
    undisturbed = trial.undisturbed()
    rows, differences = trial.disturbed(faults, undisturbed)
    for fault in not_run:
        rows.append(Row(fault, not_run=no_hosts))
        tell_row(rows[-1])
    certificate = Certificate(
        job=config.job.name,
        command=" ".join(["chaos", *(o for o in overrides if key_of(o) != "chaos.report")]),
        rows=rows,
        differences=differences,
        versions=dict(ready(undisturbed.paths).get("versions", {})),
        wall_s=time.monotonic() - start,
    )
    return _conclude(certificate, config, cwd, folder)


def _with_defaults(overrides: list[str]) -> list[str]:
    """Return the overrides with those of `chaos` before them.

    Raises:
        ConfigError: one names another cluster, whose own rules would else be told first.
    """
    for override in overrides:
        if key_of(override) == "cluster":
            _refuse_cluster(override.partition("=")[2])
    defaults = list(_DEFAULTS)
    if any(key_of(o) == "strategy" and o != _DEFAULTS[0] for o in overrides):
        defaults.remove(_DEFAULTS[1])  # only multi_worker has several workers
    return merge_overrides(defaults, overrides)


def shortened(config: RunConfig, steps: int, cwd: Path) -> list[str]:
    """Return what lets a job be trained for so few steps, below another folder."""
    changes = ["train.epochs=null", f"train.steps={steps}"]
    if config.schedule.warmup_steps >= steps:
        changes.append(f"schedule.warmup_steps={steps // 2}")
    if (init_from := find_weights(config, cwd)) is not None:
        changes.append(f"train.init_from={quoted(init_from)}")
    return changes


def _refuse_cluster(name: str) -> None:
    if name != ClusterName.local.value:
        raise ConfigError(
            f"cluster={name}: chaos ends processes of this host, and starts a Ray of its own; "
            "leave it out"
        )


def _refuse(config: RunConfig, cwd: Path) -> None:
    _refuse_cluster(config.cluster.name.value)
    for key in ("resume", "run_name"):
        if getattr(config, key) is not None:
            raise ConfigError(f"{key}={getattr(config, key)}: chaos makes runs of its own")
    if config.tracking.uri is not None:
        raise ConfigError("tracking.uri: chaos has a record of its own; leave it out")
    if config.checkpoint.every_steps is None:
        raise ConfigError("checkpoint.every_steps=null: chaos needs checkpoints by steps")
    if not _chosen(config):
        raise ConfigError("chaos.faults=[]: name at least one fault, or set chaos.full=true")
    report = config.chaos.report
    if report is not None and (reason := _why_not(cwd / report)):
        raise ConfigError(f"chaos.report={report}: {reason}; name a Markdown file, or null")


def _refuse_warmup(config: RunConfig, overrides: list[str], steps: int) -> None:
    """Refuse a warm-up that the user asks for and that cannot be had; a job's own is shortened."""
    asked = config.schedule.warmup_steps
    if asked >= steps and "schedule.warmup_steps" in map(key_of, overrides):
        raise ConfigError(
            f"schedule.warmup_steps={asked} is not shorter than the {steps:,} steps that chaos "
            "trains; set fewer, leave it out, or set train.steps"
        )


def _why_not(report: Path) -> str:
    """Say why a report cannot be written; nothing if it can."""
    try:
        if report.is_dir():
            return f"{report} is a folder"
        there = next(path for path in (report, *report.parents) if path.exists())
        if there.is_file():
            there.read_text(encoding="utf-8")  # sections of other jobs are kept
    except (OSError, UnicodeDecodeError) as error:
        return str(error)
    if there != report and not there.is_dir():
        return f"{there} is no folder"
    return "" if os.access(there, os.W_OK) else f"{there} cannot be written"


def _chosen(config: RunConfig) -> list[FaultName]:
    return list(FaultName) if config.chaos.full else list(config.chaos.faults)


def _schedule(config: RunConfig, no_hosts: str) -> tuple[list[Fault], list[Fault]]:
    """Return the faults in the order they are injected, and those that cannot be."""
    chance = random.Random(config.chaos.seed)
    chosen = [FAULTS[name] for name in _chosen(config)]
    possible = [fault for fault in chosen if not (no_hosts and fault.needs_hosts)]
    schedule: list[Fault] = []
    for _ in range(config.chaos.repeat):
        if config.chaos.random is not None:
            schedule += chance.choices(possible or chosen, k=config.chaos.random)
        else:
            schedule += chance.sample(chosen, len(chosen))
    # Hosts have a run of their own, the last.
    schedule.sort(key=lambda fault: fault.needs_hosts)
    faults = [fault for fault in schedule if fault in possible]
    return faults, schedule[len(faults) :]


def _num_steps(faults: Sequence[Fault]) -> int:
    """Return what the longer of the two runs under fire needs."""
    needs = {False: 0, True: 0}
    for fault in faults:
        needs[fault.needs_hosts] += fault.num_steps
    return max(needs.values())


def why_no_hosts(config: RunConfig) -> str:
    """Say why faults of hosts cannot be injected; empty if they can, or need not be."""
    if not any(FAULTS[name].needs_hosts for name in _chosen(config)):
        return ""
    if config.strategy.num_workers < 2:
        return "needs strategy=multi_worker with at least 2 workers"
    if local_host().num_gpus:
        return "its hosts would share the GPUs of this machine"
    return why_not_here()


def _tell(config: RunConfig, overrides: list[str], faults: Sequence[Fault], steps: int) -> None:
    count, seed = len(faults), config.chaos.seed
    print(f"chaos {config.job.name}: {count} faults in {steps:,} steps, seed {seed}")
    defaults = [line for line in _with_defaults(overrides) if line not in overrides]
    print("in place of what the job says:")
    print(textwrap.fill(" ".join(defaults), 98, initial_indent="  ", subsequent_indent="  "))
    sys.stdout.flush()


def _conclude(certificate: Certificate, config: RunConfig, cwd: Path, folder: Path) -> ExitCode:
    print()
    print("\n".join(lines(certificate)))
    print()
    code = _verdict(certificate, folder)
    # Last: what was found is told also if the report cannot be written.
    if config.chaos.report is not None:
        write_report(cwd / config.chaos.report, certificate)
    return code


def _verdict(certificate: Certificate, folder: Path) -> ExitCode:
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
