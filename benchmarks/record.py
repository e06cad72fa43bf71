"""How fast points come into a SQLite MLflow, without any training.

python -m benchmarks.record MODE SPEC

* writer: our writer reads them from a journal, as it does beside a training.
* log-batch: they are made before; `log_batch` of 1,000 at a time, in MLflow's own client.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.spec import Spec
from orchestrator.track.facts import RunFacts
from orchestrator.track.journal import Journal, read
from orchestrator.track.mlflow_client import open_client
from orchestrator.track.mlflow_writer import Writer
from orchestrator.track.points import Points

# For the length of the run only: a few thousand rows a second are what SQLite takes.
_ROWS_PER_S = 5000
_BATCH = 1000
_METRICS = ("accuracy", "top_5", "margin", "entropy")
_BLOCK_STEPS = 50


def main(mode: str, spec: Spec) -> None:
    """Write rows for about the seconds of a sample, and print how many a second."""
    with tempfile.TemporaryDirectory(prefix="bench-record-") as folder:
        facts = _facts(Path(folder))
        act = _writer if mode == "writer" else _log_batch
        write, count = act(facts, round(_ROWS_PER_S * spec.seconds))
        begin = time.perf_counter()
        write()
        rate = count / (time.perf_counter() - begin)
        print(json.dumps({"first_step": time.time(), "steps_per_s": rate}))


def _writer(facts: RunFacts, num_rows: int) -> tuple[Callable[[], Any], int]:
    journal = Journal(Path(facts.root) / "journal.jsonl")
    journal.append(facts.record(time.time()))
    writer = Writer(facts, keep=journal.append, notice=print, is_live=True)
    writer.advance()  # makes the run
    return writer.advance, _fill(journal, num_rows)


def _log_batch(facts: RunFacts, num_rows: int) -> tuple[Callable[[], Any], int]:
    from mlflow.entities import Metric

    journal = Journal(Path(facts.root) / "journal.jsonl")
    _fill(journal, num_rows)
    points = Points("1", 32)
    made = [p for record in read(Path(facts.root) / "journal.jsonl") for p in points.feed(record)]
    metrics = [Metric(*point) for point in made]
    client = open_client(facts.tracking_uri, facts.timeout_s)
    run_id = client.create_run(client.create_experiment("bench")).info.run_id

    def write() -> None:
        for start in range(0, len(metrics), _BATCH):
            client.log_batch(run_id, metrics=metrics[start : start + _BATCH])

    return write, len(metrics)


def _fill(journal: Journal, num_rows: int) -> int:
    """Journal blocks of which every step is a point of each metric; return how many rows."""
    points, count, first = Points("1", 32), 0, 0
    while count < num_rows:
        record = _block(first)
        count += len(points.feed(record))
        journal.append(record)
        first += _BLOCK_STEPS
    return count


def _block(first: int) -> dict[str, Any]:
    values = [1.0 / (first + step + 1) for step in range(_BLOCK_STEPS)]
    return {
        "kind": "BlockDone",
        "worker": 0,
        "attempt": 1,
        "time": time.time(),
        "first_step": first,
        "num_steps": _BLOCK_STEPS,
        "wall_s": 0.5,
        "data_wait_s": 0.0,
        "ledger": 0,
        "loss": values,
        "metrics": dict.fromkeys(_METRICS, values),
        "learning_rate": values,
        "skipped_steps": [],
    }


def _facts(folder: Path) -> RunFacts:
    return RunFacts(
        run="bench",
        job="bench",
        experiment="bench",
        tracking_uri=f"sqlite:///{folder}/mlflow.db",
        artifact_root=str(folder / "artifacts"),
        root=str(folder),
        log_every_steps="1",
        global_batch_size=32,
        timeout_s=5.0,
        register=None,
        params={},
        tags={},
    )


if __name__ == "__main__":
    main(sys.argv[1], Spec.from_json(sys.argv[2]))
