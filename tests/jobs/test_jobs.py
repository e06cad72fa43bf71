"""The example jobs keep the contract of Job and stay short enough to read as a tutorial."""

import ast
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from jobs.code_lm import CodeLm
from jobs.fashion import Fashion
from jobs.flights import Flights
from jobs.gan import Gan
from jobs.mnist import Mnist
from jobs.mnist_cnn import MnistCnn
from jobs.synthetic import Synthetic
from orchestrator.spec.schema import Precision
from orchestrator.train.job import Batch, Job
from orchestrator.train.sources import Split
from tests.train.rig import make_rig

ROOT = Path(__file__).parents[2]
FILES = sorted(path for path in (ROOT / "jobs").glob("*.py") if path.name != "__init__.py")
ALLOWED = {
    "orchestrator.train.job",
    "orchestrator.train.sources",
    "orchestrator.train.datasets",
    "orchestrator.train.draws",
    "keras",
    "tensorflow",
    "numpy",
    "typing",
    "functools",
}


def small_lm() -> CodeLm:
    return CodeLm(num_examples=500, num_eval_examples=40, context=24, width=16, heads=2, depth=1)


def small_synthetic() -> Synthetic:
    return Synthetic(num_examples=200, size=8, filters=4, depth=1)


JOBS = [Mnist, MnistCnn, Gan, Fashion, Flights, small_lm, small_synthetic]
MakeJob = Callable[[], Job]


@pytest.fixture(autouse=True)
def seed() -> None:
    keras.utils.set_random_seed(1)


def make_job(make: MakeJob) -> Job:
    job = make()
    job.data_dir = str(ROOT / "data")
    return job


def prepared(job: Job, indices: np.ndarray, split: Split = Split.TRAIN) -> Batch:
    batch = {name: tf.constant(rows) for name, rows in job.source(split).fetch(indices).items()}
    training = split is Split.TRAIN
    seeds = tf.stack([tf.constant(indices), tf.zeros_like(indices)], axis=1) if training else None
    return job.prepare(batch, training=training, seeds=seeds)


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
def test_the_model_has_all_its_variables_in_the_parameter_groups(job_class: MakeJob) -> None:
    job = make_job(job_class)
    model = job.model()
    grouped = [id(v) for group in job.parameter_groups(model).values() for v in group]
    assert grouped
    assert sorted(grouped) == sorted(id(v) for v in model.trainable_variables)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("job_class", JOBS)
def test_losses_and_metrics_are_one_value_for_each_example(
    job_class: MakeJob, training: bool
) -> None:
    job = make_job(job_class)
    batch = prepared(job, np.arange(7), Split.TRAIN if training else Split.EVAL)
    outcome = job.losses(job.model(), batch, training=training)
    for values in (outcome.loss, *outcome.metrics.values()):
        assert values.shape == (7,)
        assert values.dtype == tf.float32


@pytest.mark.parametrize("job_class", JOBS)
def test_every_variable_of_every_group_has_a_gradient(job_class: MakeJob) -> None:
    job = make_job(job_class)
    model = job.model()
    gradients, _ = job.gradients(model, prepared(job, np.arange(8)), 1 / 8)
    groups = job.parameter_groups(model)
    assert list(gradients) == list(groups)
    for name, group in groups.items():
        assert [g.shape for g in gradients[name]] == [tuple(v.shape) for v in group]
        assert all(float(tf.norm(tf.convert_to_tensor(g))) > 0 for g in gradients[name])


