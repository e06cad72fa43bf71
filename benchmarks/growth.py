"""How much memory the processes of two workers gain while `mnist` is trained.

python -m benchmarks.growth [first=20000] [last=120000]

Looks at each worker's process when its journal tells of these steps. Goal: less than 20 MB gained
in 100,000 steps. With two cores about four minutes.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.measure import Ours, train
from orchestrator.spec.memory import Memory, memory_of
from orchestrator.track.journal import Reader

_SIDE = Ours("mnist", 0, ("strategy=multi_worker", "strategy.num_workers=2"))
_LOOKS_S = 0.1
_AFTER = 1.1  # the run is so much longer than the last look: a process that ends is not measured


class Watch:
    """Looks at the workers of a run at certain steps.

    Attributes:
        seen: by worker, for each look the step and the bytes that its process held.
    """

    def __init__(
        self, steps: Sequence[int], look: Callable[[int], Memory | None] = memory_of
    ) -> None:
        """Watch.

        Args:
            steps: ascending.
            look: returns what a process holds.
        """
        self._steps = list(steps)
        self._look = look
        self._pids: dict[int, int] = {}
        self.seen: dict[int, list[tuple[int, int]]] = {}

    def follow(self, records: Iterable[dict[str, Any]]) -> None:
        """Take notice of what the journal tells."""
        for record in records:
            if record["kind"] == "Ready":
                self._pids[record["worker"]] = record["pid"]
                self.seen[record["worker"]] = []
            elif record["kind"] == "BlockDone":
                self._observe(record["worker"], record["first_step"] + record["num_steps"])

    def _observe(self, worker: int, step: int) -> None:
        seen = self.seen[worker]
        if len(seen) == len(self._steps) or step < self._steps[len(seen)]:
            return
        memory = self._look(self._pids[worker])
        if memory is not None:
            seen.append((step, memory.held_bytes))

    def lines(self) -> list[str]:
        """Return the growth of each worker in words."""
        told = []
        for worker, looks in sorted(self.seen.items()):
            if len(looks) < len(self._steps):
                told.append(f"worker {worker}: ended before it was looked at {len(self._steps)}x")
                continue
            (first, before), (last, after) = looks[0], looks[-1]
            growth = (after - before) / (last - first) * 100_000
            told.append(
                f"worker {worker}: {before / 1e6:,.0f} MB at step {first:,}, {after / 1e6:,.0f} MB "
                f"at {last:,}: {growth / 1e6:+.1f} MB in 100,000 steps (goal: below 20)"
            )
        return told


def main(arguments: list[str]) -> None:
    """Train, watch and print."""
    given = dict(argument.split("=", 1) for argument in arguments)
    first, last = int(given.get("first", "20000")), int(given.get("last", "120000"))
    watch = Watch([first, last])
    with tempfile.TemporaryDirectory(prefix="growth-") as name, ThreadPoolExecutor(1) as thread:
        run = thread.submit(train, _SIDE, round(_AFTER * last), Path(name))
        reader = None
        while not run.done():
            if reader is None:
                found = list(Path(name).glob("runs/*/*/journal.jsonl"))
                reader = Reader(found[0]) if found else None
            else:
                watch.follow(reader.new())
            time.sleep(_LOOKS_S)
        run.result()
    print("\n".join(watch.lines()))


if __name__ == "__main__":
    main(sys.argv[1:])
