"""How far the checkpoints of two runs lie apart, variable by variable.

Run as a script in a process of its own, because reading a bundle needs TensorFlow: takes a JSON
file that names pairs of checkpoint folders, and writes what it found beside it.
"""

from __future__ import annotations

import json
import math
import sys
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


def difference(left: np.ndarray | None, right: np.ndarray | None) -> dict[str, float]:
    """Return how far two values of a variable lie apart; infinite if they cannot be compared.

    Returns:
        `largest`: the largest difference of an element over the largest element, or over 1 if
        that is less; `relative`: the Euclidean norm of the difference over that of `left`.
    """
    apart = {"largest": math.inf, "relative": math.inf}
    if left is None or right is None or left.shape != right.shape:
        return apart
    a, b = np.asarray(left, np.float64), np.asarray(right, np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return apart
    largest = float(np.abs(a - b).max(initial=0.0))
    norm = float(np.linalg.norm((a - b).ravel()))
    return {
        "largest": largest / max(1.0, float(np.abs(a).max(initial=0.0))),
        "relative": norm / float(np.linalg.norm(a.ravel())) if norm else 0.0,
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
        steps[step] = {
            (left.get(place) or right[place])[0]: difference(
                left[place][1] if place in left else None,
                right[place][1] if place in right else None,
            )
            for place in sorted(left.keys() | right.keys())
        }
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
