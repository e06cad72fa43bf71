"""One run of one side, timed from outside: our command, a comparator, or a plain script."""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.spec import PROJECT, make_spec
from orchestrator.track.journal import read

_WARM_UP = 5  # the first of so many parts of a run is not counted
_PATIENCE_S = 30.0  # with an interrupted process that saves and cleans up
# Of benchmarks/record.py; its steps are rows in MLflow.
RECORD_MODES = ("writer", "log-batch")
_INPUTS = PROJECT / "benchmarks" / "inputs"


@dataclass(frozen=True, slots=True)
class Sample:
    """One run.

    Attributes:
        start_s: from the command to the first trained step or block.
        steps_per_s: after the warm-up; 0 if the run was too short.
        stall_s: how long steps waited for a checkpoint, median; 0 if none was written.
    """

    start_s: float
    steps_per_s: float
    stall_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Ours:
    """Our own training command.

    Attributes:
        job: a name in conf/job/.
        trial_steps: steps of the run that does not count and tells how many steps fill a sample.
        overrides: more of the command line.
        short: runs the trial's steps only; for rows that are not about steady speed.
        kept: runs after `up`, which is not counted, and is followed by `down`.
    """

    job: str
    trial_steps: int
    overrides: tuple[str, ...] = ()
    short: bool = False
    kept: bool = False

    @property
    def key(self) -> str:
        """The name of this side in the state file."""
        marks = [*(["short"] if self.short else []), *(["kept"] if self.kept else [])]
        return " ".join(["ours", self.job, *self.overrides, *marks])


@dataclass(frozen=True, slots=True)
class Script:
    """A comparator in a process of its own.

    Attributes:
        mode: of benchmarks/comparators.py or record.py, or `train` for Ray Train, or `bare` for
            plain.py.
        job: a name in conf/job/.
        block_steps: steps of one call of the same-graph loop.
        overrides: of our command that the comparator must share, such as the number of workers.
        copies: processes at once that know nothing of each other. Each trains on a batch of its
            own, so they count as one job with a batch of all these: the mean of their steps/s.
    """

    mode: str
    job: str
    block_steps: int = 1
    overrides: tuple[str, ...] = ()
    copies: int = 1

    @property
    def key(self) -> str:
        """The name of this side in the state file."""
        copies = [f"{self.copies} at once"] if self.copies > 1 else []
        return " ".join([self.mode, self.job, *self.overrides, *copies])


Side = Ours | Script


def orchestrator(*arguments: str, folder: Path) -> float:
    """Run a command of ours; return the seconds it took."""
    begin = time.perf_counter()
    # What the user's own `make up` keeps is not for measuring.
    runtime = {"XDG_RUNTIME_DIR": str(folder / "runtime")}
    process = _start(["-m", "orchestrator", *arguments], folder, runtime)
    _output(process)
    return time.perf_counter() - begin


def run_ours(side: Ours, num_steps: int, folder: Path) -> Sample:
    """Train with tracking on, and read from the journal when the chief's blocks were done.

    A run that had no steady part, because the machine was busy, is made again and longer.

    Raises:
        SystemExit: the run failed, or was too short all the same.
    """
    for longer in (1, 2, 4):
        with _kept(folder) if side.kept else nullcontext():
            begin = time.time()
            sample = sample_of(begin, train(side, longer * num_steps, folder))
        if side.short or sample.steps_per_s:
            return sample
    raise SystemExit(
        f"{side.key}: all {4 * num_steps} steps were done before MLflow had the run, so there is "
        "no steady part; raise seconds="
    )


@contextmanager
def _kept(folder: Path) -> Iterator[None]:
    orchestrator("up", folder=folder)
    try:
        yield
    finally:
        orchestrator("down", folder=folder)


def train(side: Ours, num_steps: int, folder: Path) -> list[dict[str, Any]]:
    """Train for some steps and return the records of the journal."""
    name = f"run-{time.time_ns()}"
    orchestrator(
        *("train", f"job={side.job}", f"run_name={name}", f"data.cache_dir={PROJECT / 'data'}"),
        *(f"train.steps={num_steps}", "train.epochs=null", "train.eval_every_epochs=null"),
        *("data.num_eval_examples=0", "export.enabled=false", *side.overrides),
        *(f"--config-dir={_INPUTS}",) * any("job.class_name" in text for text in side.overrides),
        folder=folder,
    )
    records = journal(side.job, name, folder)
    # Checkpoints of hundreds of megabytes would fill the disk from pair to pair.
    shutil.rmtree(folder / "runs" / side.job / name)
    return records


