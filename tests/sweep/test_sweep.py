"""Freezing, halving, tables and states of a sweep, without a process."""

from __future__ import annotations

import csv
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import ConfigError, StorageError
from orchestrator.spec.config import load_kept
from orchestrator.spec.paths import SweepPaths
from orchestrator.spec.schema import BestConfig, BestMode
from orchestrator.sweep.folder import (
    Child,
    Sweep,
    find_sweep,
    read_sweep,
    typed_runs_dir,
    write_sweep,
)
from orchestrator.sweep.freeze import freeze_sweep
from orchestrator.sweep.halving import is_behind, rungs, value_at
from orchestrator.sweep.run import sweep as run_sweep
from orchestrator.sweep.state import keep_stopped, states_of
from orchestrator.sweep.table import best_of, csv_table, markdown, text_table
from orchestrator.track.journal import Journal
from orchestrator.track.sweep_plot import Curve, draw_curves

OVERRIDES = ["job=small", "optimizer.learning_rate=1e-3,1e-2"]
BY_LOSS = BestConfig(metric=None, mode=BestMode.min, min_delta=0.0, patience=None)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A user's own configuration, with one job."""
    folder = tmp_path / "own"
    (folder / "job").mkdir(parents=True)
    write_job(folder, hidden=8)
    return folder


def write_job(folder: Path, hidden: int) -> None:
    (folder / "job" / "small.yaml").write_text(
        "# @package _global_\ndefaults: [mnist]\n"
        f"job:\n  name: small\n  args:\n    hidden: {hidden}\n"
    )


def made(tmp_path: Path) -> Sweep:
    """Return a sweep whose configurations nobody reads."""
    rates = [(rate, seed) for rate in ("0.001", "0.01") for seed in "12"]
    children = [
        Child(
            name=f"0{number}",
            job="small",
            run=f"a-0{number}",
            values={"optimizer.learning_rate": rate, "train.seed": seed},
            overrides=[],
            total_steps=100,
        )
        for number, (rate, seed) in enumerate(rates, 1)
    ]
    sweep = Sweep(
        paths=SweepPaths(tmp_path / "runs" / "sweeps" / "a"),
        overrides=OVERRIDES,
        config_dir=None,
        cwd=tmp_path,
        began=1.0,
        parallel=2,
        children=children,
    )
    write_sweep(sweep, [""] * len(children))
    return sweep


def leave(sweep: Sweep, index: int, *records: dict[str, Any]) -> None:
    """Write into the journal of a child's run."""
    paths = sweep.run_of(sweep.children[index])
    paths.root.mkdir(parents=True, exist_ok=True)
    journal = Journal(paths.journal)
    journal.append({"kind": "RunStarted", "time": 1.0, "facts": {"params": {}}})
    for record in records:
        journal.append(record)
    journal.close()


def evaluated(step: int, loss: float) -> dict[str, Any]:
    return {"kind": "Evaluated", "step": step, "metrics": {"loss": loss, "accuracy": 1 - loss}}


def ended(status: str = "FINISHED") -> dict[str, Any]:
    return {"kind": "RunEnded", "status": status}


def test_what_is_frozen_is_read_back(tmp_path: Path, own: Path) -> None:
    sweep = freeze_sweep(OVERRIDES, own, tmp_path)
    assert read_sweep(sweep.paths.root) == sweep
    assert sweep.paths.root.parent == tmp_path / "runs" / "sweeps"
    assert [child.name for child in sweep.children] == ["01", "02"]
    assert sweep.children[0].run == f"{sweep.name}-01"


def test_editing_conf_changes_nothing_that_is_frozen(tmp_path: Path, own: Path) -> None:
    sweep = freeze_sweep(OVERRIDES, own, tmp_path)
    write_job(own, hidden=999)
    found = find_sweep(OVERRIDES, own, tmp_path / "runs")
    assert found == sweep
    text = sweep.paths.config("02").read_text()
    config = load_kept(text, {"run_name": "x"}, own)
    assert config.job.args["hidden"] == 8
    assert config.optimizer.learning_rate == 0.01


def test_a_broken_conf_does_not_keep_a_frozen_sweep_from_going_on(
    tmp_path: Path, own: Path
) -> None:
    sweep = freeze_sweep(OVERRIDES, own, tmp_path)
    (own / "job" / "small.yaml").write_text("job: [")
    found = find_sweep(OVERRIDES, own, tmp_path / "runs")
    assert found is not None
    assert load_kept(sweep.paths.config("01").read_text(), {}, own).job.name == "small"


def test_how_a_sweep_goes_about_it_does_not_make_it_another(tmp_path: Path, own: Path) -> None:
    sweep = freeze_sweep([*OVERRIDES, "sweep.parallel=1"], own, tmp_path)
    again = [*OVERRIDES, "sweep.parallel=2", "sweep.halving.factor=3"]
    assert find_sweep(again, own, tmp_path / "runs") == sweep
    assert find_sweep([*OVERRIDES, "train.steps=3"], own, tmp_path / "runs") is None
    assert find_sweep([*OVERRIDES, "sweep.name=other"], own, tmp_path / "runs") is None


