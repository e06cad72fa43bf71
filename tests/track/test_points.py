"""Points: windows of steps whose means depend on the steps alone."""

from __future__ import annotations

import itertools
import math
import random
import tracemalloc
from typing import Any

import pytest

from orchestrator.track.points import Point, Points, auto_window

ENDED = {"kind": "RunEnded", "time": 99.0, "status": "FINISHED", "cause": None, "resumable": False}


def block(first: int, num: int, **changes: Any) -> dict[str, Any]:
    """A block in which the loss of step s is s, at time s, and a step takes 10 ms."""
    steps = range(first + 1, first + num + 1)
    record = {
        "kind": "BlockDone",
        "worker": 0,
        "attempt": 1,
        "time": float(first + num),
        "first_step": first,
        "num_steps": num,
        "wall_s": 0.01 * num,
        "data_wait_s": 0.002 * num,
        "ledger": 0,
        "loss": [float(step) for step in steps],
        "metrics": {"accuracy": [step / 100 for step in steps]},
        "learning_rate": [0.1] * num,
        "skipped_steps": [],
    }
    return record | changes


def feed(window: str | int, *records: dict[str, Any]) -> list[Point]:
    points = Points(window, 32)
    return list(itertools.chain.from_iterable(points.feed(record) for record in records))


def series(points: list[Point], key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in points if point.key == key]


def test_a_window_gives_one_mean_at_its_last_step_stamped_by_the_block_that_closed_it() -> None:
    points = feed(4, block(0, 3), block(3, 3))
    # (1 + 2 + 3 + 4) / 4
    assert [point for point in points if point.key == "train/loss"] == [
        Point("train/loss", 2.5, 6000, 4)
    ]


def test_all_names_are_there() -> None:
    assert {point.key for point in feed(2, block(0, 2), block(0, 2, worker=1))} == {
        "train/loss",
        "train/accuracy",
        "train/learning_rate",
        "perf/examples_per_s",
        "perf/step_ms",
        "perf/data_wait_fraction",
        "worker/0/step_ms",
        "worker/1/step_ms",
    }


def test_speed_is_that_of_the_steps_of_the_window() -> None:
    # Two steps of 10 ms and two of 30 ms: 80 ms for 4 steps of 32 examples.
    points = feed(4, block(0, 2), block(2, 2, wall_s=0.06))
    assert series(points, "perf/step_ms") == [(4, pytest.approx(20.0))]
    assert series(points, "perf/examples_per_s") == [(4, pytest.approx(1600.0))]
    assert series(points, "perf/data_wait_fraction") == [(4, pytest.approx(0.1))]


def test_speed_is_that_of_the_batch_each_start_had() -> None:
    starts = [{"kind": "RunStarted", "facts": {"global_batch_size": size}} for size in (16, 64)]
    before = feed(4, starts[0], block(0, 6))
    points = feed(4, starts[0], block(0, 6), starts[1], block(6, 6))
    assert points[: len(before)] == before
    found = series(points, "perf/examples_per_s")
    # The window that the second start goes on with counts as its own.
    assert [(step, round(speed)) for step, speed in found] == [(4, 1600), (8, 6400), (12, 6400)]


def test_the_last_partial_window_closes_when_the_run_ends() -> None:
    points = feed(4, block(0, 6), ENDED)
    assert series(points, "train/loss") == [(4, 2.5), (6, 5.5)]


@pytest.mark.parametrize("status", ["KILLED", "FAILED"])
def test_a_window_that_a_stopped_run_is_in_is_closed_by_the_run_that_goes_on(status: str) -> None:
    stopped = {**ENDED, "status": status}
    points = feed(4, block(0, 6), stopped, block(6, 4, attempt=2), ENDED)
    assert series(points, "train/loss") == [(4, 2.5), (8, 6.5), (10, 9.5)]


def test_means_do_not_depend_on_block_borders_down_to_the_last_bit() -> None:
    noise = random.Random(0)
    losses = [noise.random() for _ in range(60)]

    def cut(borders: list[int]) -> list[tuple[int, float]]:
        blocks = [
            block(start, stop - start, loss=losses[start:stop])
            for start, stop in itertools.pairwise(borders)
        ]
        return series(feed(7, *blocks, ENDED), "train/loss")

    whole = cut([0, 60])
    assert len(whole) == 9
    for _ in range(50):
        assert cut([0, *sorted(noise.sample(range(1, 60), 9)), 60]) == whole


def test_replayed_steps_count_once_and_the_first_one_is_kept() -> None:
    replay = block(2, 6, attempt=2, loss=[1000.0] * 4 + [7.0, 8.0])
    points = feed(4, block(0, 6), replay)
    # Second window: 5 and 6 from the first attempt, 7 and 8 from the second.
    assert series(points, "train/loss") == [(4, 2.5), (8, 6.5)]


def test_an_evaluation_counts_once() -> None:
    evaluated = {"kind": "Evaluated", "step": 5, "time": 2.0, "metrics": {"accuracy": 0.5}}
    points = feed(4, evaluated, evaluated | {"time": 3.0})
    assert points == [Point("eval/accuracy", 0.5, 2000, 5)]


def test_steps_missing_from_the_journal_do_not_join_two_windows() -> None:
    points = feed(4, block(0, 2), block(9, 3))
    assert series(points, "train/loss") == [(2, 1.5), (12, 11.0)]


def test_a_skipped_step_takes_no_part_in_means() -> None:
    skipping = block(0, 2, loss=[math.nan, 3.0], skipped_steps=[1])
    assert series(feed(2, skipping), "train/loss") == [(2, 3.0)]


