"""WorkerGroup: the one interface behind which workers live."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from orchestrator.control.policy import Room
from orchestrator.spec.messages import Message, Request
from orchestrator.spec.plan import RunPlan


class WorkerGroup(Protocol):
    """All workers of one attempt: started together, killed together.

    `RayGroup` runs them on a cluster, `InlineGroup` in this process, tests script their own.
    """

    def start(
        self,
        plan: RunPlan,
        attempt: int,
        restore_from: str | None,
        avoid: frozenset[str] = frozenset(),
    ) -> None:
        """Start every worker of the plan, on none of the hosts to avoid.

        Raises:
            ClusterError: a node or resource is not there.
            StartFailed: a worker's process could not be started.
        """

    def capacity(self, plan: RunPlan) -> Room:
        """Tell how many workers of a plan fit on each living host, those that run included."""

    def hosts(self) -> Mapping[int, str]:
        """Return the names that `capacity` has for the hosts of the workers; of some, maybe."""

    def prepare(self, plan: RunPlan) -> bool:
        """Make hosts ready that have no worker yet; returns at once whether all are."""

    def poll(self, timeout_s: float) -> list[Message]:
        """Wait until something is heard, at most `timeout_s`; a lost worker is a `Death`."""

    def request(self, request: Request) -> None:
        """Ask every worker for something; answers come as messages."""

    def where(self, worker: int) -> str:
        """Return a worker's node, with its address if it has one; empty if it is not known."""

    def prove_export(self) -> None:
        """Run the clean-process check of the exported model on the chief's node.

        It writes `paths.proof` and, when the model passes, `paths.mlflow_model_dir`.
        """

    def kill(self) -> None:
        """End every process of the attempt; returns when they are proven gone."""

    def close(self) -> None:
        """Give back everything that outlives an attempt: actors, placement group, zygote, Ray."""
