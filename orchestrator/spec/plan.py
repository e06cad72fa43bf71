"""RunConfig -> RunPlan: pure arithmetic, placement and TF_CONFIG."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from orchestrator.errors import PlanError
from orchestrator.spec.paths import RunPaths
from orchestrator.spec.schema import ClusterName, Precision, RunConfig, StrategyName, Weights
from orchestrator.spec.validate_train import parse_profile_steps


@dataclass(frozen=True, slots=True)
class Host:
    """What one host offers to workers; every host of a run is taken to be alike."""

    num_cpus: int
    num_gpus: int


@dataclass(frozen=True, slots=True)
class RunPlan:
    """The frozen, printable consequence of a config.

    Attributes:
        config: the whole configuration, resolved.
        run: name of the run; also the name of its folder and the tag that finds it in MLflow.
        paths: where everything of this run lies.
        num_workers: entries of TF_CONFIG.
        devices_per_worker: devices, and so replicas, of each worker.
        device_kind: "GPU" or "CPU".
        cpus_per_worker: CPU cores, and so intra-op threads, of each worker.
        replica_batch_sizes: examples a step for each replica, in replica order; the first
            `G mod R` have one more.
        steps_per_epoch: examples / global batch size; not an integer when it does not divide.
        total_steps: the last step.
        eval_period: steps between evaluations, or None; a fraction when given in epochs.
        eval_batch_size: examples a step for each replica in evaluation; the last is padded with
            weight zero.
        eval_steps: steps of one evaluation.
        tracking_uri: MLflow's tracking URI, absolute.
        data_dir: where downloads are kept, absolute.
        data_path: the user's own data, absolute, or None.
        init_from: the weights to begin with: as configured until the driver has found their path.
        profile_steps: the first and the last step to profile, counted from 1, or None.
        artifact_root: where a local SQLite store keeps artifacts; None for a server, which decides.
        verifying: the run is compared with others: what draws other numbers on each replica is
            switched off in the model, and no checkpoint is put off. Only `verify` sets it.
        loss_scale: what the loss is multiplied by at first, with float16; None without.
        overflow_step: the step, counted from 1, in which the last replica's gradient is made
            infinite; None for none. Only `verify` sets it.
    """

    config: RunConfig
    run: str
    paths: RunPaths
    num_workers: int
    devices_per_worker: int
    device_kind: str
    cpus_per_worker: int
    replica_batch_sizes: tuple[int, ...]
    steps_per_epoch: Fraction
    total_steps: int
    eval_period: Fraction | None
    eval_batch_size: int
    eval_steps: int
    tracking_uri: str
    artifact_root: str | None
    data_dir: str
    data_path: str | None
    init_from: str | None
    profile_steps: tuple[int, int] | None
    verifying: bool = False
    loss_scale: float | None = None
    overflow_step: int | None = None

    @property
    def num_replicas(self) -> int:
        """Copies of the model over all workers."""
        return self.num_workers * self.devices_per_worker

    @property
    def precision(self) -> Precision:
        """The dtype policy of the model: as configured, `auto` by the kind of device."""
        policy = self.config.precision.policy
        if policy is not Precision.auto:
            return policy
        return Precision.mixed_bfloat16 if self.device_kind == "GPU" else Precision.float32

    @property
    def exports_averages(self) -> bool:
        """Whether the model is exported with the moving average of its weights.

        The best evaluation is one of the averages where `train.evaluate_ema` says so.
        """
        train, export = self.config.train, self.config.export
        return export.weights is Weights.ema or (
            export.weights is Weights.best and train.evaluate_ema
        )

    def worker_replicas(self, worker: int) -> range:
        """Indices, among all replicas, of those of one worker."""
        first = worker * self.devices_per_worker
        return range(first, first + self.devices_per_worker)

    def tf_config(self, addresses: tuple[str, ...], worker: int) -> str:
        """The TF_CONFIG of one worker, JSON."""
        task = {"type": "worker", "index": worker}
        return json.dumps({"cluster": {"worker": list(addresses)}, "task": task})


def make_plan(
    config: RunConfig, *, run: str, host: Host, cwd: Path, num_workers: int | None = None
) -> RunPlan:
    """Work out everything that follows from a config.

    Args:
        config: a validated configuration.
        run: the name of the run.
        host: what each host offers.
        cwd: what relative paths are relative to; absolute.
        num_workers: fewer than `strategy.num_workers`, while there is no room for all of an elastic
            run's workers. What each of them takes, the global batch and the order of examples
            do not depend on it.

    Raises:
        PlanError: nothing sensible follows from the numbers.
    """
    num_workers = config.strategy.num_workers if num_workers is None else num_workers
    devices, kind = _devices(config, host)
    replicas = num_workers * devices
    batch = config.train.global_batch_size
    if batch < replicas * config.train.micro_batches:
        raise PlanError(
            f"train.global_batch_size={batch} leaves some of the {replicas} replicas "
            f"(strategy.num_workers={num_workers} x devices_per_worker={devices}) without an "
            f"example in some of the {config.train.micro_batches} micro-batches "
            f"(train.micro_batches); raise it to at least {replicas * config.train.micro_batches}"
        )
    steps_per_epoch = Fraction(config.data.num_examples, batch)
    total_steps = _total_steps(config, steps_per_epoch)
    if config.schedule.warmup_steps >= total_steps > 1:
        raise PlanError(
            f"schedule.warmup_steps={config.schedule.warmup_steps} is not shorter than the run of "
            f"{total_steps} steps (train.steps, train.epochs)"
        )
    eval_batch = min(math.ceil(batch / replicas), config.data.num_eval_examples or 1)
    root = (cwd / config.runs_dir).resolve()
    uri, artifact_root = tracking_store(config, cwd)
    return RunPlan(
        config=config,
        run=run,
        paths=RunPaths(root / config.job.name / run),
        num_workers=num_workers,
        devices_per_worker=devices,
        device_kind=kind,
        cpus_per_worker=_cpus_per_worker(config, host),
        replica_batch_sizes=split_evenly(batch, replicas),
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        eval_period=_eval_period(config, steps_per_epoch),
        eval_batch_size=eval_batch,
        eval_steps=math.ceil(config.data.num_eval_examples / (eval_batch * replicas)),
        tracking_uri=uri,
        artifact_root=artifact_root,
        data_dir=str((cwd / config.data.cache_dir).resolve()),
        data_path=None if config.data.path is None else str((cwd / config.data.path).resolve()),
        init_from=config.train.init_from,
        profile_steps=_profile_steps(config, total_steps),
        loss_scale=_loss_scale(config),
    )


def tracking_store(config: RunConfig, cwd: Path) -> tuple[str, str | None]:
    """Return MLflow's address, and for a SQLite file the folder that keeps artifacts."""
    root = (cwd / config.runs_dir).resolve()
    uri = config.tracking.uri or f"sqlite:///{root / 'mlflow.db'}"
    return absolute_uri(uri, cwd), artifacts_of(uri, root)


