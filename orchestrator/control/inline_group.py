"""WorkerGroup in this very process: breakpoints in the step work."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable

from orchestrator.control.agent import Agent
from orchestrator.spec.messages import Message, Request, WorkerOrder
from orchestrator.spec.plan import RunPlan

Run = Callable[[WorkerOrder, Callable[[Message], None], Callable[[], set[Request]]], int]


class InlineGroup:
    """One worker that runs in `poll`, on the main thread, and is watched by nobody."""

    def __init__(self, run: Run, is_stopping: Callable[[], bool] = lambda: False):
        """Make a group.

        Args:
            run: the life of a worker, `orchestrator.train.worker.run`.
            is_stopping: asked after each block, because nobody else runs while the worker does.
        """
        self._run = run
        self._is_stopping = is_stopping
        self._order: WorkerOrder | None = None
        self._plan: RunPlan | None = None
        self._requests: set[Request] = set()

    def start(self, plan: RunPlan, attempt: int, restore_from: str | None) -> None:
        """Remember what to run: it runs when it is polled."""
        self._requests = set()
        self._plan = plan
        sys.path[:0] = [path for path in plan.config.code_dirs if path not in sys.path]
        self._order = WorkerOrder(
            plan=plan,
            worker=0,
            attempt=attempt,
            addresses=(),
            visible_gpus="",
            restore_from=restore_from,
        )

    def poll(self, timeout_s: float) -> list[Message]:
        """Run the worker to its end and return what it told; it looks frozen meanwhile."""
        order, self._order = self._order, None
        if order is None:
            time.sleep(timeout_s)
            return []
        told: list[Message] = []
        self._run(order, told.append, self._pending)
        return told

    def request(self, request: Request) -> None:
        """Note a request; stacks are what a debugger shows."""
        if request is not Request.STACKS:
            self._requests.add(request)

    def prove_export(self) -> None:
        """Check the export in a process of its own, started afresh."""
        assert self._plan is not None
        paths = self._plan.paths
        agent = Agent(0, self._plan.run, zygote=None, use_fork=False, driver_silence_s=math.inf)
        agent.prove_export(str(paths.export_dir), str(paths.logs_dir / "export-proof.log"))

    def kill(self) -> None:
        """Do nothing: what runs here has ended when anybody can ask."""

    def close(self) -> None:
        """Do nothing."""

    def _pending(self) -> set[Request]:
        requests, self._requests = self._requests, set()
        return requests | ({Request.SAVE_AND_STOP} if self._is_stopping() else set())
