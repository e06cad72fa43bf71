"""What the nodes of a run are, by what their agents tell."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

_GIGA = 1e9
# Of alike nodes, so many are named.
_NAMED = 3
_FACTS = ("system", "processor", "num_cpus", "memory_bytes", "gpus")


class Nodes:
    """The nodes that a run was on.

    Attributes:
        facts: of each node by name, of all attempts; JSON-able.
    """

    def __init__(self) -> None:
        self.facts: dict[str, dict[str, Any]] = {}

    def add(self, record: Mapping[str, Any]) -> None:
        """Take in a NodeFound record."""
        self.facts[record["node"]] = {name: record[name] for name in _FACTS}

    def rows(self) -> list[tuple[str, str]]:
        """Return for each kind of node who is of it, and what it is."""
        alike: dict[str, list[str]] = defaultdict(list)
        for name, facts in self.facts.items():
            alike[_kind(facts)].append(name)
        return [(_names(names), kind) for kind, names in alike.items()]

    def words(self) -> str:
        """Return all of it in one line."""
        return "; ".join(f"{names}: {kind}" for names, kind in self.rows())


def _kind(facts: Mapping[str, Any]) -> str:
    gpus = Counter(facts["gpus"])
    told = [f"{count} x {name}" for name, count in gpus.items()] or ["no GPU"]
    memory = f"{facts['memory_bytes'] / _GIGA:.0f} GB"
    cpus = f"{facts['num_cpus']} CPUs ({facts['processor']})"
    return ", ".join([cpus, memory, *told, facts["system"]])


def _names(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
