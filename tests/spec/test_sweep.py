"""What overrides with several values stand for, and what may not be swept."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import ConfigError
from orchestrator.spec.config import change_kept, compose_config, expand, load_config, load_kept
from orchestrator.spec.sweep import children_at_once, refuse_given, refuse_swept
from tests.plans import tiny_plan


def values(*overrides: str, config_dir: Path | None = None) -> list[dict[str, str]]:
    return [choice.values for choice in expand(["job=mnist", *overrides], config_dir)]


def test_all_combinations_are_made_the_first_key_changing_slowest() -> None:
    found = values("optimizer.learning_rate=1e-3,1e-2", "train.global_batch_size=32,64")
    assert [tuple(each.values()) for each in found] == [
        ("0.001", "32"),
        ("0.001", "64"),
        ("0.01", "32"),
        ("0.01", "64"),
    ]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps=range(1,8,3)", ["1", "4", "7"]),
        ("optimizer=choice(adam,sgd)", ["adam", "sgd"]),
        ("optimizer=glob(ad*,exclude=[*grad,*delta])", ["adam", "adamax", "adamw"]),
        ("train.freeze=[a,b],[c]", ["[a,b]", "[c]"]),
        ("strategy.devices_per_worker=1,2", ["1", "2"]),
        ("data.path=a,'b,c'", ["a", "'b,c'"]),
        ("job.args.hidden=16,32", ["16", "32"]),
    ],
)
def test_values_are_given_in_hydras_grammar(override: str, expected: list[str]) -> None:
    assert [next(iter(each.values())) for each in values(override)] == expected


def test_a_glob_also_finds_what_the_users_own_folder_has(tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "mnist_own.yaml").write_text("# @package _global_\ndefaults: [mnist]\n")
    found = [choice.values["job"] for choice in expand(["job=glob(mnist*)"], tmp_path)]
    assert sorted(found) == ["mnist", "mnist_cnn", "mnist_own"]


def test_a_quoted_text_is_one_value() -> None:
    assert values("tracking.experiment='a,b'") == [{}]


def test_every_combination_is_a_configuration_that_train_takes() -> None:
    choices = expand(["job=mnist,mnist_cnn", "job.args={}", "train.seed=1,2"])
    for choice in choices:
        config = load_config(choice.overrides)
        assert (config.job.name, str(config.train.seed)) == tuple(choice.values.values())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.block_s=interval(0,1)"], "train.block_s=interval(0,1): an interval has no end"),
        (["train.seed=1,1"], "train.seed=1,1: the same value twice"),
        (["train.seed=1", "train.seed=2"], "train.seed is set twice"),
        (["train.seed=1,"], "train.seed=1,: not in Hydra's override grammar"),
        (["optimizer=glob(x*)"], "optimizer=glob(x*): matches none of adadelta, "),
        (["train.seed=glob(*)"], "train.seed=glob(*): glob is for the groups job, "),
    ],
)
def test_what_cannot_be_expanded_is_told(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(words)}"):
        values(*overrides)


def test_every_key_that_must_not_be_swept_is_told_with_its_reason() -> None:
    with pytest.raises(ConfigError) as told:
        refuse_swept(["train.seed", "runs_dir", "tracking.uri", "sweep.parallel", "cluster"])
    lines = str(told.value).splitlines()
    assert [line.split(" ")[0] for line in lines] == [
        "runs_dir",
        "tracking.uri",
        "sweep.parallel",
        "cluster",
    ]
    assert all(line.endswith("; give it one value") for line in lines)


def test_keys_that_the_sweep_decides_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^resume: the same sweep command goes on"):
        refuse_given(["job", "resume"])


def test_a_kept_configuration_is_the_composed_one_without_secrets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MY_URI", "http://me:hunter2@host")
    config, text = compose_config(["job=mnist", "tracking.uri=${oc.env:MY_URI}"])
    assert "hunter2" not in text
    assert load_kept(text, {}) == config


def test_a_kept_configuration_takes_changes() -> None:
    _, text = compose_config(["job=mnist"])
    text = change_kept(text, {"cluster.cpus_per_worker": 3})
    config = load_kept(text, {"run_name": "a-01", "sweep.halving.factor": "3"})
    assert (config.cluster.cpus_per_worker, config.run_name) == (3, "a-01")
    assert config.sweep.halving.factor == 3.0


@pytest.mark.parametrize(
    ("asked", "plans", "own_cpus", "expected"),
    [
        ("auto", [{}, {}, {}], False, 3),  # one CPU each is enough: three of eight
        ("auto", [{}] * 20, False, 8),
        ("auto", [{"cluster__cpus_per_worker": 3}] * 20, True, 2),  # 8 // 3
        ("auto", [{"cluster__cpus_per_worker": 16}] * 2, True, 1),  # it waits for nobody
        ("3", [{}] * 2, False, 2),
    ],
)
def test_as_many_children_run_at_once_as_there_are_cpus_for(
    asked: str, plans: list[dict[str, Any]], own_cpus: bool, expected: int, tmp_path: Path
) -> None:
    made = [tiny_plan(tmp_path, **changes) for changes in plans]
    found = children_at_once(asked, made, cpus=8, gpus=0, has_own_cpus=own_cpus)
    assert found == expected


def test_as_many_children_run_at_once_as_there_are_gpus_for(tmp_path: Path) -> None:
    plans = [tiny_plan(tmp_path, num_gpus=4)] * 9
    assert plans[0].device_kind == "GPU"
    assert children_at_once("auto", plans, cpus=64, gpus=4, has_own_cpus=False) == 4
