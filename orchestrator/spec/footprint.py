"""What a job holds in memory and on disk, as a rehearsal finds it without making a step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.spec.plan import RunPlan

# What a process holds that has imported TensorFlow and initialised it (CPU, TensorFlow 2.21).
TENSORFLOW_BYTES = 600 * 2**20
# What CUDA, cuDNN and TensorFlow's allocator keep of a GPU before the first tensor.
CUDA_BYTES = 600 * 2**20
# The exported SavedModel, its copy packaged for MLflow, and the copy in the store.
_EXPORT_COPIES = 3
_ROUND_BYTES = 64 * 2**20  # logs, journal, plots


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A split as it was found: equal digests mean equal examples."""

    split: str
    name: str
    origin: str
    num_examples: int
    digest: str
    placement: str
    resident_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """What one replica holds, in bytes.

    Attributes:
        num_parameters: of the model.
        model_bytes: all its variables.
        optimizer_bytes: all other state that an update reads or writes.
        gradient_bytes: one gradient a trained variable.
        step_bytes: the most that tensors of one traced step hold at a time, gradients included.
        is_lower_bound: loops in the graph hold more than can be told from it.
        micro_batch_size: examples that were traced at a time.
        checkpoint_bytes: of one checkpoint.
    """

    num_parameters: int
    model_bytes: int
    optimizer_bytes: int
    gradient_bytes: int
    step_bytes: int
    is_lower_bound: bool
    micro_batch_size: int
    checkpoint_bytes: int

    @property
    def activation_bytes(self) -> int:
        """What a step holds besides the gradients."""
        return max(0, self.step_bytes - self.gradient_bytes)

    def fixed_bytes(self, plan: RunPlan) -> int:
        """Return what a replica holds whatever its batch is."""
        # What goes into a collective is packed, and comes back beside what went in.
        reduced = self.gradient_bytes if plan.num_replicas > 1 else 0
        return self.model_bytes + self.optimizer_bytes + self.gradient_bytes + reduced

    def replica_bytes(self, plan: RunPlan) -> int:
        """Return what a replica holds in a step, without data."""
        return self.fixed_bytes(plan) + self.activation_bytes

    def largest_micro_batch(self, plan: RunPlan, room_bytes: int) -> int:
        """Return how many examples at a time would fit; 0 if not even the weights do."""
        each = self.activation_bytes / self.micro_batch_size
        room = room_bytes - self.fixed_bytes(plan)
        return max(0, math.floor(room / each)) if each and room > 0 else 0

    def disk_bytes(self, plan: RunPlan) -> int:
        """Return what a run needs on disk: kept checkpoints, one in the making, exports."""
        config = plan.config
        num_checkpoints = config.checkpoint.keep + 1 + (config.best.metric is not None)
        exports = _EXPORT_COPIES * self.model_bytes if config.export.enabled else 0
        return num_checkpoints * self.checkpoint_bytes + exports + _ROUND_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """What would go wrong in a run besides its steps.

    Attributes:
        what: as a subject, such as `the evaluation`.
        mend: the key to change, or where to look.
        error: as a worker would tell it.
        user_frame: where in the user's own code that was, if it was there.
    """

    what: str
    mend: str
    error: str
    user_frame: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """What came of loading a job's data, and of building and tracing its model, in a process.

    Attributes:
        error: why it failed; empty if it did not.
        user_frame: where in the user's own code that was, if it was there.
        splits: those that were loaded.
        footprint: None where the model was not asked for, or not reached.
        troubles: what was tried after that and failed: initial weights, evaluation, serving.
        is_unfinished: whether it was ended because it took long; a run would have waited.
        wall_s: how long it took, the import of TensorFlow included.
    """

    error: str = ""
    user_frame: str = ""
    splits: tuple[Split, ...] = ()
    footprint: Footprint | None = None
    troubles: tuple[Trouble, ...] = ()
    is_unfinished: bool = False
    wall_s: float = 0.0

    @property
    def resident_bytes(self) -> int:
        """What the data holds on each device."""
        return sum(split.resident_bytes for split in self.splits)

    def plain(self) -> dict[str, Any]:
        """Return it as what JSON knows."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_plain(values: Mapping[str, Any]) -> Rehearsal:
        """Return what `plain` was made of."""
        footprint = values["footprint"]
        return Rehearsal(
            error=values["error"],
            user_frame=values["user_frame"],
            splits=tuple(Split(**split) for split in values["splits"]),
            footprint=None if footprint is None else Footprint(**footprint),
            troubles=tuple(Trouble(**trouble) for trouble in values["troubles"]),
            is_unfinished=values["is_unfinished"],
            wall_s=values["wall_s"],
        )
