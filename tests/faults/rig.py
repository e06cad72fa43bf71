"""Runs the paced job, finds out where it is, and compares what is left of it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.comparison import lineage
from orchestrator.spec.paths import RunPaths
from orchestrator.track.journal import read
from orchestrator.train.data import Order, ledger_hash, make_shards
from orchestrator.train.store import list_checkpoints
from tests.cluster.rig import Ended, finish, is_alive, records, runs_in, start, wait_for

MINE = Path(__file__).parent / "mine"
JOB = ("job=paced", f"--config-dir={MINE}")
TWO = ("strategy=multi_worker", "strategy.num_workers=2")
QUIET = ("export.enabled=false", "data.num_eval_examples=0")


def paced(*overrides: str, cwd: Path, env: Mapping[str, str] | None = None) -> Any:
    """Start the paced job."""
    return start("train", *JOB, *overrides, cwd=cwd, env=env)


def ended(*overrides: str, cwd: Path, env: Mapping[str, str] | None = None) -> Ended:
    """Train the paced job to its end."""
    return finish(paced(*overrides, cwd=cwd, env=env), cwd)


def wait_for_record(folder: Path, kind: str, timeout_s: float = 60.0, **values: Any) -> RunPaths:
    """Wait until the newest run's journal has a record of a kind with these values."""

    def there() -> RunPaths | None:
        runs = runs_in(folder)
        found = records(runs[-1], kind) if runs else []
        hit = any(all(r.get(k) == v for k, v in values.items()) for r in found)
        return runs[-1] if hit else None

    run: RunPaths = wait_for(there, f"{kind} with {values}", timeout_s)
    return run


def wait_for_attempt_step(run: RunPaths, attempt: int, step: int) -> dict[int, int]:
    """Wait until an attempt has made a step; return its workers' processes."""

    def reached() -> bool:
        blocks = [r for r in records(run, "BlockDone") if r["attempt"] == attempt]
        return any(r["first_step"] + r["num_steps"] >= step for r in blocks)

    wait_for(reached, f"step {step} of attempt {attempt}")
    return {r["worker"]: r["pid"] for r in records(run, "Ready") if r["attempt"] == attempt}


def kill(*pids: int) -> float:
    """Kill processes at once; return the time."""
    now = time.time()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    return now


def wait_until_gone(*pids: int, timeout_s: float) -> float:
    """Wait until processes are gone; return how long it took."""
    begin = time.time()
    wait_for(lambda: not any(map(is_alive, pids)), f"the end of {pids}", timeout_s)
    return time.time() - begin


def weights(run: RunPaths) -> str:
    """Return the digest of all variables in the newest checkpoint."""
    manifest = json.loads((list_checkpoints(run.checkpoints_dir)[0] / "manifest.json").read_text())
    sums = [
        entry["sha256"] for name, entry in sorted(manifest["files"].items()) if ".data-" in name
    ]
    return hashlib.sha256("".join(sums).encode()).hexdigest()


def ledger_is_right(run: RunPaths, num_steps: int) -> bool:
    """Tell whether the lineage of the final weights used each step's examples exactly once."""
    found, order, batch = lineage(read(run.journal)), Order(0, 512), 32
    shard = make_shards((batch,), range(1))[0]
    positions = shard.positions(0, num_steps, batch)
    ids = order.examples(positions.reshape(-1)).reshape(positions.shape)
    return found.last_step == num_steps and found.used_until(num_steps) == ledger_hash(ids, 0)


def attempts(run: RunPaths) -> list[int]:
    """Return the numbers of all attempts."""
    return [record["attempt"] for record in records(run, "AttemptStarted")]


def status(run: RunPaths) -> str:
    """Return how the run ended last."""
    found: str = records(run, "RunEnded")[-1]["status"]
    return found


def signal_group(process: subprocess.Popen[str], number: int) -> None:
    """Send a signal to a command's whole process group, as a terminal does."""
    os.killpg(process.pid, number)
