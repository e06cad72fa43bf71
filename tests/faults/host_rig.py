"""A run on two of several hosts that goes on from fault to fault."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.spec.paths import RunPaths
from tests.cluster import rig
from tests.hosts import Hosts

LONG = (
    *("job.args.delay_ms=20", "train.max_block_steps=4", "train.steps=100000"),
    *("train.eval_every_steps=null", "checkpoint.every_steps=20", "export.enabled=false"),
)
# What a busy machine may add to a promise of a few seconds.
SLACK_S = 2.0


@dataclass
class Training:
    """A run that goes on from fault to fault."""

    process: subprocess.Popen[str]
    cwd: Path
    attempt: int = 1

    @property
    def run(self) -> RunPaths:
        """The run's folder."""
        return rig.runs_in(self.cwd)[-1]

    def of(self, kind: str, attempt: int | None = None) -> list[dict[str, Any]]:
        """Return the records of a kind in an attempt, by default the last."""
        number = self.attempt if attempt is None else attempt
        return [r for r in rig.records(self.run, kind) if r["attempt"] == number]

    def await_steps(self) -> None:
        """Wait until the attempt has saved something and goes on."""

        def goes_on() -> bool:
            if self.process.poll() is not None:
                raise AssertionError(self.process.communicate()[0])
            return bool(rig.runs_in(self.cwd) and self.of("Saved") and self.of("BlockDone"))

        rig.wait_for(goes_on, f"attempt {self.attempt} to save", 120.0)

    def victim(self) -> dict[str, Any]:
        """Return the first worker that is not beside the driver, as it told of itself."""
        ready = sorted(self.of("Ready"), key=lambda record: record["worker"])
        return next(record for record in ready if Hosts.index(record["host"]) != 0)

    def await_next(self) -> float:
        """Wait for the next attempt; return when it began."""
        self.attempt += 1
        began = rig.wait_for(lambda: self.of("AttemptStarted"), f"attempt {self.attempt}")
        return float(began[0]["time"])

    def told(self, attempt: int) -> float:
        """Return when the first failure of an attempt was on record."""
        kinds = ("Death", "Failed")
        return min(float(record["time"]) for kind in kinds for record in self.of(kind, attempt))


@contextlib.contextmanager
def long_training(hosts: Hosts, cwd: Path, *arguments: str) -> Iterator[Training]:
    """Give a run on two of the hosts; end it afterwards."""
    process = hosts.train(*rig.JOB, *LONG, "strategy.num_workers=2", *arguments, cwd=cwd)
    try:
        yield Training(process, cwd)
    finally:
        process.kill()
        process.communicate()


def lose(
    training: Training, hosts: Hosts, fault: Callable[[int], None]
) -> tuple[dict[str, Any], float]:
    """Do something to the host of a worker; return the worker, and when that was."""
    training.await_steps()
    victim = training.victim()
    began = time.time()
    fault(Hosts.index(victim["host"]))
    return victim, began
