"""One run of each side, and ratios of runs that alternated."""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.track.journal import read

PROJECT = Path(__file__).resolve().parents[1]
_PLAIN_STEPS = 6_000
_OUR_STEPS = 30_000


@dataclass(frozen=True)
class Sample:
    """One run: seconds from the command to the first trained step or block, then steps a second."""

    start_s: float
    steps_per_s: float


def orchestrator(*arguments: str, folder: Path) -> float:
    """Run a command of ours; return the seconds it took."""
    begin = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "orchestrator", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return time.perf_counter() - begin


def ours(folder: Path, name: str) -> Sample:
    """Train mnist with tracking on, and read from the journal when its blocks were done."""
    begin = time.time()
    orchestrator(
        *("train", "job=mnist", f"run_name={name}", f"data.cache_dir={PROJECT / 'data'}"),
        *(f"train.steps={_OUR_STEPS}", "train.eval_every_epochs=null", "export.enabled=false"),
        folder=folder,
    )
    blocks = [
        record
        for record in read(folder / "runs" / "mnist" / name / "journal.jsonl")
        if record["kind"] == "BlockDone"
    ]
    warm = next(b for b in blocks if b["first_step"] + b["num_steps"] >= _OUR_STEPS // 5)
    steps = _OUR_STEPS - warm["first_step"] - warm["num_steps"]
    return Sample(blocks[0]["time"] - begin, steps / (blocks[-1]["time"] - warm["time"]))


def plain(data: Path) -> Sample:
    """Run the plain script."""
    begin = time.time()
    shown = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("plain.py")), str(data), str(_PLAIN_STEPS)],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    told = json.loads(shown.stdout)
    return Sample(told["first_step"] - begin, told["steps_per_s"])


def spread(ratios: Sequence[float]) -> str:
    """Return median and range."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def paired(above: Sequence[float], below: Sequence[float]) -> str:
    """Return the paired ratios of two sides that alternated."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def noise(same: Sequence[float]) -> str:
    """Return the ratios of one side to itself, from one run to the next."""
    return spread([b / a for a, b in itertools.pairwise(same)])
