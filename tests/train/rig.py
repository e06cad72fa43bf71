"""Runs a plan's steps in this process, on logical CPU devices, without agents and messages."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from orchestrator.spec.plan import RunPlan
from orchestrator.train.data import Feeder, Order, ledger_hash, make_shards
from orchestrator.train.evaluate import Evaluation
from orchestrator.train.inputs import Resident
from orchestrator.train.job import Job, translated
from orchestrator.train.loop import step_means
from orchestrator.train.optimizer import Optimizers
from orchestrator.train.sources import Split
from orchestrator.train.step import BlockResult, TrainStep
from tests.plans import tiny_plan


@dataclass
class Rig:
    """One plan, ready to step."""

    plan: RunPlan
    job: Job
    strategy: Any
    model: keras.Model
    optimizers: Optimizers
    step: TrainStep
    evaluation: Evaluation
    feeder: Feeder
    done: int = 0
    results: list[BlockResult] = field(default_factory=list)
    ledger: int = 0

    def run(self, *blocks: int) -> Rig:
        """Run blocks of these lengths."""
        for num_steps in blocks:
            result = self.step.run(self.done, num_steps, self.feeder.take(self.done, num_steps))
            self.ledger += sum(ledger_hash(ids, self.done) for ids in result.ids)
            self.ledger %= 2**64
            self.done += num_steps
            self.results.append(result)
        return self

    @property
    def losses(self) -> np.ndarray:
        """The loss of each step so far."""
        return np.concatenate([step_means(result)["loss"] for result in self.results])

    @property
    def weights(self) -> list[np.ndarray]:
        """All variables of the model but the seeds of layers."""
        return [
            np.asarray(tf.convert_to_tensor(v.value))
            for v in self.model.variables
            if not v.path.endswith("seed_generator_state")
        ]


def make_rig(
    folder: Path, job: Job, *, replicas: int = 1, host: bool = False, **changes: Any
) -> Rig:
    """Build a rig of some replicas; `host` keeps the data on the host instead of the devices."""
    name = "one_device" if replicas == 1 else "mirrored"
    changes = {
        "strategy__name": type(tiny_plan(folder).config.strategy.name)[name],
        "strategy__devices_per_worker": str(replicas),
        **changes,
    }
    plan = tiny_plan(folder, **changes)
    devices = [f"CPU:{index}" for index in range(replicas)]
    strategy: Any
    if replicas == 1:
        strategy = tf.distribute.OneDeviceStrategy(devices[0])
    else:
        reduction = tf.distribute.ReductionToOneDevice()
        strategy = tf.distribute.MirroredStrategy(devices, cross_device_ops=reduction)
    return assemble(plan, job, strategy, devices, host=host)


def assemble(
    plan: RunPlan,
    job: Job,
    strategy: Any,
    devices: list[str],
    *,
    worker: int = 0,
    host: bool = False,
) -> Rig:
    """Build the rig of one worker under a strategy."""
    translated(job)
    keras.utils.set_random_seed(plan.config.train.seed)
    with strategy.scope():
        model = job.model()
        optimizers = Optimizers(plan, job.parameter_groups(model), model)
    train, test = job.source(Split.TRAIN), job.source(Split.EVAL)
    shards = make_shards(plan.replica_batch_sizes, plan.worker_replicas(worker))
    resident, eval_resident = Resident(train, devices), Resident(test, devices)
    if host:
        resident.tables = eval_resident.tables = None
    order = Order(plan.config.train.seed, train.num_examples)
    batch = plan.config.train.global_batch_size
    return Rig(
        plan=plan,
        job=job,
        strategy=strategy,
        model=model,
        optimizers=optimizers,
        step=TrainStep(plan, job, model, optimizers, strategy, shards, train, resident),
        evaluation=Evaluation(
            plan, job, model, strategy, plan.worker_replicas(worker), test, eval_resident
        ),
        feeder=Feeder(train, order, shards, batch, resident=resident.tables is not None),
    )
