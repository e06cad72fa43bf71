"""The export and its proof: a sound model passes, and every planted fault is caught and named."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from orchestrator.control.folders import prepare
from orchestrator.errors import ExportError
from orchestrator.spec.messages import Saved
from orchestrator.spec.paths import RunPaths
from orchestrator.spec.schema import BestMode, Weights
from orchestrator.track import mlflow_model
from orchestrator.train import export, store
from orchestrator.train.averages import Averages
from orchestrator.train.checkpoint import named_variables
from orchestrator.train.export import export_model
from orchestrator.train.job import Batch, Feature, translated
from orchestrator.train.optimizer import Optimizers
from orchestrator.train.sources import Split
from tests.plans import tiny_plan
from tests.train.test_worker import live, only
from tests.train.tiny import Tiny


def exported(folder: Path, job: Tiny, **changes: Any) -> RunPaths:
    """Export an untrained model."""
    paths = tiny_plan(folder).paths
    prepare(paths, 1)
    translated(job)
    model = changes.pop("model", None) or job.model()
    source = job.source(Split.EVAL)
    export_model(job, model, source, paths, paths.export_staging_dir(1), **changes)
    return paths


def proof_of(paths: RunPaths) -> dict[str, Any]:
    """Return what the proof says; it runs here, the real one in a process without this code."""
    code = mlflow_model.main([str(paths.export_dir)])
    proof: dict[str, Any] = json.loads(paths.proof.read_text())
    assert (code == 0) is proof["passed"] is paths.mlflow_model_dir.exists()
    return proof


class Scaled(Tiny):
    """Scales what it is given."""

    def prepare(self, batch: Batch, *, training: bool, seeds: Any) -> Batch:
        return {**batch, "x": batch["x"] / 255.0}


def test_a_sound_model_is_packaged_with_signature_example_and_figures(tmp_path: Path) -> None:
    from mlflow.models import Model

    paths = exported(tmp_path, Scaled(normalise=True, dropout=0.5))
    proof = proof_of(paths)
    assert proof["passed"], proof
    assert proof["max_difference"] <= proof["tolerance"]
    files = [path for path in paths.saved_model_dir.rglob("*") if path.is_file()]
    assert proof["size_bytes"] == sum(path.stat().st_size for path in files)
    assert proof["latency_1_ms"] > 0 and proof["latency_64_ms"] > 0

    model = Model.load(str(paths.mlflow_model_dir))
    assert [str(spec.type) for spec in model.signature.inputs] == ["float32"]
    assert model.signature.inputs.inputs[0].shape == (-1, 8)
    assert model.signature.outputs.inputs[0].shape == (-1, 3)
    with np.load(paths.golden) as golden:
        example = model.load_input_example(str(paths.mlflow_model_dir))
        np.testing.assert_allclose(example, golden["inputs"][:1], rtol=1e-6)
    requirements = (paths.mlflow_model_dir / "requirements.txt").read_text().split()
    assert [line.partition("==")[0] for line in requirements] == ["mlflow", "tensorflow"]


# --- Faults of the job's own `serve` ---


class Layers(Scaled):
    """Asks the layers one by one, as if in training."""

    def serve(self, model: keras.Model, inputs: Any) -> Any:
        answers = self.prepare({"x": inputs}, training=False, seeds=None)["x"]
        for layer in model.layers:
            answers = layer(answers, training=True)
        return answers


class Frozen(Tiny):
    """Takes 64 examples and no other number."""

    def serve(self, model: keras.Model, inputs: Any) -> Any:
        return model(tf.ensure_shape(inputs, [64, 8]), training=False)


class LiveOnly(Scaled):
    """Scales in this process, and not in what is exported."""

    def serve(self, model: keras.Model, inputs: Any) -> Any:
        if tf.executing_eagerly():
            return super().serve(model, inputs)
        return model(inputs, training=False)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (partial(Layers, dropout=0.5), "asked twice, its answers differ"),
        (partial(Layers, normalise=True), "depends on the others of its batch"),
        (Frozen, "it takes no batch of 1: the batch dimension must be free"),
        (LiveOnly, "prepares its inputs otherwise"),
    ],
    ids=["dropout-on", "batch-statistics", "batch-frozen", "preprocessing-missing"],
)
def test_the_proof_refuses(tmp_path: Path, make: Callable[[], Tiny], error: str) -> None:
    proof = proof_of(exported(tmp_path, make()))
    assert error in proof["error"]


class Training(Tiny):
    def serve(self, model: keras.Model, inputs: Any) -> Any:
        return model(inputs, training=True)


class Unprepared(Scaled):
    def serve(self, model: keras.Model, inputs: Any) -> Any:
        return tf.nn.softmax(model(inputs, training=False))


class Untracked(Tiny):
    """Has a variable that nobody saves."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = tf.Variable(2.0, name="temperature")

    def serve(self, model: keras.Model, inputs: Any) -> Any:
        return model(inputs, training=False) / self.temperature