def test_a_loss_that_is_not_finite_shows() -> None:
    ((_, value),) = series(feed(2, block(0, 2, loss=[math.nan, 3.0])), "train/loss")
    assert math.isnan(value)


@pytest.mark.parametrize(
    ("steps_per_s", "window"),
    [(0.01, 1), (5, 1), (5.1, 2), (10, 2), (20, 5), (50, 10), (100, 20), (2000, 500), (1e5, 20000)],
)
def test_auto_gives_a_few_points_a_second(steps_per_s: float, window: int) -> None:
    assert auto_window(steps_per_s) == window


def test_auto_takes_the_speed_of_the_second_block_and_stays_with_it() -> None:
    points = Points("auto", 32)
    # The first block holds the tracing; then 100 steps/s ask for windows of 20.
    assert points.feed(block(0, 1, wall_s=5.0)) == []
    assert points.window is None
    assert points.feed(block(1, 10)) == []
    assert points.window == 20
    found = points.feed(block(11, 60, wall_s=0.001))
    assert [step for step, _ in series(found, "train/loss")] == [20, 40, 60]


def test_auto_still_gives_points_for_a_run_of_one_block() -> None:
    points = feed("auto", block(0, 10), ENDED)
    assert series(points, "train/loss") == [(10, 5.5)]


def test_the_window_in_the_journal_stands_before_a_later_choice() -> None:
    points = feed(5, {"kind": "Window", "log_every_steps": 2}, block(0, 4))
    assert [step for step, _ in series(points, "train/loss")] == [2, 4]


def test_memory_stays_constant_over_a_million_steps() -> None:
    points = Points(1000, 32)
    losses = [0.5] * 1000
    tracemalloc.start()
    for first in range(0, 1_000_000, 1000):
        record = block(first, 1000, loss=losses, metrics={}, learning_rate=[])
        assert len(points.feed(record)) == 6
        if first == 10_000:
            early, _ = tracemalloc.get_traced_memory()
    late, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert late - early < 100_000


def test_where_the_time_went_is_told_once_for_each_step_at_which_the_run_has_ended() -> None:
    started, again = {"kind": "RunStarted", "time": 0.0}, {"kind": "RunStarted", "time": 200.0}
    ends = ENDED | {"time": 250.0}
    points = feed(4, started, block(0, 6), ENDED, again, ends)
    assert series(points, "goodput/starting_s") == [(6, 99.0)]
    assert series(points, "goodput/fraction") == [(6, 0.0)]  # no beacon tells of a phase


@pytest.mark.parametrize("status", ["FAILED", "KILLED"])
def test_where_the_time_of_a_run_went_that_did_not_finish_is_told_too_and_once(status: str) -> None:
    started, again = {"kind": "RunStarted", "time": 0.0}, {"kind": "RunStarted", "time": 200.0}
    stopped = ENDED | {"status": status}
    points = feed(4, started, block(0, 6), stopped, again, ENDED | {"time": 250.0})
    assert series(points, "goodput/starting_s") == [(6, 99.0)]
    later = [again, block(4, 4, time=210.0), ENDED | {"time": 250.0}]
    points = feed(4, started, block(0, 6), stopped, *later)
    # As the goodput of a whole run has it: 99 s and 50 s.
    assert series(points, "goodput/starting_s") == [(6, 99.0), (8, 149.0)]
    assert [step for step, _ in series(points, "train/loss")] == [4, 8]


def test_a_run_without_a_step_tells_nothing_of_its_time() -> None:
    assert feed(4, {"kind": "RunStarted", "time": 0.0}, ENDED) == []


def sampled(node: str, time: float, cpu: float) -> dict[str, Any]:
    values = {"cpu_utilization_percentage": cpu, "gpu_0_utilization_percentage": 50.0}
    origin = {"worker": 0, "attempt": 0, "time": time, "node": node}
    return {"kind": "NodeSampled", **origin, "values": values}


def test_samples_of_a_node_are_counted_over_restarts_and_stops() -> None:
    again = {"kind": "RunStarted", "time": 3.0, "format": 1, "facts": {}}
    points = feed(
        4,
        *(sampled("a", 1.0, 10.0), sampled("b", 1.5, 90.0), sampled("a", 2.0, 20.0)),
        *(ENDED | {"status": "KILLED"}, again, sampled("a", 4.0, 30.0)),
    )
    assert [point for point in points if point.key == "system/a/cpu_utilization_percentage"] == [
        Point("system/a/cpu_utilization_percentage", 10.0, 1000, 0),
        Point("system/a/cpu_utilization_percentage", 20.0, 2000, 1),
        Point("system/a/cpu_utilization_percentage", 30.0, 4000, 2),
    ]
    assert series(points, "system/b/gpu_0_utilization_percentage") == [(0, 50.0)]


def test_many_workers_get_no_more_points_together_than_a_few() -> None:
    def count(workers: int) -> int:
        points = Points(1, 32)
        points.feed({"kind": "AttemptStarted", "time": 1.0, "num_workers": workers})
        blocks = [
            {
                "kind": "BlockDone",
                "worker": worker,
                "time": 2.0,
                "first_step": first,
                "num_steps": 16,
                "wall_s": 1.0,
                "data_wait_s": 0.0,
                "skipped_steps": [],
                "loss": [0.5] * 16,
                "learning_rate": [0.1] * 16,
                "metrics": {},
            }
            for first in range(0, 64, 16)
            for worker in range(1, workers)
        ]
        return sum(len(points.feed(block)) for block in blocks)

    assert count(64) == 63 * 64  # a point a step
    assert count(256) == 255 * 16  # of 256 workers each fourth
