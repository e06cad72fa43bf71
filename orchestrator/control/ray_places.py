"""Where workers are on a Ray cluster: one bundle for each, in one placement group.

Call `ray_settings.apply_ray_settings` before this module is imported.
"""

from __future__ import annotations

import socket
from typing import Any

import ray
from ray.util.placement_group import (
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from orchestrator.control.policy import Room
from orchestrator.control.ray_nodes import (
    bundle_of,
    count_room,
    free_resources,
    host_name,
    keep_off,
    living_nodes,
    refuse_impossible,
    words,
)
from orchestrator.errors import ClusterError, StartFailed
from orchestrator.spec.plan import RunPlan
from orchestrator.spec.schema import ClusterConfig, ClusterName

# A later attempt is placed where there was room; if there is none any more, it is looked for again.
_PLACE_AGAIN_S = 15.0


class Places:
    """The places of a run's workers; they are kept from attempt to attempt as long as they fit."""

    def __init__(self, config: ClusterConfig):
        """Begin without any."""
        self._config = config
        self._group: Any = None
        self._nodes: list[str] = []  # of each worker
        self._names: dict[str, str] = {}  # of the hosts of all nodes that were ever seen
        self._suspects: set[str] = set()
        self._is_first = True

    def room(self, plan: RunPlan) -> Room:
        """Count the workers that fit on each host, with the places that are held already."""
        placement = self._config.placement
        self._follow()
        return count_room(plan, placement, self._living(), free_resources(), self._nodes)

    def hosts(self) -> dict[int, str]:
        """Return the name of each worker's host."""
        return {
            worker: self._names[node]
            for worker, node in enumerate(self._nodes)
            if node in self._names
        }

    def node_ids(self) -> dict[int, str]:
        """Return Ray's name of the node of each worker that has a place."""
        return dict(enumerate(self._nodes))

    def spare_nodes(self, plan: RunPlan) -> list[str]:
        """Return the nodes that have room for a worker and none of this run's."""
        free = count_room(plan, self._config.placement, self._living(), free_resources()).hosts
        return [
            node
            for node, name in self._names.items()
            if free.get(name) and node not in self._nodes and node not in self._suspects
        ]

    def hold(self, plan: RunPlan, avoid: frozenset[str]) -> bool:
        """Tell whether each worker of a plan has a place on a host that is good."""
        self._follow()
        enough = self._group is not None and len(self._nodes) == plan.num_workers
        return enough and not self._bad(avoid) & set(self._nodes)

    def take(self, plan: RunPlan, avoid: frozenset[str]) -> None:
        """Take a place for each worker.

        Raises:
            ClusterError: the cluster has not so many, or not free within the limit.
            StartFailed: the same, after a first attempt that had all its places.
        """
        bundle = bundle_of(plan)
        limit_s = self._config.start_timeout_s
        if self._is_first:
            refuse_impossible(plan)
        else:
            limit_s = min(limit_s, _PLACE_AGAIN_S)
        self._group = placement_group(
            [bundle] * plan.num_workers,
            strategy=self._config.placement.value,
            bundle_label_selector=keep_off(self._bad(avoid), plan.num_workers),
        )
        if not self._group.wait(limit_s):
            self.release()
            raise (ClusterError if self._is_first else StartFailed)(
                f"{plan.num_workers} x {words(bundle)} were not free within {limit_s:g} s "
                f"(cluster.start_timeout_s); free now: {words(ray.available_resources())}. Wait "
                "for other jobs, or ask for less with strategy.num_workers or "
                "cluster.cpus_per_worker"
            )
        self._is_first = False
        nodes = placement_group_table(self._group)["bundles_to_node_id"]
        self._nodes = [nodes[worker] for worker in range(plan.num_workers)]

    def release(self) -> None:
        """Give all places back; actors that are still there end."""
        if self._group is not None:
            remove_placement_group(self._group)
        self._group, self._nodes = None, []

    def strategy(self, worker: int) -> PlacementGroupSchedulingStrategy:
        """Return what puts an actor into a worker's place."""
        return PlacementGroupSchedulingStrategy(
            placement_group=self._group, placement_group_bundle_index=worker
        )

    def suspect(self, worker: int) -> None:
        """Doubt the node of a worker whose agent is gone or silent, until it answers itself."""
        if worker < len(self._nodes) and self._config.name is ClusterName.existing:
            self._suspects.add(self._nodes[worker])

    def answers(self, worker: int) -> bool:
        """Tell whether the node of a worker is alive, and says so itself if it is doubted."""
        if self._config.name is not ClusterName.existing:
            return True
        return worker < len(self._nodes) and self._nodes[worker] in self._living()

    def _follow(self) -> None:
        """Note which places Ray has moved: it replaces those of a dead node by itself."""
        if self._group is None:
            return
        nodes = placement_group_table(self._group)["bundles_to_node_id"]
        # A place that has no new node yet is still the one on the old, which is gone.
        self._nodes = [nodes.get(worker) or node for worker, node in enumerate(self._nodes)]

    def _bad(self, avoid: frozenset[str]) -> set[str]:
        """Return the nodes that may get no worker."""
        living = self._living()
        return {node for node, name in self._names.items() if node not in living or name in avoid}

    def _living(self) -> dict[str, dict[str, Any]]:
        """Return the nodes that are alive; one that answers is not under suspicion any more."""
        nodes = living_nodes(self._suspects)
        self._suspects -= nodes.keys()
        for node, facts in nodes.items():
            is_local = self._config.name is ClusterName.local
            self._names[node] = socket.gethostname() if is_local else host_name(facts)
        return nodes
