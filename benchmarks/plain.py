"""What one would write: MNIST with NumPy slices and one tf.function call a step.

The tutorial loop of TensorFlow's guides, with model, optimizer and batch of jobs/mnist.py. It says
when its first step was done and how fast the later ones were; nothing else is timed.
"""

from __future__ import annotations

import json
import sys
import time

import keras
import numpy as np
import tensorflow as tf

BATCH = 32


def main(data: str, num_steps: int) -> None:
    """Train `num_steps` steps on the images and labels in the file `data` (.npz)."""
    with np.load(data) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.layers.Input((28, 28)),
            keras.layers.Flatten(),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.Dense(10),
        ]
    )
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.Adam(0.001)

    @tf.function
    def train_step(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = loss_of(y, model(tf.cast(x, tf.float32) / 255.0, training=True))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    rng = np.random.default_rng(0)
    order = rng.permutation(len(images))
    first_step = warm = 0.0
    warm_up = num_steps // 5
    for step in range(num_steps):
        start = step * BATCH % (len(images) - BATCH)
        rows = order[start : start + BATCH]
        loss = train_step(images[rows], labels[rows])
        if step == 0:
            loss.numpy()
            first_step = time.time()
        if step == warm_up:
            loss.numpy()
            warm = time.perf_counter()
    loss.numpy()
    rate = (num_steps - 1 - warm_up) / (time.perf_counter() - warm)
    print(json.dumps({"first_step": first_step, "steps_per_s": rate}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
