"""A plan as text: what `make plan` prints and the run folder keeps."""

from __future__ import annotations

from collections import Counter

from orchestrator.spec.config import flatten
from orchestrator.spec.plan import RunPlan
from orchestrator.spec.schema import (
    ClusterName,
    Compile,
    OnNan,
    OptimizerConfig,
    Precision,
    ScheduleName,
    StrategyName,
    Weights,
)
from orchestrator.spec.secrets import mask_text, masked

_LABEL_WIDTH = 13
_WIDTH = 80


def headline(plan: RunPlan) -> list[str]:
    """Return what the screen shows above a run: a title and a few lines."""
    return [
        f"{plan.config.job.name} {plan.run}",
        f"{_workers(plan)}",
        f"{_batch(plan)}; {_steps(plan)}",
        f"run folder {plan.paths.root}",
        *_unproven(plan),
    ]


def params_of(plan: RunPlan) -> dict[str, str]:
    """Return what the record says of a plan's configuration: flattened, `auto` as what it came to.

    It may come to something else where the run is resumed.
    """
    return flatten(plan.config) | {"precision.policy": plan.precision.value}


def describe(plan: RunPlan) -> str:
    """Return the whole plan, a line or more for each decision, 80 columns where it can be."""
    config = plan.config
    rows = [
        ("job", f"{config.job.name} ({config.job.class_name}{_arguments(plan)})"),
        ("workers", _workers(plan)),
        ("cluster", _cluster(plan)),
        ("batch", _batch(plan)),
        ("steps", _steps(plan)),
        ("evaluation", _evaluation(plan)),
        ("checkpoints", _checkpoints(plan)),
        *_on_request(plan),
        ("optimizer", _optimizer(plan)),
        ("data", _data(plan)),
        ("precision", f"{_precision(plan)}, {_compile(plan)}"),
        ("export", _export(plan)),
        ("run folder", str(plan.paths.root)),
        ("tracking", f"{mask_text(plan.tracking_uri)}, experiment {experiment_name(plan)}"),
    ]
    lines = [line for label, text in rows for line in _wrapped(label, text)]
    return "\n".join([*lines, *(f"hint: {hint}" for hint in _hints(plan))]) + "\n"


def experiment_name(plan: RunPlan) -> str:
    """Return the MLflow experiment of a run."""
    return plan.config.tracking.experiment or plan.config.job.name


def _wrapped(label: str, text: str) -> list[str]:
    """Break a row at its commas; a path stays whole."""
    lines, current = [], ""
    for part in text.split(", "):
        longer = f"{current}, {part}" if current else part
        if current and len(longer) > _WIDTH - _LABEL_WIDTH:
            lines.append(f"{current},")
            current = part
        else:
            current = longer
    labels = [label, *[""] * len(lines)]
    return [
        f"{name:<{_LABEL_WIDTH}}{line}"
        for name, line in zip(labels, [*lines, current], strict=True)
    ]


def _arguments(plan: RunPlan) -> str:
    arguments = masked(plan.config.job.args)
    return "".join(f", {name}={value}" for name, value in arguments.items())


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _workers(plan: RunPlan) -> str:
    devices = _count(plan.devices_per_worker, plan.device_kind)
    least = plan.config.strategy.min_workers
    elastic = "" if least is None else f", at least {_count(least, 'worker')}"
    return (
        f"{_count(plan.num_workers, 'worker')} x {devices} = "
        f"{_count(plan.num_replicas, 'replica')}, {plan.config.strategy.name.value}, "
        f"{_count(plan.cpus_per_worker, 'CPU thread')} each{elastic}"
    )


def _cluster(plan: RunPlan) -> str:
    cluster = plan.config.cluster
    if cluster.name is ClusterName.inline:
        return "inline: in this process, without Ray"
    if cluster.name is ClusterName.local:
        return "local: a Ray started for this run"
    return f"existing: Ray at {cluster.address}, placement {cluster.placement.value}"


def _batch(plan: RunPlan) -> str:
    sizes = Counter(plan.replica_batch_sizes)
    replicas = " + ".join(f"{count} x {size}" for size, count in sizes.items())
    text = f"{_count(plan.config.train.global_batch_size, 'example')} a step = {replicas}"
    if plan.config.train.micro_batches > 1:
        text += f", each in {plan.config.train.micro_batches} micro-batches"
    return text


def _steps(plan: RunPlan) -> str:
    epoch = float(plan.steps_per_epoch)
    per_epoch = f"{epoch:,.0f}" if plan.steps_per_epoch.denominator == 1 else f"{epoch:,.2f}"
    epochs = float(plan.total_steps / plan.steps_per_epoch)
    return f"{plan.total_steps:,} steps = {epochs:g} epochs of {per_epoch} steps"


def _evaluation(plan: RunPlan) -> str:
    if plan.eval_steps == 0:
        return "none"
    every = "at the end"
    if plan.eval_period is not None:
        every = f"every {float(plan.eval_period):,.6g} steps and at the end"
    return (
        f"{every}, {_count(plan.config.data.num_eval_examples, 'example')} in "
        f"{_count(plan.eval_steps, 'step')} of {plan.num_replicas} x {plan.eval_batch_size}"
    )


