"""The example jobs keep the contract of Job and stay short enough to read as a tutorial."""

import ast
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from jobs.gan import Gan
from jobs.mnist import Mnist
from jobs.mnist_cnn import MnistCnn
from orchestrator.train.job import Batch, Job
from orchestrator.train.sources import Split
from tests.train.rig import make_rig

ROOT = Path(__file__).parents[2]
FILES = sorted(path for path in (ROOT / "jobs").glob("*.py") if path.name != "__init__.py")
ALLOWED = {
    "orchestrator.train.job",
    "orchestrator.train.sources",
    "orchestrator.train.datasets",
    "keras",
    "tensorflow",
    "numpy",
    "typing",
    "functools",
}
JOBS = [Mnist, MnistCnn, Gan]


@pytest.fixture(autouse=True)
def seed() -> None:
    keras.utils.set_random_seed(1)


def make_job(job_class: type[Job]) -> Job:
    job = job_class()
    job.data_dir = str(ROOT / "data")
    return job


def prepared(job: Job, indices: np.ndarray, split: Split = Split.TRAIN) -> Batch:
    batch = {name: tf.constant(rows) for name, rows in job.source(split).fetch(indices).items()}
    return job.prepare(batch, training=split is Split.TRAIN, seeds=None)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_job_is_short_and_imports_only_what_a_user_needs(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) < 100
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module or "")
    assert imported <= ALLOWED


@pytest.mark.parametrize("job_class", JOBS)
def test_the_model_has_all_its_variables_in_the_parameter_groups(job_class: type[Job]) -> None:
    job = make_job(job_class)
    model = job.model()
    grouped = [id(v) for group in job.parameter_groups(model).values() for v in group]
    assert grouped
    assert sorted(grouped) == sorted(id(v) for v in model.trainable_variables)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("job_class", JOBS)
def test_losses_and_metrics_are_one_value_for_each_example(
    job_class: type[Job], training: bool
) -> None:
    job = make_job(job_class)
    batch = prepared(job, np.arange(7), Split.TRAIN if training else Split.EVAL)
    outcome = job.losses(job.model(), batch, training=training)
    for values in (outcome.loss, *outcome.metrics.values()):
        assert values.shape == (7,)
        assert values.dtype == tf.float32


@pytest.mark.parametrize("job_class", JOBS)
def test_every_variable_of_every_group_has_a_gradient(job_class: type[Job]) -> None:
    job = make_job(job_class)
    model = job.model()
    gradients, _ = job.gradients(model, prepared(job, np.arange(8)), 1 / 8)
    groups = job.parameter_groups(model)
    assert list(gradients) == list(groups)
    for name, group in groups.items():
        assert [g.shape for g in gradients[name]] == [tuple(v.shape) for v in group]
        assert all(float(tf.norm(g)) > 0 for g in gradients[name])


@pytest.mark.parametrize(
    ("job_class", "shape", "dtype", "answer"),
    [
        (Mnist, (28, 28), "uint8", (10,)),
        (MnistCnn, (28, 28), "uint8", (10,)),
        (Gan, (32,), "float32", (28, 28)),
    ],
)
def test_a_job_serves_raw_inputs(
    job_class: type[Job], shape: tuple[int, ...], dtype: str, answer: tuple[int, ...]
) -> None:
    job = make_job(job_class)
    feature = job.serving_input() or job.source(Split.TRAIN).features["x"]
    assert (feature.shape, feature.dtype) == (shape, dtype)
    outputs = job.serve(job.model(), tf.zeros([3, *shape], dtype))
    assert outputs.shape == (3, *answer)


def test_constructor_arguments_change_the_model() -> None:
    assert Mnist(hidden=16).model().count_params() == 784 * 16 + 16 + 16 * 10 + 10
    assert Gan(latent=8).model().generator.input_shape == (None, 8)
    rates = [layer.rate for layer in MnistCnn(dropout=0.1).model().layers if hasattr(layer, "rate")]
    assert rates == [0.1]


def test_the_gan_differentiates_each_loss_for_its_own_network() -> None:
    job = make_job(Gan)
    model = job.model()
    batch = prepared(job, np.arange(8))
    gradients, _ = job.gradients(model, batch, 1 / 8)
    for name, group in job.parameter_groups(model).items():
        keras.utils.set_random_seed(1)
        with tf.GradientTape() as tape:
            outcome = job.losses(model, batch, training=False)
            cost = outcome.loss if name == "discriminator" else outcome.metrics["generator_loss"]
            mean = tf.reduce_mean(cost)
        expected = tape.gradient(mean, [v.value for v in group])
        for mine, theirs in zip(gradients[name], expected, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6)


def test_the_gans_latents_belong_to_the_examples() -> None:
    first, second = (make_job(Gan).source(Split.TRAIN) for _ in range(2))
    assert first.digest == second.digest
    rows = first.fetch(np.array([5, 9]))
    np.testing.assert_array_equal(rows["z"][1], second.fetch(np.array([9]))["z"][0])
    assert not np.array_equal(rows["z"][0], rows["z"][1])


@pytest.mark.parametrize("job_class", [Mnist, lambda: MnistCnn(dropout=0.0), Gan])
def test_two_replicas_compute_what_one_computes(
    job_class: Callable[[], Job], tmp_path: Path
) -> None:
    curves = []
    for replicas in (1, 2):
        job = job_class()
        job.data_dir = str(ROOT / "data")
        rig = make_rig(
            tmp_path,
            job,
            replicas=replicas,
            data__num_examples=60_000,
            data__num_eval_examples=10_000,
            train__global_batch_size=33,  # 17 and 16
        )
        curves.append(rig.run(6).losses)
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-5)
    assert curves[0][-1] != curves[0][0]


def test_a_few_hundred_steps_of_mnist_learn_digits() -> None:
    job = make_job(Mnist)
    model = job.model()
    optimizer = keras.optimizers.Adam(1e-3)
    optimizer.build(model.trainable_variables)
    tables = {
        name: tf.constant(a) for name, a in (job.source(Split.TRAIN).resident() or {}).items()
    }

    @tf.function
    def step(ids: tf.Tensor) -> None:
        batch = {name: tf.gather(table, ids) for name, table in tables.items()}
        batch = job.prepare(batch, training=True, seeds=None)
        gradients, _ = job.gradients(model, batch, 1 / 32)
        optimizer.apply(gradients["all"])

    for ids in np.random.default_rng(0).permutation(60_000)[: 32 * 300].reshape(-1, 32):
        step(tf.constant(ids))
    outcome = job.losses(model, prepared(job, np.arange(2000), Split.EVAL), training=False)
    assert float(tf.reduce_mean(outcome.metrics["accuracy"])) > 0.85
