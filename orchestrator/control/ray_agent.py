"""The agent as a Ray actor: what it adds is what Ray knows of its node."""

from __future__ import annotations

from typing import Any

import ray

from orchestrator.control.agent import Agent


class RayAgent(Agent):
    """An agent that tells its node's address as Ray knows it, and the node's id."""

    def describe_node(self) -> dict[str, Any]:
        """Return what `describe_here` tells, with `node_id`, and `ip` as Ray was told it.

        The nodes of a cluster reach each other by the addresses that they were started with;
        routing may know another one, or none at all.
        """
        known = {"ip": ray.util.get_node_ip_address()}
        return self.describe_here() | known | {"node_id": ray.get_runtime_context().get_node_id()}
