"""Rules between keys: all that are broken are told at once."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

from orchestrator.errors import ConfigError
from orchestrator.spec.schema import (
    ClusterName,
    OptimizerConfig,
    OptimizerGroup,
    OptimizerName,
    RunConfig,
    ScheduleName,
    StrategyName,
)
from orchestrator.spec.secrets import mask_text
from orchestrator.spec.sweep import sweep_rules
from orchestrator.spec.validate_job import job_rules
from orchestrator.spec.validate_placement import placement_rules
from orchestrator.spec.validate_recovery import recovery_rules
from orchestrator.spec.validate_train import train_rules

_MAX_SEED = 2**63 - 1
_MAX_LOSS_SCALE = 2**24  # beyond it no scale grows either: train/loss_scale.py
_BELOW_ONE = ("beta_1", "beta_2", "momentum", "rho")
_DECAY_BY_DEFAULT = (OptimizerName.adamw, OptimizerName.muon)
_RUN_NAME = re.compile(r"[\w][\w.\-]*")
_PORTS = re.compile(r"(\d+)-(\d+)")
_ADAM = {"weight_decay", "beta_1", "beta_2", "epsilon"}
# What Keras 3.15's constructors take, besides the learning rate.
ACCEPTED = {
    OptimizerName.adam: _ADAM,
    OptimizerName.adamw: _ADAM,
    OptimizerName.sgd: {"weight_decay", "momentum", "nesterov"},
    OptimizerName.rmsprop: {"weight_decay", "rho", "momentum", "epsilon"},
    OptimizerName.lion: {"weight_decay", "beta_1", "beta_2"},
    OptimizerName.nadam: _ADAM,
    OptimizerName.adamax: _ADAM,
    OptimizerName.adagrad: {"weight_decay", "epsilon"},
    OptimizerName.adadelta: {"weight_decay", "rho", "epsilon"},
    OptimizerName.ftrl: {"weight_decay"},
    OptimizerName.lamb: _ADAM,
    OptimizerName.muon: {"weight_decay", "epsilon", "momentum", "nesterov"},
}
ARGUMENTS = ("weight_decay", "beta_1", "beta_2", "epsilon", "momentum", "nesterov", "rho")


def validate(config: RunConfig) -> None:
    """Check what types cannot say.

    Raises:
        ConfigError: every broken rule, a line each.
    """
    errors = list(_flat(config)) or [
        *_numbers(config),
        *_optimizer_numbers(config),
        *_strategy(config),
        *_lengths(config),
        *placement_rules(config),
        *recovery_rules(config),
        *train_rules(config),
        *sweep_rules(config),
        *_optimizer(config),
        *_names(config),
        *job_rules(config),
    ]
    if errors:
        raise ConfigError("\n".join(errors))


def _flat(section: Any, prefix: str = "") -> Iterator[str]:
    """Refuse lists within lists, which no key has; arguments of a job may be anything."""
    for field in dataclasses.fields(section):
        key, value = f"{prefix}{field.name}", getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from _flat(value, f"{key}.")
        elif isinstance(value, list) and any(isinstance(item, list | dict) for item in value):
            yield f"{key}={value}: must be a list of single values"


def _numbers(config: RunConfig) -> Iterator[str]:
    at_least: list[tuple[str, float | None, float]] = [
        ("strategy.num_workers", config.strategy.num_workers, 1),
        ("strategy.min_workers", config.strategy.min_workers, 1),
        ("strategy.bytes_per_pack", config.strategy.bytes_per_pack, 1),
        ("train.global_batch_size", config.train.global_batch_size, 1),
        ("train.micro_batches", config.train.micro_batches, 1),
        ("train.steps", config.train.steps, 1),
        ("train.eval_every_steps", config.train.eval_every_steps, 1),
        ("train.max_block_steps", config.train.max_block_steps, 1),
        ("train.audit_every_steps", config.train.audit_every_steps, 1),
        ("train.seed", config.train.seed, 0),
        ("data.num_examples", config.data.num_examples, 1),
        ("data.num_eval_examples", config.data.num_eval_examples, 0),
        ("checkpoint.every_steps", config.checkpoint.every_steps, 1),
        ("checkpoint.keep", config.checkpoint.keep, 1),
        ("checkpoint.max_failed_saves", config.checkpoint.max_failed_saves, 1),
        ("schedule.warmup_steps", config.schedule.warmup_steps, 0),
        ("precision.initial_loss_scale", config.precision.initial_loss_scale, 1),
        ("cluster.cpus_per_worker", config.cluster.cpus_per_worker, 1),
        ("verify.steps", config.verify.steps, 1),
        ("verify.own_steps", config.verify.own_steps, 1),
        ("chaos.random", config.chaos.random, 1),
        ("chaos.repeat", config.chaos.repeat, 1),
        ("chaos.seed", config.chaos.seed, 0),
    ]
    positive: list[tuple[str, float | None]] = [
        ("train.epochs", config.train.epochs),
        ("train.eval_every_epochs", config.train.eval_every_epochs),
        ("train.block_s", config.train.block_s),
        ("checkpoint.every_s", config.checkpoint.every_s),
        ("cluster.start_timeout_s", config.cluster.start_timeout_s),
        ("tracking.system_metrics_every_s", config.tracking.system_metrics_every_s),
        ("tracking.timeout_s", config.tracking.timeout_s),
        ("tracking.journal_patience_s", config.tracking.journal_patience_s),
        ("chaos.step_ms", config.chaos.step_ms),
        ("optimizer.learning_rate", config.optimizer.learning_rate),
        ("optimizer.clip_global_norm", config.optimizer.clip_global_norm),
        ("optimizer.clip_value", config.optimizer.clip_value),
        *(
            (f"optimizer.groups.{name}.learning_rate", group.learning_rate)
            for name, group in config.optimizer.groups.items()
        ),
    ]
    for key, value, least in at_least:
        if value is not None and not value >= least:
            yield f"{key}={value}: must be at least {least}"
    for key, value in positive:
        if value is not None and not (value > 0 and math.isfinite(value)):
            yield f"{key}={value}: must be a number greater than 0"
    if config.train.seed > _MAX_SEED:
        yield f"train.seed={config.train.seed}: must be at most 2^63-1"
    # On a busy machine an answer may take a second: a short limit would end healthy workers.
    for key in ("driver_silence_s", "agent_silence_s"):
        if not (silence_s := getattr(config.cluster, key)) >= 3:
            yield f"cluster.{key}={silence_s}: must be at least 3"


def _optimizer_sections(optimizer: OptimizerConfig) -> list[tuple[str, OptimizerGroup]]:
    """Return the optimizer and its parameter groups, each with the key that it stands below."""
    groups = [(f"optimizer.groups.{name}", group) for name, group in optimizer.groups.items()]
    return [("optimizer", optimizer), *groups]


def _optimizer_numbers(config: RunConfig) -> Iterator[str]:
    """Refuse numbers with which an update is no step downhill."""
    for section, group in _optimizer_sections(config.optimizer):
        for argument in _BELOW_ONE:
            value = getattr(group, argument)
            if value is not None and not 0 <= value < 1:
                yield f"{section}.{argument}={value}: must be at least 0 and below 1"
        for argument in ("epsilon", "weight_decay"):
            value = getattr(group, argument)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                yield f"{section}.{argument}={value}: must be a number from 0"
    factors = [("final_factor", config.schedule.final_factor)]
    factors += [("factors", factor) for factor in config.schedule.factors]
    for key, factor in factors:
        if not (factor >= 0 and math.isfinite(factor)):
            yield f"schedule.{key}={factor}: must be a number from 0"
    if config.precision.initial_loss_scale > _MAX_LOSS_SCALE:
        yield (
            f"precision.initial_loss_scale={config.precision.initial_loss_scale:g}: must be at "
            f"most {_MAX_LOSS_SCALE:,}"
        )


def _strategy(config: RunConfig) -> Iterator[str]:
    strategy, cluster = config.strategy, config.cluster
    if strategy.name is not StrategyName.multi_worker and strategy.num_workers > 1:
        yield (
            f"strategy.num_workers={strategy.num_workers} with strategy={strategy.name.value}: "
            "several workers need strategy=multi_worker; several devices of one host are "
            "strategy=mirrored strategy.devices_per_worker=N"
        )
    if strategy.min_workers is not None and strategy.name is not StrategyName.multi_worker:
        yield (
            f"strategy.min_workers={strategy.min_workers} with strategy={strategy.name.value}: "
            "only multi_worker can go on with fewer workers; set strategy.min_workers=null"
        )
    elif strategy.min_workers is not None and strategy.min_workers > strategy.num_workers:
        yield (
            f"strategy.min_workers={strategy.min_workers} is more than "
            f"strategy.num_workers={strategy.num_workers}, which is the most that a run has"
        )
    devices = strategy.devices_per_worker
    if devices != "auto" and not (devices.isdecimal() and int(devices) >= 1):
        yield f"strategy.devices_per_worker={devices}: must be auto or a whole number from 1"
    elif strategy.name is StrategyName.one_device and devices != "1":
        yield f"strategy.devices_per_worker={devices} with strategy=one_device: use mirrored"
    if cluster.name is ClusterName.inline and strategy.name is StrategyName.multi_worker:
        yield (
            "cluster=inline with strategy=multi_worker: one process cannot be several workers; "
            "use cluster=local, or strategy=mirrored"
        )
    if cluster.name is not ClusterName.existing and cluster.address is not None:
        yield (
            f"cluster.address={cluster.address} with cluster={cluster.name.value}: an address "
            "belongs to cluster=existing"
        )
    match = _PORTS.fullmatch(cluster.port_range)
    if not match or not 1024 <= int(match[1]) <= int(match[2]) <= 65535:
        yield f"cluster.port_range={cluster.port_range}: must be FIRST-LAST within 1024-65535"
    elif int(match[2]) - int(match[1]) + 1 < strategy.num_workers:
        yield (
            f"cluster.port_range={cluster.port_range} has fewer ports than "
            f"strategy.num_workers={strategy.num_workers}"
        )


def _lengths(config: RunConfig) -> Iterator[str]:
    train, schedule = config.train, config.schedule
    if train.epochs is None and train.steps is None:
        yield "train.epochs and train.steps are both null: set one of them"
    if (
        train.steps is not None
        and schedule.warmup_steps >= train.steps
        and schedule.warmup_steps > 0
    ):
        yield (
            f"schedule.warmup_steps={schedule.warmup_steps} is not shorter than "
            f"train.steps={train.steps}"
        )
    if schedule.name is ScheduleName.piecewise:
        if len(schedule.factors) != len(schedule.boundaries) + 1:
            yield (
                f"schedule.factors has {len(schedule.factors)} values for "
                f"{len(schedule.boundaries)} schedule.boundaries: one more is needed"
            )
        if sorted(set(schedule.boundaries)) != schedule.boundaries:
            yield f"schedule.boundaries={schedule.boundaries}: must increase"
    elif schedule.factors or schedule.boundaries:
        yield (
            f"schedule.boundaries and schedule.factors with schedule={schedule.name.value}: only "
            "piecewise has them"
        )
    log = config.tracking.log_every_steps
    if log != "auto" and not (log.isdecimal() and int(log) >= 1):
        yield f"tracking.log_every_steps={log}: must be auto or a whole number from 1"


def _optimizer(config: RunConfig) -> Iterator[str]:
    optimizer: OptimizerConfig = config.optimizer
    sections = _optimizer_sections(optimizer)
    accepted = ACCEPTED[optimizer.name]
    for section, group in sections:
        for argument in ARGUMENTS:
            if getattr(group, argument) is not None and argument not in accepted:
                yield (
                    f"{section}.{argument}={getattr(group, argument)}: {optimizer.name.value} has "
                    f"no {argument}; it takes {', '.join(sorted(accepted))}"
                )
    if optimizer.ema_decay is not None and not 0 < optimizer.ema_decay < 1:
        yield f"optimizer.ema_decay={optimizer.ema_decay:g}: must be between 0 and 1"
    if config.train.evaluate_ema and optimizer.ema_decay is None:
        yield (
            "train.evaluate_ema=true without a moving average: set optimizer.ema_decay, such as "
            "0.999"
        )
    # With null Keras's own default counts.
    has_own = optimizer.name in _DECAY_BY_DEFAULT and optimizer.weight_decay is None
    if optimizer.weight_decay_exclude and not (has_own or any(g.weight_decay for _, g in sections)):
        yield (
            "optimizer.weight_decay_exclude without weight decay: set optimizer.weight_decay, or "
            "leave it out"
        )
    if optimizer.learning_rate is None:
        yield "optimizer.learning_rate is null: set it"


def _names(config: RunConfig) -> Iterator[str]:
    for key, name in (("run_name", config.run_name), ("job.name", config.job.name)):
        if name is not None and not (_RUN_NAME.fullmatch(name) and ".." not in name):
            yield f"{key}={name!r}: only letters, digits, `_`, `-` and `.`; it names a folder"
    if config.run_name is not None and config.resume is not None:
        yield f"run_name={config.run_name} with resume={config.resume}: a run keeps its name"
    yield from uri_errors(config.tracking.uri)


def uri_errors(uri: str | None) -> Iterator[str]:
    """Yield what is wrong with `tracking.uri`."""
    if uri is not None and not uri.startswith(("sqlite:///", "http://", "https://")):
        yield (
            f"tracking.uri={mask_text(uri)}: must begin with sqlite:///, http:// or https:// "
            "(MLflow's file store is no longer supported)"
        )
