"""A user's own job that gets stuck, or takes its time, where its arguments say so."""

import ctypes
import json
import os
import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from orchestrator.train.job import Job
from orchestrator.train.sources import ArraySource, Split

FOR_EVER_S = 100_000


def sleep_for_ever():
    time.sleep(FOR_EVER_S)


def hold_the_interpreter():
    # A PyDLL keeps the interpreter's lock during the call, as a careless extension does.
    ctypes.PyDLL(None).sleep(FOR_EVER_S)


HANGS = {"sleep": sleep_for_ever, "gil": hold_the_interpreter}


def worker():
    """Return this worker's index."""
    return json.loads(os.environ.get("TF_CONFIG", '{"task": {"index": 0}}'))["task"]["index"]


class Paced(ArraySource):
    """Examples that take their time, and may never come."""

    def __init__(self, arrays, job, split):
        super().__init__(arrays, name="troubled", resident_limit_bytes=0)
        self.job, self.split = job, split

    def fetch(self, indices):
        if self.split is Split.EVAL:
            time.sleep(self.job.eval_s)
            return super().fetch(indices)
        time.sleep(self.job.fetch_s)
        self.job.fetched += 1
        self.get_stuck()
        return super().fetch(indices)

    def get_stuck(self):
        """Be stuck in this worker's input if it is told to, once for each file that says so."""
        if self.job.fetched <= 4 or worker() != 1 or not self.job.orders:
            return
        for order in sorted(Path(self.job.orders).glob("hang-*")):
            how = order.name.removeprefix("hang-")
            order.rename(order.with_name(f"done-{how}-{time.time()}"))
            HANGS[how]()


class Troubled(Job):
    """A dense classifier with dropout."""

    def __init__(self, orders="", fetch_s=0.05, trace_s=0.0, eval_s=0.0, fsync_s=0.0, block_s=0.0):
        self.orders = orders
        self.fetch_s, self.trace_s, self.eval_s, self.block_s = fetch_s, trace_s, eval_s, block_s
        self.fetched = 0
        self.blocks = 0
        if fsync_s:
            fsync = os.fsync
            # A slow disk, as far as this process can see.
            os.fsync = lambda fd: (time.sleep(fsync_s), fsync(fd))

    def model(self):
        layers = keras.layers
        return keras.Sequential(
            [
                layers.Input((8,)),
                layers.Dense(16, activation="relu"),
                layers.Dropout(0.1),
                layers.Dense(3),
            ]
        )

    def source(self, split):
        count = 512 if split is Split.TRAIN else 64
        rng = np.random.default_rng([7, split is Split.TRAIN])
        arrays = {
            "x": rng.integers(0, 255, (count, 8)).astype("uint8"),
            "y": rng.integers(0, 3, count),
        }
        return Paced(arrays, self, split)

    def prepare(self, batch, *, training, seeds):
        return {**batch, "x": tf.cast(batch["x"], tf.float32) / 255.0}

    def loss(self, batch, outputs):
        time.sleep(self.trace_s)  # runs while the block is traced, once
        return keras.losses.sparse_categorical_crossentropy(batch["y"], outputs, from_logits=True)

    def metrics(self, batch, outputs):
        hit = tf.argmax(outputs, axis=-1) == tf.cast(batch["y"], tf.int64)
        return {"accuracy": tf.cast(hit, tf.float32)}

    def on_block(self, progress):
        self.blocks += 1
        if self.blocks == 2:
            time.sleep(self.block_s)
