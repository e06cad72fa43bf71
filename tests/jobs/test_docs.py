"""The example in docs/jobs.md runs as it is printed, from a folder outside the repository."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from orchestrator.spec.config import load_config
from orchestrator.spec.messages import DataUsed, Ended, Failed
from orchestrator.train.sources import Split
from tests.train.test_worker import live, only

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "jobs.md").read_text()
# Examples further down stand on the first one.
LATER_BLOCK = re.compile(r"^`mine/(wave_\S+)`\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^`mine/(?!wave_)(\S+)`\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def example() -> dict[str, str]:
    """Return the files of the example by their path below `mine/`."""
    return dict(BLOCK.findall(PAGE))


def write_example(folder: Path) -> Path:
    """Write the example, and those that stand on it."""
    for name, text in [*example().items(), *LATER_BLOCK.findall(PAGE)]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_the_example_is_a_class_and_its_yaml_in_40_lines() -> None:
    files = example()
    assert sorted(files) == ["job/waves.yaml", "waves.py"]
    code = [line for line in "".join(files.values()).splitlines() if line.strip()]
    assert len(code) <= 45
    assert len([line for line in files["waves.py"].splitlines() if line.strip()]) <= 40


def test_the_examples_configuration_is_accepted(tmp_path: Path) -> None:
    config = load_config(["job=waves"], write_example(tmp_path / "mine"))
    assert config.job.class_name == "waves.Waves"
    for split, planned in (
        (Split.TRAIN, config.data.num_examples),
        (Split.EVAL, config.data.num_eval_examples),
    ):
        assert load_example().Waves(**config.job.args).source(split).num_examples == planned


def load_example() -> types.ModuleType:
    module = types.ModuleType("waves")
    exec(compile(example()["waves.py"], "waves.py", "exec"), module.__dict__)
    return module


def test_the_example_learns() -> None:
    keras.utils.set_random_seed(1)
    job = load_example().Waves()
    model = job.model()
    tables = {name: tf.constant(a) for name, a in job.source(Split.TRAIN).resident().items()}
    held_out = {name: tf.constant(a) for name, a in job.source(Split.EVAL).resident().items()}
    optimizer = keras.optimizers.Adam(0.005)
    optimizer.build(model.trainable_variables)

    @tf.function
    def step(ids: tf.Tensor) -> None:
        batch = {name: tf.gather(table, ids) for name, table in tables.items()}
        optimizer.apply(job.gradients(model, batch, 1 / 50)[0]["all"])

    before = float(tf.reduce_mean(job.losses(model, held_out, training=False).loss))
    for ids in np.random.default_rng(0).integers(0, 10_000, (600, 50)):
        step(tf.constant(ids))
    after = float(tf.reduce_mean(job.losses(model, held_out, training=False).loss))
    assert after < before / 4


@pytest.mark.skipif(
    importlib.util.find_spec("orchestrator.__main__") is None, reason="there is no command line"
)
def test_the_example_is_trained_by_the_command_from_an_outside_folder(tmp_path: Path) -> None:
    folder = write_example(tmp_path / "mine")
    command = [sys.executable, "-m", "orchestrator", "train", "--config-dir", str(folder)]
    command += ["job=waves", "cluster=inline", f"runs_dir={tmp_path / 'runs'}", "train.epochs=1"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "eval/absolute_error" in done.stdout
    assert list((tmp_path / "runs" / "waves").iterdir())


@pytest.mark.parametrize(
    ("name", "placement"),
    [
        ("wave_records.RecordWaves", "fetched from host"),
        ("wave_streams.StreamWaves", "stream, not elastic"),
    ],
)
def test_the_examples_of_records_and_streams_are_trained_on_the_files_they_write(
    name: str, placement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = write_example(tmp_path / "mine")
    [given] = re.findall(
        rf'^make train conf=waves args="--config-dir mine (.*{name}.*)"$', PAGE, re.M
    )
    assert load_config(["job=waves", *given.split()], mine).job.class_name == name
    monkeypatch.syspath_prepend(mine)
    data = tmp_path / "data"
    try:
        importlib.import_module("wave_records").write(data)
        told = live(
            tmp_path,
            job__class_name=name,
            data__path=str(data),
            data__cache_dir=str(tmp_path / "cache"),
            data__num_examples=10_000,
            data__num_eval_examples=1_000,
            export__enabled=False,
        )
    finally:
        for module in ("waves", "wave_records", "wave_streams"):
            sys.modules.pop(module, None)
    used = {message.split: message.placement for message in only(told, DataUsed)}
    assert used["train"] == placement
    assert not only(told, Failed)
    assert only(told, Ended)[0].step == 12, only(told, Failed)
