"""A job that cannot serve its model is refused before it is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from orchestrator.spec.messages import BlockDone, Cause, Ended, Exported, Failed
from orchestrator.spec.messages import Outcome as RunOutcome
from orchestrator.train.job import Batch, Outcome
from orchestrator.train.sources import ArraySource, Feature, Source, Split
from tests.train.test_worker import live, only
from tests.train.tiny import Tiny, clusters


class TwoInputs(Tiny):
    """Has the features a and b, and nothing that is called x."""

    def source(self, split: Split) -> Source:
        rows = clusters(split, 96 if split is Split.TRAIN else 50).fetch(np.arange(50))
        size = 96 if split is Split.TRAIN else 50
        halves = {"a": rows["x"][:, :4], "b": rows["x"][:, 4:], "y": rows["y"]}
        return ArraySource({name: np.resize(v, (size, *v.shape[1:])) for name, v in halves.items()})

    def losses(self, model: keras.Model, batch: Batch, *, training: bool) -> Outcome:
        outputs = model(tf.concat([batch["a"], batch["b"]], axis=1), training=training)
        return Outcome(loss=self.loss(batch, outputs))


class Served(TwoInputs):
    def serving_input(self) -> Feature:
        return Feature("float32", (8,))

    def serve(self, model: keras.Model, inputs: Any) -> Any:
        return model(inputs, training=False)


class Labelled(Tiny):
    """Prepares labels where there are none."""

    def prepare(self, batch: Batch, *, training: bool, seeds: Any) -> Batch:
        return batch | {"y": tf.cast(batch["y"], tf.int64)}


class Texts(Tiny):
    def serving_input(self) -> Feature:
        return Feature("string")


@pytest.mark.parametrize(
    ("job", "said"),
    [
        (TwoInputs, ["takes the feature x", "has a, b, y", "serving_input()", "export.enabled"]),
        (Labelled, ["serve() of Labelled fails on float32 [8] alone, KeyError: 'y'", "prepare()"]),
        (Texts, ["takes string []", "proven on numbers", "export.enabled=false"]),
    ],
)
def test_what_could_not_be_exported_is_not_trained(
    tmp_path: Path, job: type[Tiny], said: list[str]
) -> None:
    name = {"job__class_name": f"{__name__}.{job.__name__}"}
    told = live(tmp_path, **name)
    [failed] = only(told, Failed)
    assert failed.cause is Cause.job
    assert [part for part in said if part not in failed.error] == []
    assert not only(told, BlockDone)
    if job is Labelled:
        assert 'in prepare: return batch | {"y"' in failed.user_frame
    untold = live(tmp_path / "again", export__enabled=False, **name)
    assert only(untold, Ended)[0].outcome is RunOutcome.completed


def test_a_job_of_several_inputs_says_what_it_serves(tmp_path: Path) -> None:
    told = live(tmp_path, job__class_name=f"{__name__}.Served")
    assert not only(told, Failed) and only(told, Exported)
