"""What was seen of the nodes a run may use, before anything is judged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from orchestrator.control.links import Link
from orchestrator.control.node_facts import NodeFacts, Port
from orchestrator.control.preflight import Finding
from orchestrator.spec.footprint import Footprint, Rehearsal
from orchestrator.spec.plan import RunPlan
from orchestrator.spec.schema import ClusterName

DRIVER = "the driver's host"


@dataclass(frozen=True, slots=True)
class Clock:
    """A node's Unix time, and the driver's before and after it was asked."""

    told: float
    asked: float
    answered: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """Everything that the checks of nodes judge by.

    Attributes:
        plan: of the run.
        own: the host of the driver.
        nodes: those that may get workers; without Ray the host of the driver.
        places: the node of each worker, by Ray's name of it, as Ray has placed them just now.
        unplaced: why Ray could not; empty if it could.
        silent: nodes that did not answer, with the reason.
        clocks: of each node.
        unseen: for each node, and for the driver, the others whose files it does not see.
        rehearsals: of each node; the first has the model.
        links: between nodes, as many as there was time for.
        exposed: for each node the ports that another node, whose index is given, reaches.
    """

    plan: RunPlan
    own: NodeFacts
    nodes: tuple[NodeFacts, ...] = ()
    places: Mapping[int, str] = field(default_factory=dict)
    unplaced: str = ""
    silent: Mapping[str, str] = field(default_factory=dict)
    clocks: tuple[Clock, ...] = ()
    unseen: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rehearsals: tuple[Rehearsal, ...] = ()
    links: tuple[Link, ...] = ()
    exposed: Mapping[int, tuple[int, tuple[Port, ...]]] = field(default_factory=dict)

    @property
    def footprint(self) -> Footprint | None:
        """What a replica holds, if a rehearsal came so far."""
        found = (rehearsal.footprint for rehearsal in self.rehearsals)
        return next((footprint for footprint in found if footprint is not None), None)

    @property
    def resident_bytes(self) -> int:
        """What the data holds on each device."""
        return max((rehearsal.resident_bytes for rehearsal in self.rehearsals), default=0)

    @property
    def is_local(self) -> bool:
        """Whether all workers are on the driver's host."""
        return self.plan.config.cluster.name is not ClusterName.existing

    def workers_on(self, node: NodeFacts) -> int:
        """Return how many workers a node gets; where nobody knows, its even share."""
        if self.is_local:
            return self.plan.num_workers
        if self.places:
            return Counter(self.places.values())[node.node_id]
        return -(-self.plan.num_workers // max(1, len(self.nodes)))


# Yields what is worth telling, and what was found to be wrong.
Judge = Callable[[Survey], Iterator[str | Finding]]
