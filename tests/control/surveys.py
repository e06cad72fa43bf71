"""Surveys for tests of what is judged of them: nodes that are well, and changes to them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from orchestrator.control.links import Link
from orchestrator.control.node_facts import NodeFacts
from orchestrator.control.preflight import Finding
from orchestrator.control.survey import DRIVER, Clock, Judge, Survey
from orchestrator.spec.footprint import Footprint, Rehearsal, Split
from orchestrator.spec.memory import MemoryLimit
from orchestrator.spec.schema import ClusterName, StrategyName
from tests.plans import tiny_plan

GIB = 2**30
VERSIONS = {"Python": "3.11.9", "tensorflow": "2.21.0", "ray": "2.60.0", "project": "0123456789ab"}
TWO_WORKERS = {
    "cluster__name": ClusterName.existing,
    "strategy__name": StrategyName.multi_worker,
    "strategy__num_workers": 2,
}


def node(number: int, **changes: Any) -> NodeFacts:
    """Return a node that is well."""
    known: dict[str, Any] = {
        "host": f"host-{number}",
        "ip": f"10.0.0.{number}",
        "interface": "eth0",
        "addresses": {"lo": "127.0.0.1", "eth0": f"10.0.0.{number}"},
        "resolves_to": f"10.0.0.{number}",
        "node_id": f"{number:032x}",
        "versions": VERSIONS,
        "is_cpu_build": True,
        "num_cpus": 16,
        "memory": MemoryLimit(16 * GIB, "of this host"),
        "free_memory_bytes": 12 * GIB,
        "free_disk_bytes": 100 * GIB,
        "shm_bytes": 8 * GIB,
        "max_files": 65536,
        "auth_mode": "token",
        "told_at": 1000.0,
    }
    return NodeFacts(**known | changes)


def rehearsal(digest: str = "d" * 64, *, with_model: bool = True, **changes: Any) -> Rehearsal:
    """Return a rehearsal that went well: 4 MiB of weights, 1 MiB of activations an example."""
    split = Split(
        split="train",
        name="digits",
        origin="/data/digits",
        num_examples=96,
        digest=digest,
        placement="resident on device",
        resident_bytes=2**20,
    )
    mib = 2**20
    found = Footprint(
        num_parameters=mib,
        model_bytes=4 * mib,
        optimizer_bytes=8 * mib,
        gradient_bytes=4 * mib,
        step_bytes=12 * mib,
        is_lower_bound=False,
        micro_batch_size=8,
        checkpoint_bytes=12 * mib,
    )
    known = {"splits": (split,), "footprint": found if with_model else None}
    return Rehearsal(**known | changes)


def survey(folder: Path, *nodes: NodeFacts, plan: Any = None, **changes: Any) -> Survey:
    """Return the survey of two nodes with a worker each, that are well, or of others."""
    nodes = nodes or (node(1), node(2))
    known: dict[str, Any] = {
        "plan": plan or tiny_plan(folder, **TWO_WORKERS),
        "own": node(0),
        "nodes": nodes,
        "places": {worker: n.node_id for worker, n in enumerate(nodes)},
        "clocks": tuple(Clock(told=100.0, asked=99.999, answered=100.001) for _ in nodes),
        "unseen": dict.fromkeys((DRIVER, *(n.where for n in nodes)), ()),
        "rehearsals": tuple(rehearsal(with_model=i == 0) for i in range(len(nodes))),
        "links": tuple(
            Link(a, b, 0.0002, 1e9) for a in range(len(nodes)) for b in range(len(nodes)) if a != b
        ),
    }
    return Survey(**known | changes)


def changed(found: Survey, **changes: Any) -> Survey:
    """Return a survey with other values."""
    return dataclasses.replace(found, **changes)


def findings(judge: Judge, found: Survey) -> list[Finding]:
    """Return what a check finds."""
    return [item for item in judge(found) if isinstance(item, Finding)]


def said(judge: Judge, found: Survey) -> str:
    """Return what a check tells."""
    return "\n".join(item for item in judge(found) if isinstance(item, str))


def problem(judge: Judge, found: Survey) -> Finding:
    """Return the one finding of a check; it hinders a start."""
    (finding,) = findings(judge, found)
    assert finding.error is not None, finding.text
    return finding


def notice(judge: Judge, found: Survey) -> Finding:
    """Return the one finding of a check; it hinders nothing."""
    (finding,) = findings(judge, found)
    assert finding.error is None, finding.text
    return finding
