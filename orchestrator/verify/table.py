"""What `verify` prints: what it changed, and a table of how far the runs are apart."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.spec.messages import Substituted
from orchestrator.spec.schema import Compile, OptimizerName, Precision, RunConfig, ScheduleName
from orchestrator.spec.variants import Comparison, Variant
from orchestrator.verify.verdict import Verdict

_HEADER = (
    "largest difference from one device",
    "loss",
    "gradient norm",
    "variables",
    "examples",
    "",
    "s",
)
_MANY = 4


def substitutions(
    config: RunConfig,
    comparisons: Sequence[Comparison],
    *,
    changed: Substituted | None,
    batch: int,
    replicas: int,
    clip: float,
) -> list[str]:
    """Return what differs from what `train` would do, a line each.

    Args:
        config: of the job.
        comparisons: that are made.
        changed: what the worker changed in the model.
        batch: the global batch size of all runs.
        replicas: how many replicas it must not divide by.
        clip: limit of the gradient's norm in runs that clip.
    """
    lines = [f"{comparison.name}: {comparison.title}" for comparison in comparisons]
    if batch != config.train.global_batch_size:
        lines.append(
            f"train.global_batch_size {config.train.global_batch_size} -> {batch}, which "
            f"{replicas} replicas do not divide"
        )
    if config.train.compile is not Compile.eager:
        compile_ = config.train.compile.value
        lines.append(f"train.compile {compile_} -> graph: XLA rounds a part otherwise than a whole")
    lines.append(
        f"clipped runs: optimizer.clip_global_norm {clip:.3g}, half the median of the first "
        "steps' norms"
    )
    if config.schedule.name is not ScheduleName.constant or config.schedule.warmup_steps:
        lines.append(f"schedule {config.schedule.name.value} -> constant, without warm-up")
    if config.precision.policy not in (Precision.float32, Precision.float64):
        scale = ", with a loss scale in a comparison of its own"
        scale = scale if any(comparison.loss_scale for comparison in comparisons) else ""
        lines.append(f"precision {config.precision.policy.value} -> float64 and float32{scale}")
    lines.append("no evaluation, no export, no record in MLflow")
    return [*lines, *_in_model(config, changed)]


def _in_model(config: RunConfig, changed: Substituted | None) -> list[str]:
    if changed is None:
        return []
    lines = []
    if changed.silenced:
        lines.append(f"dropout and noise off in {_named(changed.silenced)}: masks are a replica's")
    if changed.synchronised:
        lines.append(f"BatchNorm synchronised in {_named(changed.synchronised)}")
        lines.append("no micro-batches: BatchNorm would normalise each by itself")
        noise = "a bias before BatchNorm has no gradient but rounding noise"
        if config.optimizer.name is OptimizerName.lion:
            lines.append(f"not with lion: {noise}, whose sign is a full step")
        else:
            lines.append(f"the job's own optimizer in float64: {noise}")
    if changed.random:
        lines.append(
            f"NOT off: {_named(changed.random)} draws random numbers, on each replica others; "
            "expect a difference"
        )
    return lines


def table(rows: Sequence[tuple[Variant, Verdict, float]], batch: int) -> list[str]:
    """Return the lines of a table: variant, largest differences, verdict, seconds."""
    cells = [_HEADER]
    for variant, verdict, wall_s in rows:
        cells.append(
            (
                variant.title(batch),
                f"{verdict.loss:.1e}",
                f"{verdict.norm:.1e}",
                f"{verdict.variables:.1e}",
                "the same" if verdict.same_examples else "others",
                "proven" if verdict.agrees else "DIFFERS",
                f"{wall_s:.1f}",
            )
        )
    widths = [max(len(row[column]) for row in cells) for column in range(len(_HEADER))]
    return [
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]


def _named(layers: Sequence[str]) -> str:
    shown = ", ".join(layers[:_MANY])
    return f"{shown} and {len(layers) - _MANY} more" if len(layers) > _MANY else shown
