"""Run folders: which one a command trains in, and who holds it."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from orchestrator.errors import ConfigError, RestoreError, StorageError
from orchestrator.spec.overrides import GROUPS, key_of
from orchestrator.spec.paths import RunPaths
from orchestrator.spec.schema import RunConfig
from orchestrator.spec.secrets import MASK
from orchestrator.track.facts import FORMAT
from orchestrator.train.store import start_of

# What says how one start of a run is made, not what the run is.
ONE_START = ("resume", "resume_allow", "run_name")


@dataclass(frozen=True, slots=True)
class Past:
    """What the journal of a run folder tells about it.

    Attributes:
        paths: of the run.
        status: FINISHED, FAILED or KILLED; None if it never ended.
        attempts: how many attempts were started.
        mlflow_run: MLflow's id, if it was ever known.
        facts: the record the run was started with.
        last: the record of its last start.
        last_step: the last step that the chief of any attempt reported.
        last_evaluation: the step of the last evaluation that was reported; 0 if none was.
        starts: the step that each attempt went on from.
        digests: of the data of each split, as it was trained on last.
        start_time: Unix seconds at which it was first started; 0 if nothing is known.
        format: of its records.
        notice: why this run was chosen, for the user to read.
    """

    paths: RunPaths
    status: str | None
    attempts: int
    mlflow_run: str | None
    facts: dict[str, Any]
    last: dict[str, Any]
    last_step: int
    last_evaluation: int
    starts: Mapping[int, int]
    digests: Mapping[str, str]
    start_time: float
    format: int = FORMAT
    notice: str = ""

    @property
    def name(self) -> str:
        """The run's name."""
        return self.paths.root.name


ReadJournal = Callable[[Path], Iterator[dict[str, Any]]]


