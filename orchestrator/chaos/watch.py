"""A run as `chaos` sees it: its journal while it grows, and the processes that it names."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.track.journal import Reader
from orchestrator.train import store

_POLL_S = 0.01


@dataclass(slots=True)
class Watch:
    """What the journal of a run tells, with the moment each thing was on record.

    Attributes:
        journal: need not exist yet.
        attempt: number of the newest attempt.
        began_at: step of the checkpoint that it began with.
        pids: of its workers that have their model, by worker.
        hosts: the names of theirs.
        step: the last step that it has done; `began_at` before its first block.
        done: the same of every attempt.
        is_stepping: whether it has done any block.
        saved: step of the newest checkpoint of this attempt; `began_at` before the first.
        failed_at: Unix seconds at which the first failure of an attempt was on record.
        ended: how the run ended, since it was started last.
    """

    journal: Path
    attempt: int = 0
    began_at: int = 0
    pids: dict[int, int] = field(default_factory=dict)
    hosts: dict[int, str] = field(default_factory=dict)
    step: int = 0
    done: dict[int, int] = field(default_factory=dict)
    is_stepping: bool = False
    saved: int = 0
    failed_at: dict[int, float] = field(default_factory=dict)
    ended: str | None = None
    _reader: Reader | None = None

    def look(self) -> None:
        """Take note of what is on record since the last look."""
        if self._reader is None:
            self._reader = Reader(self.journal)
        for record in self._reader.new():
            self._observe(record, time.time())

    def until(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Look until a condition holds; False when the time is over before it does."""
        deadline = time.monotonic() + timeout_s
        while True:
            self.look()
            if condition():
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)

    def _observe(self, record: Mapping[str, Any], now: float) -> None:
        kind = record["kind"]
        if kind == "RunStarted":
            self.ended = None
        elif kind == "RunEnded":
            self.ended = record["status"]
        elif kind == "AttemptStarted":
            self.attempt, self.is_stepping = record["attempt"], False
            self.pids, self.hosts = {}, {}
            self.began_at = store.start_of(record["restore_from"])
            self.step = self.saved = self.done[self.attempt] = self.began_at
        elif kind in ("Death", "Failed"):
            self.failed_at.setdefault(record["attempt"], now)
        elif record.get("attempt") != self.attempt:
            return
        elif kind == "Ready":
            self.pids[record["worker"]] = record["pid"]
            self.hosts[record["worker"]] = record["host"]
        elif kind == "BlockDone":
            self.step = max(self.step, record["first_step"] + record["num_steps"])
            self.done[self.attempt] = self.step
            self.is_stepping = True
        elif kind == "Saved":
            self.saved = max(self.saved, record["step"])
