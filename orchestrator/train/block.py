"""What a block of steps reports: a row of numbers a step, written in graph, read on the host.

The row of a step holds, in this order: whether it was applied, the global norm of the mean
gradient, the number of the first variable whose gradient is not finite (0 for none), the loss
scale, the loss of each local replica, whether the gradients of each were finite, on request the
norms of each variable's gradient and of the variable, and the sums.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf

from orchestrator.train.sums import Layout


@dataclass(frozen=True, slots=True)
class BlockResult:
    """What a block of n steps reports, on the host.

    Attributes:
        sums: for `loss` and each metric the weighted sums over the global batch, [n] or [n, k].
        weight: the sums of the weights, [n].
        gradient_norm: global norm of the mean gradient before it is clipped, [n].
        loss_scale: of each step, [n]; 1 without float16.
        finite: whether the update was applied, bool [n].
        overflowed: not applied because float16 overflowed, which the loss scale expects, bool [n].
        bad_variable: path of the first variable whose gradient is not finite; "" without one.
        finite_losses: whether the loss of each local replica was finite, bool [n, local replicas].
        finite_gradients: whether the gradients of each were, before they were added up over all
            replicas, bool [n, local replicas].
        ids: for each local replica the examples as the steps used them, int64 [n, batch].
        norms: with `train.layer_norms`, `gradient_norm/<path>` and `weight_norm/<path>` of each
            variable before the update, [n] each.
    """

    sums: Mapping[str, np.ndarray]
    weight: np.ndarray
    gradient_norm: np.ndarray
    loss_scale: np.ndarray
    finite: np.ndarray
    overflowed: np.ndarray
    bad_variable: list[str]
    finite_losses: np.ndarray
    finite_gradients: np.ndarray
    ids: list[np.ndarray]
    norms: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def broken(self) -> np.ndarray:
        """Which steps were not finite, and not because of the loss scale; bool [n]."""
        return ~self.finite & ~self.overflowed

    @property
    def is_guilty(self) -> bool:
        """Whether the first of these was not finite on a replica of this worker."""
        first = np.flatnonzero(self.broken)[:1]
        return not (self.finite_losses & self.finite_gradients)[first].all()

    def until(self, num_steps: int) -> BlockResult:
        """Return the report of the first steps only."""

        def cut(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {name: part[:num_steps] for name, part in value.items()}
            return value[:num_steps]

        parts = {item.name: cut(getattr(self, item.name)) for item in dataclasses.fields(self)}
        return BlockResult(**{**parts, "ids": [part[:num_steps] for part in self.ids]})


class Rows:
    """Writes and reads the rows of one model's steps.

    Attributes:
        layout: names and widths of the sums; known once a step was traced.
    """

    def __init__(self, paths: Sequence[str], num_local: int, *, with_norms: bool):
        """Make the format.

        Args:
            paths: of the variables, in the order of the gradients.
            num_local: replicas of this worker.
            with_norms: whether rows hold the norms of each variable.
        """
        self.layout: Layout | None = None
        self.with_norms = with_norms
        self._paths = list(paths)
        self._num_local = num_local

    def write(
        self,
        *,
        ok: Any,
        mean_norm: Any,
        bad: Any,
        scale: Any,
        local: Sequence[Any],
        sound: Sequence[Any],
        norms: Sequence[Any],
        sums: Any,
    ) -> Any:
        """Return the row of one step, in graph.

        Args:
            ok: whether the update was applied, bool scalar.
            mean_norm: global norm of the mean gradient, scalar.
            bad: what `first_bad` finds, scalar.
            scale: the loss scale, scalar.
            local: the loss of each local replica, scalars.
            sound: whether the gradients of each local replica are finite, bool scalars.
            norms: where they are wanted, those of all gradients and of all variables,
                [variables] each.
            sums: the reduced sums, as `weighted_sums` orders them.
        """
        dtype = sums.dtype
        head = [tf.cast(ok, dtype), mean_norm, tf.cast(bad, dtype), tf.cast(scale, dtype), *local]
        head += [tf.cast(each, dtype) for each in sound]
        return tf.concat([tf.stack(head), *norms, sums], 0)

    def read(self, rows: np.ndarray, ids: list[np.ndarray]) -> BlockResult:
        """Take the rows of a block apart, [n, columns]."""
        assert self.layout is not None
        columns = rows.astype(np.float64)
        num_norms = 2 * len(self._paths) if self.with_norms else 0
        borders = np.cumsum([4, self._num_local, self._num_local, num_norms, 1])
        head, local, sound, norms, weight, sums = np.split(columns, borders, axis=1)
        split = self.layout.split(sums)
        names = ["", *self._paths]
        finite, scale = head[:, 0] > 0, head[:, 3]
        return BlockResult(
            sums=split,
            weight=weight[:, 0],
            gradient_norm=head[:, 1],
            loss_scale=scale,
            finite=finite,
            # At a scale of 1 it is not the scale's doing any more.
            overflowed=~finite & np.isfinite(split["loss"]) & (scale > 1),
            bad_variable=[names[int(index)] for index in head[:, 2]],
            finite_losses=np.isfinite(local),
            finite_gradients=sound > 0,
            ids=ids,
            norms=self._named(norms),
        )

    def _named(self, norms: np.ndarray) -> dict[str, np.ndarray]:
        if not self.with_norms:
            return {}
        names = [
            f"{kind}/{path}" for kind in ("gradient_norm", "weight_norm") for path in self._paths
        ]
        return dict(zip(names, norms.T, strict=True))


def first_bad(squares: Any) -> Any:
    """Return the number of the first array whose sum of squares is not finite; 0 for none.

    Args:
        squares: [arrays].
    """
    wrong = ~tf.math.is_finite(squares)
    return tf.where(tf.reduce_any(wrong), tf.argmax(tf.cast(wrong, tf.int32)) + 1, 0)


def step_means(result: BlockResult) -> dict[str, np.ndarray]:
    """Return the weighted means of each step, [n]; a metric of k columns gives `name/0` to k-1."""
    means = {}
    for name, sums in result.sums.items():
        if sums.ndim == 1:
            means[name] = sums / result.weight
        else:
            means.update({f"{name}/{i}": sums[:, i] / result.weight for i in range(sums.shape[1])})
    return means
