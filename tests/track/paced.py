"""A run whose steps are journaled as a driver does it, and what MLflow has of it."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from orchestrator.track.facts import RunFacts
from orchestrator.track.journal import read
from orchestrator.track.mlflow_projection import Report
from orchestrator.track.points import Points
from orchestrator.track.record import Record
from tests.track import rig

_PATIENCE_S = 90.0
_STEP_S = 0.005


class Paced:
    """A training of steps of some milliseconds, six points each, that only its record sees.

    Attributes:
        step: the last one.
        slowest_s: how long the record held up a step at most.
        said: notices.
    """

    def __init__(self, facts: RunFacts, first_step: int = 0):
        """Begin, or go on after a step."""
        self.step = first_step
        self.slowest_s = 0.0
        self.said: list[str] = []
        self._heard = 0
        self._pause = threading.Event()
        journal = Path(facts.root) / "journal.jsonl"
        self._record = Record(journal, facts, notice=self.said.append)
        self._record.start_tracking()

    def make_step(self) -> None:
        """Make a step."""
        self._pause.wait(_STEP_S)
        began = time.perf_counter()
        self._record.add(rig.block(self.step, 1) | {"time": time.time()})
        self.slowest_s = max(self.slowest_s, time.perf_counter() - began)
        self.step += 1

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Train until something is the case."""
        deadline = time.monotonic() + _PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, f"waited {_PATIENCE_S:g} s for {what}: {self.said}"
            self.make_step()

    def for_steps(self, number: int) -> None:
        """Make so many steps."""
        end = self.step + number
        self.until(lambda: self.step >= end, f"step {end}")

    def until_said(self, words: str) -> None:
        """Train until the user is told something, after what was waited for the last time."""
        self.until(lambda: any(words in line for line in self.said[self._heard :]), words)
        self._heard = next(
            number
            for number, line in enumerate(self.said, 1)
            if number > self._heard and words in line
        )

    def end(self, status: str = "FINISHED", deadline_s: float = 60.0) -> Report:
        """End the run."""
        report = self._record.end(status, "", deadline_s)
        print(f"{self.step} steps, held up {1000 * self.slowest_s:.1f} ms at most")
        return report


def facts_of(folder: Path, uri: str, **changes: Any) -> RunFacts:
    """Return the facts of a run whose every step is a point; its folder is made if missing."""
    root = root_of(folder)
    if not root.exists():
        rig.new_run(folder, root.name)
    return rig.make_facts(root, uri, log_every_steps="1", **changes)


def root_of(folder: Path) -> Path:
    """Return the run folder of a test: its name is no other test's."""
    return folder / f"run-of-{folder.name}"


def points_in(database: Path, run: str) -> Counter[tuple[str, int]]:
    """Count the rows that MLflow's own table has of a run for each metric and step."""
    query = "select key, step from metrics join runs using (run_uuid) where name = ?"
    return Counter(_rows(database, query, run))


def points_of(root: Path) -> Counter[tuple[str, int]]:
    """Count the points that a run's journal asks for."""
    points = Points("1", 16)
    made = (point for record in read(root / "journal.jsonl") for point in points.feed(record))
    return Counter((point.key, point.step) for point in made)


def assert_nothing_lost_or_doubled(folder: Path, database: Path) -> None:
    """Compare MLflow's table with the journal: one run that is FINISHED, every point once."""
    root = root_of(folder)
    wanted, found = points_of(root), points_in(database, root.name)
    lost, doubled = wanted - found, found - wanted
    assert (len(lost), len(doubled)) == (0, 0), (lost.most_common(3), doubled.most_common(3))
    assert _rows(database, "select status from runs where name = ?", root.name) == [("FINISHED",)]


def _rows(database: Path, query: str, run: str) -> list[Any]:
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        return connection.execute(query, (run,)).fetchall()
