"""`train.init_from`: the model's weights at step 0 from another run or file, for fine-tuning.

Only the model's variables: the optimizer and the step begin anew. Variables are matched by their
path, and loaded where the shape is the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from orchestrator.errors import JobError
from orchestrator.train.checkpoint import read_model
from orchestrator.train.job import Job
from orchestrator.train.names import stable_paths
from orchestrator.train.replica import is_layer_seed

_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Loaded:
    """What became of each variable.

    Attributes:
        matched: paths that were loaded.
        missing: paths of the model that nothing in the source fits; they keep their initial values.
        extra: paths of the source that the model does not have; unknown of a `.weights.h5` file.
        reshaped: `path: shape there, shape here` of those left as they are; of a `.weights.h5` file
            these are among the missing.
    """

    matched: list[str]
    missing: list[str]
    extra: list[str]
    reshaped: list[str]

    def table(self, limit: int | None = None) -> str:
        """Return the counts, and the paths of all but the matched ones."""
        lines = [f"{len(self.matched)} of the model's variables were loaded"]
        for what, paths in (
            ("without a match in the source, left as initialised", self.missing),
            ("only in the source, not used", self.extra),
            ("of another shape, left as initialised", self.reshaped),
        ):
            if paths:
                lines += [f"{len(paths)} {what}:", *(f"  {path}" for path in paths[:limit])]
                if limit is not None and len(paths) > limit:
                    lines.append(f"  and {len(paths) - limit} more")
        return "\n".join(lines)

    def summary(self) -> str:
        """Return the table, short enough for a screen."""
        return self.table(_SHOWN)


def load_initial(
    path: Path,
    job: Job,
    model: keras.Model,
    progress: Callable[[str], None] = lambda text: None,
) -> Loaded:
    """Set the model's variables to those of a checkpoint folder or a `.weights.h5` file.

    Args:
        path: of the folder or file.
        job: whose model it is.
        model: whose variables are set.
        progress: takes a short text, often, while a checkpoint is read.

    Raises:
        JobError: the source cannot be read, or none of its variables fits.
    """
    is_file = path.name.endswith(".weights.h5")
    try:
        values = _from_h5(path, job) if is_file else read_model(path, progress)
    except (OSError, ValueError, KeyError) as error:
        raise JobError(f"train.init_from={path} cannot be read: {error}") from error
    loaded = _assign(values, model)
    if not loaded.matched:
        raise JobError(f"train.init_from={path} fits nowhere:\n{loaded.summary()}")
    return loaded


def _assign(values: Mapping[str, np.ndarray], model: keras.Model) -> Loaded:
    loaded = Loaded([], [], [], [])
    known = set()
    for path, variable in zip(stable_paths(model), model.variables, strict=True):
        if is_layer_seed(variable):
            continue
        known.add(path)
        if path not in values:
            loaded.missing.append(path)
        elif values[path].shape != tuple(variable.shape):
            there, here = list(values[path].shape), list(variable.shape)
            loaded.reshaped.append(f"{path}: {there} in the source, {here} in the model")
        else:
            variable.assign(values[path].astype(tf.as_dtype(variable.dtype).as_numpy_dtype))
            loaded.matched.append(path)
    loaded.extra.extend(sorted(values.keys() - known))
    return loaded


def _from_h5(path: Path, job: Job) -> dict[str, np.ndarray]:
    """Read a Keras weights file by Keras's own rules, which match by structure, not by path.

    They are applied to a second model, filled with NaN: what is still NaN was not in the file.
    """
    twin = job.model()
    variables = [
        (path, variable)
        for path, variable in zip(stable_paths(twin), twin.variables, strict=True)
        if tf.as_dtype(variable.dtype).is_floating
    ]
    for _, variable in variables:
        variable.assign(np.full(variable.shape, np.nan, np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the table says what was skipped
        twin.load_weights(str(path), skip_mismatch=True)
    arrays = {path: np.asarray(tf.convert_to_tensor(v.value)) for path, v in variables}
    return {path: array for path, array in arrays.items() if not np.isnan(array).all()}
