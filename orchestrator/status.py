"""`runs status`: one run as its journal and its lease show it, whether its driver lives or not."""

from __future__ import annotations

import glob
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from orchestrator.errors import ConfigError, ExitCode
from orchestrator.lease import Holder, holder_of
from orchestrator.listing import age
from orchestrator.spec.messages import Cause, Phase
from orchestrator.spec.paths import RunPaths, typed_path
from orchestrator.terminal import duration, metrics_text, printable, size
from orchestrator.track.failure import FirstFailure
from orchestrator.track.goodput import Goodput
from orchestrator.track.journal import read
from orchestrator.track.resume import TOP_FOLDER, resume_command
from orchestrator.train import store

_CHIEF = 0
# Smaller shares of the time are not worth a word.
_SMALLEST_SHARE = 0.005


@dataclass(slots=True)
class WorkerStatus:
    """A worker of the newest attempt: where it is, what it does, and since when (Unix seconds)."""

    where: str = ""
    phase: str = Phase.starting.value
    since: float = 0.0


@dataclass(slots=True)
class Status:
    """What the records of a journal tell about a run.

    Attributes:
        facts: of the newest start.
        status: FINISHED, FAILED or KILLED; None if it has not ended.
        cause: why it did not finish.
        changed: Unix seconds since which `status` holds.
        attempt: the newest one; 0 before the first.
        step: the last step done in it.
        total_steps: where the plan ends; 0 if that is not known.
        evaluated: the last evaluation: its step and metrics.
        saved: the newest Saved record.
        mlflow_run: MLflow's id.
        failure: what failed first, of all attempts.
        num_failures: workers that failed or were lost by themselves.
    """

    facts: Mapping[str, Any] = field(default_factory=dict)
    status: str | None = None
    cause: str = ""
    changed: float = 0.0
    attempt: int = 0
    step: int = 0
    total_steps: int = 0
    evaluated: tuple[int, Mapping[str, float]] | None = None
    saved: Mapping[str, Any] | None = None
    mlflow_run: str | None = None
    workers: dict[int, WorkerStatus] = field(default_factory=dict)
    failure: FirstFailure = field(default_factory=FirstFailure)
    num_failures: int = 0
    goodput: Goodput = field(default_factory=Goodput)

    def observe(self, record: Mapping[str, Any]) -> None:
        """Take note of one record of the journal."""
        self.goodput.feed(record)
        self.failure.feed(record)
        match record.get("kind"):
            case "RunStarted":
                self.facts, self.status, self.cause = record["facts"], None, ""
                self.changed, self.workers = record["time"], {}
            case "AttemptStarted":
                self._attempt_started(record)
            case "Beacon":
                self._enter(record, record["phase"])
            case "Ready":
                worker = self._worker(record)
                worker.where = f"{record['host']}: {', '.join(record['devices'])}"
                if record["worker"] == _CHIEF:
                    self.step = record["start_step"]
            case "BlockDone":
                self._enter(record, Phase.stepping.value)
                if record["worker"] == _CHIEF:
                    self.step = record["first_step"] + record["num_steps"]
            case "Evaluated":
                self.evaluated = (record["step"], record["metrics"])
            case "Saved":
                self.saved = record
            case "MlflowRun":
                self.mlflow_run = record["run_id"]
            case "Failed" | "Death":
                self._failed(record)
            case "RunEnded":
                self.status, self.cause = record["status"], record.get("cause", "")
                self.changed = record["time"]

    def _attempt_started(self, record: Mapping[str, Any]) -> None:
        self.attempt = record["attempt"]
        self.total_steps = record.get("total_steps", self.total_steps)
        self.workers = {
            worker: WorkerStatus(since=record["time"])
            for worker in range(record.get("num_workers", 0))
        }

    def _worker(self, record: Mapping[str, Any]) -> WorkerStatus:
        return self.workers.setdefault(record["worker"], WorkerStatus(since=record["time"]))

    def _enter(self, record: Mapping[str, Any], phase: str) -> None:
        worker = self._worker(record)
        if worker.phase != phase:
            worker.phase, worker.since = phase, record["time"]

    def _failed(self, record: Mapping[str, Any]) -> None:
        self._enter(record, "failed" if record["kind"] == "Failed" else "lost")
        self.num_failures += record.get("cause") != Cause.collateral.value


def read_status(paths: RunPaths) -> Status:
    """Return what a run's journal tells."""
    return observed(read(paths.journal))


def observed(records: Iterable[Mapping[str, Any]]) -> Status:
    """Return what records tell."""
    status = Status()
    for record in records:
        status.observe(record)
    return status


def find_run_folder(run: str, runs_dir: str, cwd: Path) -> RunPaths:
    """Find a run by its folder, by `<job>/<run>` or by its bare name below `runs_dir`.

    Raises:
        ConfigError: there is none, or several jobs have one of this name.
    """
    top = typed_path(runs_dir, cwd)
    for folder in (cwd / run, cwd / TOP_FOLDER / run, top / run):
        if _is_run(folder):
            return RunPaths(folder.resolve())
    named = top.glob(f"*/{glob.escape(run)}") if "/" not in run else []
    found = [path for path in named if _is_run(path)]
    if len(found) == 1:
        return RunPaths(found[0])
    if found:
        names = " or ".join(f"{path.parent.name}/{path.name}" for path in found)
        raise ConfigError(f"{run} is a run of several jobs: say {names}")
    runs = sorted((p.parent for p in top.glob("*/*/journal.jsonl")), key=lambda path: path.name)
    newest = ", ".join(f"{path.parent.name}/{path.name}" for path in runs[-5:]) or "none"
    raise ConfigError(
        f"{run}: there is no such run in {top} (newest there: {newest}); name its folder, or say "
        "runs_dir=FOLDER, or address=http://HEAD:8265 for one that was submitted"
    )


