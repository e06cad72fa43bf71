"""Small jobs that take their time, so that faults fall inside them."""

from __future__ import annotations

import time
from typing import Any

import keras

from orchestrator.train.job import Progress
from orchestrator.train.sources import Source, Split
from orchestrator.train.streams import StreamSource
from tests.train.streaming import plain
from tests.train.tiny import Tiny


class Paced(Tiny):
    """The dense classifier with dropout, at so many milliseconds a step."""

    def __init__(self, step_ms: float = 20.0, ballast: int = 0, **options: Any):
        """Make a job; `ballast` is how many float32 the model carries along without use."""
        super().__init__(dropout=0.1, **options)
        self.step_ms = step_ms
        self.ballast = ballast

    def model(self) -> keras.Model:
        model = super().model()
        if self.ballast:
            model.ballast = model.add_weight(
                shape=(self.ballast,), trainable=False, initializer="ones", name="ballast"
            )
        return model

    def on_block(self, progress: Progress) -> None:
        time.sleep(progress.num_steps * self.step_ms / 1000)


class PacedStream(Paced):
    """The same, on a stream."""

    def source(self, split: Split) -> Source:
        if split is Split.EVAL:
            return super().source(split)
        return StreamSource(plain, name="paced clusters")
