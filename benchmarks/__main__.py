"""`make bench`: our speed against a plain script, in one run of alternating pairs.

python -m benchmarks [PAIRS]    prints the tables and keeps them in benchmarks/RESULTS.md
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np

from benchmarks.measure import PROJECT, Sample, noise, orchestrator, ours, paired, plain, spread

_RESULTS = Path(__file__).with_name("RESULTS.md")
_MARK = "<!-- measured: everything below is written by `make bench` -->"


def main(pairs: int) -> None:
    """Measure, print and keep."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        print("reading MNIST, and one run of each side that does not count", flush=True)
        ours(folder, "warm-up")
        data = _arrays(folder)
        plain(data)
        a: list[Sample] = []
        b: list[Sample] = []
        for pair in range(pairs):
            a.append(plain(data))
            b.append(ours(folder, f"pair-{pair}"))
            print(f"pair {pair + 1} of {pairs}: plain {a[-1]}, ours {b[-1]}", flush=True)
        text = "\n\n".join([_machine(), _ratios(a, b), _seconds(folder, pairs)]) + "\n"
    print(text)
    head = _RESULTS.read_text().partition(_MARK)[0] if _RESULTS.exists() else ""
    _RESULTS.write_text(f"{head}{_MARK}\n\n{text}")


def _arrays(folder: Path) -> Path:
    """Write the training images for the plain script: both sides read the same files."""
    from orchestrator.train.datasets import mnist
    from orchestrator.train.sources import Split

    source = mnist(Split.TRAIN, path=None, cache_dir=str(PROJECT / "data"))
    arrays = source.fetch(np.arange(source.num_examples))
    path = folder / "mnist.npz"
    np.savez(path, images=arrays["x"], labels=arrays["y"])
    return path


def _machine() -> str:
    names = ("tensorflow-cpu", "tensorflow", "keras", "ray", "mlflow")
    found = []
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except ImportError:
            continue
    return (
        f"{date.today()}, {os.cpu_count()} CPU cores ({platform.machine()}), Python "
        f"{platform.python_version()}, {', '.join(found)}."
    )


def _ratios(a: list[Sample], b: list[Sample]) -> str:
    start_a, start_b = [s.start_s for s in a], [s.start_s for s in b]
    rate_a, rate_b = [s.steps_per_s for s in a], [s.steps_per_s for s in b]
    rows = [
        [
            "steady steps/s, `mnist`, one worker, tracking on, against the tutorial loop",
            "≥ 1.5",
            paired(rate_b, rate_a),
            noise(rate_a),
            noise(rate_b),
        ],
        [
            "command to first trained block, Ray started for it, against the plain script",
            "≤ 1.6",
            paired(start_b, start_a),
            noise(start_a),
            noise(start_b),
        ],
    ]
    lines = ["| ratio | goal | median (range) | plain A/A | ours A/A |", "|---|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += [
        "",
        f"{len(a)} pairs. Plain script: first step after {spread(start_a)} s, {spread(rate_a)} "
        f"steps/s. Ours: first block after {spread(start_b)} s, {spread(rate_b)} steps/s.",
    ]
    return "\n".join(lines)


def _seconds(folder: Path, pairs: int) -> str:
    data = f"data.cache_dir={PROJECT / 'data'}"
    rows = {
        "`--help` (goal < 1)": [orchestrator("--help", folder=folder) for _ in range(pairs)],
        "`plan job=mnist` (goal < 2)": [
            orchestrator("plan", "job=mnist", folder=folder) for _ in range(pairs)
        ],
        "`train job=mnist`, a second time, in all (goal ≤ 25)": [
            orchestrator("train", "job=mnist", data, folder=folder) for _ in range(pairs)
        ],
    }
    lines = ["| command | seconds, median (range) |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {spread(times)} |" for name, times in rows.items())])


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 5))
