"""Variables <-> store: everything a run needs to go on as if it had never stopped.

Saved are the model's variables and all optimizer state. Not saved are the seeds of layers and the
position in the data: both follow from the step.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from orchestrator.errors import RestoreError, StorageError
from orchestrator.spec.messages import Saved
from orchestrator.spec.paths import RunPaths
from orchestrator.train import store
from orchestrator.train.best import Best
from orchestrator.train.names import stable_paths
from orchestrator.train.optimizer import Optimizers
from orchestrator.train.replica import is_layer_seed

BUNDLE = "variables"
_MODEL = "model/"


def named_variables(model: keras.Model, optimizers: Optimizers) -> dict[str, keras.Variable]:
    """Return everything to save, by key.

    Keras paths alone do not identify a variable (they contain counters of the process), so the
    key is `<section>/<index>:<path>`; paths of the model's own variables are without counters.
    """
    keys = model_variables(model)
    for section, variables in optimizers.variables.items():
        for index, variable in enumerate(variables):
            keys[f"{section}/{index}:{variable.path}"] = variable
    return keys


def model_variables(model: keras.Model) -> dict[str, keras.Variable]:
    """Return what is saved of a model, by key."""
    paths = zip(stable_paths(model), model.variables, strict=True)
    saved = [(path, variable) for path, variable in paths if not is_layer_seed(variable)]
    return {f"{_MODEL}{index}:{path}": v for index, (path, v) in enumerate(saved)}


class Saver:
    """Writes checkpoints in the background, one at a time, in the order they were due."""

    def __init__(
        self,
        paths: RunPaths,
        attempt: int,
        variables: Mapping[str, keras.Variable],
        *,
        keep: int,
        facts: Mapping[str, Any],
        announce: Callable[..., None],
    ):
        """Make a saver.

        Args:
            paths: of the run.
            attempt: staging happens in this attempt's folder, so that an attempt that is over
                cannot commit any more once the folder is renamed away.
            variables: what to save, by key.
            keep: how many checkpoints stay.
            facts: what the manifest says besides step and variables.
            announce: called with the fields of `Saved` when a checkpoint is durable.
        """
        self._paths = paths
        self._staging_dir = paths.staging_dir(attempt)
        self._variables = variables
        self._keep = keep
        self._facts = facts
        self._announce = announce
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._pending: Future[None] | None = None
        self._staging_dir.mkdir(parents=True, exist_ok=True)

    def save(self, step: int, best: Best | None = None) -> None:
        """Take a snapshot of all variables and write it in the background.

        A save that is still under way is waited for: checkpoints never overtake each other.

        Args:
            step: of the variables.
            best: the best evaluation so far, whose checkpoint stays however old it is.

        Raises:
            StorageError: the save before this one failed.
        """
        start = time.monotonic()
        self.wait()
        # A copy on the next write: the values of this step stay, without a pause to copy them.
        snapshot = {key: tf.identity(_local(v)) for key, v in self._variables.items()}
        stall_s = time.monotonic() - start
        self._pending = self._thread.submit(self._write, step, snapshot, stall_s, best)

    def wait(self) -> None:
        """Wait until the last checkpoint is durable; raises what its writing raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait, then end the thread and remove the staging folder."""
        self.wait()
        self._thread.shutdown()
        shutil.rmtree(self._staging_dir, ignore_errors=True)

    def _write(
        self, step: int, snapshot: Mapping[str, tf.Tensor], stall_s: float, best: Best | None
    ) -> None:
        start = time.monotonic()
        staged = self._staging_dir / store.checkpoint_name(step)
        target = self._paths.checkpoints_dir / store.checkpoint_name(step)
        try:
            staged.mkdir(exist_ok=True)  # the state of streams may lie there already
        except OSError as error:
            raise StorageError(f"cannot stage a checkpoint in {staged}: {error}") from error
        with tf.device("CPU:0"):
            tf.raw_ops.SaveV2(
                prefix=str(staged / BUNDLE),
                tensor_names=list(snapshot),
                shape_and_slices=[""] * len(snapshot),
                tensors=list(snapshot.values()),
            )
        described = {
            key: {"shape": value.shape.as_list(), "dtype": value.dtype.name}
            for key, value in snapshot.items()
        }
        facts = {**self._facts, **(best.facts() if best is not None else {})}
        manifest = {"step": step, **facts, "time": time.time(), "variables": described}
        num_bytes = store.commit(staged, target, manifest)
        store.prune(self._paths.checkpoints_dir, self._keep, best.step if best else None)
        wall_s = time.monotonic() - start
        self._announce(
            Saved, step=step, path=str(target), num_bytes=num_bytes, wall_s=wall_s, stall_s=stall_s
        )


def read_model(path: Path) -> dict[str, np.ndarray]:
    """Return the model's variables in a checkpoint, by path without counters.

    Raises:
        ValueError: the checkpoint is damaged.
    """
    store.verify(path)
    keys = store.read_manifest(path)["variables"]
    reader = tf.train.load_checkpoint(str(path / BUNDLE))
    return {key.split(":", 1)[1]: reader.get_tensor(key) for key in keys if key.startswith(_MODEL)}


def read_section(path: Path, section: str) -> list[np.ndarray]:
    """Return the values of a section besides the model, such as `averages`, in their order.

    Raises:
        ValueError: the checkpoint is damaged.
    """
    store.verify(path)
    keys = [k for k in store.read_manifest(path)["variables"] if k.startswith(f"{section}/")]
    reader = tf.train.load_checkpoint(str(path / BUNDLE))
    return [reader.get_tensor(key) for key in keys]


def restore(
    path: Path, variables: Mapping[str, keras.Variable], *, model_only: bool = False
) -> int:
    """Set all variables to a checkpoint's values, under any strategy.

    Args:
        path: the checkpoint's folder.
        variables: what to set, by key.
        model_only: whether `variables` are those of the model alone.

    Returns:
        The step of the checkpoint.

    Raises:
        RestoreError: the checkpoint is damaged, or its variables are not those of this model and
            optimizer: the message lists what is missing, extra or of another shape.
    """
    try:
        store.verify(path)
        manifest = store.read_manifest(path)
    except (OSError, ValueError) as error:
        raise RestoreError(f"checkpoint {path}: {error}") from error
    saved = {
        place_of(key): (key, entry)
        for key, entry in manifest["variables"].items()
        if not model_only or key.startswith(_MODEL)
    }
    wanted = {place_of(key): (key, variable) for key, variable in variables.items()}
    differences = _differences(saved, wanted)
    if differences:
        shown = "\n".join(f"  {line}" for line in differences[:12])
        more = f"\n  and {len(differences) - 12} more" if len(differences) > 12 else ""
        raise RestoreError(
            f"checkpoint {path} does not fit this model and optimizer:\n{shown}{more}\n"
            "resume with the configuration and job it was made with, or start a new run"
        )
    reader = tf.train.load_checkpoint(str(path / BUNDLE))
    for position, (_, variable) in wanted.items():
        variable.assign(reader.get_tensor(saved[position][0]))
    return int(manifest["step"])


def place_of(key: str) -> str:
    """Return the part of a key that does not depend on the process: section and index."""
    return key.split(":", 1)[0]


def _differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    lines = []
    for position in sorted(saved.keys() | wanted.keys()):
        if position not in wanted:
            lines.append(f"only in the checkpoint: {saved[position][0]}")
        elif position not in saved:
            lines.append(f"only in the model: {wanted[position][0]}")
        else:
            entry, variable = saved[position][1], wanted[position][1]
            shape, dtype = list(variable.shape), tf.as_dtype(variable.dtype).name
            if (entry["shape"], entry["dtype"]) != (shape, dtype):
                lines.append(
                    f"{saved[position][0]}: {entry['dtype']} {entry['shape']} in the checkpoint, "
                    f"{dtype} {shape} in the model"
                )
    return lines


def _local(variable: keras.Variable) -> tf.Tensor:
    """Return the value of a variable on this worker's first replica."""
    return tf.convert_to_tensor(variable.value)