def _checkpoints(plan: RunPlan) -> str:
    checkpoint = plan.config.checkpoint
    when = [
        f"every {checkpoint.every_steps:,} steps" if checkpoint.every_steps else "",
        f"every {checkpoint.every_s:g} s" if checkpoint.every_s else "",
        "at the end",
    ]
    return f"{', '.join(filter(None, when))}, the newest {checkpoint.keep} are kept"


def _on_request(plan: RunPlan) -> list[tuple[str, str]]:
    """Rows for what most runs do without."""
    best, train = plan.config.best, plan.config.train
    rows = []
    if best.metric is not None:
        margin = f", by more than {best.min_delta:g}" if best.min_delta else ""
        rows.append(
            ("best", f"eval/{best.metric}, {best.mode.value}{margin}, its checkpoint is kept")
        )
    if best.patience is not None:
        rows.append(
            ("ends early", f"after {_count(best.patience, 'evaluation')} without a better one")
        )
    if train.max_time_s is not None:
        rows.append(("ends early", f"saves and stops {train.max_time_s:g} s after the command"))
    if plan.init_from is not None:
        rows.append(("begins with", f"the weights of {plan.init_from}"))
    if train.freeze:
        rows.append(("frozen", ", ".join(train.freeze)))
    if train.on_nan is OnNan.skip:
        rows.append(("not finite", "updates that are not finite are left out"))
    if train.on_nan is OnNan.rollback:
        rows.append(("not finite", "the last checkpoint's weights, then the next examples"))
    if train.layer_norms:
        rows.append(("norms", "of each variable and its gradient, at every step"))
    if plan.profile_steps is not None:
        rows.append(("profile", f"steps {plan.profile_steps[0]:,} to {plan.profile_steps[1]:,}"))
    return rows


def _optimizer(plan: RunPlan) -> str:
    optimizer: OptimizerConfig = plan.config.optimizer
    schedule = plan.config.schedule
    parts = [f"{optimizer.name.value}", f"learning rate {optimizer.learning_rate:g}"]
    parts.append(f"{schedule.name.value} schedule")
    if schedule.warmup_steps:
        parts.append(f"{schedule.warmup_steps:,} steps of warm-up")
    if schedule.name is ScheduleName.piecewise:
        parts.append(f"factors {schedule.factors} at steps {schedule.boundaries}")
    if optimizer.clip_global_norm is not None:
        parts.append(f"gradient norm at most {optimizer.clip_global_norm:g}")
    if optimizer.clip_value is not None:
        parts.append(f"gradient values at most {optimizer.clip_value:g}")
    if optimizer.ema_decay is not None:
        evaluated = ", which is evaluated" if plan.config.train.evaluate_ema else ""
        parts.append(f"moving average of the weights at {optimizer.ema_decay:g}{evaluated}")
    for name, group in optimizer.groups.items():
        if group.learning_rate is not None:
            parts.append(f"{name} at {group.learning_rate:g}")
    return ", ".join(parts)


def _data(plan: RunPlan) -> str:
    where = f"from {plan.data_path}" if plan.data_path else f"kept in {plan.data_dir}"
    return f"{_count(plan.config.data.num_examples, 'example')}, {where}"


def _precision(plan: RunPlan) -> str:
    if plan.config.precision.policy is Precision.auto:
        return f"auto: {plan.precision.value} (on a {plan.device_kind})"
    return plan.precision.value


def _compile(plan: RunPlan) -> str:
    train = plan.config.train
    if train.compile is not Compile.auto:
        return f"compile {train.compile.value}"
    if plan.num_replicas > 1 or train.deterministic:
        reason = "several replicas" if plan.num_replicas > 1 else "deterministic"
        return f"compile auto: graph ({reason})"
    return "compile auto: graph or XLA as measured in the run"


def _export(plan: RunPlan) -> str:
    export = plan.config.export
    if not export.enabled:
        return "none"
    name = f", registered as {export.register}" if export.register else ""
    name += f"@{export.alias}" if export.alias else ""
    which = " of the best evaluation" if export.weights is Weights.best else ""
    average = " with averaged weights" if plan.exports_averages else ""
    return f"SavedModel{which}{average}, proven in a clean process{name}"


def _unproven(plan: RunPlan) -> list[str]:
    """Return what no test of this project has proven, and how to prove it."""
    name = plan.config.optimizer.name
    if name.is_proven:
        return []
    return [
        f"optimizer {name.value}: not proven by this project's tests; "
        f"make verify conf={plan.config.job.name} with the same args proves it for this job"
    ]


def _hints(plan: RunPlan) -> list[str]:
    hints = _unproven(plan)
    strategy = plan.config.strategy
    if strategy.name is StrategyName.multi_worker and plan.num_workers == 1:
        hints.append("multi_worker with one worker does what strategy=mirrored does with less")
    if strategy.name is StrategyName.mirrored and plan.num_replicas == 1:
        hints.append("no GPU found: one CPU device. strategy.devices_per_worker=2 makes two")
    return hints
