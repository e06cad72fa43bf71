"""The `sweep` section of `conf/`, and the rules of what may be swept."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.errors import ConfigError

if TYPE_CHECKING:
    from orchestrator.spec.plan import RunPlan
    from orchestrator.spec.schema import RunConfig

# Sections and keys that all children of a sweep share, each with the reason.
_SHARED = {
    "runs_dir": "all runs of a sweep lie below one folder",
    "run_name": "a sweep names its children",
    "resume": "the same sweep command goes on with what is not finished",
    "resume_allow": "a child keeps the configuration it was frozen with",
    "cluster": "all children run on one cluster",
    "tracking": "all children are recorded beside their parent",
    "best.metric": "children are compared by it",
    "best.mode": "children are compared by it",
    "debug": "it is for one run in a debugger",
    "sweep": "it is about the sweep itself",
    "verify": "training does not read it",
    "chaos": "training does not read it",
}
_NAME = re.compile(r"\w[\w\-]*(\.[\w\-]+)*")
_NEVER_GIVEN = ("run_name", "resume", "resume_allow", "debug")


@dataclass(kw_only=True, slots=True)
class HalvingConfig:
    """When a child that is behind the others is stopped."""

    factor: float | None
    first: float


@dataclass(kw_only=True, slots=True)
class SweepConfig:
    """How `sweep` goes about its children; training does not read it."""

    name: str | None
    parallel: str  # "auto" or a number
    max_children: int
    halving: HalvingConfig


def sweep_rules(config: RunConfig) -> Iterator[str]:
    """Yield what is wrong with the section."""
    sweep, halving = config.sweep, config.sweep.halving
    if sweep.name is not None and not _NAME.fullmatch(sweep.name):
        yield f"sweep.name={sweep.name!r}: only letters, digits, `_`, `-`, `.`; it names a folder"
    if sweep.parallel != "auto" and not (sweep.parallel.isdecimal() and int(sweep.parallel) >= 1):
        yield f"sweep.parallel={sweep.parallel}: must be auto or a whole number from 1"
    if not sweep.max_children >= 1:
        yield f"sweep.max_children={sweep.max_children}: must be at least 1"
    if not 0 < halving.first < 1:
        yield f"sweep.halving.first={halving.first:g}: is a part of a run, between 0 and 1"
    if halving.factor is None:
        return
    if not halving.factor > 1:
        yield f"sweep.halving.factor={halving.factor:g}: must be greater than 1, such as 2 or 3"
    train = config.train
    if config.data.num_eval_examples == 0 or (
        train.eval_every_steps is None and train.eval_every_epochs is None
    ):
        yield (
            f"sweep.halving.factor={halving.factor:g} without evaluations before the end: there "
            "is nothing to compare children by; set train.eval_every_steps"
        )


def refuse_swept(keys: Sequence[str]) -> None:
    """Refuse keys that must be the same in all children.

    Raises:
        ConfigError: every such key, with the reason.
    """
    errors = []
    for key in keys:
        parts = key.split(".")
        owners = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
        reason = next((_SHARED[owner] for owner in owners if owner in _SHARED), None)
        if reason is not None:
            errors.append(f"{key} cannot be swept: {reason}; give it one value")
    if errors:
        raise ConfigError("\n".join(errors))


def refuse_given(keys: Sequence[str]) -> None:
    """Refuse keys that a sweep decides itself.

    Raises:
        ConfigError: every such key, with the reason.
    """
    errors = [f"{key}: {_SHARED[key]}; leave it out" for key in keys if key in _NEVER_GIVEN]
    if errors:
        raise ConfigError("\n".join(errors))


def children_at_once(
    asked: str, plans: Sequence[RunPlan], *, cpus: int, gpus: int, has_own_cpus: bool
) -> int:
    """Return how many children run at a time.

    Args:
        asked: `sweep.parallel`.
        plans: of the children; the largest one counts.
        cpus: of all nodes together.
        gpus: of all nodes together.
        has_own_cpus: `cluster.cpus_per_worker` is set; else one CPU for each worker is enough.
    """
    if asked != "auto":
        return min(int(asked), len(plans))
    each = max(plan.num_workers * (plan.cpus_per_worker if has_own_cpus else 1) for plan in plans)
    fits = cpus // each
    on_gpus = [p.num_workers * p.devices_per_worker for p in plans if p.device_kind == "GPU"]
    if on_gpus:
        fits = min(fits, gpus // max(on_gpus))
    return max(1, min(fits, len(plans)))
