"""Jobs that use the tape in their own way: several heads, nested tapes, shared weights, slices."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from orchestrator.train.job import Batch, Gradients, Job, Outcome
from orchestrator.train.sources import ArraySource, Source, Split

layers = keras.layers
NUM_TOKENS = 11  # 0 fills up
NUM_BINS = 8
LARGE_ROWS = 40_000  # x 8 x 4 bytes: above the megabyte from which slices are sent as such
SMALL_ROWS = 100


def rows(split: Split) -> dict[str, np.ndarray]:
    """Return 100 examples of everything that the jobs below read; the same for every call."""
    rng = np.random.default_rng([11, split is Split.TRAIN])
    n = 100
    labels = rng.integers(0, 3, n)
    lengths = rng.integers(1, 7, n)
    tokens = rng.integers(1, NUM_TOKENS, (n, 6)) * (np.arange(6) < lengths[:, None])
    return {
        "x": rng.normal(size=(n, 8)) + labels[:, None],
        "word": rng.integers(0, 7, n),
        "y": labels,
        "z": rng.normal(size=n),
        "domain": rng.integers(0, 2, n),
        "noise": rng.normal(size=(n, 4)),
        "mix": rng.uniform(size=(n, 1)),
        "tokens": tokens,
        "weight": rng.uniform(0.5, 2.0, n),
        "large": rng.integers(0, LARGE_ROWS, (n, 3)),
        "small": rng.integers(0, SMALL_ROWS, (n, 3)),
    }


def crossentropy(labels: Any, logits: Any) -> Any:
    return keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)


class Free(Job):
    """What all have in common: the examples."""

    def source(self, split: Split) -> Source:
        return ArraySource(rows(split), name="rows")


class Heads(Free):
    """Two inputs, two outputs, a loss for each, and terms: a penalty and the mean activity."""

    def model(self) -> keras.Model:
        x, word = keras.Input((8,), name="x"), keras.Input((), dtype="int64", name="word")
        joined = layers.concatenate([x, layers.Embedding(7, 3)(word)])
        hidden = layers.Dense(12, activation="tanh")(joined)
        return keras.Model(
            {"x": x, "word": word},
            {"kind": layers.Dense(3)(hidden), "size": layers.Dense(1)(hidden), "hidden": hidden},
        )

    def losses(self, model: keras.Model, batch: Batch, *, training: bool) -> Outcome:
        out = model({"x": batch["x"], "word": batch["word"]}, training=training)
        kind = crossentropy(batch["y"], out["kind"])
        size = tf.abs(out["size"][:, 0] - tf.cast(batch["z"], kind.dtype))
        kernels = [v.value for v in model.trainable_variables if v.path.endswith("kernel")]
        return Outcome(
            loss=kind + 0.5 * size,
            terms={
                "penalty": 0.01 * tf.add_n([tf.reduce_sum(tf.square(k)) for k in kernels]),
                "activity": 0.1 * tf.reduce_mean(tf.square(out["hidden"])),
            },
            metrics={"kind": kind, "size": size},
        )


class Wasserstein(Free):
    """A generator and its critic, whose slope is held near 1 (Gulrajani et al. 2017, eq. 3)."""

    def model(self) -> keras.Model:
        maker = keras.Sequential([keras.Input((4,)), layers.Dense(8, "tanh"), layers.Dense(8)])
        critic = keras.Sequential([keras.Input((8,)), layers.Dense(8, "tanh"), layers.Dense(1)])
        noise = keras.Input((4,))
        model = keras.Model(noise, critic(maker(noise)))
        model.maker, model.critic = maker, critic
        return model

    def parameter_groups(self, model: keras.Model) -> dict[str, list[keras.Variable]]:
        return {
            "maker": model.maker.trainable_variables,
            "critic": model.critic.trainable_variables,
        }

    def losses(self, model: keras.Model, batch: Batch, *, training: bool) -> Outcome:
        return Outcome(loss=-model(batch["noise"], training=training)[:, 0])

    def gradients(self, model: keras.Model, batch: Batch, scale: Any) -> tuple[Gradients, Outcome]:
        with tf.GradientTape(persistent=True) as tape:
            made = model.maker(batch["noise"], training=True)
            real = tf.cast(batch["x"], made.dtype)
            between = real + tf.cast(batch["mix"], made.dtype) * (made - real)
            with tf.GradientTape() as inner:
                inner.watch(between)
                judged = model.critic(between, training=True)
            slope = tf.norm(inner.gradient(judged, between), axis=1)
            on_real, on_made = model.critic(real)[:, 0], model.critic(made)[:, 0]
            parts = {
                "distance": on_made - on_real,
                "slope": 10.0 * tf.square(slope - 1.0),
                "drift": 0.001 * tf.square(on_real),
            }
            critic = Outcome(loss=tf.add_n(list(parts.values())), metrics=parts)
            costs = {
                "critic": critic.objective(scale),
                "maker": Outcome(loss=-on_made).objective(scale),
            }
        groups = self.parameter_groups(model)
        return {
            name: tape.gradient(costs[name], [v.value for v in group])
            for name, group in groups.items()
        }, critic


class Probed(Free):
    """A classifier, and a probe that reads another label off its features; one tape, two losses."""

    def model(self) -> keras.Model:
        x = keras.Input((8,))
        trunk, head, probe = layers.Dense(8, "tanh"), layers.Dense(3), layers.Dense(2)
        hidden = trunk(x)
        model = keras.Model(x, [head(hidden), probe(hidden)])
        model.body, model.probe = [trunk, head], probe
        return model

    def parameter_groups(self, model: keras.Model) -> dict[str, list[keras.Variable]]:
        return {
            "body": [v for layer in model.body for v in layer.trainable_variables],
            "probe": model.probe.trainable_variables,
        }

    def losses(self, model: keras.Model, batch: Batch, *, training: bool) -> Outcome:
        kind, domain = model(batch["x"], training=training)
        metrics = {"domain": crossentropy(batch["domain"], domain)}
        return Outcome(loss=crossentropy(batch["y"], kind), metrics=metrics)

    def gradients(self, model: keras.Model, batch: Batch, scale: Any) -> tuple[Gradients, Outcome]:
        with tf.GradientTape(persistent=True) as tape:
            outcome = self.losses(model, batch, training=True)
            domain = outcome.metrics["domain"]
            body = dataclasses.replace(outcome, loss=outcome.loss - 0.3 * domain)
            costs = {
                "body": body.objective(scale),
                "probe": dataclasses.replace(outcome, loss=domain).objective(scale),
            }
        return {
            name: tape.gradient(costs[name], [v.value for v in group])
            for name, group in self.parameter_groups(model).items()
        }, outcome


@tf.custom_gradient
def reversed_gradient(x: Any) -> Any:
    """Return x, and -0.3 of its gradient (Ganin and Lempitsky 2015)."""
    return tf.identity(x), lambda upstream: -0.3 * upstream


class Reversed(Probed):
    """The same two heads in one loss, with a gradient that is reversed on its way to the trunk."""

    def parameter_groups(self, model: keras.Model) -> dict[str, list[keras.Variable]]:
        return Job.parameter_groups(self, model)

    def losses(self, model: keras.Model, batch: Batch, *, training: bool) -> Outcome:
        trunk, head = model.body
        hidden = trunk(batch["x"])
        kind = crossentropy(batch["y"], head(hidden))
        domain = crossentropy(batch["domain"], model.probe(reversed_gradient(hidden)))
        return Outcome(loss=kind + domain, metrics={"kind": kind, "domain": domain})

    def gradients(self, model: keras.Model, batch: Batch, scale: Any) -> tuple[Gradients, Outcome]:
        return Job.gradients(self, model, batch, scale)


class Ranked(Free):
    """A yes-or-no classifier with metrics that are no means: F1 of counts, AUC of a histogram."""

    def model(self) -> keras.Model:
        return keras.Sequential([keras.Input((8,)), layers.Dense(1, activation="sigmoid")])

    def losses(self, model: keras.Model, batch: Batch, *, training: bool) -> Outcome:
        score = model(batch["x"], training=training)[:, 0]
        is_yes = tf.cast(batch["domain"], score.dtype)
        said_yes = tf.cast(score > 0.5, score.dtype)
        counts = [is_yes * said_yes, (1 - is_yes) * said_yes, is_yes * (1 - said_yes)]
        bins = tf.one_hot(tf.cast(score * NUM_BINS, tf.int32), NUM_BINS, dtype=score.dtype)
        return Outcome(
            loss=keras.losses.binary_crossentropy(is_yes[:, None], score[:, None]),
            metrics={
                "counts": tf.stack(counts, axis=1),
                "yes": bins * is_yes[:, None],
                "no": bins * (1 - is_yes)[:, None],
            },
        )

    def summarise(self, sums: Mapping[str, Any], weight: float) -> Mapping[str, float]:
        hits, false, missed = sums["counts"]
        yes, no = sums["yes"], sums["no"]
        below = np.concatenate([[0.0], np.cumsum(no)[:-1]])
        return {
            "loss": float(sums["loss"]) / weight,
            "f1": float(2 * hits / (2 * hits + false + missed)),
            "auc": float((yes * (below + no / 2)).sum() / (yes.sum() * no.sum())),
        }


class Tied(Free):
    """Predicts the next token; the table that reads tokens also scores them."""

    def model(self) -> keras.Model:
        tokens = keras.Input((5,), dtype="int64")
        penalty = keras.regularizers.L2(2.0**-8)
        table = layers.Embedding(NUM_TOKENS, 6, embeddings_regularizer=penalty)
        hidden = layers.Dense(6, activation="tanh", kernel_regularizer=penalty)(table(tokens))
        model = keras.Model(tokens, hidden)
        model.table = table
        return model

    def losses(self, model: keras.Model, batch: Batch, *, training: bool) -> Outcome:
        tokens = batch["tokens"]
        hidden = model(tokens[:, :-1], training=training)
        logits = tf.matmul(hidden, model.table.embeddings, transpose_b=True)
        each = crossentropy(tokens[:, 1:], logits)
        known = tf.cast(tokens[:, 1:] > 0, each.dtype)
        count = tf.reduce_sum(known, axis=1)
        # The mean over an example's own tokens, weighted by their number: rows of length 1 have
        # none, and weight zero.
        loss = tf.math.divide_no_nan(tf.reduce_sum(known * each, axis=1), count)
        return Outcome(
            loss=loss,
            terms={"regularisation": tf.add_n(model.losses)},
            weight=count * tf.cast(batch["weight"], count.dtype),
        )


class Tables(Free):
    """A large and a small table; one example's loss may be multiplied until float16 overflows.

    Attributes:
        kinds: the gradients of both tables in the order large, small, as last traced.
    """

    def __init__(self, victim: float | None = None, factor: float = 1.0):
        self.victim = victim
        self.factor = factor
        self.kinds: list[type] = []

    def model(self) -> keras.Model:
        large = keras.Input((3,), dtype="int64", name="large")
        small = keras.Input((3,), dtype="int64", name="small")
        joined = layers.concatenate(
            [layers.Embedding(LARGE_ROWS, 8)(large), layers.Embedding(SMALL_ROWS, 8)(small)]
        )
        return keras.Model([large, small], layers.Dense(3)(layers.Flatten()(joined)))

    def losses(self, model: keras.Model, batch: Batch, *, training: bool) -> Outcome:
        logits = tf.cast(model([batch["large"], batch["small"]], training=training), tf.float32)
        loss = crossentropy(batch["y"], logits)
        if self.victim is not None:
            loss *= tf.where(tf.abs(batch["z"] - self.victim) < 1e-9, self.factor, 1.0)
        return Outcome(loss=loss)

    def gradients(self, model: keras.Model, batch: Batch, scale: Any) -> tuple[Gradients, Outcome]:
        gradients, outcome = super().gradients(model, batch, scale)
        self.kinds = [type(g) for g in gradients["all"][:2]]
        return gradients, outcome


class Normalised(Free):
    """A classifier with batch normalisation, over the replica's batch or over all of them."""

    def __init__(self, synchronised: bool):
        self.synchronised = synchronised

    def model(self) -> keras.Model:
        normalise = layers.BatchNormalization(momentum=0.9, synchronized=self.synchronised)
        # No bias in front of the normalisation: it would have no gradient but rounding noise.
        first = layers.Dense(6, use_bias=False)
        return keras.Sequential(
            [keras.Input((8,)), first, normalise, layers.ReLU(), layers.Dense(3)]
        )

    def loss(self, batch: Batch, outputs: Any) -> Any:
        return crossentropy(batch["y"], outputs)