def test_a_sweep_that_cannot_be_read_stands_in_nobodys_way_but_its_own(
    tmp_path: Path, own: Path
) -> None:
    sweep = freeze_sweep([*OVERRIDES, "sweep.name=first"], own, tmp_path)
    broken = tmp_path / "runs" / "sweeps" / "broken"
    broken.mkdir()
    (broken / "sweep.json").write_text('{"format": 1')
    told: list[str] = []
    assert find_sweep(OVERRIDES, own, tmp_path / "runs", told.append) == sweep
    assert len(told) == 1 and f"{broken}/sweep.json cannot be read" in told[0]
    with pytest.raises(StorageError, match="remove the folder and the runs of its"):
        find_sweep([*OVERRIDES, "sweep.name=broken"], own, tmp_path / "runs")


def test_the_name_of_another_sweep_is_refused(tmp_path: Path, own: Path) -> None:
    freeze_sweep([*OVERRIDES, "sweep.name=first"], own, tmp_path)
    with pytest.raises(ConfigError, match=r"^sweep.name=first: this sweep was begun with other"):
        find_sweep(["job=small", "train.seed=3,4", "sweep.name=first"], own, tmp_path / "runs")


def test_runs_of_an_earlier_sweep_are_not_taken_for_children(tmp_path: Path, own: Path) -> None:
    named = [*OVERRIDES, "sweep.name=first"]
    first = freeze_sweep(named, own, tmp_path)
    leave(first, 0, ended())
    shutil.rmtree(first.paths.root)  # begun again, as a broken one is
    with pytest.raises(ConfigError, match=r"sweep\.name=first: \S+/first-01 exists already"):
        freeze_sweep(named, own, tmp_path)
    assert first.run_of(first.children[0]).journal.exists()


def test_jobs_may_be_given_as_files(tmp_path: Path) -> None:
    files = "job=conf/job/mnist.yaml,conf/job/mnist_cnn.yaml"
    sweep = freeze_sweep([files, "train.seed=1,2"], None, tmp_path)
    assert [child.job for child in sweep.children] == ["mnist", "mnist", "mnist_cnn", "mnist_cnn"]


@pytest.mark.parametrize("own", ["sweep.halving={factor:3,first:0.2}", "sweep.name=${oc.env:HOME}"])
def test_keys_of_the_sweep_itself_are_plain_values(tmp_path: Path, own: str) -> None:
    with pytest.raises(ConfigError, match="one plain value for each key"):
        run_sweep(["job=mnist", "train.seed=1,2", own], None, tmp_path)
    assert not (tmp_path / "runs").exists()


def test_the_errors_of_all_children_are_told_at_once(tmp_path: Path, own: Path) -> None:
    overrides = ["job=small", "train.seed=1,-2", "train.global_batch_size=32,0"]
    with pytest.raises(ConfigError) as told:
        freeze_sweep(overrides, own, tmp_path)
    lines = sorted(str(told.value).splitlines())
    assert [line.partition(":")[0] for line in lines] == [
        "train.global_batch_size=0",
        "train.seed=-2",
    ]
    assert "(with train.seed=-2 train.global_batch_size=32; " in lines[1]
    assert not (tmp_path / "runs").exists()


