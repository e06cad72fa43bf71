"""Where workers are on a Ray cluster: one bundle for each, in one placement group.

Call `ray_settings.apply_ray_settings` before this module is imported.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
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
    asked_words,
    bundle_of,
    count_room,
    free_resources,
    host_name,
    living_nodes,
    wanted_labels,
    why_impossible,
    words,
)
from orchestrator.errors import ClusterError, StartFailed
from orchestrator.spec.plan import RunPlan
from orchestrator.spec.schema import ClusterConfig, ClusterName

# A later attempt is placed where there was room; if there is none any more, it is looked for again.
_PLACE_AGAIN_S = 15.0
# Who waits for room is told why after so long, and then once in a while.
_FIRST_WORD_S = 3.0
_NEXT_WORD_S = 30.0


class Places:
    """The places of a run's workers; they are kept from attempt to attempt as long as they fit."""

    def __init__(self, config: ClusterConfig, notice: Callable[[str], None] = lambda _: None):
        """Begin without any.

        Args:
            config: says which nodes may be used, and how long to wait for room on them.
            notice: shown to the user while they wait.
        """
        self._config = config
        self._notice = notice
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
        limit_s, key = self._config.start_timeout_s, "cluster.start_timeout_s"
        if not self._is_first:
            limit_s = min(limit_s, _PLACE_AGAIN_S)
        elif self._config.queue_s:
            limit_s, key = self._config.queue_s, "cluster.queue_s"
        elif why := why_impossible(plan):
            raise ClusterError(
                f"{why}. Lower strategy.num_workers, strategy.devices_per_worker or "
                "cluster.cpus_per_worker, ask for other nodes (cluster.node_labels, "
                "cluster.accelerator_type, cluster.placement), or wait for them: cluster.queue_s"
            )
        self._group = placement_group(
            [bundle_of(plan)] * plan.num_workers,
            strategy=self._config.placement.value,
            bundle_label_selector=wanted_labels(plan, self._bad(avoid)),
        )
        if not self._wait(plan, limit_s):
            self.release()
            raise (ClusterError if self._is_first else StartFailed)(
                f"no room within {limit_s:g} s ({key}): {_why_not_yet(plan)}. Wait for other jobs, "
                "or ask for less with strategy.num_workers or cluster.cpus_per_worker"
            )
        self._is_first = False
        nodes = placement_group_table(self._group)["bundles_to_node_id"]
        self._nodes = [nodes[worker] for worker in range(plan.num_workers)]

    def _wait(self, plan: RunPlan, limit_s: float) -> bool:
        """Wait for the places, saying why from time to time; tell whether they came."""
        deadline = time.monotonic() + limit_s
        word_s = _FIRST_WORD_S
        while (left_s := deadline - time.monotonic()) > 0:
            if self._group.wait(min(word_s, left_s)):
                return True
            word_s = _NEXT_WORD_S
            if (left_s := deadline - time.monotonic()) > 0:
                self._notice(f"waiting for room, for {left_s:.0f} s at most: {_why_not_yet(plan)}")
        return False

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


def _why_not_yet(plan: RunPlan) -> str:
    """Return why the places are not there: others have them, or no node has what is asked."""
    if why := why_impossible(plan):
        return why
    free = words(ray.available_resources())
    return f"{plan.num_workers} worker(s) of {asked_words(plan)} each, free are {free}"
