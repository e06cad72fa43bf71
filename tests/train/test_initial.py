"""`train.init_from` and `train.freeze`: what training begins with, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from orchestrator.errors import JobError, RestoreError
from orchestrator.spec.messages import Cause, Ended, Failed, Message, Notice, Ready, Saved
from orchestrator.train import store
from orchestrator.train.checkpoint import read_model
from orchestrator.train.freeze import freeze
from orchestrator.train.initial import load_initial
from orchestrator.weights import find_weights
from tests.plans import tiny_config, tiny_plan
from tests.train.test_worker import live, only
from tests.train.tiny import Tiny

FIRST = ["sequential/dense/kernel", "sequential/dense/bias"]
SECOND = ["sequential/dense_1/kernel", "sequential/dense_1/bias"]
NORM = [
    f"sequential/batch_normalization/{name}"
    for name in ("gamma", "beta", "moving_mean", "moving_variance")
]


class Shaped(Tiny):
    """The tiny model with another width, and other names on request."""

    def __init__(self, width: int = 16, named: bool = False, **args: Any):
        super().__init__(**args)
        self.width = width
        self.named = named

    def model(self) -> keras.Model:
        if not self.named and self.width == 16:
            return super().model()
        one = keras.layers.Dense(self.width, activation="relu", name="one" if self.named else None)
        two = keras.layers.Dense(3, name="two" if self.named else None)
        return keras.Sequential([keras.layers.Input((8,)), one, two])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a plain tiny run."""
    [saved] = only(live(tmp_path_factory.mktemp("trained"), export__enabled=False), Saved)
    return Path(saved.path)


