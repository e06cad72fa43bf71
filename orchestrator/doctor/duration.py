"""How long a run will take, from the last run of its job that was cut in the same way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.errors import StorageError
from orchestrator.spec.paths import RunPaths
from orchestrator.spec.plan import RunPlan
from orchestrator.track.journal import read

# What decides how long a step takes; a run with another value tells nothing.
_SAME = (
    *("strategy.", "job.args.", "job.class_name", "precision.", "cluster.name"),
    *("train.global_batch_size", "train.micro_batches", "train.compile"),
)
_MOST_RUNS = 5


@dataclass(slots=True)
class Pace:
    """What a run's journal tells of its speed.

    Attributes:
        params: the configuration it was last started with, flattened.
        blocks: (steps, seconds) of each block of its newest attempt.
        eval_s: of each evaluation.
        began: Unix time of the newest start.
        start_s: from there to the first step.
        is_starting: whether that step is not made yet.
    """

    params: Mapping[str, str] = field(default_factory=dict)
    blocks: list[tuple[int, float]] = field(default_factory=list)
    eval_s: list[float] = field(default_factory=list)
    began: float = 0.0
    start_s: float = 0.0
    is_starting: bool = True

    def observe(self, record: Mapping[str, Any]) -> None:
        """Take note of one record of the journal."""
        match record.get("kind"):
            case "RunStarted":
                self.params, self.began = record["facts"]["params"], record["time"]
                self.is_starting = True
            case "AttemptStarted":
                self.blocks = []
            case "BlockDone" if record["worker"] == 0:
                if self.is_starting:
                    self.start_s = record["time"] - record["wall_s"] - self.began
                    self.is_starting = False
                self.blocks.append((record["num_steps"], record["wall_s"]))
            case "Evaluated":
                self.eval_s.append(record["wall_s"])

    def steps_per_s(self) -> float:
        """Return how many steps a second were made; the first block, which is traced, is left out.

        0 if that is not known.
        """
        counted = self.blocks[1:] if len(self.blocks) > 1 else self.blocks
        seconds = sum(wall_s for _, wall_s in counted)
        return sum(steps for steps, _ in counted) / seconds if seconds else 0.0


def expected_duration(plan: RunPlan, params: Mapping[str, str]) -> str:
    """Return in words how long a run will take, or why that is not known.

    Args:
        plan: of the run.
        params: its configuration, flattened.
    """
    folder = plan.paths.root.parent
    journals = sorted(folder.glob("*/journal.jsonl"), key=_changed, reverse=True)
    wanted = _cut(params)
    for path in journals[:_MOST_RUNS]:
        pace = Pace()
        try:
            for record in read(path):
                pace.observe(record)
        except StorageError:
            continue  # somebody else's
        rate = pace.steps_per_s()
        if rate and _cut(pace.params) == wanted:
            return _in_words(plan, pace, rate, RunPaths(path.parent).root.name)
    if not journals:
        return f"unknown: {plan.config.job.name} has not run here yet"
    return "unknown: no recent run of this job had the same batch, workers and arguments"


def _in_words(plan: RunPlan, pace: Pace, rate: float, run: str) -> str:
    num_evaluations = 0
    if plan.eval_steps:
        num_evaluations = 1
        if plan.eval_period is not None:
            num_evaluations = max(1, int(plan.total_steps / plan.eval_period))
    each_s = sum(pace.eval_s) / len(pace.eval_s) if pace.eval_s else 0.0
    steps_s, evaluations_s = plan.total_steps / rate, num_evaluations * each_s
    total_s = max(0.0, pace.start_s) + steps_s + evaluations_s
    return (
        f"about {_length(total_s)}: {plan.total_steps:,} steps at {rate:,.1f} steps/s, "
        f"{_length(evaluations_s)} of evaluation, {_length(max(0.0, pace.start_s))} to start; as "
        f"{run} did"
    )


def _cut(params: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in params.items() if key.startswith(_SAME)}


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _length(seconds: float) -> str:
    """Return a length of time: `8 s`, `12 min`, `3.4 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
