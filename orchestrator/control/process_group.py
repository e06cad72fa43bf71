"""WorkerGroup on this host alone: every worker a process, without Ray."""

from __future__ import annotations

import math
import pickle
import socket
from collections.abc import Sequence
from pathlib import Path

from orchestrator.control.agent import Agent
from orchestrator.control.policy import Room
from orchestrator.spec.messages import Message, Request, WorkerOrder
from orchestrator.spec.plan import RunPlan


class ProcessGroup:
    """Workers that this process starts and watches itself, on loopback.

    The agents are those that Ray's actors are elsewhere; here they live in the driver.
    """

    def __init__(self, *, zygote: Path | None, ports: tuple[int, int], gpus: Sequence[str] = ()):
        """Make a group.

        Args:
            zygote: socket of the zygote that workers are forked from; None starts each afresh.
            ports: first and last port of TensorFlow's servers; groups that run at the same time
                need ranges of their own, as a port is free again until TensorFlow takes it.
            gpus: what CUDA_VISIBLE_DEVICES may name, dealt out in order.
        """
        self._zygote = zygote
        self._ports = ports
        self._gpus = gpus
        self._plan: RunPlan | None = None
        self._agents: list[Agent] = []
        self._addresses: tuple[str, ...] = ()

    def start(
        self,
        plan: RunPlan,
        attempt: int,
        restore_from: str | None,
        avoid: frozenset[str] = frozenset(),
    ) -> None:
        """Start every worker's process.

        Raises:
            StartFailed: there is no free port, or no TensorFlow process to be had.
        """
        self._plan = plan
        while len(self._agents) < plan.num_workers:
            self._agents.append(
                Agent(
                    len(self._agents),
                    str(plan.paths.root),
                    zygote=None if self._zygote is None else str(self._zygote),
                    use_fork=self._zygote is not None,
                    driver_silence_s=math.inf,  # the driver is this process
                )
            )
        addresses: tuple[str, ...] = ()
        if plan.num_workers > 1:
            ports = [agent.reserve_port(*self._ports) for agent in self._agents]
            addresses = tuple(f"127.0.0.1:{port}" for port in ports)
        self._addresses = addresses
        for worker, agent in enumerate(self._agents):
            order = WorkerOrder(
                plan=plan,
                worker=worker,
                attempt=attempt,
                addresses=addresses,
                visible_gpus=self._gpus_of(plan, worker),
                restore_from=restore_from,
            )
            agent.start(
                pickle.dumps(order),
                attempt,
                str(plan.paths.worker_log(attempt, worker)),
                str(plan.paths.worker_stacks(attempt, worker)),
                plan.config.code_dirs,
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
        """Wait until something is heard, at most so long."""
        share_s = timeout_s / max(1, len(self._agents))
        return [message for agent in self._agents for message in agent.poll(share_s)]

    def request(self, request: Request) -> None:
        """Ask every worker for something."""
        for agent in self._agents:
            agent.request(request)

    def where(self, worker: int) -> str:
        """Return the address of a worker, if it has one."""
        return self._addresses[worker] if self._addresses else ""

    def prove_export(self) -> None:
        """Run the clean-process check of the exported model."""
        assert self._plan is not None
        paths = self._plan.paths
        log = str(paths.logs_dir / "export-proof.log")
        self._agents[0].prove_export(str(paths.export_dir), log)

    def kill(self) -> None:
        """End every process of the attempt."""
        for agent in self._agents:
            agent.kill()

    def close(self) -> None:
        """Do nothing: nothing outlives an attempt."""

    def _gpus_of(self, plan: RunPlan, worker: int) -> str:
        if plan.device_kind != "GPU":
            return ""
        first = worker * plan.devices_per_worker
        return ",".join(self._gpus[first : first + plan.devices_per_worker])
