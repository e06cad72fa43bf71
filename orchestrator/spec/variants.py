"""RunConfig -> the runs that `verify` compares: the same job cut in different ways.

Two comparisons are made, because no single one is both sharp and the job's own:

*exact*: plain SGD in float64. Runs differ in the order of additions only. A gradient is a sum of G
terms, so its error is at most G eps of the terms' size, eps = 2.2e-16; after S steps of rate lr the
weights are at most S lr |g| G eps apart, 200 x 0.01 x 1 x 64 x 2.2e-16 = 3e-14, times how far the
training itself drives neighbouring weights apart, e^(0.01 x 200 x 5) = 2e4 where the loss curves
downwards by 5. `EXACT_LIMIT` = 1e-9 lies above that; a wrong factor, clip or example shows
as lr |g| = 1e-3 to 1e-6.

*own*: the job's optimizer, clipping and groups in float32, for few steps, because an optimizer that
divides by its gradient's size makes a full step of a gradient that is rounding noise, and apart
they stay. eps = 1.2e-7; `OWN_LIMIT` = 1e-5 of the norm of a variable is 17 eps a step over 5 steps.
What has no gradient at all in exact arithmetic, such as a bias in front of a normalisation, is
noise only and is left out; where BatchNorm would carry such noise further this comparison is in
float64 too, with the limit of the first.

*scaled*, for a job in mixed_float16: as own, but the runs that are compared have the job's loss
scale and their reference has the scale 1, and in step 2 the gradient of the last replica alone is
made infinite. A power of two changes no digit of a float32 number, so nothing may come of the
scale, of its halving, or of the step that is left out; the limits are those of own. In float16
itself the runs would differ by eps = 1e-3 a step, which hides more than it shows.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import ConfigError
from orchestrator.spec.paths import RunPaths
from orchestrator.spec.plan import Host, RunPlan, make_plan, split_evenly
from orchestrator.spec.schema import (
    Compile,
    OnNan,
    OptimizerConfig,
    OptimizerName,
    Precision,
    RunConfig,
    ScheduleName,
    StrategyName,
    VariantName,
)

EXACT_LIMIT = 1e-9
OWN_LIMIT = 1e-5
_RATE = 0.01  # of SGD: moves every weight, and keeps most models far from diverging
_CHECKPOINTS = 10  # of the exact comparison; between two of them steps are made again if needed
_MICRO_BATCHES = 4
_OVERFLOW_STEP = 2  # neither the first nor the last: what was applied shows in the next


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How all runs of a comparison compute.

    Attributes:
        name: "exact", "own" or "scaled"; names a folder.
        optimizer: of every run; its clipping is the variant's where the variant has one.
        precision: of every run.
        steps: of every run.
        every_steps: steps between checkpoints, whose variables are compared.
        limit: the largest difference that counts as equal.
        relative: `limit` is a share of the norm of a variable, or of a loss; else of the larger of
            1 and the largest element.
        loss_scale: of the runs that are compared with a reference, whose own is 1; or None.
    """

    name: str
    optimizer: OptimizerConfig
    precision: Precision
    steps: int
    every_steps: int
    limit: float
    relative: bool
    loss_scale: float | None = None

    @property
    def title(self) -> str:
        """What the runs have in common, in words."""
        name, precision = self.optimizer.name.value, self.precision.value
        share = "of the norm" if self.relative else "of an element"
        scale = ""
        if self.loss_scale is not None:
            scale = f" with loss scale {self.loss_scale:g} against 1, overflow in step "
            scale += str(_OVERFLOW_STEP)
        return f"{name} in {precision}{scale}, {self.steps} steps, at most {self.limit:.0e} {share}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """How one run is cut.

    Attributes:
        name: of the variant; names a folder.
        reference: name of the variant that it must agree with; its own for a reference.
        clipped: gradients are clipped to a norm that most steps exceed.
    """

    name: str
    reference: str
    strategy: StrategyName = StrategyName.one_device
    num_workers: int = 1
    devices: int = 1
    micro_batches: int = 1
    clipped: bool = False

    @property
    def num_replicas(self) -> int:
        """Copies of the model over all workers."""
        return self.num_workers * self.devices

    def title(self, global_batch_size: int) -> str:
        """Return what the variant is, with the batch of each replica."""
        sizes = split_evenly(global_batch_size, max(self.num_replicas, self.micro_batches))
        cut = "+".join(map(str, sizes)) if len(sizes) > 1 else str(global_batch_size)
        what = {
            StrategyName.one_device: "1 device",
            StrategyName.mirrored: f"{self.devices} replicas",
            StrategyName.multi_worker: f"{self.num_workers} workers",
        }[self.strategy]
        micro = f", {self.micro_batches} micro-batches" if self.micro_batches > 1 else ""
        return f"{what}{micro}{', clipped' if self.clipped else ''}: {cut}"


ONE_DEVICE = Variant(name="one_device", reference="one_device")
ONE_DEVICE_CLIPPED = Variant(
    name="one_device_clipped", reference="one_device_clipped", clipped=True
)


def make_comparisons(config: RunConfig, *, has_batch_norm: bool) -> list[Comparison]:
    """Return the comparisons of a job.

    Args:
        config: of the job.
        has_batch_norm: the model has layers that normalise over the batch.
    """
    steps = config.verify.steps
    plain = OptimizerConfig(name=OptimizerName.sgd, learning_rate=_RATE)
    exact = Comparison(
        name="exact",
        optimizer=plain,
        precision=Precision.float64,
        steps=steps,
        every_steps=max(1, steps // _CHECKPOINTS),
        limit=EXACT_LIMIT,
        relative=False,
    )
    own = Comparison(
        name="own",
        optimizer=config.optimizer,
        precision=Precision.float64 if has_batch_norm else Precision.float32,
        steps=config.verify.own_steps,
        every_steps=1,
        limit=EXACT_LIMIT if has_batch_norm else OWN_LIMIT,
        relative=not has_batch_norm,
    )
    # Lion steps by the sign alone: of rounding noise as far as of a gradient, in any precision.
    if has_batch_norm and config.optimizer.name is OptimizerName.lion:
        return [exact]
    if config.precision.policy is not Precision.mixed_float16:
        return [exact, own]
    scaled = dataclasses.replace(
        own,
        name="scaled",
        steps=max(own.steps, _OVERFLOW_STEP + 1),
        loss_scale=max(2.0, config.precision.initial_loss_scale),
    )
    return [exact, own, scaled]


def make_variants(config: RunConfig, *, num_gpus: int, has_batch_norm: bool) -> list[Variant]:
    """Return what is compared, each after the reference that it needs.

    Args:
        config: of the job; `verify.variants` says which.
        num_gpus: of this host; none for logical CPU devices.
        has_batch_norm: micro-batches are left out: each is normalised by itself.
    """
    many = uneven_replicas(num_gpus)
    known = {
        VariantName.mirrored: Variant(
            name="mirrored", reference="one_device", strategy=StrategyName.mirrored, devices=2
        ),
        VariantName.multi_worker: Variant(
            name="multi_worker",
            reference="one_device_clipped",
            strategy=StrategyName.multi_worker,
            num_workers=2,
            clipped=True,
        ),
        VariantName.micro_batches: Variant(
            name="micro_batches", reference="one_device", micro_batches=_MICRO_BATCHES
        ),
        VariantName.uneven: Variant(
            name="uneven",
            reference="one_device_clipped",
            strategy=StrategyName.mirrored,
            devices=many,
            clipped=True,
        ),
    }
    wanted = [known[name] for name in VariantName if name in config.verify.variants]
    if has_batch_norm:
        wanted = [variant for variant in wanted if variant.micro_batches == 1]
    if not wanted:
        names = ",".join(name.value for name in config.verify.variants)
        raise ConfigError(
            f"verify.variants=[{names}]: a model with BatchNormalization computes something else "
            "with micro-batches, and nothing else is left to compare: name another variant"
        )
    references = [ONE_DEVICE]
    if any(variant.clipped for variant in wanted):
        references.append(ONE_DEVICE_CLIPPED)
    return [*references, *wanted]


def uneven_replicas(num_gpus: int) -> int:
    """Return how many replicas share a batch that they do not divide."""
    return 2 if num_gpus == 2 else 3


def uneven_batch_size(global_batch_size: int, num_gpus: int) -> int:
    """Return the global batch size, or the next one that the replicas do not divide."""
    size = max(global_batch_size, _MICRO_BATCHES)
    return size + (size % uneven_replicas(num_gpus) == 0)


def variant_plan(
    config: RunConfig,
    comparison: Comparison,
    variant: Variant,
    *,
    clip: float | None,
    host: Host,
    cwd: Path,
    folder: Path,
) -> RunPlan:
    """Return the plan of one run of a comparison.

    Args:
        config: of the job; not changed.
        comparison: how the run computes.
        variant: how it is cut.
        clip: limit of the gradient's norm for variants that clip.
        host: this host; without GPUs, logical CPU devices are used.
        cwd: what relative paths are relative to.
        folder: takes the run's folder.
    """
    config = copy.deepcopy(config)
    config.strategy.name = variant.strategy
    config.strategy.num_workers = variant.num_workers
    config.strategy.min_workers = None
    config.strategy.devices_per_worker = str(variant.devices)
    config.optimizer = copy.deepcopy(comparison.optimizer)
    if variant.clipped:
        config.optimizer.clip_global_norm = clip
    config.schedule.name = ScheduleName.constant
    config.schedule.warmup_steps = 0
    config.schedule.boundaries, config.schedule.factors = [], []
    config.precision.policy = comparison.precision
    train = config.train
    train.global_batch_size = uneven_batch_size(train.global_batch_size, host.num_gpus)
    train.micro_batches = variant.micro_batches
    train.epochs, train.steps = None, comparison.steps
    if train.compile is not Compile.eager:
        # XLA rounds one device's program and a replica's share of it to other float32 numbers.
        train.compile = Compile.graph
    config.data.num_eval_examples = 0
    config.checkpoint.every_steps, config.checkpoint.every_s = comparison.every_steps, None
    config.checkpoint.keep = comparison.steps
    config.export.enabled = False
    if comparison.loss_scale is not None:
        train.on_nan = OnNan.skip  # of the reference, for which the overflow is no overflow
    plan = make_plan(config, run=folder.name, host=host, cwd=cwd)
    paths = RunPaths(folder / f"{comparison.name}-{variant.name}")
    plan = dataclasses.replace(plan, paths=paths, verifying=True)
    if comparison.loss_scale is None:
        return plan
    is_reference = variant.name == variant.reference
    scale = 1.0 if is_reference else comparison.loss_scale
    return dataclasses.replace(plan, loss_scale=scale, overflow_step=_OVERFLOW_STEP)
