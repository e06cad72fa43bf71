"""Keras optimizers from typed configuration, one for each parameter group."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from orchestrator.errors import JobError
from orchestrator.spec.plan import RunPlan
from orchestrator.spec.schema import (
    OptimizerConfig,
    OptimizerGroup,
    OptimizerName,
    ScheduleConfig,
    ScheduleName,
)
from orchestrator.train import fused
from orchestrator.train.averages import Averages
from orchestrator.train.job import flatten_groups
from orchestrator.train.loss_scale import LossScale
from orchestrator.train.names import renamed, stable_names

KERAS_CLASSES = {
    OptimizerName.adam: fused.Adam,
    OptimizerName.adamw: fused.AdamW,
    OptimizerName.sgd: keras.optimizers.SGD,
    OptimizerName.rmsprop: keras.optimizers.RMSprop,
    OptimizerName.lion: keras.optimizers.Lion,
    OptimizerName.nadam: keras.optimizers.Nadam,
    OptimizerName.adamax: keras.optimizers.Adamax,
    OptimizerName.adagrad: keras.optimizers.Adagrad,
    OptimizerName.adadelta: keras.optimizers.Adadelta,
    OptimizerName.ftrl: keras.optimizers.Ftrl,
    OptimizerName.lamb: keras.optimizers.Lamb,
    OptimizerName.muon: keras.optimizers.Muon,
}


class LearningRate(keras.optimizers.schedules.LearningRateSchedule):
    """`base x warm-up x shape`, each a factor of the optimizer's step.

    Warm-up is linear and reaches 1 at step `warmup_steps`; the cosine begins there and ends at
    `total_steps` with `final_factor` (Loshchilov and Hutter 2017, equation 5, one period).
    """

    def __init__(self, base: float, config: ScheduleConfig, total_steps: int):
        self._base = base
        self._config = config
        self._total_steps = total_steps

    def __call__(self, step: Any) -> Any:
        """Return the rate of the update after `step` updates, in float32."""
        step = tf.cast(step, tf.float32)
        warmup = self._config.warmup_steps
        rate = tf.constant(self._base, tf.float32) * self._shape(step)
        if warmup:
            rate *= tf.minimum(1.0, (step + 1.0) / warmup)
        return rate

    @property
    def is_constant(self) -> bool:
        """Tell whether the rate never changes, so that no step needs to compute it."""
        return self._config.name is ScheduleName.constant and self._config.warmup_steps == 0

    @property
    def base(self) -> float:
        """The rate that the schedule multiplies."""
        return self._base

    def _shape(self, step: Any) -> Any:
        config = self._config
        if config.name is ScheduleName.cosine:
            span = max(1, self._total_steps - config.warmup_steps)
            done = tf.clip_by_value((step - config.warmup_steps) / span, 0.0, 1.0)
            half = 0.5 * (1.0 + tf.cos(math.pi * done))
            return config.final_factor + (1.0 - config.final_factor) * half
        if config.name is ScheduleName.piecewise:
            factors = tf.constant(config.factors, tf.float32)
            passed = step[..., None] >= tf.constant(config.boundaries, tf.float32)
            return tf.gather(factors, tf.reduce_sum(tf.cast(passed, tf.int32), axis=-1))
        return tf.ones_like(step)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments, as Keras asks of a schedule."""
        return {"base": self._base, "config": self._config, "total_steps": self._total_steps}


