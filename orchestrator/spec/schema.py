"""The schema of `conf/`: one dataclass per section. The values live in YAML.

The dataclasses are not frozen because OmegaConf refuses every override of a frozen one; nobody
changes a config after `load_config` has returned it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from orchestrator.spec.chaos import ChaosConfig
from orchestrator.spec.sweep import SweepConfig


class StrategyName(Enum):
    """How replicas are spread: tf.distribute's own names."""

    one_device = "one_device"
    mirrored = "mirrored"
    multi_worker = "multi_worker"


class ClusterName(Enum):
    """Where workers run: a Ray started for this run, one that exists, or this very process."""

    local = "local"
    existing = "existing"
    inline = "inline"


class OptimizerName(Enum):
    """Keras optimizers whose arguments are known here."""

    adam = "adam"
    adamw = "adamw"
    sgd = "sgd"
    rmsprop = "rmsprop"
    lion = "lion"
    nadam = "nadam"
    adamax = "adamax"
    adagrad = "adagrad"
    adadelta = "adadelta"
    ftrl = "ftrl"
    lamb = "lamb"
    muon = "muon"

    @property
    def is_proven(self) -> bool:
        """Tell whether this project's tests prove it under every strategy."""
        return self.value in ("adam", "adamw", "sgd", "rmsprop", "lion")


class ScheduleName(Enum):
    """Learning-rate schedules, as factors of `optimizer.learning_rate`."""

    constant = "constant"
    cosine = "cosine"
    piecewise = "piecewise"


class Compile(Enum):
    """How a block of steps is executed."""

    auto = "auto"
    graph = "graph"
    xla = "xla"
    eager = "eager"


class OnNan(Enum):
    """What a loss or gradient that is not finite does."""

    stop = "stop"
    skip = "skip"
    rollback = "rollback"


class BestMode(Enum):
    """Which value of a metric is the better one."""

    min = "min"
    max = "max"


class Weights(Enum):
    """Which weights a run exports: those it ended with, their average, or the best evaluation's."""

    last = "last"
    ema = "ema"
    best = "best"


class Precision(Enum):
    """Keras dtype policies; float64 is for comparisons.

    auto is mixed_bfloat16 on GPUs and float32 on CPUs.
    """

    auto = "auto"
    float32 = "float32"
    float64 = "float64"
    mixed_bfloat16 = "mixed_bfloat16"
    mixed_float16 = "mixed_float16"


class VariantName(Enum):
    """What `verify` compares with one device."""

    mirrored = "mirrored"
    multi_worker = "multi_worker"
    micro_batches = "micro_batches"
    uneven = "uneven"


class Placement(Enum):
    """How Ray spreads workers over nodes: the names of its placement strategies."""

    PACK = "PACK"
    SPREAD = "SPREAD"
    STRICT_PACK = "STRICT_PACK"
    STRICT_SPREAD = "STRICT_SPREAD"


class Code(Enum):
    """How the project comes to the nodes of a cluster."""

    upload = "upload"
    installed = "installed"


@dataclass(kw_only=True, slots=True)
class JobConfig:
    """Which class to train. `args` are the constructor's arguments."""

    name: str
    class_name: str
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class StrategyConfig:
    """How many workers, with how many devices each."""

    name: StrategyName
    num_workers: int
    min_workers: int | None
    devices_per_worker: str  # "auto" or a number: OmegaConf has no union of text and int
    bytes_per_pack: int | None


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    """How to reach Ray, and what each worker may use of its node."""

    name: ClusterName
    address: str | None
    code: Code = Code.upload
    allow_unauthenticated: bool = False
    placement: Placement
    node_labels: dict[str, str] = field(default_factory=dict)
    accelerator_type: str | None = None
    interface: str | None = None
    cpus_per_worker: int | None
    queue_s: float = 0.0
    start_timeout_s: float
    driver_silence_s: float
    agent_silence_s: float
    fork: bool
    port_range: str
    trusted_network: bool
    log_device_placement: bool
    soft_placement: bool