def print_status(paths: RunPaths, address: str | None) -> ExitCode:
    """Print what is known of a run.

    Args:
        paths: of the run.
        address: of the job server it was submitted to, for the commands that are named.
    """
    lines = describe_status(paths, read_status(paths), holder_of(paths), time.time(), address)
    print(printable("\n".join(lines)))
    return ExitCode.DONE


def describe_status(
    paths: RunPaths, status: Status, holder: Holder | None, now: float, address: str | None
) -> list[str]:
    """Return the lines of `runs status`.

    Args:
        paths: of the run.
        status: by its journal.
        holder: its living driver.
        now: Unix seconds.
        address: of the job server it was submitted to.
    """
    name = f"{paths.root.parent.name}/{paths.root.name}"
    lines = [f"{name}: {_state(status, holder, now)}"]
    rows = [("folder", str(paths.root))]
    if status.attempt:
        of = ""
        if status.total_steps:
            share = 100 * status.step / status.total_steps
            of = f" of {status.total_steps:,} ({share:.0f} %)"
        rows.append(("attempt", str(status.attempt)))
        rows.append(("step", f"{status.step:,}{of}"))
    if status.evaluated is not None:
        step, metrics = status.evaluated
        rows.append(("evaluated", f"step {step:,}  {metrics_text('eval/', metrics)}"))
    rows += [
        (f"worker {index}", _worker_text(worker, holder, now))
        for index, worker in sorted(status.workers.items())
    ]
    rows.append(("checkpoints", _checkpoints(paths, status)))
    rows.append(("MLflow run", status.mlflow_run or "not there yet"))
    rows.append(("goodput", _goodput(status.goodput)))
    if status.num_failures:
        more = f" ({status.num_failures} in all)" if status.num_failures > 1 else ""
        first = status.failure
        text = f"{first.where}, {_clock(first.time)}: {first.error}"
        rows.append((f"first failure{more}", text))
    if holder is None and status.status != "FINISHED":
        rows.append(("go on", resume_command(paths, address, status.facts)))
    width = max(len(key) for key, _ in rows)
    return lines + [f"  {key:<{width}}  {text}" for key, text in rows if text]


def _state(status: Status, holder: Holder | None, now: float) -> str:
    since = f"since {_clock(status.changed)} ({age(now - status.changed)})"
    if status.status is not None:
        cause = f", {status.cause.splitlines()[0]}" if status.cause else ""
        return f"{status.status.lower()}{cause}, {since}"
    if holder is None:
        return "died: its driver is gone without a word"
    return f"running {since}, driver: {holder.words}"


def final_words(paths: RunPaths, address: str | None) -> str:
    """Return how a run that nobody holds has ended, and how it goes on."""
    status = read_status(paths)
    name = f"{paths.root.parent.name}/{paths.root.name}"
    text = f"{name}: {_state(status, None, time.time())}; step {status.step:,}"
    newest = next(iter(store.list_checkpoints(paths.checkpoints_dir)), None)
    text += f", checkpoint of step {store.step_of(newest):,}" if newest else ", no checkpoint"
    if status.status == "FINISHED":
        return text
    return f"{text}\n  go on  {resume_command(paths, address, status.facts)}"


def _worker_text(worker: WorkerStatus, holder: Holder | None, now: float) -> str:
    if holder is None:
        return f"{worker.where}  last seen {worker.phase}, {_clock(worker.since)}".strip()
    since = f"since {_clock(worker.since)} ({duration(now - worker.since)})"
    return f"{worker.where}  {worker.phase} {since}".strip()


def _checkpoints(paths: RunPaths, status: Status) -> str:
    found = store.list_checkpoints(paths.checkpoints_dir)
    if not found:
        return "none"
    text = f"{len(found)}, newest of step {store.step_of(found[0]):,}"
    if status.saved is not None:
        text += f"; last save {size(status.saved['num_bytes'])}, {_clock(status.saved['time'])}"
    return text


def _goodput(goodput: Goodput) -> str:
    if not goodput.wall_s:
        return ""
    shares = {use: seconds / goodput.wall_s for use, seconds in goodput.seconds().items()}
    told = sorted(shares.items(), key=lambda item: -item[1])
    words = [f"{use} {100 * share:.0f} %" for use, share in told if share >= _SMALLEST_SHARE]
    return f"{', '.join(words)} of {duration(goodput.wall_s)}"


def _is_run(folder: Path) -> bool:
    # False, too, where it is another user's and not to be entered.
    return os.path.isfile(RunPaths(folder).journal) or os.path.isfile(RunPaths(folder).lease)


def _clock(unix_time: float) -> str:
    """Return a time of day, with its date unless that is today."""
    when = datetime.fromtimestamp(unix_time)
    return f"{when:%H:%M:%S}" if when.date() == datetime.now().date() else f"{when:%m-%d %H:%M:%S}"
