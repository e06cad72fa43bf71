"""A scope that catches what a job's layers assign while a batch is computed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import keras
import tensorflow as tf

from orchestrator.errors import JobError


class Captured(keras.StatelessScope):
    """Catches what layers assign to their state, so that the step decides what becomes of it.

    Keras's own scope answers None for variables it was not given, which its regularisers then
    take for the value (keras 3.15, layers/layer.py:_get_regularization_losses).
    """

    def __init__(
        self,
        state: Sequence[tuple[keras.Variable, Any]] = (),
        derived: Callable[[keras.Variable], Any] = lambda variable: None,
        *,
        discards: bool = False,
    ):
        """Begin with some values.

        Args:
            state: variables and what they are in the scope.
            derived: asked for the value of any other; None lets it be what it is outside.
            discards: nobody looks at what was assigned, so that it may be anything.
        """
        super().__init__(state, collect_losses=True, initialize_variables=False)
        self._derived = derived
        self._discards = discards
        self._given = {id(variable) for variable, _ in state}
        self._assigned: dict[int, keras.Variable] = {}
        self._graph: Any = None

    def __enter__(self) -> Captured:
        """Begin to catch what is assigned in the graph that is being built."""
        self._graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
        super().__enter__()
        return self

    def get_current_value(self, variable: keras.Variable) -> Any:
        """Return the value assigned in the scope, else the variable itself, which tapes watch.

        Raises:
            JobError: it was made within the scope, by a layer that is called for the first time.
        """
        value = super().get_current_value(variable)
        if value is None:
            value = self._derived(variable)
        if value is None and variable._value is None and _is_float(variable):
            # Keras would put its initial value into the graph, for good.
            raise JobError(
                f"{variable.path} was made while a batch was computed, where it could neither be "
                "trained nor saved: build its layer in model(), by calling the model once as it is "
                "called in training"
            )
        return variable._value if value is None else value

    def add_update(self, update: tuple[keras.Variable, Any]) -> None:
        """Take what is assigned to a variable; called by Keras.

        Raises:
            JobError: that happens in the body of a loop or the like, from which it cannot be taken.
        """
        variable, value = update
        if self._graph is not None and getattr(value, "graph", self._graph) is not self._graph:
            if self._discards or self._follows_from_step(variable):
                return  # a layer of the model draws the same in each round
            raise JobError(
                f"the job assigns to {variable.path} in tf.map_fn, a loop or a condition, where "
                "each round would begin with the same value: random layers and generators would "
                "draw the same for every example. Use them on the whole batch, or draw from the "
                "seeds that prepare() gets (orchestrator.train.draws)"
            )
        super().add_update(update)
        self._assigned[id(variable)] = variable

    def _follows_from_step(self, variable: keras.Variable) -> bool:
        """Tell whether a variable is a seed of the model's layers."""
        return id(variable) in self._given and not _is_float(variable)

    def refuse_lost(
        self, kept: Callable[[keras.Variable], bool], of_model: Collection[keras.Variable]
    ) -> None:
        """Refuse assignments that nobody keeps.

        Args:
            kept: tells of a variable whether what was assigned lives on.
            of_model: the model's variables.

        Raises:
            JobError: there is one that is lost.
        """
        lost = [variable for variable in self._assigned.values() if not kept(variable)]
        if not lost:
            return
        owned = {id(variable) for variable in of_model}
        told = "; ".join(f"{v.path}, {_why_lost(v, id(v) in owned)}" for v in lost)
        raise JobError(
            "the job assigns to variables while it computes a batch. A step keeps what layers of "
            f"the model assign to float state that is not trained; it would lose {told}"
        )


def _is_float(variable: keras.Variable) -> bool:
    return bool(tf.as_dtype(variable.dtype).is_floating)


def _why_lost(variable: keras.Variable, is_of_model: bool) -> str:
    """Return what is wrong with assigning to a variable, and what to do instead."""
    if not is_of_model:
        return (
            "which is not the model's: give it to the model in model(), or return what it "
            "counts as a metric"
        )
    if variable.trainable:
        return (
            "which is trained: use what would be assigned without assigning it, or give the "
            "variable a constraint, which holds after each update"
        )
    return (
        f"which is {tf.as_dtype(variable.dtype).name}: let it be float32, whose mean over the "
        "replicas is kept"
    )
