"""WorkerGroup in this very process: breakpoints in the step work."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from orchestrator.spec.messages import Message, Request, WorkerOrder
from orchestrator.spec.plan import RunPlan

Run = Callable[[WorkerOrder, Callable[[Message], None], Callable[[], set[Request]]], int]
Prove = Callable[[Path], None]


class InlineGroup:
    """One worker that runs in `poll`, on the main thread, and is watched by nobody."""

    def __init__(self, run: Run, prove: Prove):
        """Make a group.

        Args:
            run: the life of a worker, `orchestrator.train.worker.run`.
            prove: checks the exported model in the folder it is given, in a clean process.
        """
        self._run = run
        self._prove = prove
        self._order: WorkerOrder | None = None
        self._requests: set[Request] = set()
        self._observe: Callable[[Message], None] | None = None
        self._told: list[Message] = []

    def listen(self, observe: Callable[[Message], None]) -> None:
        """Hand messages to `observe` while the worker runs, instead of at its end."""
        self._observe = observe

    def start(self, plan: RunPlan, attempt: int, restore_from: str | None) -> None:
        """Remember what to run: it runs when it is polled."""
        self._requests = set()
        self._order = WorkerOrder(
            plan=plan,
            worker=0,
            attempt=attempt,
            addresses=(),
            visible_gpus="",
            restore_from=restore_from,
        )

    def poll(self, timeout_s: float) -> list[Message]:
        """Run the worker to its end and return what it told."""
        order, self._order = self._order, None
        if order is None:
            time.sleep(timeout_s)
            return []
        self._told = []
        self._run(order, self._told.append, self._pending)
        return self._told

    def request(self, request: Request) -> None:
        """Note a request; stacks are what a debugger shows."""
        if request is not Request.STACKS:
            self._requests.add(request)

    def prove_export(self) -> None:
        """Check the export in a process of its own."""

    def kill(self) -> None:
        """Do nothing: what runs here has ended when anybody can ask."""

    def close(self) -> None:
        """Do nothing."""

    def _pending(self) -> set[Request]:
        requests, self._requests = self._requests, set()
        return requests
