"""The class a user subclasses to describe what is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import tensorflow as tf

from orchestrator.errors import JobError
from orchestrator.train.sources import Feature, Source, Split

Batch = dict[str, Any]
Gradients = dict[str, list[Any]]

__all__ = ["Batch", "Feature", "Gradients", "Job", "Outcome", "Progress", "Source", "Split"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a batch costs, before any sum or mean is taken.

    Attributes:
        loss: float [batch], one value for each example.
        terms: scalars added to the mean loss (regularisation, auxiliary losses), by name; what is
            one value for each example belongs into `loss`.
        metrics: float [batch] or [batch, k] by name; reported as means over examples.
        weight: float [batch], weight of each example; None for one each.
    """

    loss: Any
    terms: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    weight: Any = None

    def weights(self) -> Any:
        """Return the weight of each example in the loss's dtype or in float32, [batch]."""
        loss = at_least_float32(self.loss)
        if self.weight is None:
            return tf.ones_like(loss)
        return tf.cast(self.weight, loss.dtype)

    def objective(self, scale: Any) -> Any:
        """Return the scalar to differentiate.

        The terms are multiplied by the sum of the weights, because the reduced gradient is divided
        by that sum over all replicas: `sum_r c (sum w l + t sum w) / (c sum w) = mean l + t`.

        Args:
            scale: what the step multiplies sums over examples by; a number or a float scalar.

        Raises:
            JobError: a term is no scalar.
        """
        loss = at_least_float32(self.loss)
        if self.weight is None:
            total = tf.reduce_sum(loss)
            total_weight = tf.cast(tf.size(loss), total.dtype)
        else:
            total = tf.reduce_sum(self.weights() * loss)
            total_weight = tf.reduce_sum(self.weights())
        if self.terms:
            total += total_weight * self.added(total.dtype)
        # A plain number stays one: tf.cast would take it through float32.
        return (tf.cast(scale, total.dtype) if tf.is_tensor(scale) else scale) * total

    def added(self, dtype: Any) -> Any:
        """Return the sum of the terms, of which there are some, as a scalar.

        Raises:
            JobError: a term is no scalar.
        """
        return tf.add_n(
            [tf.cast(_scalar(f"the term {n!r}", t), dtype) for n, t in self.terms.items()]
        )


@dataclass(frozen=True, slots=True)
class Progress:
    """What a block of steps came to.

    Attributes:
        step: the last step done, counted from 1.
        num_steps: steps of the block.
        loss: mean over the block's steps.
        metrics: the same for each metric.
    """

    step: int
    num_steps: int
    loss: float
    metrics: Mapping[str, float]


