"""Whether a disturbed run left what the undisturbed one left: weights, journal, MLflow history."""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.comparison import Lineage, lineage
from orchestrator.spec.messages import DRIVER_KILLED, NO_ATTEMPT
from orchestrator.spec.paths import RunPaths
from orchestrator.track.goodput import goodput
from orchestrator.track.journal import read
from orchestrator.train import store

# Metrics whose values follow from the weights; of the others only the steps do.
_COMPUTED = ("train/", "eval/")
_BY_STEP = (*_COMPUTED, "perf/", "worker/")
_BUNDLE = "variables.data"
_SHOWN = 3
# The part of a run's time that its goodput may leave out or count twice.
_UNACCOUNTED = 0.01


@dataclass(frozen=True, slots=True)
class Difference:
    """What differs.

    Attributes:
        step: from which step on; None where that cannot be told.
        is_of_all: whether any fault may be to blame, where there is no step.
        on_hosts: whether it is the run on several hosts that differs.
    """

    text: str
    step: int | None = None
    is_of_all: bool = False
    on_hosts: bool = False


@dataclass(frozen=True, slots=True)
class Left:
    """What a run left: its folder, and MLflow's database, which holds that run alone.

    Attributes:
        database: None if the run was made without MLflow.
    """

    paths: RunPaths
    database: Path | None


def judge(undisturbed: Left, disturbed: Left, total_steps: int) -> list[Difference]:
    """Compare a run with the undisturbed one; an empty list means that they are the same."""
    records = list(read(disturbed.paths.journal))
    one, other = lineage(read(undisturbed.paths.journal)), lineage(records)
    return [
        *_status(other),
        *_steps(other, total_steps),
        *_losses(one, other),
        *_examples(one, other, total_steps),
        *_late_words(records),
        *_goodput(records),
        *_weights(undisturbed.paths, disturbed.paths, total_steps),
        *_record(undisturbed.database, disturbed.database),
        *_litter(disturbed.paths),
    ]


def history(database: Path) -> dict[tuple[str, int], list[float]]:
    """Return every value that MLflow's own table has, by metric and step.

    The table itself is read, not the client's answer: a point that is stored twice shows.
    """
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    for key, step, value, is_nan in _rows(database, "select key, step, value, is_nan from metrics"):
        if key.startswith(_BY_STEP):
            found[key, step].append(float("nan") if is_nan else value)
    return found


def _rows(database: Path, query: str) -> list[tuple[Any, ...]]:
    if not database.exists():
        return []
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        return connection.execute(query).fetchall()


def _status(run: Lineage) -> list[Difference]:
    if run.status == "FINISHED":
        return []
    return [Difference(f"journal: the run is {run.status or 'not ended'}, not FINISHED")]


def _steps(run: Lineage, total_steps: int) -> list[Difference]:
    """Every step must have one loss in the lineage."""
    missing = [step for step in range(1, total_steps + 1) if step not in run.losses]
    if missing:
        return [Difference(f"journal: {len(missing)} steps are missing", missing[0])]
    beyond = [step for step in run.losses if step > total_steps]
    return [Difference("journal: steps beyond the last", beyond[0])] if beyond else []


def _losses(one: Lineage, other: Lineage) -> list[Difference]:
    off = [
        step
        for step in sorted(one.losses.keys() & other.losses.keys())
        if not _same(one.losses[step], other.losses[step])
    ]
    return [Difference(f"losses: {len(off)} steps have another one", off[0])] if off else []


def _examples(one: Lineage, other: Lineage, total_steps: int) -> list[Difference]:
    for step in sorted(one.ledgers.keys() & other.ledgers.keys()):
        if one.used_until(step) != other.used_until(step):
            return [Difference("examples: other ones were used", step)]
    ends = [run.last_step for run in (one, other)]
    if ends != [total_steps, total_steps]:
        return [Difference(f"examples: known up to step {ends[1]}, not {total_steps}")]
    return []


def _late_words(records: Sequence[Mapping[str, Any]]) -> list[Difference]:
    """Nothing may be on record of an attempt that is over."""
    newest = 0
    for record in records:
        attempt = record.get("attempt", newest)
        if record["kind"] == "AttemptStarted":
            newest = attempt
        elif NO_ATTEMPT < attempt < newest and record["kind"] not in ("Death", "Failed"):
            text = f"journal: attempt {attempt} wrote {record['kind']} after it was over"
            return [Difference(text)]
    return []


