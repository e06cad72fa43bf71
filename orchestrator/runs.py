"""Run folders: which one a command trains in, and who holds it."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from orchestrator.errors import ConfigError, RestoreError, StorageError
from orchestrator.spec.overrides import key_of
from orchestrator.spec.paths import RunPaths
from orchestrator.spec.plan import RunPlan
from orchestrator.spec.schema import RunConfig
from orchestrator.spec.secrets import MASK

# What decides which examples a step uses, and so what the run computes.
_SAME_RUN = ("job.class_name", "train.global_batch_size", "train.seed", "data.num_examples")
# What says how one start of a run is made, not what the run is.
_ONE_START = ("resume", "resume_allow", "run_name")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Past:
    """What the journal of a run folder tells about it.

    Attributes:
        paths: of the run.
        status: FINISHED, FAILED or KILLED; None if it never ended.
        attempts: how many attempts were started.
        mlflow_run: MLflow's id, if it was ever known.
        facts: the record the run was started with.
        last_step: the last step any attempt reported.
        start_time: Unix seconds at which it was first started; 0 if nothing is known.
    """

    paths: RunPaths
    status: str | None
    attempts: int
    mlflow_run: str | None
    facts: dict[str, Any]
    last_step: int
    start_time: float

    @property
    def name(self) -> str:
        """The run's name."""
        return self.paths.root.name


ReadJournal = Callable[[Path], Iterator[dict[str, Any]]]


def look_back(paths: RunPaths, read: ReadJournal) -> Past:
    """Read what a run folder's journal tells."""
    status, attempts, mlflow_run, last_step = None, 0, None, 0
    facts: dict[str, Any] = {}
    for record in read(paths.journal):
        kind = record.get("kind")
        if kind == "RunStarted":
            facts = facts or record
            status = None
        elif kind == "AttemptStarted":
            attempts = max(attempts, int(record["attempt"]))
        elif kind == "RunEnded":
            status = record["status"]
        elif kind == "MlflowRun":
            mlflow_run = record["run_id"]
        elif kind == "BlockDone":
            last_step = max(last_step, int(record["first_step"]) + int(record["num_steps"]))
    start_time = float(facts.get("time", 0.0))
    return Past(paths, status, attempts, mlflow_run, facts, last_step, start_time)


def new_run_name(now: datetime, token: str) -> str:
    """Return `<date>-<time>-<token>`, such as `20260301-142501-3fa9`."""
    return f"{now:%Y%m%d-%H%M%S}-{token}"


def create_run(config: RunConfig, cwd: Path) -> RunPaths:
    """Create the folder of a new run; two commands never get the same one.

    Raises:
        ConfigError: `run_name` is taken.
        StorageError: the folder cannot be made.
    """
    parent = (cwd / config.runs_dir).resolve() / config.job.name
    while True:
        name = config.run_name or new_run_name(datetime.now(), secrets.token_hex(2))
        root = parent / name
        try:
            parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cannot_make(parent, error) from error
        try:
            root.mkdir()
        except FileExistsError as error:
            if config.run_name is None:
                continue
            raise ConfigError(
                f"run_name={name}: {root} exists already; choose another name, or continue it "
                f"with resume={name}"
            ) from error
        except OSError as error:
            raise _cannot_make(root, error) from error
        return RunPaths(root)


def _cannot_make(folder: Path, error: OSError) -> StorageError:
    return StorageError(
        f"cannot make the folder {folder}: {error.strerror}; set runs_dir to a folder that can be "
        "written"
    )