@pytest.fixture(scope="module")
def keras_file(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as Keras writes them."""
    model = Tiny().model()
    load_initial(trained, Tiny(), model)
    path = tmp_path_factory.mktemp("keras") / "some.weights.h5"
    model.save_weights(path)
    return path


def weights(told: list[Message], index: int = -1) -> dict[str, np.ndarray]:
    """Return the model's variables in a checkpoint that was told of."""
    return read_model(Path(only(told, Saved)[index].path))


def same(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> set[str]:
    return {path for path in a.keys() & b.keys() if np.allclose(a[path], b[path], atol=1e-5)}


@pytest.mark.parametrize("source", ["trained", "keras_file"])
def test_training_begins_at_step_0_with_the_weights_of_another_run(
    tmp_path: Path, trained: Path, source: str, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(source)
    still = {"optimizer__learning_rate": 1e-9, "train__steps": 1, "export__enabled": False}
    told = live(tmp_path, train__init_from=str(path), train__seed=5, **still)
    assert only(told, Ready)[0].start_step == 0
    [notice] = only(told, Notice)
    assert notice.text == f"weights of {path}: 4 of the model's variables were loaded"
    assert same(weights(told), read_model(trained)) == {*FIRST, *SECOND}


def test_a_checkpoint_goes_before_the_weights_the_run_began_with(
    tmp_path: Path, trained: Path
) -> None:
    own = live(tmp_path / "own", export__enabled=False, train__seed=5)
    path = only(own, Saved)[-1].path
    told = live(tmp_path, restore_from=path, train__init_from=str(trained))
    assert only(told, Ready)[0].start_step == 12
    assert not only(told, Notice) and only(told, Ended)


MISMATCHES: list[tuple[str, dict[str, Any], dict[str, list[str]]]] = [
    ("trained", {}, {"matched": FIRST + SECOND}),
    ("keras_file", {}, {"matched": FIRST + SECOND}),
    ("trained", {"normalise": True, "dropout": 0.5}, {"matched": FIRST + SECOND, "missing": NORM}),
    ("keras_file", {"normalise": True}, {"matched": FIRST + SECOND, "missing": NORM}),
    (
        "trained",
        {"width": 4},
        {
            "matched": SECOND[1:],
            "reshaped": [
                "sequential/dense/kernel: [8, 16] in the source, [8, 4] in the model",
                "sequential/dense/bias: [16] in the source, [4] in the model",
                "sequential/dense_1/kernel: [16, 3] in the source, [4, 3] in the model",
            ],
        },
    ),
]


@pytest.mark.parametrize(("source", "args", "expected"), MISMATCHES)
def test_what_fits_is_loaded_and_the_rest_is_listed(
    source: str, args: dict[str, Any], expected: dict[str, list[str]], request: Any
) -> None:
    job = Shaped(**args)
    model = job.model()
    before = [np.asarray(v.value) for v in model.variables]
    loaded = load_initial(request.getfixturevalue(source), job, model)
    for what in ("matched", "missing", "extra", "reshaped"):
        assert getattr(loaded, what) == expected.get(what, []), what
        if what != "matched":
            assert all(path in loaded.table() for path in expected.get(what, []))
    changed = [
        not np.array_equal(old, v.value) for old, v in zip(before, model.variables, strict=True)
    ]
    assert sum(changed) == len(loaded.matched)


def test_what_only_the_source_has_is_listed(tmp_path: Path) -> None:
    told = live(tmp_path, job__args={"normalise": True}, export__enabled=False, train__steps=1)
    loaded = load_initial(Path(only(told, Saved)[0].path), Tiny(), Tiny().model())
    assert (loaded.extra, loaded.matched) == (sorted(NORM), FIRST + SECOND)
    assert "4 only in the source, not used:" in loaded.summary()
    assert "and 3 more" in loaded.table(1)


@pytest.mark.parametrize(
    ("source", "args"), [("trained", {"named": True}), ("keras_file", {"width": 5})]
)
def test_weights_that_fit_nowhere_are_refused(
    source: str, args: dict[str, Any], request: Any
) -> None:
    job = Shaped(**args)
    path = request.getfixturevalue(source)
    if source == "keras_file":  # Keras matches by structure: the last bias alone would still fit
        job.model = lambda: keras.Sequential(  # type: ignore[method-assign]
            [keras.layers.Input((8,)), keras.layers.Dense(5)]
        )
    with pytest.raises(JobError, match="fits nowhere:\n0 of the model's variables"):
        load_initial(path, job, job.model())


def test_a_source_that_cannot_be_read_is_refused(tmp_path: Path, trained: Path) -> None:
    broken = tmp_path / "broken.weights.h5"
    broken.write_bytes(b"no HDF5")
    copy = tmp_path / trained.name
    copy.mkdir()
    for file in trained.iterdir():
        (copy / file.name).write_bytes(file.read_bytes()[: 40 if file.suffix == ".index" else None])
    for path in (broken, copy):
        [failed] = only(live(tmp_path / "run", train__init_from=str(path)), Failed)
        assert failed.cause is Cause.job
        assert f"train.init_from={path} cannot be read" in failed.error


def test_a_mirrored_model_takes_the_weights_on_every_replica(trained: Path) -> None:
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        model = Tiny().model()
    load_initial(trained, Tiny(), model)
    kernel = read_model(trained)[FIRST[0]]
    for part in model.variables[0].value.values:
        np.testing.assert_array_equal(part, kernel)


def make_checkpoint(root: Path, step: int, best: int | None = None) -> Path:
    target = root / "checkpoints" / store.checkpoint_name(step)
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = root / "staged"
    staged.mkdir()
    (staged / "variables.index").write_bytes(b"content")
    store.commit(staged, target, {"step": step, "best": {"step": best}})
    return target


def test_a_name_a_folder_or_a_file_stands_for_weights(tmp_path: Path) -> None:
    def found(asked: str | None) -> str | None:
        return find_weights(tiny_config(train__init_from=asked), tmp_path)

    assert found(None) is None
    run = tmp_path / "runs" / "tiny" / "20260101-000000-abcd"
    old = make_checkpoint(run, 10)
    assert found(run.name) == str(old)
    new = make_checkpoint(run, 20, best=10)
    assert found(run.name) == found(f"tiny/{run.name}") == found(str(run)) == str(old)
    newest = make_checkpoint(run, 30, best=25)  # of the best one there is nothing left
    assert found(run.name) == str(newest)
    assert found(str(new.relative_to(tmp_path))) == str(new)
    (newest / "variables.index").write_bytes(b"spoilt!")
    assert found(run.name) == str(old)  # the newest valid one, and the best that it knows
    file = tmp_path / "a.weights.h5"
    file.touch()
    assert found("a.weights.h5") == str(file)
    for wrong in ("20260101-000000-zzzz", "b.weights.h5", "..", "tiny/none", "[a]"):
        with pytest.raises(RestoreError, match=f"runs that have checkpoints: {run.name}"):
            found(wrong)
    with pytest.raises(RestoreError, match="does not have the content that was written"):
        found(str(newest))


BEFORE_AND_AFTER = {"checkpoint__every_steps": 1, "checkpoint__keep": 99, "export__enabled": False}


@pytest.mark.parametrize(
    ("patterns", "kept"),
    [
        ([], []),
        (["dense"], FIRST),
        (["dense/*"], FIRST),
        (["dense*"], None),
        (["*/bias"], [FIRST[1], SECOND[1]]),
        (["dense_1/kernel", "dense/bias"], [FIRST[1], SECOND[0]]),
    ],
)
def test_frozen_variables_keep_their_values(
    tmp_path: Path, patterns: list[str], kept: list[str] | None
) -> None:
    told = live(tmp_path, train__freeze=patterns, **BEFORE_AND_AFTER)
    if kept is None:
        [failed] = only(told, Failed)
        assert failed.cause is Cause.job
        assert failed.error == "train.freeze=['dense*'] leaves nothing to train"
        return
    first, last = weights(told, 0), weights(told)
    assert {path for path in first if np.array_equal(first[path], last[path])} == set(kept)


def test_a_pattern_that_matches_nothing_is_refused_with_the_paths(tmp_path: Path) -> None:
    [failed] = only(live(tmp_path, train__freeze=["dense", "backbone/*"]), Failed)
    assert failed.cause is Cause.job
    assert failed.error == (
        "train.freeze: the pattern backbone/* matches nothing that is trained; there are "
        "dense/kernel, dense/bias, dense_1/kernel, dense_1/bias"
    )


def test_a_frozen_batch_normalisation_keeps_its_statistics(tmp_path: Path) -> None:
    normal = {"job__args": {"normalise": True}, **BEFORE_AND_AFTER}
    for patterns, kept in ((["batch_norm*"], set(NORM)), (["dense"], set(FIRST))):
        told = live(tmp_path / patterns[0][:5], train__freeze=patterns, **normal)
        first, last = weights(told, 0), weights(told)
        assert {path for path in first if np.array_equal(first[path], last[path])} == kept


class TwoParts(Tiny):
    def model(self) -> keras.Model:
        def part(name: str) -> keras.Model:
            layers = [keras.layers.Input((8,)), keras.layers.Dense(8), keras.layers.Dense(8)]
            return keras.Sequential(layers, name=name)

        inputs = keras.Input((8,))
        return keras.Model(inputs, part("head")(part("backbone")(inputs)))

    def parameter_groups(self, model: keras.Model) -> dict[str, list[keras.Variable]]:
        return {name: model.get_layer(name).trainable_variables for name in ("backbone", "head")}


def test_frozen_layers_in_nested_models_and_own_groups(tmp_path: Path) -> None:
    job = TwoParts()
    model = job.model()
    text = freeze(job, model, ["backbone/*"])
    assert text.splitlines()[0] == "frozen: 4 of 8 trainable variables"
    assert not model.get_layer("backbone").trainable_variables
    # Of the group that is frozen as a whole nothing is left to optimize.
    groups = job.parameter_groups(model)
    assert {name: len(group) for name, group in groups.items()} == {"head": 4}
    own = {"job__class_name": f"{__name__}.TwoParts", "export__enabled": False}
    told = live(tmp_path, train__freeze=["backbone/*"], **own)
    assert only(told, Ended) and not only(told, Failed)


@pytest.mark.parametrize("pattern", ["backbone", "backbone/*", "*bone/block*/kernel"])
def test_a_functional_model_inside_another_is_frozen_by_its_name(pattern: str) -> None:
    inputs = keras.Input((8,))
    inner = keras.layers.Dense(8, name="block_1")(inputs)
    inner = keras.layers.BatchNormalization(name="block_2")(inner)
    backbone = keras.Model(inputs, keras.layers.Dense(8)(inner), name="backbone")
    outer = keras.Input((8,))
    model = keras.Model(outer, keras.layers.Dense(3, name="head")(backbone(outer)))
    text = freeze(Tiny(), model, [pattern])
    if pattern.startswith("backbone"):
        assert [v.path for v in model.trainable_variables] == ["head/kernel", "head/bias"]
        assert not backbone.trainable and not backbone.get_layer("block_2").trainable
    else:
        assert text.splitlines()[1:] == ["  backbone/block_1/kernel"]


def test_a_frozen_run_is_resumed(tmp_path: Path) -> None:
    frozen = {"train__freeze": ["dense"], "checkpoint__every_steps": 6, "export__enabled": False}
    first = live(tmp_path, **frozen)
    path = only(first, Saved)[0].path
    second = live(tmp_path, attempt=2, restore_from=path, **frozen)
    assert only(second, Ready)[0].start_step == 6
    assert same(weights(first), weights(second)) == {*FIRST, *SECOND}


def test_the_models_summary_is_written_down(tmp_path: Path) -> None:
    live(tmp_path, train__freeze=["dense"], train__steps=1, export__enabled=False)
    text = tiny_plan(tmp_path).paths.model_summary.read_text()
    assert "Trainable params: 51 " in text and "Non-trainable params: 144 " in text
    assert "Param #" in text and {"144", "51"} <= set(text.split())
