"""What a run's journal has to tell to a reader: settings, results, events and times."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.spec.paths import RunPaths
from orchestrator.track.curve import Curve
from orchestrator.track.failure import FirstFailure
from orchestrator.track.goodput import Goodput
from orchestrator.track.nodes import Nodes
from orchestrator.track.points import Points
from orchestrator.track.resume import resume_command

_CHIEF = 0
# A story of more events is told by its first and last ones.
MAX_EVENTS = 200


@dataclass(frozen=True, slots=True)
class Event:
    """Something worth a line: Unix seconds, what happened, and whether it is bad news."""

    time: float
    text: str
    is_failure: bool = False


@dataclass(slots=True)
class Account:
    """The content of a report.

    Attributes:
        facts: of the newest start of the run.
        began: Unix seconds of the first start.
        ended: Unix seconds of the last record.
        status: FINISHED, FAILED or KILLED; None while it runs.
        cause: why it did not finish.
        failure: what failed first.
        starts: how many commands have trained it.
        attempts: how many groups of workers were started.
        last_step: the last step done.
        num_saved: checkpoints written.
        nodes: that it was on.
        workers: host, devices and threads of each worker of the newest attempt.
        versions: of the packages in the workers.
        num_parameters: of the model; None before it was built.
        data: the DataUsed record of each split.
        evaluated: the last evaluation's metrics.
        exported: the Exported record, or None.
        series: (step, value) of each metric, as MLflow has it; of very many, evenly spaced ones.
        events: in the order they happened.
        goodput: where the time went.
        commands: what can be done next: a word and the command to copy.
    """

    facts: Mapping[str, Any] = field(default_factory=dict)
    began: float = 0.0
    ended: float = 0.0
    status: str | None = None
    cause: str = ""
    failure: FirstFailure = field(default_factory=FirstFailure)
    starts: int = 0
    attempts: int = 0
    last_step: int = 0
    num_saved: int = 0
    nodes: Nodes = field(default_factory=Nodes)
    workers: dict[int, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    num_parameters: int | None = None
    data: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    evaluated: Mapping[str, float] = field(default_factory=dict)
    exported: Mapping[str, Any] | None = None
    series: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    goodput: Goodput = field(default_factory=Goodput)
    commands: list[tuple[str, str]] = field(default_factory=list)

    @property
    def first_failure(self) -> str:
        """What failed first, if the run did not get over it and the cause does not tell it."""
        has_failed = self.status in ("FAILED", "KILLED")
        return self.failure.text if has_failed and self.failure.error not in self.cause else ""

    def _tell(self, record: Mapping[str, Any], text: str, *, is_failure: bool = False) -> None:
        self.events.append(Event(float(record.get("time", self.ended)), text, is_failure))

    def observe(self, record: Mapping[str, Any]) -> None:
        """Take note of one record of the journal."""
        self.goodput.feed(record)
        self.failure.feed(record)
        self.ended = max(self.ended, float(record.get("time", 0.0)))
        match record.get("kind"):
            case "RunStarted":
                self._started(record)
            case "AttemptStarted":
                self._attempt(record)
            case "Ready":
                self._ready(record)
            case "NodeFound":
                self.nodes.add(record)
            case "DataUsed":
                self.data[record["split"]] = record
            case "BlockDone" if record["worker"] == _CHIEF:
                self.last_step = record["first_step"] + record["num_steps"]
            case "Evaluated":
                self.evaluated = record["metrics"]
            case "Saved":
                self.num_saved += 1
            case "Exported":
                self.exported = record
                self._tell(record, f"SavedModel of step {record['step']:,} written")
            case "Notice":
                self._tell(record, record["text"])
            case "Failed" | "Death":
                self._tell(record, f"worker {record['worker']}: {record['error']}", is_failure=True)
            case "RunEnded":
                self.status, self.cause = record["status"], record["cause"]
                self.commands = [(word, text) for word, text in record.get("commands", ())]
                if not self.commands and self.status != "FINISHED":  # its driver was killed
                    paths = RunPaths(Path(self.facts["root"]))
                    self.commands = [("resume", resume_command(paths, None, self.facts))]
                self._tell(record, f"ended: {self.status.lower()}")

    def _started(self, record: Mapping[str, Any]) -> None:
        self.began = self.began or record["time"]
        self.facts, self.status, self.cause = record["facts"], None, ""
        self.starts += 1
        self._tell(record, "started" if self.starts == 1 else "started again")

    def _attempt(self, record: Mapping[str, Any]) -> None:
        self.attempts += 1
        self.workers = {}
        origin = record["restore_from"]
        where = f"from {origin.rpartition('/')[2]}" if origin else "from step 0"
        self._tell(record, f"attempt {record['attempt']} {where}")

    def _ready(self, record: Mapping[str, Any]) -> None:
        devices = ", ".join(record["devices"])
        self.workers[record["worker"]] = (
            f"{record['host']}: {devices}, {record['cpu_threads']} threads"
        )
        self.versions, self.num_parameters = record["versions"], record["num_parameters"]
        if record["worker"] == _CHIEF:
            self.last_step = record["start_step"]


def account(records: Iterable[Mapping[str, Any]]) -> Account:
    """Read a run's journal."""
    found = Account()
    points: Points | None = None
    curves: dict[str, Curve] = defaultdict(Curve)
    for record in records:
        found.observe(record)
        if points is None and record.get("kind") == "RunStarted":
            facts = record["facts"]
            points = Points(facts["log_every_steps"], facts["global_batch_size"])
        for point in points.feed(record) if points is not None else ():
            curves[point.key].add(point.step, point.value)
    found.series = {key: curve.points() for key, curve in curves.items()}
    return found
