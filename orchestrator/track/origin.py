"""What went into an exported model, from the journal of its run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.spec.fingerprint import fingerprint

_JUDGED_BY = ("best.metric", "best.mode", "best.min_delta")
# Evaluations made again under other workers agree to about so much, relative.
_SAME = 1e-4


@dataclass(slots=True)
class Origin:
    """The lineage of the model that a run exported last; steps made again count once.

    Attributes:
        facts: of the newest start of the run.
        data: the DataUsed record of each split.
        ledgers: sums over all workers of what blocks used, by the last step of each block.
        evaluations: the Evaluated record at each step.
        told: the first one at each step, which the charts have, however often it was made again.
        exported: the Exported record, or None.
        is_new: whether the newest start of the run has exported it, and not an earlier one.
    """

    facts: Mapping[str, Any] = field(default_factory=dict)
    data: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    ledgers: dict[int, int] = field(default_factory=dict)
    evaluations: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    told: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    exported: Mapping[str, Any] | None = None
    is_new: bool = False
    _attempt: int = 0
    _judged_from: int = 0

    def observe(self, record: Mapping[str, Any]) -> None:
        """Take note of one record of the journal."""
        match record.get("kind"):
            case "RunStarted":
                self._start(record["facts"])
            case "Ready" if record["attempt"] > self._attempt:
                self._attempt = record["attempt"]
                self._forget_after(record["start_step"])
            case "DataUsed":
                self.data[record["split"]] = record
            case "BlockDone":
                end = record["first_step"] + record["num_steps"]
                self.ledgers[end] = (self.ledgers.get(end, 0) + record["ledger"]) % 2**64
            case "Evaluated":
                self.evaluations[record["step"]] = record
                self.told.setdefault(record["step"], record)
            case "Exported":
                self.exported, self.is_new = record, True

    @property
    def step(self) -> int:
        """The step whose weights the model has."""
        return int(self.exported["step"]) if self.exported is not None else self.last_step

    @property
    def last_step(self) -> int:
        """The last step done."""
        return max(self.ledgers, default=0)

    def params(self) -> dict[str, str]:
        """Return the lineage by name, as MLflow keeps it with the model."""
        settings, tags = self.facts.get("params", {}), self.facts.get("tags", {})
        ledger = sum(used for end, used in self.ledgers.items() if end <= self.step) % 2**64
        found = {
            "run": self.facts.get("run", ""),
            "job": settings.get("job.class_name", ""),
            "checkpoint_step": str(self.step),
            "weights": settings.get("export.weights", ""),
            "config_fingerprint": fingerprint(settings),
            "ledger": f"{ledger:016x}",
            "code": tags.get("mlflow.source.git.commit", ""),
        }
        for split, used in self.data.items():
            found[f"{split}_data"] = f"{used['name']} {used['digest']}"
        return {key: value for key, value in found.items() if value}

    def complaint(self) -> str:
        """Tell what is wrong with the step that was exported; nothing if it is the right one.

        The worker chose it by what its checkpoints say; the journal has the evaluations themselves.
        """
        if self.exported is None:
            return "no worker has told of an export"
        settings = self.facts.get("params", {})
        values = self._judged(settings.get("best.metric", ""))
        if settings.get("export.weights") != "best" or not values:
            if self.step == self.last_step:
                return ""
            return f"it has the weights of step {self.step:,}, training ended at {self.last_step:,}"
        if self.step <= self._judged_from:
            return ""  # judged by other rules than today's
        sign = -1.0 if settings.get("best.mode") == "min" else 1.0
        best = max(values, key=lambda step: sign * values[step])
        slack = float(settings.get("best.min_delta") or 0.0) + _SAME * abs(values[best])
        if self.step == best or sign * (values[best] - values.get(self.step, math.nan)) <= slack:
            return ""
        return (
            f"it has the weights of step {self.step:,}, and the best evaluation was at step "
            f"{best:,}: eval/{settings['best.metric']} {values[best]:.6g}"
        )

    def _judged(self, metric: str) -> dict[int, float]:
        """Return the metric's value by step, as far as evaluations were judged by it."""
        return {
            step: record["metrics"][metric]
            for step, record in self.evaluations.items()
            if step > self._judged_from and not math.isnan(record["metrics"].get(metric, math.nan))
        }

    def _start(self, facts: Mapping[str, Any]) -> None:
        before, now = self.facts.get("params", {}), facts["params"]
        self.facts, self.is_new = facts, False
        if any(before.get(key) != now.get(key) for key in _JUDGED_BY):
            # What the run evaluated before was judged otherwise, or not at all.
            self._judged_from = self.last_step

    def _forget_after(self, step: int) -> None:
        """Drop what was done after the checkpoint that a new attempt begins with."""
        self.ledgers = {end: used for end, used in self.ledgers.items() if end <= step}
        self.evaluations = {at: found for at, found in self.evaluations.items() if at <= step}
        self._judged_from = min(self._judged_from, step)


def origin(records: Iterable[Mapping[str, Any]]) -> Origin:
    """Read a run's journal."""
    found = Origin()
    for record in records:
        found.observe(record)
    return found