def _goodput(records: Sequence[Mapping[str, Any]]) -> list[Difference]:
    """Each second from a start of the command to its end, or its last record, has one use."""
    stretches: list[tuple[float, float]] = []
    is_open = False
    for record in records:
        time = record.get("time")
        if time is None:
            continue
        if record["kind"] == "RunStarted":
            stretches.append((time, time))
            is_open = True
        elif is_open:
            began, last = stretches[-1]
            if record.get("cause") != DRIVER_KILLED:
                stretches[-1] = began, max(last, time)
            is_open = record["kind"] != "RunEnded"
    wall_s = sum(last - began for began, last in stretches)
    used_s = sum(goodput(records).seconds().values())
    if abs(used_s - wall_s) <= _UNACCOUNTED * wall_s:
        return []
    return [Difference(f"goodput: {used_s:.1f} s are accounted for, of {wall_s:.1f} s")]


def _weights(undisturbed: RunPaths, disturbed: RunPaths, total_steps: int) -> list[Difference]:
    """Compare the final checkpoints by the SHA-256 of all variables."""
    sums = [_final_sum(paths.checkpoints_dir, total_steps) for paths in (undisturbed, disturbed)]
    if None in sums:
        return [Difference(f"weights: no valid checkpoint of step {total_steps}")]
    if sums[0] == sums[1]:
        return []
    return [Difference("weights: the final checkpoints have another SHA-256", is_of_all=True)]


def _final_sum(checkpoints_dir: Path, step: int) -> list[str] | None:
    path = checkpoints_dir / store.checkpoint_name(step)
    try:
        store.verify(path)
        files = store.read_manifest(path)["files"]
    except (OSError, ValueError):
        return None
    return [entry["sha256"] for name, entry in sorted(files.items()) if name.startswith(_BUNDLE)]


def _record(undisturbed: Path | None, disturbed: Path | None) -> list[Difference]:
    if undisturbed is None or disturbed is None:
        return []
    one = history(undisturbed)
    if not one:
        return [Difference(f"MLflow: the undisturbed run has no points in {undisturbed}")]
    found = _history(one, history(disturbed)) + _twice(disturbed)
    states = [status for (status,) in _rows(disturbed, "select status from runs")]
    if states != ["FINISHED"]:
        shown = ", ".join(states) or "none"
        found.append(Difference(f"MLflow: one run that is FINISHED is wanted, there are: {shown}"))
    return found


def _twice(database: Path) -> list[Difference]:
    """Find points that are there twice, of metrics whose steps depend on the time or on faults.

    They are those of nodes (`system/`), of the run's time (`goodput/`) and of the model.
    """
    rows = _rows(database, "select key, step from metrics group by key, step having count(*) > 1")
    points = [(key, step) for key, step in rows if not key.startswith(_BY_STEP)]
    shown = ", ".join(f"{key} at {step}" for key, step in points[:_SHOWN])
    return [Difference(f"MLflow: {len(points)} points are there twice: {shown}")] if points else []


def _history(
    one: Mapping[tuple[str, int], list[float]], other: Mapping[tuple[str, int], list[float]]
) -> list[Difference]:
    found = []
    twice = sorted(key for key, values in other.items() if len(values) > 1)
    lost, extra = sorted(one.keys() - other.keys()), sorted(other.keys() - one.keys())
    off = sorted(
        key
        for key in one.keys() & other.keys()
        if key[0].startswith(_COMPUTED) and not _same(one[key][0], other[key][0])
    )
    for what, points in (
        ("are there twice", twice),
        ("are lost", lost),
        ("have no counterpart", extra),
        ("have another value", off),
    ):
        if points:
            shown = ", ".join(f"{key} at {step}" for key, step in points[:_SHOWN])
            step = min(step for _, step in points)
            found.append(Difference(f"MLflow: {len(points)} points {what}: {shown}", step))
    return found


def _litter(paths: RunPaths) -> list[Difference]:
    folder = paths.checkpoints_dir
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    left = sorted(name for name in names if not name.startswith("step-"))
    return [Difference(f"left behind: checkpoints/{', checkpoints/'.join(left)}")] if left else []


def _same(left: float, right: float) -> bool:
    return left == right or (left != left and right != right)
