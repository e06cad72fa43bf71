"""A user's own jobs, small enough that a run is mostly start and end; on request a faulty worker.

The faults are planted here, where the worker imports the job: in the process that trains, nowhere
else. Each is one that distributed training is known for.
"""

import dataclasses

import keras
import numpy as np
import tensorflow as tf
from faults import FAULTS

from orchestrator.train.job import Job, Outcome
from orchestrator.train.sources import ArraySource

layers = keras.layers


def arrays():
    rng = np.random.default_rng(7)
    labels = rng.integers(0, 3, 96)
    points = np.random.default_rng(3).normal(size=(3, 8))[labels] * 2 + rng.normal(size=(96, 8))
    return {
        "x": points.astype("float32"),
        "y": labels.astype("int64"),
        "word": rng.integers(0, 70_000, 96),
    }


class Small(Job):
    """A dense classifier."""

    def __init__(self, fault=""):
        if fault:
            FAULTS[fault]()

    def model(self):
        return keras.Sequential([layers.Input((8,)), *self.hidden(), layers.Dense(3)])

    def hidden(self):
        return [layers.Dense(16, activation="relu")]

    def source(self, split):
        return ArraySource(arrays(), name="small")

    def loss(self, batch, outputs):
        return keras.losses.sparse_categorical_crossentropy(batch["y"], outputs, from_logits=True)


class Normalised(Small):
    """Has what no two cuts of a batch agree on: batch normalisation and dropout."""

    def hidden(self):
        middle = [layers.BatchNormalization(), layers.Dropout(0.5), layers.GaussianNoise(0.1)]
        return [layers.Dense(16, activation="relu"), layers.Dense(8), *middle]


class Embedded(Small):
    """Looks words up: gradients are slices of a table that is large enough to be sent as such."""

    def model(self):
        word, point = layers.Input((), dtype="int64"), layers.Input((8,))
        known = layers.Embedding(70_000, 4, embeddings_initializer="normal")(word)
        joined = layers.concatenate([known, layers.Dense(8)(point)])
        return keras.Model([word, point], layers.Dense(3)(joined))

    def losses(self, model, batch, *, training):
        outputs = model([batch["word"], batch["x"]], training=training)
        return Outcome(loss=self.loss(batch, outputs))


class Duel(Small):
    """Two networks against each other: two optimizers, gradients of its own from one tape."""

    def model(self):
        model = keras.Sequential([layers.Input((8,)), layers.Dense(8), layers.Dense(1)])
        model.maker, model.judge = model.layers
        return model

    def losses(self, model, batch, *, training):
        made = model.maker(batch["x"])
        real, fake = model.judge(batch["x"])[:, 0], model.judge(made)[:, 0]
        return Outcome(
            loss=tf.nn.softplus(-real) + tf.nn.softplus(fake),
            metrics={"maker_loss": tf.nn.softplus(-fake)},
        )

    def parameter_groups(self, model):
        return {
            "maker": model.maker.trainable_variables,
            "judge": model.judge.trainable_variables,
        }

    def gradients(self, model, batch, scale):
        with tf.GradientTape(persistent=True) as tape:
            outcome = self.losses(model, batch, training=True)
            made = dataclasses.replace(outcome, loss=outcome.metrics["maker_loss"], metrics={})
            costs = {"maker": made.objective(scale), "judge": outcome.objective(scale)}
        return {
            name: tape.gradient(costs[name], [variable.value for variable in group])
            for name, group in self.parameter_groups(model).items()
        }, outcome


class Personal(Small):
    """Draws random numbers in a way that nobody can switch off from outside."""

    def hidden(self):
        class Shaky(layers.Layer):
            def __init__(self):
                super().__init__()
                self.source = keras.random.SeedGenerator(1)

            def call(self, inputs, training=False):
                return inputs + keras.random.normal(keras.ops.shape(inputs), seed=self.source)

        return [*super().hidden(), Shaky()]
