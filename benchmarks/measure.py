"""One run of one side, timed from outside: our command, a comparator, or a plain script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.spec import PROJECT, make_spec
from orchestrator.track.journal import read

_WARM_UP = 5  # the first of so many parts of a run is not counted
_INPUTS = PROJECT / "benchmarks" / "inputs"


@dataclass(frozen=True, slots=True)
class Sample:
    """One run: seconds from the command to the first trained step or block, then steps a second."""

    start_s: float
    steps_per_s: float


@dataclass(frozen=True, slots=True)
class Ours:
    """Our own training command.

    Attributes:
        job: a name in conf/job/.
        trial_steps: steps of the run that does not count and tells how many steps fill a sample.
        overrides: more of the command line.
        short: runs the trial's steps only; for rows about the start.
    """

    job: str
    trial_steps: int
    overrides: tuple[str, ...] = ()
    short: bool = False

    @property
    def key(self) -> str:
        """The name of this side in the state file."""
        return " ".join(["ours", self.job, *self.overrides, *(["short"] if self.short else [])])


@dataclass(frozen=True, slots=True)
class Script:
    """A comparator in a process of its own.

    Attributes:
        mode: of benchmarks/comparators.py, or `train` for Ray Train, or `bare` for plain.py.
        job: a name in conf/job/.
        block_steps: steps of one call of the same-graph loop.
        overrides: of our command that the comparator must share, such as the number of workers.
    """

    mode: str
    job: str
    block_steps: int = 1
    overrides: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The name of this side in the state file."""
        return " ".join([self.mode, self.job, *self.overrides])


Side = Ours | Script


def orchestrator(*arguments: str, folder: Path) -> float:
    """Run a command of ours; return the seconds it took."""
    begin = time.perf_counter()
    _check(
        subprocess.run(
            [sys.executable, "-m", "orchestrator", *arguments],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(PROJECT)},
            capture_output=True,
            text=True,
        )
    )
    return time.perf_counter() - begin


def run_ours(side: Ours, num_steps: int, folder: Path) -> Sample:
    """Train with tracking on, and read from the journal when the chief's blocks were done."""
    name = f"run-{time.time_ns()}"
    begin = time.time()
    orchestrator(
        *("train", f"job={side.job}", f"run_name={name}", f"data.cache_dir={PROJECT / 'data'}"),
        *(f"train.steps={num_steps}", "train.epochs=null", "train.eval_every_epochs=null"),
        *("data.num_eval_examples=0", "export.enabled=false", *side.overrides),
        *(f"--config-dir={_INPUTS}",) * any("job.class_name" in text for text in side.overrides),
        folder=folder,
    )
    records = read(folder / "runs" / side.job / name / "journal.jsonl")
    blocks = [r for r in records if r["kind"] == "BlockDone" and r["worker"] == 0]
    return steady(begin, blocks)


def steady(begin: float, blocks: list[dict[str, Any]]) -> Sample:
    """Return the start and the rate of a run from its blocks; no rate (0) if it was too short."""
    total = blocks[-1]["first_step"] + blocks[-1]["num_steps"]
    warm = next(b for b in blocks if b["first_step"] + b["num_steps"] >= total / _WARM_UP)
    steps = total - warm["first_step"] - warm["num_steps"]
    rate = steps / (blocks[-1]["time"] - warm["time"]) if steps else 0.0
    return Sample(blocks[0]["time"] - begin, rate)


def run_script(side: Script, seconds: float, data: Path) -> Sample:
    """Run a comparator; `data` holds the training images for plain.py."""
    spec = make_spec(side.job, side.overrides, side.block_steps, seconds).to_json()
    command = {
        "bare": [str(PROJECT / "benchmarks" / "plain.py"), str(data), "500"],
        "train": ["-m", "benchmarks.ray_train", spec],
    }.get(side.mode, ["-m", "benchmarks.comparators", side.mode, spec])
    begin = time.time()
    done = subprocess.run(
        [sys.executable, *command],
        cwd=PROJECT,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2", "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
    )
    _check(done)
    told = json.loads(done.stdout.strip().splitlines()[-1])
    return Sample(told["first_step"] - begin, told["steps_per_s"])


def _check(done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise SystemExit(
            f"{' '.join(map(str, done.args))[:400]}\nended with {done.returncode}:\n{tail}"
        )