class Optimizers:
    """One Keras optimizer for each parameter group, applied to gradients already reduced.

    Attributes:
        groups: the variables of each parameter group.
        loss_scale: with float16, what the loss is multiplied by; else None.
        averages: the moving average of the weights if it is asked for, else None.
    """

    def __init__(
        self,
        plan: RunPlan,
        groups: Mapping[str, Sequence[keras.Variable]],
        model: keras.Model | None = None,
    ):
        """Build the optimizers and their slots; call inside `strategy.scope()`.

        Args:
            plan: of the run.
            groups: variables by parameter group.
            model: whose variables they are, so that patterns match names that do not depend on
                what else the process has built.

        Raises:
            JobError: the groups and `optimizer.groups` do not fit each other, or overlap; one has
                a variable that is not the model's; or a pattern of
                `optimizer.weight_decay_exclude` fits no variable.
        """
        config = plan.config
        _check_groups(config.optimizer, groups)
        if model is not None:
            _check_members(groups, model)
        self.groups = {name: list(variables) for name, variables in groups.items()}
        names = stable_names(model) if model is not None else {}
        paths = {id(v): renamed(v.path, names) for v in flatten_groups(self.groups)}
        excluded = _excluded(config.optimizer.weight_decay_exclude, self.groups, paths)
        self._rates: dict[str, LearningRate] = {}
        self._optimizers = {}
        for name, variables in self.groups.items():
            optimizer = self._build(plan, name)
            optimizer.exclude_from_weight_decay(var_list=excluded)
            optimizer.build(variables)
            # The gradients are sums over all replicas already; Keras must not add them up again
            # (keras 3.15, backend/tensorflow/optimizer.py:_all_reduce_sum_gradients).
            optimizer._all_reduce_sum_gradients = lambda grads_and_vars: grads_and_vars
            self._optimizers[name] = optimizer
        self.loss_scale: LossScale | None = None
        if plan.loss_scale is not None:
            self.loss_scale = LossScale(plan.loss_scale)
        self.averages: Averages | None = None
        if config.optimizer.ema_decay is not None:
            self.averages = Averages(config.optimizer.ema_decay, flatten_groups(self.groups))

    @property
    def variables(self) -> dict[str, list[keras.Variable]]:
        """All state that an update reads or writes besides the model's, by section."""
        state = {f"optimizer/{name}": list(o.variables) for name, o in self._optimizers.items()}
        if self.loss_scale is not None:
            state["loss_scale"] = self.loss_scale.variables
        if self.averages is not None:
            state["averages"] = self.averages.variables
        return state

    def take_initial_weights(self) -> None:
        """Let averages begin at the weights that were loaded, not at the random ones before."""
        if self.averages is not None:
            self.averages.restart()

    def apply(self, gradients: Mapping[str, Sequence[Any]]) -> None:
        """Update the variables of every group; call in replica context."""
        for name, optimizer in self._optimizers.items():
            optimizer.apply(gradients[name], self.groups[name])

    def apply_if(self, applied: Any, gradients: Mapping[str, Sequence[Any]]) -> None:
        """Update the variables, or leave everything as it is; for a block that XLA compiles.

        What an optimizer assigns is chosen at each assignment: XLA then makes one loop of it. A
        `tf.cond` around the update, or putting old values back after it, copies all state (MLP,
        Adam: 3,200 against 5,300 steps/s).

        Args:
            applied: bool scalar.
            gradients: as for `apply`.
        """
        for name, optimizer in self._optimizers.items():
            group = self.groups[name]
            # Keras assigns these without asking the optimizer (keras 3.15, base_optimizer.py).
            direct = [optimizer.iterations]
            if optimizer.weight_decay is not None or any(v.constraint for v in group):
                direct += group
            before = [tf.identity(variable.value) for variable in direct]
            with _choosing(optimizer, applied), fused.unfused(optimizer):
                optimizer.apply(gradients[name], group)
            for variable, value in zip(direct, before, strict=True):
                variable.value.assign(tf.where(applied, variable.value, value))

    def learning_rates(self, num_steps: int) -> dict[str, np.ndarray]:
        """Return the rates of the next `num_steps` updates of each group, float32 [num_steps]."""
        rates = {}
        for name, schedule in self._rates.items():
            first = int(self._optimizers[name].iterations.numpy())
            rates[name] = schedule(tf.range(first, first + num_steps)).numpy()
        return rates

    def take_configured_rates(self) -> None:
        """Let constant rates be those of the configuration; a checkpoint has those it had then."""
        for name, rate in self._rates.items():
            if rate.is_constant:
                self._optimizers[name].learning_rate = rate.base

    def _build(self, plan: RunPlan, group: str) -> Any:
        config = plan.config.optimizer
        arguments = _arguments(config, config.groups.get(group))
        rate = LearningRate(arguments["learning_rate"], plan.config.schedule, plan.total_steps)
        self._rates[group] = rate
        if not rate.is_constant:
            arguments["learning_rate"] = rate
        return KERAS_CLASSES[config.name](**arguments)