@pytest.mark.parametrize(
    ("make", "fragments"),
    [
        (partial(Training, dropout=0.5), ["serve() calls the model with training=True"]),
        (Unprepared, ["serve() gives the model inputs from -", "self.prepare()"]),
        (Untracked, ["serve() uses tf.Variable 'temperature:0'", "add_weight"]),
    ],
    ids=["dropout-on", "preprocessing-missing", "variable-not-tracked"],
)
def test_an_export_is_refused_before_it_is_written(
    tmp_path: Path, make: Callable[[], Tiny], fragments: list[str]
) -> None:
    with pytest.raises(ExportError) as caught:
        exported(tmp_path, make())
    assert [part for part in fragments if part not in str(caught.value)] == [], caught.value
    assert not tiny_plan(tmp_path).paths.export_dir.exists()


class Sums(Unprepared):
    """Says that it takes other inputs than evaluation."""

    def serving_input(self) -> Feature:
        return Feature("float32", (8,))


class Softmax(Scaled):
    def serve(self, model: keras.Model, inputs: Any) -> Any:
        scaled = self.prepare({"x": inputs}, training=False, seeds=None)["x"]
        return tf.nn.softmax(model(scaled, training=False))


@pytest.mark.parametrize("make", [Sums, Softmax], ids=["other-inputs", "own-answer"])
def test_a_serve_that_means_what_it_does_is_left_alone(
    tmp_path: Path, make: Callable[[], Tiny]
) -> None:
    assert exported(tmp_path, make()).golden.exists()


# --- Faults of the export itself ---


def test_a_signature_of_a_fixed_batch_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = tf.TensorSpec
    monkeypatch.setattr(
        export.tf,
        "TensorSpec",
        lambda shape, *rest, **named: spec([64, *shape[1:]], *rest, **named),
    )
    proof = proof_of(exported(tmp_path, Tiny()))
    assert "it takes no batch of 1: the batch dimension must be free" in proof["error"]


@contextlib.contextmanager
def _nothing(self: Any) -> Any:
    yield


class Faint(Tiny):
    """Gives answers that are small."""

    def serve(self, model: keras.Model, inputs: Any) -> Any:
        return 1e-4 * super().serve(model, inputs)


@pytest.mark.parametrize("make", [Tiny, Faint])
@pytest.mark.parametrize("side", ["saved", "live"])
def test_averages_that_were_not_swapped_in_are_seen(
    tmp_path: Path, side: str, make: Callable[[], Tiny], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make()
    model = job.model()
    averages = Averages(0.9, model.trainable_variables)
    for average in averages.variables[1:]:
        average.assign(average + 0.1)
    changes: dict[str, Any] = {"model": model, "averages": averages}
    assert proof_of(exported(tmp_path / "sound", job, **changes))["passed"]
    if side == "saved":
        monkeypatch.setattr(export, "_take_averages", lambda *arguments: None)
    else:
        monkeypatch.setattr(Averages, "in_place", _nothing)
    proof = proof_of(exported(tmp_path / "faulty", job, **changes))
    assert "It has other weights than the live model" in proof["error"]


def test_a_stale_checkpoint_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = export._load

    def load_another(checkpoint: Path, twin: keras.Model) -> None:
        load(checkpoint.with_name(store.checkpoint_name(12)), twin)

    monkeypatch.setattr(export, "_load", load_another)
    # The loss falls, so with mode=max the first evaluation stays the best.
    live(
        tmp_path,
        export__weights=Weights.best,
        best__metric="loss",
        best__mode=BestMode.max,
        train__eval_every_steps=4,
        checkpoint__every_steps=4,
    )
    proof = proof_of(tiny_plan(tmp_path).paths)
    assert "It has other weights than the live model" in proof["error"]


def test_a_checkpoint_under_another_name_is_not_exported(tmp_path: Path) -> None:
    told = live(tmp_path, export__enabled=False)
    last = Path(only(told, Saved)[-1].path)
    renamed = last.rename(last.with_name(store.checkpoint_name(4)))
    job = Tiny()
    model = job.model()
    optimizers = Optimizers(tiny_plan(tmp_path), job.parameter_groups(model))
    variables = named_variables(model, optimizers)
    with pytest.raises(ExportError, match="holds step 12"):
        variables = named_variables(
            model, Optimizers(tiny_plan(tmp_path), {"all": model.trainable_variables})
        )
        exported(tmp_path, job, model=model, checkpoint=renamed, variables=variables)
