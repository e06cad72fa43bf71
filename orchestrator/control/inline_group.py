"""WorkerGroup in this very process: breakpoints in the step work."""

from __future__ import annotations

import math
import queue
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from orchestrator.control.agent import Agent
from orchestrator.control.policy import Room
from orchestrator.control.sampler import Sampler
from orchestrator.spec.messages import Message, Request, WorkerOrder
from orchestrator.spec.plan import RunPlan

Run = Callable[[WorkerOrder, Callable[[Message], None], Callable[[], set[Request]]], int]
Result = TypeVar("Result")


class InlineGroup:
    """One worker that has the main thread, while its supervisor runs in a thread beside it.

    A debugger may hold the worker for as long as it likes: nobody can end it from outside.
    """

    def __init__(self, run: Run):
        """Make a group; `run` is the life of a worker, `orchestrator.train.worker.run`."""
        self._run = run
        self._plan: RunPlan | None = None
        self._orders: queue.SimpleQueue[WorkerOrder | None] = queue.SimpleQueue()
        self._told: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._asked: queue.SimpleQueue[Request] = queue.SimpleQueue()
        self._sampler: Sampler | None = None
        self._idle = threading.Event()
        self._idle.set()

    def serve(self, supervise: Callable[[], Result]) -> Result:
        """Run a supervisor in a thread, and here, one after another, the workers it starts.

        Args:
            supervise: what starts workers in this group and polls it.

        Returns:
            What `supervise` returns; what it raises is raised here.
        """
        future: Future[Result] = Future()

        def run() -> None:
            try:
                future.set_result(supervise())
            except BaseException as error:
                future.set_exception(error)
            finally:
                self._orders.put(None)

        threading.Thread(target=run, name="supervisor", daemon=True).start()
        while (order := self._orders.get()) is not None:
            try:
                self._run(order, self._told.put, lambda: set(_drained(self._asked)))
            finally:
                self._idle.set()
        return future.result()

    def start(
        self,
        plan: RunPlan,
        attempt: int,
        restore_from: str | None,
        avoid: frozenset[str] = frozenset(),
    ) -> None:
        """Let the main thread run the worker."""
        self._plan = plan
        sys.path[:0] = [path for path in plan.config.code_dirs if path not in sys.path]
        _drained(self._asked)
        if self._sampler is None:
            every_s = plan.config.tracking.system_metrics_every_s
            self._sampler = Sampler(0, socket.gethostname(), every_s, self._tell_all)
        self._idle.clear()
        self._orders.put(
            WorkerOrder(
                plan=plan,
                worker=0,
                attempt=attempt,
                addresses=(),
                visible_gpus="",
                restore_from=restore_from,
            )
        )

    def capacity(self, plan: RunPlan) -> Room:
        """Tell that every plan fits: there is nowhere else."""
        return Room({socket.gethostname(): plan.num_workers})

    def hosts(self) -> dict[int, str]:
        """Return nothing: workers tell themselves where they are."""
        return {}

    def prepare(self, plan: RunPlan) -> bool:
        """Do nothing: there is no other host."""
        return True

    def poll(self, timeout_s: float) -> list[Message]:
        """Return what the worker told, waiting for something at most so long."""
        try:
            first = self._told.get(timeout=timeout_s)
        except queue.Empty:
            return []
        return [first, *_drained(self._told)]

    def request(self, request: Request) -> None:
        """Ask the worker; stacks are what a debugger shows."""
        if request is not Request.STACKS:
            self._asked.put(request)

    def where(self, worker: int) -> str:
        """Return nothing: it is here."""
        return ""

    def prove_export(self) -> None:
        """Check the export in a process of its own, started afresh."""
        assert self._plan is not None
        paths = self._plan.paths
        run = str(paths.root)
        agent = Agent(0, run, zygote=None, use_fork=False, driver_silence_s=math.inf)
        agent.prove_export(str(paths.export_dir), str(paths.logs_dir / "export-proof.log"))

    def kill(self) -> None:
        """Wait for the worker's end: nothing but itself can end it."""
        self._asked.put(Request.SAVE_AND_STOP)
        self._idle.wait()
        _drained(self._told)

    def close(self) -> None:
        """Let the node rest."""
        if self._sampler is not None:
            self._sampler.stop()

    def _tell_all(self, messages: list[Message]) -> None:
        for message in messages:
            self._told.put(message)


Item = TypeVar("Item")


def _drained(items: queue.SimpleQueue[Item]) -> list[Item]:
    """Return what is in a queue now."""
    found = []
    while True:
        try:
            found.append(items.get_nowait())
        except queue.Empty:
            return found