@contextlib.contextmanager
def _choosing(optimizer: Any, applied: Any) -> Iterator[None]:
    """Let an optimizer's assignments keep the old value unless `applied`."""

    def assign(variable: Any, value: Any) -> None:
        target = variable.value if isinstance(variable, keras.Variable) else variable
        target.assign(tf.where(applied, tf.cast(value, target.dtype), target))

    def assign_add(variable: Any, value: Any) -> None:
        assign(variable, variable + tf.cast(value, variable.dtype))

    def assign_sub(variable: Any, value: Any) -> None:
        assign(variable, variable - tf.cast(value, variable.dtype))

    chosen = {"assign": assign, "assign_add": assign_add, "assign_sub": assign_sub}
    for name, method in chosen.items():
        object.__setattr__(optimizer, name, method)
    try:
        yield
    finally:
        for name in chosen:
            object.__delattr__(optimizer, name)


def _excluded(
    patterns: Sequence[str],
    groups: Mapping[str, Sequence[keras.Variable]],
    paths: Mapping[int, str],
) -> list[keras.Variable]:
    """Return the variables that weight decay leaves alone."""
    every = flatten_groups(groups)
    chosen = {}
    for pattern in patterns:
        fitting = [variable for variable in every if fnmatch.fnmatch(paths[id(variable)], pattern)]
        if not fitting:
            raise JobError(
                f"optimizer.weight_decay_exclude: {pattern!r} fits no variable; they are "
                + ", ".join(paths[id(variable)] for variable in every[:12])
            )
        chosen.update({id(variable): variable for variable in fitting})
    return list(chosen.values())


def _arguments(config: OptimizerConfig, group: OptimizerGroup | None) -> dict[str, Any]:
    """Return the arguments that are set, the group's before the optimizer's."""
    arguments = {}
    for item in dataclasses.fields(OptimizerGroup):
        own = getattr(group, item.name) if group is not None else None
        value = own if own is not None else getattr(config, item.name)
        if value is not None:
            arguments[item.name] = value
    return arguments


def _check_members(groups: Mapping[str, Sequence[keras.Variable]], model: keras.Model) -> None:
    """Refuse variables that no checkpoint would hold."""
    owned = {id(variable) for variable in model.variables}
    for name, variables in groups.items():
        for variable in variables:
            if id(variable) not in owned:
                raise JobError(
                    f"the parameter group {name!r} has {variable.path}, which is no variable of "
                    "the model: checkpoints and the export would lack it. Make it a weight of the "
                    "model or of one of its layers in model(), with add_weight or as an attribute"
                )


def _check_groups(config: OptimizerConfig, groups: Mapping[str, Sequence[keras.Variable]]) -> None:
    unknown = sorted(set(config.groups) - set(groups))
    if unknown:
        raise JobError(
            f"optimizer.groups.{unknown[0]}: parameter_groups() of the job has "
            f"{', '.join(sorted(groups))}; name one of these (a group that train.freeze leaves "
            "nothing of is none)"
        )
    seen: dict[int, str] = {}
    for name, variables in groups.items():
        if not variables:
            raise JobError(
                f"parameter group {name!r} has no variables: the model has nothing to train there"
            )
        for variable in variables:
            if id(variable) in seen:
                raise JobError(
                    f"variable {variable.path} is in the parameter groups {seen[id(variable)]!r} "
                    f"and {name!r}; each variable may have one optimizer"
                )
            seen[id(variable)] = name
