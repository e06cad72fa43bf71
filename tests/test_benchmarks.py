"""The pure parts of the benchmark; nothing here takes a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.__main__ import Options, chosen, parse
from benchmarks.bench import Bench
from benchmarks.growth import Watch
from benchmarks.measure import fastest_rate, sample_of
from benchmarks.report import (
    kept_lines,
    noise,
    paired,
    ratio_line,
    seconds_line,
    spread,
    tables,
    verdict,
)
from benchmarks.rows import COMMANDS, SUBJECTS, Subject, rows
from benchmarks.spec import Spec, make_spec
from benchmarks.state import State
from orchestrator.spec.memory import Memory


def block(first_step: int, num_steps: int, time: float, worker: int = 0) -> dict[str, object]:
    return {
        "kind": "BlockDone",
        "worker": worker,
        "first_step": first_step,
        "num_steps": num_steps,
        "time": time,
    }


def test_ratios_are_of_pairs_and_noise_is_of_neighbours() -> None:
    assert paired([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    assert noise([1.0, 2.0, 1.0]) == [2.0, 0.5]


def test_a_single_pair_has_no_noise() -> None:
    assert spread(noise([1.0])) == "–"


def test_spread_is_median_and_range_with_three_digits() -> None:
    assert spread([3.0, 1.0, 2.0]) == "2.00 (1.00 to 3.00)"
    assert spread([3000.4], "steps/s") == "3,000 steps/s"
    assert spread([0.002, 0.0041]) == "0.00305 (0.00200 to 0.00410)"


@pytest.mark.parametrize(
    ("goal", "ours", "told"),
    [
        # The other side is [100, 102, 100]: it moves by 2 % from run to run.
        ("≥ 0.98", [105.0, 106.0, 105.0], "yes"),
        ("≥ 0.98", [99.0, 101.0, 99.0], "within noise"),
        ("≥ 0.98", [90.0, 91.0, 90.0], "no"),
        ("≤ 0.98", [90.0, 91.0, 90.0], "yes"),
        ("≤ 0.98", [105.0, 106.0, 105.0], "no"),
        # Our own side moves by a quarter and more: that decides, too.
        ("≥ 0.98", [110.0, 140.0, 112.0], "within noise"),
    ],
)
def test_a_goal_is_met_or_missed_by_more_than_the_noise(
    goal: str, ours: list[float], told: str
) -> None:
    other = [100.0, 102.0, 100.0]
    assert verdict(goal, paired(ours, other), ours, other) == told


def test_one_pair_is_no_verdict() -> None:
    assert verdict("≥ 0.98", [2.0], [200.0], [100.0]) == "–"


MLFLOW = {"kind": "MlflowRun"}


def test_the_first_fifth_of_a_run_is_not_counted() -> None:
    # 100 steps; the block that ends at 20 is the last of the warm-up: 80 steps in 8 s.
    blocks = [block(0, 10, 3.0), block(10, 10, 5.0), block(20, 40, 9.0), block(60, 40, 13.0)]
    sample = sample_of(1.0, [MLFLOW, *blocks, block(0, 100, 99.0, worker=1)])
    assert (sample.start_s, sample.steps_per_s, sample.stall_s) == (2.0, 10.0, 0.0)


def test_steps_beside_the_import_of_mlflow_are_not_counted() -> None:
    # MLflow has the run before the block that ends at 60: 40 steps in 4 s.
    blocks = [block(0, 10, 3.0), block(10, 10, 5.0), block(20, 40, 99.0), block(60, 40, 103.0)]
    assert sample_of(1.0, [*blocks[:2], MLFLOW, *blocks[2:]]).steps_per_s == 10.0


def test_a_run_that_ends_before_mlflow_has_it_has_no_rate() -> None:
    blocks = [block(0, 10, 3.0), block(10, 10, 5.0)]
    assert sample_of(1.0, [*blocks, MLFLOW]).steps_per_s == 0.0
    assert sample_of(1.0, [MLFLOW, block(0, 10, 3.0)]).steps_per_s == 0.0


def test_the_rate_of_a_trial_is_that_of_its_fastest_long_block() -> None:
    # The first block traces; the one of 2 steps is too short to say anything.
    blocks = [(1, 5.0), (16, 4.0), (2, 0.01), (20, 2.0)]
    records = [{**block(0, n, 0.0), "wall_s": wall_s} for n, wall_s in blocks]
    assert fastest_rate(records) == 10.0
    assert fastest_rate(records[:1]) == 0.0


def test_the_stall_of_a_run_is_the_median_of_its_checkpoints() -> None:
    saved = [{"kind": "Saved", "stall_s": stall} for stall in (0.1, 0.5, 0.2)]
    assert sample_of(1.0, [block(0, 10, 3.0), *saved]).stall_s == 0.2


def test_arguments_are_read() -> None:
    asked = parse(["only=start,help", "pairs=2", "seconds=0.5", "fresh=true"])
    assert asked == Options(only=("start", "help"), pairs=2, seconds=0.5, fresh=True)


@pytest.mark.parametrize("argument", ["pairs=many", "pairs=0", "fresh=yes", "7", "rows=all"])
def test_arguments_that_do_not_fit_are_refused(argument: str) -> None:
    with pytest.raises(SystemExit, match=r"does not fit|is meant|above zero"):
        parse([argument])


def test_a_pattern_chooses_rows() -> None:
    ratios, commands = chosen(("mnist-*", "help"))
    assert {row.name for row in ratios} == {
        row.name for row in rows() if row.name.startswith("mnist-")
    }
    assert [row.name for row in commands] == ["help"]


def test_an_unknown_row_is_refused_with_the_names() -> None:
    with pytest.raises(SystemExit, match=r"only=minst: no such row; there are mnist-graph"):
        chosen(("minst",))


def test_rows_have_names_of_their_own() -> None:
    names = [row.name for row in [*rows(), *COMMANDS]]
    assert len(set(names)) == len(names)


def test_samples_outlive_an_interrupt(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    State(path, "one").add("a / b", [1.0, 2.0])
    State(path, "one").add("a / b", [3.0, 4.0])
    assert State(path, "one").samples("a / b") == [[1.0, 2.0], [3.0, 4.0]]


def test_samples_of_another_commit_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    State(path, "one").add("a / b", [1.0])
    assert State(path, "two").samples("a / b") == []
    assert State(path, "one").samples("a / b") == [[1.0]]


def test_fresh_forgets_this_commit_only(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    State(path, "one").add("a", [1.0])
    State(path, "two").add("a", [2.0])
    State(path, "one", fresh=True).add("a", [3.0])
    assert json.loads(path.read_text()) == {"two": {"a": [[2.0]]}, "one": {"a": [[3.0]]}}


def test_pairs_that_two_rows_share_are_estimated_once(tmp_path: Path) -> None:
    bench = Bench(5, None, State(tmp_path / "state.json", "one"), tmp_path)
    by_name = {row.name: row for row in rows()}
    rate, start = by_name["mnist-train"], by_name["mnist-train-start"]
    assert rate.pair == start.pair
    assert bench.estimate_s([rate, start], []) == bench.estimate_s([rate], []) > 0


def test_all_rows_with_five_pairs_are_estimated_below_an_hour_and_a_half(tmp_path: Path) -> None:
    bench = Bench(5, None, State(tmp_path / "state.json", "one"), tmp_path)
    assert 0 < bench.estimate_s(rows(), COMMANDS) <= 90 * 60


def test_rows_that_share_a_side_are_measured_in_rounds(tmp_path: Path) -> None:
    bench = Bench(5, None, State(tmp_path / "state.json", "one"), tmp_path)
    groups = bench.groups(rows())
    assert sorted(row.name for group in groups for row in group) == sorted(r.name for r in rows())
    [fits] = [group for group in groups if group[0].name == "code_lm-graph"]
    assert {row.name for row in fits} >= {"code_lm-tutorial", "code_lm-fit", "code_lm-fit-10"}
    # Our side is run once a round for all of them.
    alone = sum(bench.estimate_s([row], []) for row in fits)
    assert bench.estimate_s(fits, []) < 0.8 * alone


def test_every_comparator_is_set_against_the_three_jobs() -> None:
    names = {row.name for row in rows()}
    for job in ("mnist", "mnist_cnn", "code_lm"):
        assert {f"{job}-{mode}" for mode in ("graph", "tutorial", "fit", "train")} <= names
        assert any(name.startswith(f"{job}-fit") and name.endswith("0") for name in names)


def test_the_growth_of_memory_is_that_between_two_looks_at_each_process() -> None:
    held = {11: iter([500_000_000, 512_000_000]), 12: iter([400_000_000, 400_000_000])}
    watch = Watch([20, 120], lambda pid: Memory(next(held[pid]), 0))
    ready = [{"kind": "Ready", "worker": w, "pid": 11 + w} for w in (0, 1)]
    blocks = [block(first, 20, 0.0, worker=w) for first in range(0, 160, 20) for w in (0, 1)]
    watch.follow([*ready, *blocks[:5]])
    watch.follow(blocks[5:])
    # 12 MB in 100 steps.
    assert "worker 0: 500 MB at step 20, 512 MB at 120: +12000.0 MB in 100,000" in watch.lines()[0]
    assert "+0.0 MB" in watch.lines()[1]


def test_what_is_there_already_is_not_estimated(tmp_path: Path) -> None:
    [finish] = [command for command in COMMANDS if command.name == "finish"]
    state = State(tmp_path / "state.json", "one")
    state.add(finish.key, [9.0, 4.0])
    assert Bench(1, None, state, tmp_path).estimate_s([], [finish]) == 0


def test_rows_of_other_days_stay_in_the_table() -> None:
    old = ratio_line("gan-graph", "gan", "≥ 0.98", [1.0], [1.0], unit="s", when="2020-01-01 abc")
    new = ratio_line("mnist-graph", "m", "≥ 0.98", [2.0], [1.0], unit="s", when="2020-01-02 def")
    again = seconds_line("help", "`--help`", "< 1", [0.1], "2020-01-02 def")
    text = tables({"gan-graph": old}, ["mnist-graph", "gan-graph"], ["help"], "machine")
    lines = kept_lines(text) | {"mnist-graph": new, "help": again}
    text = tables(lines, ["mnist-graph", "gan-graph"], ["help"], "machine")
    assert list(kept_lines(text)) == ["mnist-graph", "gan-graph", "help"]
    assert kept_lines(text)["gan-graph"] == old


def test_a_comparator_is_told_what_our_plan_says() -> None:
    spec = make_spec("mnist", ("train.global_batch_size=16", "train.seed=3"), 100, 2.0)
    assert (spec.batch_size, spec.seed, spec.optimizer) == (16, 3, "adam")
    assert spec.arguments == {"learning_rate": 0.001}
    assert Spec.from_json(spec.to_json()) == spec


def test_parameter_groups_keep_their_own_learning_rates() -> None:
    spec = make_spec("gan", (), 100, 2.0)
    assert spec.groups == {
        "generator": {"learning_rate": 0.001},
        "discriminator": {"learning_rate": 0.001},
    }


NO_AVERAGE = ("train.evaluate_ema=false", "export.weights=last")


@pytest.mark.parametrize("subject", SUBJECTS, ids=[subject.job for subject in SUBJECTS])
def test_the_comparators_do_the_work_of_every_job_that_is_measured(subject: Subject) -> None:
    spec = make_spec(subject.job, subject.overrides, subject.block_steps, 2.0)
    assert Spec.from_json(spec.to_json()) == spec


def test_a_comparator_has_the_same_schedule_and_clipping() -> None:
    spec = make_spec("code_lm", ("optimizer.ema_decay=null", *NO_AVERAGE), 4, 2.0)
    # 60,000 windows, 32 a step: 1,875 steps of which 100 warm up, and the cosine ends at zero.
    assert spec.cosine == (100, 1_875, 0.0)
    assert spec.arguments["global_clipnorm"] == 1.0
    assert Spec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize(
    "override", ["train.micro_batches=2", "optimizer.ema_decay=0.9", "optimizer.clip_value=1"]
)
def test_a_job_whose_work_the_comparators_do_not_do_is_refused(override: str) -> None:
    with pytest.raises(SystemExit, match="which the comparators do not"):
        make_spec("mnist", (override,), 4, 2.0)
