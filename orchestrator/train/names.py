"""Names of a model's variables that do not depend on what else a process has built.

Keras numbers the layers that were given no name: `dense`, `dense_1`, ... over the whole process.
A second model of the same code therefore has other paths. Here these layers are numbered anew,
within the model.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict

import keras


def stable_paths(model: keras.Model) -> list[str]:
    """Return a path for each of `model.variables`, each path once."""
    names = stable_names(model)
    seen: Counter[str] = Counter()
    paths = []
    for variable in model.variables:
        path = renamed(variable.path, names)
        # Layers that the user gave the same name: told apart by their order.
        paths.append(f"{path}#{seen[path]}" if seen[path] else path)
        seen[path] += 1
    return paths


def renamed(path: str, names: dict[str, str]) -> str:
    """Return a path with its numbered parts replaced."""
    return "/".join(names.get(part, part) for part in path.split("/"))


def stable_names(model: keras.Model) -> dict[str, str]:
    """Return Keras's own layer names and what they are called within the model."""
    numbers: dict[str, set[int]] = defaultdict(set)
    for layer in model._flatten_layers():
        base = _snake_case(type(layer).__name__)
        match = re.fullmatch(rf"{re.escape(base)}(?:_(\d+))?", layer.name)
        if match is not None:
            numbers[base].add(int(match[1] or 0))
    return {
        _numbered(base, number): _numbered(base, rank)
        for base, found in numbers.items()
        for rank, number in enumerate(sorted(found))
    }


def _numbered(base: str, number: int) -> str:
    return f"{base}_{number}" if number else base


def _snake_case(name: str) -> str:
    """Return a class's name as Keras makes layer names of it (keras 3.15, utils/naming.py)."""
    name = re.sub(r"\W+", "", name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()