@dataclass(kw_only=True, slots=True)
class OptimizerGroup:
    """What one parameter group changes of the optimizer; null keeps the optimizer's value."""

    learning_rate: float | None = None
    weight_decay: float | None = None
    beta_1: float | None = None
    beta_2: float | None = None
    epsilon: float | None = None
    momentum: float | None = None
    nesterov: bool | None = None
    rho: float | None = None


@dataclass(kw_only=True, slots=True)
class OptimizerConfig(OptimizerGroup):
    """A Keras optimizer by name; null leaves an argument at Keras's default."""

    name: OptimizerName
    clip_global_norm: float | None = None
    clip_value: float | None = None
    weight_decay_exclude: list[str] = field(default_factory=list)
    ema_decay: float | None = None
    groups: dict[str, OptimizerGroup] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class ScheduleConfig:
    """The learning rate over the steps, as a factor of `optimizer.learning_rate`."""

    name: ScheduleName
    warmup_steps: int
    final_factor: float
    boundaries: list[int]
    factors: list[float]


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Sizes of the data, which the plan needs and the worker checks, and where it lies."""

    num_examples: int
    num_eval_examples: int
    path: str | None
    cache_dir: str


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """How long, how large, how often."""

    global_batch_size: int
    micro_batches: int
    epochs: float | None
    steps: int | None
    eval_every_epochs: float | None
    eval_every_steps: int | None
    seed: int
    compile: Compile
    block_s: float
    max_block_steps: int
    on_nan: OnNan
    allow_missing_gradients: bool = False
    evaluate_ema: bool = False
    deterministic: bool
    max_time_s: float | None
    init_from: str | None
    freeze: list[str]
    check_numerics: bool
    profile_steps: str | None  # FIRST-LAST
    layer_norms: bool
    audit_every_steps: int | None


@dataclass(kw_only=True, slots=True)
class BestConfig:
    """Which evaluation is the best one, and how long training goes on without a better one."""

    metric: str | None
    mode: BestMode
    min_delta: float
    patience: int | None


@dataclass(kw_only=True, slots=True)
class PrecisionConfig:
    """The dtype policy of the model."""

    policy: Precision
    initial_loss_scale: float = 2.0**15


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """When to save and what to keep."""

    every_steps: int | None
    every_s: float | None
    keep: int
    max_failed_saves: int | None


@dataclass(kw_only=True, slots=True)
class RecoveryConfig:
    """How patient and how stubborn the supervisor is.

    Attributes:
        start_patience_s: seconds without progress, in every phase but stepping, that are a stall.
        step_patience_s: the same while stepping; at least five of the slowest blocks count.
    """

    max_restarts: int | None
    max_start_restarts: int | None
    max_node_restarts: int | None
    max_preemptions: int | None
    backoff_s: float
    max_backoff_s: float
    capacity_timeout_s: float
    start_patience_s: float
    step_patience_s: float


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """Where the record goes."""

    uri: str | None
    experiment: str | None
    required: bool
    log_every_steps: str  # "auto" or a number
    system_metrics_every_s: float | None
    timeout_s: float
    journal_patience_s: float


@dataclass(kw_only=True, slots=True)
class ExportConfig:
    """The SavedModel at the end of a run."""

    enabled: bool
    weights: Weights
    register: str | None
    alias: str | None


@dataclass(kw_only=True, slots=True)
class VerifyConfig:
    """What `verify` compares; training does not read it."""

    steps: int
    own_steps: int
    variants: list[VariantName]


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """Everything a run is made from."""

    job: JobConfig
    strategy: StrategyConfig
    cluster: ClusterConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    data: DataConfig
    train: TrainConfig
    precision: PrecisionConfig
    best: BestConfig
    checkpoint: CheckpointConfig
    recovery: RecoveryConfig
    tracking: TrackingConfig
    export: ExportConfig
    verify: VerifyConfig
    chaos: ChaosConfig
    sweep: SweepConfig
    runs_dir: str
    run_name: str | None
    resume: str | None
    resume_allow: list[str]
    code_dirs: list[str] = field(default_factory=list)  # importable in workers; set by load_config
