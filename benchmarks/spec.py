"""What a comparator is told: the job's class, batch, optimizer and threads, as our run has them."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.spec.config import load_config
from orchestrator.spec.host import local_host
from orchestrator.spec.plan import make_plan
from orchestrator.spec.schema import OptimizerGroup, ScheduleName

PROJECT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Spec:
    """A job as a comparator trains it; crosses to its process as JSON.

    Attributes:
        class_name: dotted name of the job's class.
        args: arguments of its constructor.
        data_dir: where downloads are kept.
        batch_size: examples a step over all workers.
        num_workers: processes that train together.
        num_threads: intra-op and inter-op threads of each of them.
        block_steps: steps of one call of the same-graph loop.
        precision: Keras's dtype policy.
        seed: of initial weights and order.
        optimizer: name of the Keras optimizer, in lower case.
        arguments: of that optimizer.
        groups: what parameter groups change of them.
        cosine: of the learning rate: steps of warm-up, of the whole run, and the last factor;
            None for a constant one.
        seconds: measured time, after a warm-up of a fifth of it.
    """

    class_name: str
    args: dict[str, Any]
    data_dir: str
    batch_size: int
    num_workers: int
    num_threads: int
    block_steps: int
    precision: str
    seed: int
    optimizer: str
    arguments: dict[str, float]
    groups: dict[str, dict[str, float]]
    cosine: tuple[int, int, float] | None
    seconds: float

    def to_json(self) -> str:
        """Return it as one command-line argument."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Spec:
        """Return what `to_json` wrote."""
        values = json.loads(text)
        cosine = values.pop("cosine")
        return cls(**values, cosine=None if cosine is None else tuple(cosine))


def make_spec(job: str, overrides: tuple[str, ...], block_steps: int, seconds: float) -> Spec:
    """Read what our run would do from its plan.

    Raises:
        SystemExit: the job asks for something that the comparators do not do, so that the two
            sides would not do the same work.
    """
    config = load_config([f"job={job}", f"data.cache_dir={PROJECT / 'data'}", *overrides])
    plan = make_plan(config, run="bench", host=local_host(), cwd=PROJECT)
    optimizer, schedule = config.optimizer, config.schedule
    if config.train.micro_batches != 1:
        raise SystemExit(f"{job} accumulates gradients, which the comparators do not")
    if optimizer.clip_value or optimizer.ema_decay or optimizer.weight_decay_exclude:
        raise SystemExit(
            f"{job} sets optimizer.clip_value, ema_decay or weight_decay_exclude, which the "
            "comparators do not"
        )
    is_constant = schedule.name is ScheduleName.constant and not schedule.warmup_steps
    if not is_constant and schedule.name is not ScheduleName.cosine:
        raise SystemExit(f"{job} has schedule={schedule.name.value}, which the comparators do not")
    cosine = (schedule.warmup_steps, plan.total_steps, schedule.final_factor)
    arguments = _arguments(optimizer)
    if optimizer.clip_global_norm is not None:
        arguments["global_clipnorm"] = optimizer.clip_global_norm
    return Spec(
        class_name=config.job.class_name,
        args=config.job.args,
        data_dir=plan.data_dir,
        batch_size=config.train.global_batch_size,
        num_workers=plan.num_workers,
        num_threads=plan.cpus_per_worker,
        block_steps=block_steps,
        precision=plan.precision.value,
        seed=config.train.seed,
        optimizer=optimizer.name.value,
        arguments=arguments,
        groups={name: _arguments(group) for name, group in optimizer.groups.items()},
        cosine=None if is_constant else cosine,
        seconds=seconds,
    )


def _arguments(group: OptimizerGroup) -> dict[str, float]:
    names = [item.name for item in dataclasses.fields(OptimizerGroup)]
    return {name: getattr(group, name) for name in names if getattr(group, name) is not None}
