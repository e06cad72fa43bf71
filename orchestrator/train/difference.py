"""How far the checkpoints of two runs lie apart, variable by variable.

Run as a script in a process of its own, because reading a bundle needs TensorFlow: takes a JSON
file that names pairs of checkpoint folders, and writes what it found beside it.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from orchestrator.train import store
from orchestrator.train.checkpoint import BUNDLE, place_of


def read_variables(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Return name and value of every variable of a checkpoint, by section and index."""
    reader = tf.train.load_checkpoint(str(path / BUNDLE))
    keys = store.read_manifest(path)["variables"]
    return {place_of(key): (key, reader.get_tensor(key)) for key in keys}


def typical_sizes(values: Mapping[str, tuple[str, np.ndarray]]) -> dict[str, float]:
    """Return the root mean square of all elements of each kind of variable."""
    totals: dict[str, list[float]] = {}
    for key, value in values.values():
        total = totals.setdefault(_kind(key), [0.0, 0.0])
        total[0] += float(np.square(np.asarray(value, np.float64)).sum())
        total[1] += value.size
    return {kind: math.sqrt(total / max(1.0, count)) for kind, (total, count) in totals.items()}


def _kind(key: str) -> str:
    """Return what a variable can be compared with: all weights, or one kind of slot.

    Keras ends the names of slots in `_momentum`, `_velocity` and the like.
    """
    section = key.split(":", 1)[0].rsplit("/", 1)[0]
    return section if section == "model" else f"{section}/{key.rsplit('_', 1)[-1]}"


def difference(
    left: np.ndarray | None, right: np.ndarray | None, typical: float = 0.0
) -> dict[str, float]:
    """Return how far two values of a variable lie apart; infinite if they cannot be compared.

    Args:
        left: of the reference.
        right: of the other run.
        typical: size of an element of variables like this one: a bias that began at zero is as
            small as the first steps, and their rounding is large beside it.

    Returns:
        `largest`: the largest difference of an element over the largest element, or over 1 if
        that is less; `relative`: the Euclidean norm of the difference over that of `left`, or
        over that of typical elements if that is less.
    """
    apart = {"largest": math.inf, "relative": math.inf}
    if left is None or right is None or left.shape != right.shape:
        return apart
    a, b = np.asarray(left, np.float64), np.asarray(right, np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return apart
    largest = float(np.abs(a - b).max(initial=0.0))
    norm = float(np.linalg.norm((a - b).ravel()))
    scale = max(float(np.linalg.norm(a.ravel())), typical * math.sqrt(a.size))
    relative = norm / scale if scale else math.inf
    return {
        "largest": largest / max(1.0, float(np.abs(a).max(initial=0.0))),
        "relative": relative if norm else 0.0,
    }


def compare(reference_dir: Path, other_dir: Path) -> dict[int, dict[str, dict[str, float]]]:
    """Return, for each step that either run has saved, the difference of every variable."""
    steps: dict[int, dict[str, dict[str, float]]] = {}
    folders = [
        {store.step_of(path): path for path in store.list_checkpoints(folder)}
        for folder in (reference_dir, other_dir)
    ]
    for step in sorted(folders[0].keys() | folders[1].keys()):
        left, right = (read_variables(f[step]) if step in f else {} for f in folders)
        typical = typical_sizes(left)
        steps[step] = {}
        for place in sorted(left.keys() | right.keys()):
            key, value = left.get(place, (right.get(place, ("",))[0], None))
            other = right[place][1] if place in right else None
            steps[step][key] = difference(value, other, typical.get(_kind(key), 0.0))
    return steps


def movements(checkpoints_dir: Path) -> dict[str, float]:
    """Return how far each variable of the model went from the first checkpoint to the last."""
    paths = store.list_checkpoints(checkpoints_dir)
    last, first = read_variables(paths[0]), read_variables(paths[-1])
    return {
        key: float(np.linalg.norm(np.asarray(value - first[place][1], np.float64).ravel()))
        for place, (key, value) in last.items()
        if place.startswith("model/")
    }


def main(request: Path) -> int:
    """Answer a request: `{"pairs": [[reference, other], ...], "moved": reference}`."""
    asked: dict[str, Any] = json.loads(request.read_text())
    answer = {
        "pairs": [compare(Path(left), Path(right)) for left, right in asked["pairs"]],
        "moved": movements(Path(asked["moved"])) if asked["moved"] else {},
    }
    request.with_suffix(".answer.json").write_text(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
