"""Draw digits: two networks with an optimizer each, trained by one persistent tape."""

from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from orchestrator.train.datasets import mnist
from orchestrator.train.job import Batch, Feature, Gradients, Job, Outcome, Source, Split
from orchestrator.train.sources import ArraySource


class Pair(keras.Model):
    """A generator, latent [batch, latent] -> image [batch, 28, 28], and its discriminator."""

    def __init__(self, latent: int):
        super().__init__()
        dense = partial(layers.Dense, activation="leaky_relu")
        paint = [layers.Dense(784, activation="sigmoid"), layers.Reshape((28, 28))]
        self.generator = keras.Sequential([layers.Input((latent,)), dense(128), dense(256), *paint])
        look = [layers.Input((28, 28)), layers.Flatten()]
        self.discriminator = keras.Sequential([*look, dense(256), dense(128), layers.Dense(1)])

    def call(self, latents: Any) -> Any:
        """Return what the generator makes of latents."""
        return self.generator(latents)


class Gan(Job):
    """A GAN (Goodfellow et al. 2014) with the R1 penalty (Mescheder et al. 2018).

    Args:
        latent: how many numbers the generator draws an image from.
        penalty: keeps the discriminator from being steep where real images are; >= 0.
    """

    def __init__(self, latent: int = 32, penalty: float = 0.3):
        self.latent = latent
        self.penalty = penalty

    def model(self) -> keras.Model:
        """Return both networks in one model: it is saved, restored and exported as one."""
        model = Pair(self.latent)
        model(keras.Input((self.latent,)))
        return model

    def source(self, split: Split) -> Source:
        """Return images `x`, each with its own latent `z`: any worker draws the same from it."""
        images = mnist(split, path=self.data_path, cache_dir=self.data_dir)
        x = images.fetch(np.arange(images.num_examples))["x"]
        z = np.random.default_rng(1).standard_normal((len(x), self.latent), np.float32)
        return ArraySource({"x": x, "z": z}, name=images.name, origin=images.origin)

    def prepare(self, batch: Batch, *, training: bool, seeds: Any) -> Batch:
        """Scale pixels to [0, 1], the range of the generator's sigmoid."""
        return {**batch, "x": tf.cast(batch["x"], keras.config.floatx()) / 255}

    def losses(self, model: keras.Model, batch: Batch, *, training: bool) -> Outcome:
        """Return what the discriminator loses, and the generator's loss as a metric."""
        with tf.GradientTape() as tape:
            tape.watch(batch["x"])
            real = model.discriminator(batch["x"], training=training)[:, 0]
        slope = tape.gradient(real, batch["x"])
        fake = model.discriminator(model.generator(batch["z"], training=training))[:, 0]
        penalty = self.penalty / 2 * tf.reduce_sum(tf.square(slope), axis=[1, 2])
        return Outcome(  # -log D(x) - log(1 - D(G(z))) + penalty
            loss=tf.nn.softplus(-real) + tf.nn.softplus(fake) + penalty,
            metrics={"generator_loss": tf.nn.softplus(-fake)},  # -log D(G(z))
        )

    def parameter_groups(self, model: keras.Model) -> dict[str, list[keras.Variable]]:
        """Name the two groups; each has its section under `optimizer.groups`."""
        return {
            "generator": model.generator.trainable_variables,
            "discriminator": model.discriminator.trainable_variables,
        }

    def gradients(self, model: keras.Model, batch: Batch, scale: Any) -> tuple[Gradients, Outcome]:
        """Differentiate two losses of one forward pass, each for its own network."""
        with tf.GradientTape(persistent=True) as tape:
            outcome = self.losses(model, batch, training=True)
            drawn = Outcome(loss=outcome.metrics["generator_loss"]).objective(scale)
            costs = {"generator": drawn, "discriminator": outcome.objective(scale)}
        return {
            name: tape.gradient(costs[name], [variable.value for variable in group])
            for name, group in self.parameter_groups(model).items()
        }, outcome

    def serve(self, model: keras.Model, inputs: Any) -> Any:
        """Draw an image for each latent vector: [batch, 28, 28] in [0, 1]."""
        return model.generator(inputs, training=False)

    def serving_input(self) -> Feature:
        """The exported model takes latent vectors, not images."""
        return Feature("float32", (self.latent,))
