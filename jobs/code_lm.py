"""A small language model of Python code: bytes in, the next byte out."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from orchestrator.train.datasets import python_library
from orchestrator.train.job import Batch, Job, Source, Split

BYTES = 256


class CodeLm(Job):
    """A decoder-only transformer with pre-norm blocks on the sources of Python's own library.

    Args:
        context: bytes that the model sees at once.
        width: of the residual stream.
        heads: of each attention.
        depth: number of blocks.
        num_examples: windows that one epoch is cut into; as `data.num_examples`. The library
            differs between versions of Python, so the windows are laid over it at equal distances
            instead of being counted.
        num_eval_examples: the same of the files that are held out.
    """

    def __init__(
        self,
        num_examples: int,
        num_eval_examples: int,
        context: int = 128,
        width: int = 128,
        heads: int = 4,
        depth: int = 3,
    ):
        self.num_examples = {Split.TRAIN: num_examples, Split.EVAL: num_eval_examples}
        self.context, self.width, self.heads, self.depth = context, width, heads, depth

    def model(self) -> keras.Model:
        """Return bytes [batch, context] -> logits of each next byte [batch, context, 256]."""
        tokens = keras.Input((self.context,), dtype="uint8")
        places = layers.Embedding(self.context, self.width, name="places")
        x = layers.Embedding(BYTES, self.width)(tokens) + places(tf.range(self.context))
        for _ in range(self.depth):
            normal = layers.LayerNormalization()(x)
            attention = layers.MultiHeadAttention(self.heads, self.width // self.heads)
            x = x + attention(normal, normal, use_causal_mask=True)
            normal = layers.LayerNormalization()(x)
            x = x + layers.Dense(self.width)(layers.Dense(4 * self.width, "gelu")(normal))
        logits = layers.Dense(BYTES)(layers.LayerNormalization()(x))
        # Probabilities are computed in full precision whatever the layers compute in.
        return keras.Model(tokens, keras.ops.cast(logits, keras.config.floatx()))

    def source(self, split: Split) -> Source:
        """Return windows `x` uint8 [context] and `y`, the byte after each."""
        return python_library(split, context=self.context, num_examples=self.num_examples[split])

    def loss(self, batch: Batch, outputs: Any) -> Any:
        """Return the mean over each window of -log p(next byte), in nats."""
        nats = keras.losses.sparse_categorical_crossentropy(batch["y"], outputs, from_logits=True)
        return tf.reduce_mean(nats, axis=1)

    def metrics(self, batch: Batch, outputs: Any) -> dict[str, Any]:
        """Return the loss in bits: what a compressor with this model spends on a byte."""
        return {"bits_per_byte": self.loss(batch, outputs) / np.log(2)}

    def serve(self, model: keras.Model, inputs: Any) -> Any:
        """Return the probabilities of the byte that follows each window, [batch, 256]."""
        return tf.nn.softmax(model(inputs, training=False)[:, -1])

    def on_end(self, model: keras.Model) -> str:
        """Let the trained model write some code."""
        return self.sample(model, "def ", 200, seed=0)

    def sample(self, model: keras.Model, prompt: str, length: int, seed: int) -> str:
        """Return the prompt and `length` more bytes drawn from the model."""
        rng = np.random.default_rng(seed)
        answer = tf.function(lambda window: tf.nn.softmax(model(window, training=False)[0]))
        text = list(prompt.encode()) or [0]  # 0 begins each file
        for _ in range(length):
            window = text[-self.context :]
            filled = np.array([window + [0] * (self.context - len(window))], np.uint8)
            chances = answer(tf.constant(filled))[len(window) - 1].numpy().astype(np.float64)
            text.append(int(rng.choice(BYTES, p=chances / chances.sum())))
        return bytes(text).decode(errors="replace")