@pytest.mark.parametrize(
    ("job_class", "shape", "dtype", "answer"),
    [
        (Mnist, (28, 28), "uint8", (10,)),
        (MnistCnn, (28, 28), "uint8", (10,)),
        (Gan, (32,), "float32", (28, 28)),
        (Fashion, (28, 28), "uint8", (10,)),
        (Flights, (5,), "int16", ()),
        (small_lm, (24,), "uint8", (256,)),
        (small_synthetic, (8, 8, 3), "uint8", (10,)),
    ],
)
def test_a_job_serves_raw_inputs(
    job_class: MakeJob, shape: tuple[int, ...], dtype: str, answer: tuple[int, ...]
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


@pytest.mark.parametrize(
    ("job_class", "sizes"),
    [
        (Mnist, (60_000, 10_000)),
        (lambda: MnistCnn(dropout=0.0), (60_000, 10_000)),
        (Gan, (60_000, 10_000)),
        (lambda: Fashion(dropout=0.0, synchronized=True), (60_000, 10_000)),
        (Flights, (2_850_000, 150_000)),
        (small_lm, (500, 40)),
        (small_synthetic, (200, 200)),
    ],
)
def test_two_replicas_compute_what_one_computes(
    job_class: MakeJob, sizes: tuple[int, int], tmp_path: Path
) -> None:
    curves = []
    for replicas in (1, 2):
        job = job_class()
        job.data_dir = str(ROOT / "data")
        rig = make_rig(
            tmp_path,
            job,
            replicas=replicas,
            data__num_examples=sizes[0],
            data__num_eval_examples=sizes[1],
            train__global_batch_size=33,  # 17 and 16
            # Batch normalisation makes larger steps chaotic: rounding grew to 1e-3 in 6 steps.
            optimizer__learning_rate=0.001,
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


def test_the_language_model_sees_no_byte_before_it_predicts_it() -> None:
    model = small_lm().model()
    text = np.arange(24, dtype=np.uint8)[None]
    changed = text.copy()
    changed[0, 15:] += 100
    before, after = (model(tf.constant(tokens)).numpy()[0] for tokens in (text, changed))
    np.testing.assert_allclose(before[:15], after[:15], atol=1e-6)
    assert not np.allclose(before[15:], after[15:], atol=1e-3)


def test_bits_per_byte_of_an_untrained_language_model_are_about_eight() -> None:
    # 256 equally likely bytes: log2 256 = 8.
    job = make_job(small_lm)
    outcome = job.losses(job.model(), prepared(job, np.arange(20)), training=False)
    bits = outcome.metrics["bits_per_byte"].numpy()
    assert 7.5 < bits.mean() < 9
    np.testing.assert_allclose(bits * np.log(2), outcome.loss, rtol=1e-6)


def test_the_language_model_in_bfloat16_predicts_in_full_precision(tmp_path: Path) -> None:
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        rig = make_rig(
            tmp_path,
            make_job(small_lm),
            precision__policy=Precision.mixed_bfloat16,
            data__num_examples=500,
            train__steps=None,
            train__epochs=1,
        )
        losses = rig.run(4).losses
    finally:
        keras.config.set_dtype_policy("float32")
    assert rig.model.outputs[0].dtype == "float32"
    assert rig.model.layers[2].compute_dtype == "bfloat16"
    assert losses[-1] < losses[0] < 6  # of 256 bytes: log 256 = 5.5


def test_a_sample_has_the_length_asked_for_and_depends_on_the_seed_alone() -> None:
    job = small_lm()
    model = job.model()
    first, again, other = (job.sample(model, "def f(", 30, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert first.startswith("def f(")
    # 6 + 30 bytes, of which some together may be one character.
    assert 6 < len(first) <= 36
    assert job.sample(model, "x = 1", 0, 1) == "x = 1"
    assert len(job.sample(model, "a" * 100, 1, 1)) == 101  # longer than the context


def test_an_image_moves_by_its_own_seed_wherever_it_is_in_the_batch() -> None:
    job = Fashion()
    images = np.random.default_rng(0).random((64, 28, 28), np.float32)
    seeds = np.stack([np.arange(64), np.full(64, 3)], axis=1)
    whole = job.moved(tf.constant(images), tf.constant(seeds)).numpy()
    halves = [
        job.moved(tf.constant(images[part]), tf.constant(seeds[part])).numpy()
        for part in (slice(0, 32), slice(32, 64))
    ]
    np.testing.assert_array_equal(whole, np.concatenate(halves))
    found = set()
    for image, moved in zip(images, whole, strict=True):
        (how,) = [
            (down, right, flip)
            for down in range(-2, 3)
            for right in range(-2, 3)
            for flip in (False, True)
            if np.array_equal(shifted(image[:, ::-1] if flip else image, down, right), moved)
        ]
        found.add(how)
    # 50 equally likely moves, of which 64 images should use about 50 (1 - (49/50)^64) = 36.
    assert len(found) > 25


def shifted(image: np.ndarray, down: int, right: int) -> np.ndarray:
    padded = np.pad(image, 2)
    return padded[2 - down : 30 - down, 2 - right : 30 - right]


def test_images_are_not_moved_in_evaluation() -> None:
    job = Fashion()
    x = np.random.default_rng(0).integers(0, 256, (3, 28, 28), np.uint8)
    batch = job.prepare({"x": tf.constant(x)}, training=False, seeds=None)
    np.testing.assert_allclose(batch["x"][..., 0], x / 255, rtol=1e-6)


def test_delays_are_clipped_and_compared_in_minutes() -> None:
    job = Flights(earliest=-10, latest=20, delta=5.0)
    batch = {"y": tf.constant([-600, 0, 1000], tf.int16)}
    outputs = tf.constant([-10.0, 3.0, 10.0])
    np.testing.assert_allclose(job.metrics(batch, outputs)["mae"], [0, 3, 10])
    # 3 < 5: 3^2 / 2; 10 > 5: 5 (10 - 5 / 2)
    np.testing.assert_allclose(job.loss(batch, outputs), [0, 4.5, 37.5])


def test_the_gradients_of_embeddings_come_as_rows() -> None:
    job = make_job(Flights)
    model = job.model()
    gradients, _ = job.gradients(model, prepared(job, np.arange(8)), 1 / 8)
    sparse = [isinstance(gradient, tf.IndexedSlices) for gradient in gradients["all"]]
    assert sum(sparse) == 5


def test_synthetic_data_says_so() -> None:
    source = small_synthetic().source(Split.TRAIN)
    assert "synthetic" in source.name and "not real data" in source.origin
