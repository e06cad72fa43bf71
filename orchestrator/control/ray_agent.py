"""The agent as a Ray actor: what it adds is what Ray knows of its node."""

from __future__ import annotations

import time
from typing import Any

import ray

from orchestrator.control.agent import Agent
from orchestrator.spec.messages import Message


class RayAgent(Agent):
    """An agent that tells its clock with all it heard, and its node's address as Ray knows it."""

    def describe_node(self, with_project: bool = False) -> dict[str, Any]:
        """Return what `describe_here` tells, with `node_id`, and `ip` as Ray was told it.

        The nodes of a cluster reach each other by the addresses that they were started with;
        routing may know another one, or none at all.
        """
        known = {"ip": ray.util.get_node_ip_address()}
        known["node_id"] = ray.get_runtime_context().get_node_id()
        return self.describe_here(with_project) | known

    def clocks(self) -> tuple[float, float]:
        """Return this process's monotonic clock and the host's Unix time; the driver lives."""
        self.poll(0.0)
        return time.monotonic(), time.time()

    def listen(self, timeout_s: float, stamp: float) -> tuple[float, list[Message]]:
        """Return the monotonic clock and what was heard, waiting for something at most so long.

        Args:
            timeout_s: how long.
            stamp: the clock in the last answer that the driver has.
        """
        messages = self.poll(timeout_s, alive_at=stamp)
        return time.monotonic(), messages