def run_command(arguments: Sequence[str], folder: Path) -> tuple[float, float]:
    """Run a command of ours.

    Returns:
        The seconds it took, and the seconds from the last step to its end, 0 unless it trains.
    """
    if "train" not in arguments:
        return orchestrator(*arguments, folder=folder), 0.0
    name = f"run-{time.time_ns()}"
    cache = f"data.cache_dir={PROJECT / 'data'}"
    wall_s = orchestrator(*arguments, f"run_name={name}", cache, folder=folder)
    end = time.time()
    job = next(text for text in arguments if text.startswith("job=")).removeprefix("job=")
    return wall_s, end - _chief_blocks(journal(job, name, folder))[-1]["time"]


def journal(job: str, run: str, folder: Path) -> list[dict[str, Any]]:
    """Return the records of a run."""
    return list(read(folder / "runs" / job / run / "journal.jsonl"))


def sample_of(begin: float, records: Sequence[dict[str, Any]]) -> Sample:
    """Return start, rate and stall of a run of ours; no rate (0) if it was too short.

    The rate begins after the first fifth of the steps, and once MLflow has the run: importing
    MLflow beside the first steps takes seconds of CPU, once.
    """
    blocks = _chief_blocks(records)
    total = _end(blocks[-1])
    tracked = next((i for i, r in enumerate(records) if r["kind"] == "MlflowRun"), len(records))
    steady = [b for b in _chief_blocks(records[tracked:]) if _end(b) >= total / _WARM_UP]
    rate = 0.0
    if len(steady) > 1:
        steps = total - _end(steady[0])
        rate = steps / (steady[-1]["time"] - steady[0]["time"])
    stalls = [record["stall_s"] for record in records if record["kind"] == "Saved"]
    stall_s = statistics.median(stalls) if stalls else 0.0
    return Sample(blocks[0]["time"] - begin, rate, stall_s)


def fastest_rate(records: Sequence[dict[str, Any]]) -> float:
    """Return the steps/s of the fastest long block: what a run that is not disturbed would do."""
    blocks = _chief_blocks(records)[1:]  # the first one traces
    longest = max((b["num_steps"] for b in blocks), default=0)
    long = [b["num_steps"] / b["wall_s"] for b in blocks if 2 * b["num_steps"] >= longest]
    return float(max(long, default=0.0))


def _end(block: dict[str, Any]) -> int:
    return int(block["first_step"] + block["num_steps"])


def _chief_blocks(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [r for r in records if r["kind"] == "BlockDone" and r["worker"] == 0]


def run_script(side: Script, seconds: float, data: Path) -> Sample:
    """Run a comparator; `data` holds the training images for plain.py."""
    spec = make_spec(side.job, side.overrides, side.block_steps, seconds).to_json()
    command = {
        "bare": [str(PROJECT / "benchmarks" / "plain.py"), str(data), "500"],
        "train": ["-m", "benchmarks.ray_train", spec],
        **{mode: ["-m", "benchmarks.record", mode, spec] for mode in RECORD_MODES},
    }.get(side.mode, ["-m", "benchmarks.comparators", side.mode, spec])
    begin = time.time()
    processes = [_start(command, PROJECT) for _ in range(side.copies)]
    try:
        told = [json.loads(_output(process).strip().splitlines()[-1]) for process in processes]
    finally:
        for process in processes:
            process.kill()  # one whose twin failed; nothing where all have ended
    return Sample(
        max(each["first_step"] for each in told) - begin,
        statistics.mean(each["steps_per_s"] for each in told),
        told[0].get("stall_s", 0.0),
    )


def _start(
    arguments: Sequence[str], folder: Path, more: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start Python in a session of its own, so that Ctrl-C reaches it once and from us only."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env={
            **os.environ,
            "TF_CPP_MIN_LOG_LEVEL": "2",
            "PYTHONPATH": str(PROJECT),
            **(more or {}),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _output(process: subprocess.Popen[str]) -> str:
    """Wait for the end of a process and return its standard output.

    Raises:
        SystemExit: it failed; the message ends with its last lines.
    """
    try:
        output, errors = process.communicate()
    except BaseException:
        # A trainer ends its workers and a Ray of its own when it is asked to.
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=_PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
        raise
    if process.returncode:
        tail = "\n".join((output + errors).splitlines()[-15:])
        command = " ".join(map(str, process.args))[:400]  # type: ignore[arg-type]
        raise SystemExit(f"{command}\nended with {process.returncode}:\n{tail}")
    return output