def find_run(config: RunConfig, cwd: Path, read: ReadJournal) -> Past | None:
    """Find the run that `resume` means; None for `resume=auto` when there is nothing to resume.

    Raises:
        RestoreError: there is no such run.
    """
    assert config.resume is not None
    parent = (cwd / config.runs_dir).resolve() / config.job.name
    pasts = [look_back(RunPaths(path.parent), read) for path in parent.glob("*/journal.jsonl")]
    pasts.sort(key=lambda past: (past.start_time, past.name), reverse=True)
    if config.resume in ("latest", "auto"):
        unfinished = [past for past in pasts if past.status != "FINISHED"]
        if unfinished:
            return unfinished[0]
        if config.resume == "auto":
            return None
        raise RestoreError(
            f"resume=latest: no unfinished run of job {config.job.name} in {parent}"
            f"{_finished_runs(pasts)}; leave resume out to start a new run"
        )
    for past in pasts:
        if config.resume in (past.name, past.mlflow_run):
            return past
    names = ", ".join(past.name for past in pasts[:5]) or "none"
    raise RestoreError(
        f"resume={config.resume}: no run of job {config.job.name} in {parent} has this name or "
        f"MLflow id; newest there: {names}"
    )


def _finished_runs(pasts: list[Past]) -> str:
    return f" ({len(pasts)} finished)" if pasts else " (there are no runs at all)"


def read_overrides(paths: RunPaths) -> list[str]:
    """Return the overrides a run was started with, without those that are about one start."""
    try:
        lines = paths.overrides.read_text().splitlines()
    except FileNotFoundError:
        return []
    return [line for line in lines if key_of(line) not in _ONE_START and MASK not in line]


def merge_overrides(before: list[str], given: list[str]) -> list[str]:
    """Return both, where what is given now replaces the same key of before."""
    keys = {key_of(override) for override in given}
    return [*(override for override in before if key_of(override) not in keys), *given]


def compare(past: Past, plan: RunPlan, params: Mapping[str, str]) -> list[str]:
    """Compare a run with the configuration that shall continue it.

    Returns:
        What else has changed, for the user to read.

    Raises:
        RestoreError: a key that decides what the run computes differs and `resume_allow` does not
            name it, or the run is beyond the last step already.
    """
    if plan.total_steps < past.last_step:
        raise RestoreError(
            f"resuming {past.name}: it has made {past.last_step:,} steps, the plan ends at "
            f"{plan.total_steps:,}; raise train.steps or train.epochs"
        )
    before = past.facts.get("facts", {}).get("params", {})
    changed = {
        key: f"{key}={value} was {before[key]}"
        for key, value in params.items()
        if key in before and before[key] != value and key not in _ONE_START
    }
    refused = [
        line
        for key, line in changed.items()
        if key in _SAME_RUN and key not in plan.config.resume_allow
    ]
    if refused:
        names = ",".join(line.split("=")[0] for line in refused)
        raise RestoreError(
            f"resuming {past.name} with other settings: {'; '.join(refused)}. They decide which "
            f"examples each step sees; resume with the old ones, or say resume_allow=[{names}]"
        )
    return [f"since the run was started: {line}" for line in changed.values()]


class Lease:
    """The right to write in a run folder: a lock that ends with the process that holds it."""

    def __init__(self, paths: RunPaths):
        """Take the lease.

        Raises:
            StorageError: another living process holds it; the message names the holder.
        """
        self._path = paths.lease
        try:
            self._file = self._path.open("a+")
        except OSError as error:
            raise StorageError(f"cannot write in the run folder: {error}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.seek(0)
            raise StorageError(
                f"the run {paths.root.name} is held by {_holder(self._file.read())}; wait for it "
                "to end, or stop it"
            ) from error
        self._file.seek(0)
        self._file.truncate()
        boot_id = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
        holder = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "boot_id": boot_id,
            "since": time.time(),
        }
        self._file.write(json.dumps(holder))
        self._file.flush()

    def release(self) -> None:
        """Give the lease back."""
        self._file.close()


def _holder(text: str) -> str:
    try:
        holder = json.loads(text)
        since = datetime.fromtimestamp(holder["since"])
        return f"process {holder['pid']} on {holder['host']} since {since:%Y-%m-%d %H:%M:%S}"
    except (ValueError, KeyError, TypeError):
        return "another process"