def test_what_cannot_be_planned_is_told_before_anything_starts(tmp_path: Path, own: Path) -> None:
    overrides = [
        *("job=small", "strategy=multi_worker", "strategy.devices_per_worker=1"),
        *("strategy.num_workers=2", "train.global_batch_size=1,8"),
    ]
    with pytest.raises(ConfigError, match=r"at least 2 .with train.global_batch_size=1.$"):
        freeze_sweep(overrides, own, tmp_path)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], "a sweep wants a key with several values.*`train` trains"),
        (["train.seed=range(0,200)"], "200 children are more than sweep.max_children=100"),
        (["train.seed=1,2", "cluster=inline"], "cluster=inline: children are processes"),
        (["train.seed=1,2", "run_name=a"], "run_name: a sweep names its children"),
        (["train.seed=1,2", "sweep.parallel=0"], "sweep.parallel=0: must be auto or"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(
    more: list[str], words: str, tmp_path: Path, own: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        freeze_sweep(["job=small", *more], own, tmp_path)


def test_children_of_a_host_share_its_cpus(tmp_path: Path, own: Path) -> None:
    sweep = freeze_sweep([*OVERRIDES, "sweep.parallel=1000"], own, tmp_path)
    assert sweep.parallel == 2
    assert sweep.children[0].overrides[-1].startswith("cluster.cpus_per_worker=")


def test_jobs_that_are_swept_are_recorded_in_one_experiment(tmp_path: Path) -> None:
    sweep = freeze_sweep(["job=mnist,mnist_cnn"], None, tmp_path)
    configs = [load_kept(sweep.paths.config(c.name).read_text(), {}) for c in sweep.children]
    assert {config.tracking.experiment for config in configs} == {"mnist-mnist_cnn"}


def test_rungs_are_parts_of_a_run() -> None:
    assert rungs(3, 0.1) == pytest.approx([0.1, 0.3, 0.9])
    assert rungs(2, 0.5) == [0.5]


def test_a_rung_is_reached_by_the_first_evaluation_at_or_after_it() -> None:
    found = {10: {"loss": 3.0}, 30: {"loss": 2.0}, 100: {"loss": 1.0}}
    assert value_at(0.1, found, "loss", 100) == 3.0
    assert value_at(0.2, found, "loss", 100) == 2.0
    # The last evaluation saves nothing any more.
    assert value_at(0.5, found, "loss", 100) is None
    assert value_at(0.1, found, "accuracy", 100) is None


@pytest.mark.parametrize(
    ("value", "others", "factor", "mode", "expected"),
    [
        (9.0, [], 3, BestMode.min, False),  # the first one at a rung goes on
        (2.0, [1.0], 2, BestMode.min, True),  # one of two goes on
        (1.0, [2.0], 2, BestMode.min, False),
        (2.0, [1.0], 2, BestMode.max, False),
        (2.0, [1.0, 3.0], 3, BestMode.min, True),  # one of three
        (2.0, [1.0, 3.0, 4.0], 3, BestMode.min, False),  # two of four
        (1.0, [1.0, 1.0, 1.0], 4, BestMode.min, False),  # equals are not behind
        (math.nan, [1.0], 1.5, BestMode.min, False),  # two of two
        (math.nan, [1.0, 2.0, 3.0], 2, BestMode.min, True),
    ],
)
def test_the_best_go_on_from_a_rung(
    value: float, others: list[float], factor: float, mode: BestMode, expected: bool
) -> None:
    assert is_behind(value, others, factor, mode) is expected


def test_states_come_from_the_journals(tmp_path: Path) -> None:
    sweep = made(tmp_path)
    leave(sweep, 0, evaluated(100, 0.5), ended())
    leave(sweep, 1, ended("FAILED"))
    leave(sweep, 2, evaluated(50, 0.9))
    states = states_of(sweep)
    assert [state.status for state in states] == ["finished", "failed", "interrupted", "waiting"]
    assert [state.is_open for state in states] == [False, True, True, True]
    keep_stopped(sweep, states[2], "stopped at 10% of its steps")
    assert [state.status for state in states_of(sweep)][2] == "stopped"


def test_a_child_that_finished_all_the_same_was_not_stopped(tmp_path: Path) -> None:
    sweep = made(tmp_path)
    leave(sweep, 0, evaluated(100, 0.5), ended())
    keep_stopped(sweep, states_of(sweep)[0], "stopped at 10% of its steps")
    assert states_of(sweep)[0].status == "finished"


def test_the_best_child_is_marked_in_every_table(tmp_path: Path) -> None:
    sweep = made(tmp_path)
    for index, loss in enumerate([0.5, math.nan, 0.25]):
        leave(sweep, index, evaluated(100, loss), ended())
    leave(sweep, 3, evaluated(50, 0.01))  # better, but it has not finished
    states = states_of(sweep)
    winner = best_of(states, BY_LOSS)
    assert winner is not None and winner.child.name == "03"
    lines = text_table(sweep, states, BY_LOSS).splitlines()
    assert lines[0].split() == [
        "child",
        "learning_rate",
        "seed",
        "status",
        "steps",
        "eval/loss",
        "time",
    ]
    assert [line.split()[0] for line in lines if "*" in line] == ["03"]
    said = markdown(sweep, states, BY_LOSS).splitlines()
    assert said[0].startswith("best: 03, eval/loss 0.25, with `optimizer.learning_rate=0.01`")
    rows = list(csv.DictReader(csv_table(sweep, states, BY_LOSS).splitlines()))
    assert [row["result"] for row in rows] == ["0.5", "nan", "0.25", "0.01"]
    assert rows[2]["optimizer.learning_rate"] == "0.01"


def test_the_best_metric_says_which_child_is_best(tmp_path: Path) -> None:
    best = BestConfig(metric="accuracy", mode=BestMode.max, min_delta=0.0, patience=None)
    sweep = made(tmp_path)
    leave(sweep, 0, evaluated(50, 0.1), evaluated(100, 0.7), ended())  # 0.9 at step 50
    # Its first evaluation had nothing to tell.
    leave(sweep, 1, evaluated(50, math.nan), evaluated(100, 0.2), ended())
    winner = best_of(states_of(sweep), best)
    assert winner is not None and winner.child.name == "01"


def test_values_that_look_like_formulas_are_drawn_as_they_are(tmp_path: Path) -> None:
    curve = Curve(r"01 job.args.pattern='^\d+$' job.args.other='^\w+$'", [(1, 0.5), (2, 0.25)])
    draw_curves(tmp_path / "plot.png", [curve], "eval/loss")
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_a_folder_of_runs_may_begin_with_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert typed_runs_dir(["job=small", "runs_dir=~/runs"], Path("/")) == tmp_path / "runs"