def absolute_uri(uri: str, cwd: Path) -> str:
    """Return MLflow's address for processes that are somewhere else: a SQLite file by its path."""
    if not uri.startswith("sqlite:///"):
        return uri
    return f"sqlite:///{(cwd / uri.removeprefix('sqlite:///')).resolve()}"


def artifacts_of(uri: str, runs_dir: Path) -> str | None:
    """Return the folder that keeps the artifacts of a SQLite file; a server has its own."""
    return str(runs_dir / "mlartifacts") if uri.startswith("sqlite:") else None


def split_evenly(total: int, parts: int) -> tuple[int, ...]:
    """Split `total` into `parts` sizes that differ by at most one, the larger ones first."""
    small, extra = divmod(total, parts)
    return tuple(small + (index < extra) for index in range(parts))


def _devices(config: RunConfig, host: Host) -> tuple[int, str]:
    """Devices of each worker and their kind."""
    asked, num_workers = config.strategy.devices_per_worker, config.strategy.num_workers
    if config.strategy.name is StrategyName.one_device:
        return 1, "GPU" if host.num_gpus else "CPU"
    if host.num_gpus == 0:
        count = 1 if asked == "auto" else int(asked)
        if config.strategy.name is StrategyName.multi_worker and count > 1:
            raise PlanError(
                f"strategy.devices_per_worker={count} with strategy=multi_worker and no GPU: "
                "TensorFlow gives a CPU worker one device; set strategy.devices_per_worker=1 and "
                f"raise strategy.num_workers, or use strategy=mirrored on one host"
            )
        return count, "CPU"
    # Workers of a local cluster share this host; elsewhere each may have a host of its own.
    sharing = num_workers if config.cluster.name is ClusterName.local else 1
    most = host.num_gpus // sharing
    count = max(1, most) if asked == "auto" else int(asked)
    if count > most:
        shared = f" for {sharing} workers (strategy.num_workers)" if sharing > 1 else ""
        raise PlanError(
            f"strategy.devices_per_worker={asked} but the host has {host.num_gpus} GPU(s){shared}; "
            f"set strategy.devices_per_worker to at most {max(1, most)}, or to auto"
            + (f" and strategy.num_workers to at most {host.num_gpus}" if most == 0 else "")
        )
    return count, "GPU"


def _loss_scale(config: RunConfig) -> float | None:
    """Return what the loss is multiplied by at first: float16 alone needs it."""
    precision = config.precision
    is_half = precision.policy is Precision.mixed_float16
    return precision.initial_loss_scale if is_half else None


def _cpus_per_worker(config: RunConfig, host: Host) -> int:
    """CPU cores of each worker: what is asked, else an equal share of this host."""
    if config.cluster.cpus_per_worker is not None:
        return config.cluster.cpus_per_worker
    if config.cluster.name is ClusterName.existing:
        return 1
    return max(1, host.num_cpus // config.strategy.num_workers)


def _total_steps(config: RunConfig, steps_per_epoch: Fraction) -> int:
    if config.train.steps is not None:
        return config.train.steps
    return math.ceil(_exact(config.train.epochs or 0.0) * steps_per_epoch)


def _profile_steps(config: RunConfig, total_steps: int) -> tuple[int, int] | None:
    if config.train.profile_steps is None:
        return None
    first, last = parse_profile_steps(config.train.profile_steps)
    if last > total_steps:
        raise PlanError(
            f"train.profile_steps={config.train.profile_steps} is beyond the run of {total_steps} "
            "steps (train.steps, train.epochs)"
        )
    return first, last


def _eval_period(config: RunConfig, steps_per_epoch: Fraction) -> Fraction | None:
    if config.data.num_eval_examples == 0:
        return None
    if config.train.eval_every_steps is not None:
        return Fraction(config.train.eval_every_steps)
    if config.train.eval_every_epochs is not None:
        return _exact(config.train.eval_every_epochs) * steps_per_epoch
    return None


def _exact(number: float) -> Fraction:
    """Return a number as it was written: 0.1 is a tenth, not the nearest sum of halves."""
    return Fraction(repr(number))
