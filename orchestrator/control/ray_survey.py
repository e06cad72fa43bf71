"""Surveys the nodes of a Ray cluster, with an actor on each.

Call `ray_settings.apply_ray_settings` before this module is imported.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.control.links import Link, rounds
from orchestrator.control.node_facts import NodeFacts, Port
from orchestrator.control.ray_nodes import bundle_of, host_name, living_nodes, may_hold_workers
from orchestrator.control.ray_places import Places
from orchestrator.control.scout import Scout, leave_mark, unseen
from orchestrator.control.survey import DRIVER, Clock, Survey
from orchestrator.errors import ClusterError, OrchestratorError
from orchestrator.spec.footprint import Rehearsal
from orchestrator.spec.plan import RunPlan

# Ray starts a process on each node, and may unpack the project there first.
_ANSWER_S = 20.0
_PLACES_S = 5.0
_MARKS_S = 2.0
_LINKS_S = 5.0


class RaySurvey:
    """Scouts on the nodes that may get workers, and what they tell."""

    def __init__(self, plan: RunPlan, own: NodeFacts):
        """Send a scout to each node; they are on their way."""
        self._plan, self._own = plan, own
        self._nodes = _candidates(plan)
        scout = ray.remote(Scout)
        self._scouts = {
            node: scout.options(
                num_cpus=0,
                max_restarts=0,
                max_concurrency=4,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            ).remote()
            for node in self._nodes
        }
        self._silent: dict[str, str] = {}

    def survey(self, folder: Path, rehearsal_s: float) -> Survey:
        """Look at all nodes, between them, and at the job on them.

        Args:
            folder: the run folder, which the driver's host has made.
            rehearsal_s: how long loading the data and tracing the model may take.
        """
        self._drop(self._ask("clock"))
        places, unplaced = self._place()
        clocks = self._clocks()
        facts = self._looks(folder)
        seen = self._unseen(folder, facts)
        nodes = [facts[node] for node in self._scouts]
        links = self._links(nodes)
        exposed = self._exposed(nodes)
        return Survey(
            plan=self._plan,
            own=self._own,
            nodes=tuple(nodes),
            places=places,
            unplaced=unplaced,
            silent=self._silent,
            clocks=tuple(clocks[node] for node in self._scouts),
            unseen=seen,
            rehearsals=self._rehearsals(rehearsal_s),
            links=links,
            exposed=exposed,
        )

    def close(self) -> None:
        """End the scouts."""
        for scout in self._scouts.values():
            ray.kill(scout)
        self._scouts = {}

    def _ask(self, method: str, arguments: Mapping[str, tuple[Any, ...]] | None = None) -> Any:
        """Ask every scout for something; return Ray's references by node."""
        return {
            node: getattr(scout, method).remote(*(arguments or {}).get(node, ()))
            for node, scout in self._scouts.items()
        }

    def _get(self, refs: Mapping[str, Any], limit_s: float = _ANSWER_S) -> dict[str, Any]:
        """Return what the scouts answer; what one raises or does not say is an exception."""
        if refs:
            ray.wait(list(refs.values()), num_returns=len(refs), timeout=limit_s)
        found: dict[str, Any] = {}
        for node, ref in refs.items():
            try:
                found[node] = ray.get(ref, timeout=0.1)
            except GetTimeoutError:
                found[node] = ClusterError(f"not within {limit_s:g} s")
            except RayError as error:
                found[node] = ClusterError(_last_line(error))
        return found

    def _drop(self, refs: Mapping[str, Any]) -> None:
        """Go on without the nodes that do not answer."""
        for node, answer in self._get(refs).items():
            if isinstance(answer, Exception):
                self._silent[host_name(self._nodes[node])] = str(answer)
                ray.kill(self._scouts.pop(node))

    def _place(self) -> tuple[dict[int, str], str]:
        """Let Ray place the workers, and give the places back."""
        limit_s = min(_PLACES_S, self._plan.config.cluster.start_timeout_s)
        # A run may queue, the doctor does not.
        cluster = dataclasses.replace(
            self._plan.config.cluster, start_timeout_s=limit_s, queue_s=0.0
        )
        places = Places(cluster)
        try:
            places.take(self._plan, frozenset())
            return places.node_ids(), ""
        except OrchestratorError as error:
            return {}, str(error)
        finally:
            places.release()

    def _clocks(self) -> dict[str, Clock]:
        """Ask one after another: the shorter the way of the answer, the more it tells."""
        found = {}
        for node, scout in self._scouts.items():
            asked = time.time()
            told = self._get({node: scout.clock.remote()})[node]
            answered = time.time()
            found[node] = Clock(told if isinstance(told, float) else asked, asked, answered)
        return found

    def _looks(self, folder: Path) -> dict[str, NodeFacts]:
        first, last = map(int, self._plan.config.cluster.port_range.split("-"))
        arguments = {
            node: (
                str(folder),
                (first, last),
                self._nodes[node]["NodeManagerAddress"],
                self._plan.config.cluster.interface,
                node,
                int(self._nodes[node]["Resources"].get("GPU", 0)),
            )
            for node in self._scouts
        }
        refs = self._ask("look", arguments)
        self._drop(refs)
        return self._get({node: refs[node] for node in self._scouts})

    def _unseen(self, folder: Path, facts: Mapping[str, NodeFacts]) -> dict[str, tuple[str, ...]]:
        """Let all write into the run folder, and all read what the others wrote."""
        names = {f"seen-by-{node[:16]}": facts[node].where for node in self._scouts}
        marks = dict(zip(self._scouts, names, strict=True))
        own = "seen-by-driver"
        everybody = {own: DRIVER, **names}
        leave_mark(folder, own)
        self._get(self._ask("leave_mark", {n: (str(folder), m) for n, m in marks.items()}))
        asked = {n: (str(folder), list(everybody), _MARKS_S) for n in self._scouts}
        answers = self._get(self._ask("unseen", asked))
        found = {DRIVER: tuple(names[name] for name in unseen(folder, list(names), _MARKS_S))}
        for node, missing in answers.items():
            if not isinstance(missing, Exception):
                found[facts[node].where] = tuple(
                    everybody[name] for name in missing if name != marks[node]
                )
        return found

    def _links(self, nodes: list[NodeFacts]) -> tuple[Link, ...]:
        """Measure the ways between nodes, in both directions, for as long as there is time."""
        if len(nodes) < 2:
            return ()
        scouts = list(self._scouts.values())
        first, last = map(int, self._plan.config.cluster.port_range.split("-"))
        echoes = list(
            self._get(self._ask("open_echo", dict.fromkeys(self._scouts, (first, last)))).values()
        )
        deadline = time.monotonic() + _LINKS_S
        found: list[Link] = []
        for pairs in rounds(len(nodes)):
            if time.monotonic() > deadline:
                break
            refs = {
                f"{source} {target}": scouts[source].measure.remote(
                    source, target, nodes[target].ip, *echoes[target]
                )
                for source, target in pairs
                if not isinstance(echoes[target], Exception)
            }
            found += [link for link in self._get(refs).values() if isinstance(link, Link)]
        self._get(self._ask("close_echo"))
        return tuple(found)

    def _exposed(self, nodes: list[NodeFacts]) -> dict[int, tuple[int, tuple[Port, ...]]]:
        """Let each node's next neighbour try the ports that are open on it."""
        if len(nodes) < 2:
            return {}
        scouts = list(self._scouts.values())
        observers = [(index + 1) % len(nodes) for index in range(len(nodes))]
        refs = {
            str(index): scouts[observers[index]].open_ports.remote(
                node.ip, [port.number for port in node.listening]
            )
            for index, node in enumerate(nodes)
        }
        found = {}
        for index, open_there in self._get(refs).items():
            if not isinstance(open_there, Exception):
                ports = nodes[int(index)].listening
                reached = tuple(port for port in ports if port.number in open_there)
                found[int(index)] = (observers[int(index)], reached)
        return found

    def _rehearsals(self, limit_s: float) -> tuple[Rehearsal, ...]:
        """Let every node load the data, and the first one trace the model too."""
        arguments = {
            node: (self._plan, place == 0, limit_s) for place, node in enumerate(self._scouts)
        }
        answers = self._get(self._ask("rehearse", arguments), limit_s + _ANSWER_S)
        return tuple(
            answer if isinstance(answer, Rehearsal) else Rehearsal(error=str(answer))
            for answer in answers.values()
        )


def _last_line(error: RayError) -> str:
    """Return what an error says last, without colours: after Ray's words and a traceback."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


def _candidates(plan: RunPlan) -> dict[str, dict[str, Any]]:
    """Return the nodes that are large enough for a worker; all, if none is."""
    bundle = bundle_of(plan)
    nodes = dict(sorted(living_nodes().items(), key=lambda item: host_name(item[1])))
    fitting = {
        name: node
        for name, node in nodes.items()
        if may_hold_workers(node, plan.config.cluster)
        and all(node["Resources"].get(kind, 0) >= amount for kind, amount in bundle.items())
    }
    return fitting or nodes
