"""`train.freeze`: variables that keep their values, chosen by patterns on their paths."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

import keras

from orchestrator.errors import JobError
from orchestrator.train.job import Job
from orchestrator.train.names import renamed, stable_names

_SHOWN = 12


def freeze(job: Job, model: keras.Model, patterns: Sequence[str]) -> str:
    """Freeze layers and variables; call before the optimizers are built.

    A layer whose path matches, or whose variables all match, is frozen as a whole: a
    BatchNormalization then keeps its statistics too. The job's parameter groups lose what is
    frozen.

    Args:
        job: whose `parameter_groups` are narrowed.
        model: the built model.
        patterns: as in a shell, on paths below the model such as `backbone/dense_1/kernel`; `*`
            also matches `/`.

    Returns:
        What is frozen, for the log.

    Raises:
        JobError: a pattern matches nothing that could be trained, or nothing is left to train.
    """
    paths = _Paths(model)
    candidates = list(model.trainable_variables)
    filled = {name for name, group in job.parameter_groups(model).items() if group}
    for pattern in patterns:
        _freeze_layers(model, pattern, paths)
        found = [variable for variable in candidates if paths.match(pattern, variable)]
        for variable in found:
            variable.trainable = False
        if not found:
            raise JobError(
                f"train.freeze: the pattern {pattern} matches nothing that is trained; there are "
                f"{_some([paths.of(variable) for variable in candidates])}"
            )
    if not model.trainable_variables:
        raise JobError(f"train.freeze={list(patterns)} leaves nothing to train")
    _narrow_groups(job, filled)
    frozen = [paths.of(variable) for variable in candidates if not variable.trainable]
    lines = [f"frozen: {len(frozen)} of {len(candidates)} trainable variables"]
    return "\n".join([*lines, *(f"  {path}" for path in frozen)])


class _Paths:
    """Paths of variables below the model: some kinds of models put their own name in front.

    The variables of a functional model that is a layer of another one do not have its name in
    their path: for them the layers that lead to them count.
    """

    def __init__(self, model: keras.Model):
        self._names = stable_names(model)
        self._prefix = f"{model.name}/"
        self._below: dict[int, str] = {}
        self._walk(model, "")

    def of(self, variable: keras.Variable) -> str:
        """Return the path that says more."""
        own = renamed(variable.path.removeprefix(self._prefix), self._names)
        return max(own, self._below.get(id(variable), ""), key=lambda path: path.count("/"))

    def match(self, pattern: str, variable: keras.Variable) -> bool:
        own = renamed(variable.path.removeprefix(self._prefix), self._names)
        return any(_matches(pattern, path) for path in (own, self._below.get(id(variable), own)))

    def _walk(self, layer: keras.Layer, path: str) -> None:
        for variable in layer.variables:
            self._below[id(variable)] = f"{path}{variable.name}"
        for part in layer._flatten_layers(recursive=False, include_self=False):
            self._walk(part, f"{path}{renamed(part.name, self._names)}/")


def _matches(pattern: str, path: str) -> bool:
    """Tell whether a pattern matches a variable or a layer that it belongs to."""
    parts = path.split("/")
    return any(fnmatchcase("/".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


def _freeze_layers(model: keras.Model, pattern: str, paths: _Paths) -> None:
    for layer in model._flatten_layers():
        own = layer.variables
        if own and all(paths.match(pattern, variable) for variable in own):
            layer.trainable = False


def _narrow_groups(job: Job, filled: Collection[str]) -> None:
    """Leave frozen variables out of the parameter groups, also of those the user wrote.

    A group of which nothing is left is none any more; one that had nothing before is a mistake.
    """
    groups_of = job.parameter_groups

    def trainable_groups(model: keras.Model) -> dict[str, list[keras.Variable]]:
        groups = groups_of(model)
        left = {name: [v for v in group if v.trainable] for name, group in groups.items()}
        return {name: group for name, group in left.items() if group or name not in filled}

    job.parameter_groups = trainable_groups  # type: ignore[method-assign]


def _some(paths: list[str]) -> str:
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return f"{', '.join(paths[:_SHOWN])}{more}"
