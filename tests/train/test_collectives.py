"""How many collectives a step of two workers makes: counted in the graph that two processes ran."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from orchestrator.control.launcher import TENSORFLOW_ENV

ROOT = Path(__file__).parents[2]


def test_a_step_of_two_workers_makes_one_collective_for_each_dtype() -> None:
    with ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(2)]
        for one in held:
            one.bind(("127.0.0.1", 0))
        addresses = [f"127.0.0.1:{one.getsockname()[1]}" for one in held]
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.train.collectives", str(worker), *addresses],
            cwd=ROOT,
            env={**os.environ, **TENSORFLOW_ENV, "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            text=True,
        )
        for worker in range(2)
    ]
    try:
        told = [process.communicate(timeout=120)[0] for process in workers]
    finally:
        for process in workers:
            process.kill()
    assert [process.returncode for process in workers] == [0, 0], told
    found, other = (json.loads(text.splitlines()[-1]) for text in told)
    assert found == other
    assert found == {
        "dense": {"CollectiveReduceV2": 1},
        "BatchNorm, micro-batches, float16": {"CollectiveReduceV2": 1},
        "two dtypes": {"CollectiveReduceV2": 2},
        # Values and indices of the slices, for each first the number of rows of every worker.
        "large table": {"CollectiveReduceV2": 1, "CollectiveGatherV2": 4},
        # Sum, sum of squares and count; the gradients of the former two.
        "synchronised BatchNorm": {"CollectiveReduceV2": 1 + 5},
        "packs of 256 bytes": {"CollectiveReduceV2": 2},
    }