def look_back(paths: RunPaths, read: ReadJournal) -> Past:
    """Read what a run folder's journal tells."""
    status, attempts, mlflow_run, last_step, last_evaluation, format_ = None, 0, None, 0, 0, 0
    facts: dict[str, Any] = {}
    last: dict[str, Any] = {}
    starts: dict[int, int] = {}
    digests: dict[str, str] = {}
    for record in read(paths.journal):
        kind = record.get("kind")
        if kind == "RunStarted":
            facts, last = facts or record, record
            status = None
            format_ = max(format_, int(record.get("format", FORMAT)))
        elif kind == "AttemptStarted":
            attempts = max(attempts, int(record["attempt"]))
            start = starts[int(record["attempt"])] = start_of(record.get("restore_from"))
            last_evaluation = min(last_evaluation, start)  # what came later is made again
        elif kind == "DataUsed":
            digests[record["split"]] = record["digest"]
        elif kind == "Evaluated":
            last_evaluation = max(last_evaluation, int(record["step"]))
        elif kind == "RunEnded":
            status = record["status"]
        elif kind == "MlflowRun":
            mlflow_run = record["run_id"]
        elif kind == "BlockDone" and record["worker"] == 0:  # the losses are the chief's to tell
            last_step = max(last_step, int(record["first_step"]) + int(record["num_steps"]))
    start_time = float(facts.get("time", 0.0))
    return Past(
        paths=paths,
        status=status,
        attempts=attempts,
        mlflow_run=mlflow_run,
        facts=facts,
        last=last,
        last_step=last_step,
        last_evaluation=last_evaluation,
        starts=starts,
        digests=digests,
        start_time=start_time,
        format=format_ or FORMAT,
    )


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
        RestoreError: there is no such run of this job, or a newer version has recorded it.
    """
    assert config.resume is not None
    jobs_dir = (cwd / config.runs_dir).resolve()
    pasts = _runs_of(jobs_dir / config.job.name, read, config.resume)
    if config.resume not in ("latest", "auto"):
        return _readable(_named(config, jobs_dir, pasts, read))
    unfinished = [past for past in pasts if past.status != "FINISHED"]
    if unfinished:
        return _readable(_chosen(unfinished, config.resume))
    if config.resume == "auto":
        return None
    raise RestoreError(
        f"resume=latest: no unfinished run of job {config.job.name} in "
        f"{jobs_dir / config.job.name}{_finished_runs(pasts)}; leave resume out to start a new run"
    )


def look_again(past: Past, config: RunConfig, read: ReadJournal) -> Past:
    """Read once more what a run's journal tells, when its lease is held: nobody else writes there.

    Raises:
        RestoreError: it has finished meanwhile, and an unfinished run was meant.
    """
    again = look_back(past.paths, read)
    if again.status == "FINISHED" and config.resume in ("latest", "auto"):
        raise RestoreError(
            f"resume={config.resume}: the run {past.name} has finished meanwhile; say it again for "
            "another one"
        )
    return dataclasses.replace(again, notice=past.notice)


def _runs_of(folder: Path, read: ReadJournal, resume: str | None) -> list[Past]:
    """Return the runs of a job, the newest first.

    Raises:
        StorageError: one cannot be read, and it may be the one that `resume` means.
    """
    pasts = []
    for path in folder.glob("*/journal.jsonl"):
        try:
            pasts.append(look_back(RunPaths(path.parent), read))
        except StorageError:
            if resume in ("latest", "auto", path.parent.name):
                raise
    return sorted(pasts, key=lambda past: (past.start_time, past.name), reverse=True)


def _chosen(unfinished: list[Past], resume: str) -> Past:
    """Return the newest run with the reason."""
    newest = unfinished[0]
    others = f", the newest of {len(unfinished)} unfinished runs" if len(unfinished) > 1 else ""
    how = f"{newest.status or 'not ended'}, {newest.last_step:,} steps"
    return dataclasses.replace(newest, notice=f"resume={resume}: {newest.name} ({how}){others}")


def _named(config: RunConfig, jobs_dir: Path, pasts: list[Past], read: ReadJournal) -> Past:
    """Return the run with a name or an MLflow id."""
    for past in pasts:
        if config.resume in (past.name, past.mlflow_run):
            return past
    for folder in sorted(jobs_dir.glob("*/")):
        for past in _runs_of(folder, read, config.resume) if folder.name != config.job.name else []:
            if config.resume in (past.name, past.mlflow_run):
                raise RestoreError(
                    f"resume={config.resume} is a run of job {folder.name}, not of "
                    f"{config.job.name}; train it with job={folder.name}, or begin with its "
                    f"weights: train.init_from={past.paths.checkpoints_dir}/step-..."
                )
    names = ", ".join(past.name for past in pasts[:5]) or "none"
    raise RestoreError(
        f"resume={config.resume}: no run of job {config.job.name} in "
        f"{jobs_dir / config.job.name} has this name or MLflow id; newest there: {names}"
    )


def _readable(past: Past) -> Past:
    """Refuse records that mean something this version does not know."""
    if past.format <= FORMAT:
        return past
    tags = past.facts.get("facts", {}).get("tags", {})
    version = tags.get("orchestrator.version.orchestrator")
    by = f" by version {version}" if version else ""
    raise RestoreError(
        f"the run {past.name} was recorded in format {past.format}{by}; this version reads up to "
        f"{FORMAT}. Resume it with the version that made it"
    )


def _finished_runs(pasts: list[Past]) -> str:
    return f" ({len(pasts)} finished)" if pasts else " (there are no runs at all)"


def read_overrides(paths: RunPaths) -> list[str]:
    """Return the overrides a run was started with, without those that are about one start."""
    try:
        lines = paths.overrides.read_text().splitlines()
    except FileNotFoundError:
        return []
    return [line for line in lines if key_of(line) not in ONE_START and MASK not in line]


def merge_overrides(before: list[str], given: list[str]) -> list[str]:
    """Return both, where what is given now replaces the same key of before.

    Another choice in a group, such as `strategy=mirrored`, also replaces what was said about the
    keys of the earlier choice.
    """
    keys = {key_of(override) for override in given}
    groups = tuple(
        f"{key}."
        for key in keys & set(GROUPS) - {"job"}
        if not {o for o in given if key_of(o) == key} <= set(before)
    )
    kept = [o for o in before if key_of(o) not in keys and not key_of(o).startswith(groups)]
    return [*kept, *given]
