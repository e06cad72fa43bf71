"""The frozen records that cross from worker to driver, and the order that starts a worker.

Every record carries the worker (index in TF_CONFIG), the attempt and `time`, in Unix seconds,
stamped where the thing happened: the journal and MLflow keep that time, so that sending a record
twice changes nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.spec.plan import RunPlan


class Phase(Enum):
    """What a worker is doing; each phase has its own patience."""

    starting = "starting"
    importing = "importing"
    connecting = "connecting"
    loading_data = "loading data"
    building = "building"
    restoring = "restoring"
    tracing = "tracing"
    stepping = "stepping"
    calling_back = "calling the job back"
    evaluating = "evaluating"
    saving = "saving"
    exporting = "exporting"
    ending = "ending"


class Cause(Enum):
    """Whose fault a failure is; budgets and exit codes follow from it."""

    job = "job"
    worker = "worker"
    node = "node"
    preemption = "preemption"
    start = "start"
    cluster = "cluster"
    restore = "restore"
    storage = "storage"
    export = "export"
    collateral = "collateral"


class Request(Enum):
    """What the driver may ask of running workers."""

    SAVE = "save"
    SAVE_AND_STOP = "save_and_stop"
    STACKS = "stacks"


class Outcome(Enum):
    """How a worker ended without failing."""

    completed = "completed"
    stopped = "stopped"


# Why a run has ended whose driver could not say so: the guardian does, some seconds later.
DRIVER_KILLED = "the driver was killed"
# What is told of a node, and not of what one attempt does there.
NO_ATTEMPT = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """What every record carries."""

    worker: int
    attempt: int
    time: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Beacon(Message):
    """A sign of life: where the worker is.

    Attributes:
        begins: whether the phase begins here; others come once a second, whatever happens, and are
            not kept in the journal.
    """

    phase: Phase
    step: int
    detail: str = ""
    begins: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready(Message):
    """The worker has its devices and its model; sent once, before the first step."""

    host: str
    pid: int
    devices: tuple[str, ...]
    cpu_threads: int
    replica_batch_sizes: tuple[int, ...]
    num_parameters: int
    start_step: int
    restored_from: str | None
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataUsed(Message):
    """A split as the chief found it."""

    split: str
    name: str
    source: str
    digest: str
    num_examples: int
    features: Mapping[str, str]  # name -> "uint8 [28, 28]"
    placement: str = ""  # "resident on device", "fetched from host" or "stream, not elastic"


@dataclass(frozen=True, slots=True, kw_only=True)
class Substituted(Message):
    """What a run that is compared with others has changed in its model: names of layers.

    Attributes:
        silenced: layers that no longer drop or add anything at random.
        synchronised: BatchNorm layers that normalise over all replicas.
        random: layers that draw random numbers and could not be silenced.
    """

    silenced: tuple[str, ...]
    synchronised: tuple[str, ...]
    random: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockDone(Message):
    """One block of steps: `steps first_step+1 .. first_step+num_steps` are done.

    `loss`, `metrics` and `learning_rate` hold one reduced value a step, from the chief only;
    other workers leave them empty. `wall_s` is the whole block, `data_wait_s` the part of it
    spent waiting for input. `ledger` is the sum, modulo 2^64, of the hashes of (id, step) of
    every example that this worker's replicas used.
    """

    first_step: int
    num_steps: int
    wall_s: float
    data_wait_s: float
    ledger: int
    loss: tuple[float, ...] = ()
    metrics: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    learning_rate: tuple[float, ...] = ()
    skipped_steps: tuple[int, ...] = ()

    @property
    def last_step(self) -> int:
        """The last step that is done."""
        return self.first_step + self.num_steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated(Message):
    """The whole eval split was evaluated at `step`; `metrics` includes `loss`."""

    step: int
    metrics: Mapping[str, float]
    num_examples: int
    wall_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved(Message):
    """A checkpoint is in place and durable. `stall_s` is how long steps waited for it."""

    step: int
    path: str
    num_bytes: int
    wall_s: float
    stall_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveFailed(Message):
    """A checkpoint could not be written; training goes on and tries again.

    Attributes:
        step: of the checkpoint.
        error: why.
        num_failed: saves in a row that have failed, this one included.
        limit: how many end the run; None for never.
    """

    step: int
    error: str
    num_failed: int
    limit: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported(Message):
    """The chief has written the SavedModel and the golden batch."""

    step: int
    path: str
    input_dtype: str
    input_shape: tuple[int | None, ...]
    output_dtype: str
    output_shape: tuple[int | None, ...]
    wall_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice(Message):
    """Something the user should read; it stops nothing."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFound(Message):
    """What a node is; told by the agent that samples it, of no attempt.

    Attributes:
        node: its name in the record; unique within a run.
        system: kernel and machine.
        processor: the model's name.
        num_cpus: logical ones.
        memory_bytes: of the whole node.
        gpus: their names, whether this run uses them or not; empty where NVML is not there.
    """

    node: str
    system: str
    processor: str
    num_cpus: int
    memory_bytes: int
    gpus: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSampled(Message):
    """How busy a node is, whoever keeps it busy; told by the agent that samples it, of no attempt.

    Attributes:
        node: as `NodeFound` names it.
        values: by MLflow's own names of its system metrics, such as `cpu_utilization_percentage`.
    """

    node: str
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Draining(Message):
    """The worker's node is to be left; made by the group.

    `deadline` is the Unix time at which the node goes, None if that is not known.
    """

    host: str
    deadline: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed(Message):
    """The worker cannot go on. `user_frame` is `file:line in function: source line`."""

    step: int
    phase: Phase
    cause: Cause
    error: str
    user_frame: str
    traceback: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended(Message):
    """The worker's last word when all went well."""

    step: int
    outcome: Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Stacks(Message):
    """The Python stacks of a worker, as `faulthandler` writes them; sent by its agent when asked.

    `text` is empty if the process could not write them.
    """

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Death(Message):
    """A worker's process or its agent is gone; made by the agent or the group, not by the worker.

    Or it is as good as gone: it makes no progress, and the supervisor ends it.

    `error` is one line; `exit_status` is the process's, negative for a signal, None if unknown.
    """

    error: str
    exit_status: int | None
    log_path: str
    log_tail: str
    cause: Cause = Cause.worker  # node or preemption where its machine is gone


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOrder:
    """What an agent hands to the process it forks.

    Attributes:
        addresses: `host:port` of every worker, in TF_CONFIG order; empty without multi_worker.
        visible_gpus: value of CUDA_VISIBLE_DEVICES, "" for none.
        restore_from: a checkpoint folder, or None to start at step 0.
    """

    plan: RunPlan
    worker: int
    attempt: int
    addresses: tuple[str, ...]
    visible_gpus: str
    restore_from: str | None


MESSAGE_KINDS: dict[str, type[Message]] = {
    kind.__name__: kind
    for kind in (
        Beacon,
        Ready,
        DataUsed,
        Substituted,
        BlockDone,
        Evaluated,
        Saved,
        SaveFailed,
        Exported,
        Notice,
        NodeFound,
        NodeSampled,
        Draining,
        Failed,
        Ended,
        Stacks,
        Death,
    )
}


def is_kept(message: Message) -> bool:
    """Tell whether a message belongs into the journal; signs of life would only fill it."""
    return not isinstance(message, Stacks) and getattr(message, "begins", True)


def to_record(message: Message) -> dict[str, Any]:
    """Turn a message into a JSON-able dict with its kind under `kind`."""
    record: dict[str, Any] = {"kind": type(message).__name__}
    for item in dataclasses.fields(message):
        value = getattr(message, item.name)
        record[item.name] = value.value if isinstance(value, Enum) else value
    return record