class Job:
    """A model, its data and its loss. Subclass it in `jobs/` and name it in `conf/job/`.

    A plain supervised job writes `model`, `source`, `loss` and `metrics`. Constructor arguments
    come from `job.args` in the YAML. Everything else can be overridden when it is needed.

    Attributes:
        data_path: `data.path` of the configuration; set before `source` is called.
        data_dir: `data.cache_dir`, where downloads are kept; set before `source` is called.
    """

    data_path: str | None = None
    data_dir: str = "data"

    def model(self) -> keras.Model:
        """Build the model with its variables. Called inside `strategy.scope()`."""
        raise NotImplementedError(f"{type(self).__name__} has no model()")

    def source(self, split: Split) -> Source:
        """Return the examples of a split. Called once for each split in every worker."""
        raise NotImplementedError(f"{type(self).__name__} has no source()")

    def prepare(self, batch: Batch, *, training: bool, seeds: Any) -> Batch:
        """Scale or augment a batch, in graph.

        Args:
            batch: features as the source gives them, each [batch, ...].
            training: False in evaluation and serving.
            seeds: int64 [batch, 2], one stateless seed for each example, from (position in the
                run, seed): augmentation that draws from them does not change with the number of
                workers. None unless training.
        """
        return batch

    def loss(self, batch: Batch, outputs: Any) -> Any:
        """Return the loss of each example, [batch]; not its mean."""
        raise NotImplementedError(f"{type(self).__name__} has neither loss() nor losses()")

    def metrics(self, batch: Batch, outputs: Any) -> Mapping[str, Any]:
        """Return what to report besides the loss, [batch] for each name."""
        return {}

    def losses(self, model: keras.Model, batch: Batch, *, training: bool) -> Outcome:
        """Run the model on a prepared batch and return what it costs.

        The default feeds `batch["x"]` and adds the model's own `add_loss` terms and regularisers.
        Runs under `keras.StatelessScope`: what layers assign to their state is captured, reduced
        over the replicas and assigned by the step.
        """
        outputs = model(batch["x"], training=training)
        terms = {}
        if model.losses:
            parts = [_scalar("a loss of the model (add_loss)", part) for part in model.losses]
            dtype = max((part.dtype for part in parts), key=lambda dtype: dtype.size)
            terms["regularisation"] = tf.add_n([tf.cast(part, dtype) for part in parts])
        loss = self.loss(batch, outputs)
        if loss is None:
            raise JobError(
                f"{type(self).__name__}.loss() returned None: return the loss of each example, "
                "[batch]"
            )
        return Outcome(loss=loss, terms=terms, metrics=self.metrics(batch, outputs))

    def parameter_groups(self, model: keras.Model) -> dict[str, list[keras.Variable]]:
        """Name the sets of variables that have an optimizer each (`optimizer.groups.<name>`)."""
        return {"all": model.trainable_variables}

    def gradients(self, model: keras.Model, batch: Batch, scale: Any) -> tuple[Gradients, Outcome]:
        """Differentiate. Override for nested or persistent tapes and several losses.

        Args:
            model: the model.
            batch: a prepared batch.
            scale: factor for sums over examples; pass it to `Outcome.objective`.

        Returns:
            For each parameter group one gradient a variable, not yet reduced over replicas; and
            the outcome that is reported.
        """
        groups = self.parameter_groups(model)
        variables = [variable.value for group in groups.values() for variable in group]
        with tf.GradientTape() as tape:
            outcome = self.losses(model, batch, training=True)
            objective = outcome.objective(scale)
        flat = iter(tape.gradient(objective, variables))
        return {name: [next(flat) for _ in group] for name, group in groups.items()}, outcome

    def summarise(self, sums: Mapping[str, Any], weight: float) -> Mapping[str, float]:
        """Turn weighted sums over examples into metrics. Override for F1, AUC and the like.

        Args:
            sums: for `loss` and each metric the weighted sum, a scalar or [k].
            weight: the sum of the weights.
        """
        means = {}
        for name, total in sums.items():
            if getattr(total, "ndim", 0):
                means.update({f"{name}/{i}": float(part) / weight for i, part in enumerate(total)})
            else:
                means[name] = float(total) / weight
        return means

    def serve(self, model: keras.Model, inputs: Any) -> Any:
        """Answer raw inputs: what the exported SavedModel does.

        Args:
            model: the trained model.
            inputs: feature `x` as the source gives it, [batch, ...], or `serving_input`.
        """
        return model(self.prepare({"x": inputs}, training=False, seeds=None)["x"], training=False)

    def serving_input(self) -> Feature | None:
        """Return what one input of `serve` looks like; None for feature `x` of the source."""
        return None

    def on_block(self, progress: Progress) -> None:
        """Look at a block of steps after it was reported. Called on the chief only.

        It may not change the model: other workers would not know. What it raises ends the run.
        """

    def on_end(self, model: keras.Model) -> str | None:
        """Return a text for the log and the screen, such as a sample of what the model writes.

        Called on the chief only, when training is complete, before the export.
        """
        return None


def _scalar(what: str, value: Any) -> Any:
    """Return a term as a scalar tensor of at least float32."""
    value = at_least_float32(tf.convert_to_tensor(value))
    if value.shape.rank not in (0, None):
        raise JobError(
            f"{what} has shape {value.shape}: what is added to the mean loss is a scalar. Add one "
            "value for each example to `loss`, or add their mean"
        )
    return value


def at_least_float32(values: Any) -> Any:
    """Return numbers as float32 if they are halves, which have too few digits for sums."""
    return tf.cast(values, tf.float32) if tf.as_dtype(values.dtype).size < 4 else values


def flatten_groups(groups: Mapping[str, Sequence[Any]]) -> list[Any]:
    """Return the members of all groups in the order of the groups."""
    return [member for group in groups.values() for member in group]


def translated(job: Job) -> Job:
    """Let the methods that a user wrote use `if`, `while` and `for` on tensors (AutoGraph).

    Only these: the rest of the step is graph code already, and translating it would take seconds
    at every start. Keras's own code is never translated, by TensorFlow's rules.
    """
    # TensorFlow 2.21 has no public name for "translate this callable inside a graph".
    from tensorflow.python.autograph.impl.api import convert

    for name in ("prepare", "loss", "metrics", "losses", "gradients", "serve"):
        if getattr(type(job), name) is not getattr(Job, name):
            setattr(job, name, convert(recursive=True)(getattr(job, name)))
    return job
