"""Agents as Ray actors, and those that only prepare a node for workers to come.

Call `ray_settings.apply_ray_settings` before this module is imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.control.ray_agent import RayAgent
from orchestrator.spec.plan import RunPlan
from orchestrator.spec.schema import ClusterConfig


class Agents:
    """Makes agents, all alike but for their place."""

    def __init__(self, config: ClusterConfig, zygote: Path | None, surroundings: Path | None):
        """Make none yet.

        Args:
            config: how to reach Ray.
            zygote: socket of this node's, for a local cluster; elsewhere agents find or start one.
            surroundings: file with folder and environment for processes, where neither agent nor
                zygote has those of the driver.
        """
        self._config = config
        self._zygote = zygote
        self._surroundings = surroundings
        self._warming: dict[str, tuple[Any, Any]] = {}

    def make(self, plan: RunPlan, worker: int, **options: Any) -> Any:
        """Return the agent of a worker; `options` are those of the Ray actor."""
        return (
            ray.remote(RayAgent)
            .options(max_restarts=0, max_concurrency=8, **options)
            .remote(
                worker,
                str(plan.paths.root),
                zygote=str(self._zygote) if self._zygote is not None else None,
                use_fork=self._config.fork,
                driver_silence_s=self._config.driver_silence_s,
                surroundings=str(self._surroundings) if self._surroundings is not None else None,
            )
        )

    def warm(self, plan: RunPlan, nodes: list[str]) -> bool:
        """Let TensorFlow be imported on nodes without workers; tell whether all have done it."""
        if not self._config.fork:
            return True
        for node in nodes:
            if node not in self._warming:
                strategy = NodeAffinitySchedulingStrategy(node, soft=False)
                agent = self.make(plan, 0, num_cpus=0, scheduling_strategy=strategy)
                self._warming[node] = agent, agent.warm_up.remote(wait=True)
        waiting = [ref for _, ref in self._warming.values()]
        return not waiting or not ray.wait(waiting, num_returns=len(waiting), timeout=0)[1]

    def end_warming(self) -> None:
        """End the agents of nodes without workers; what they have imported stays."""
        for agent, _ in self._warming.values():
            ray.kill(agent)
        self._warming = {}
