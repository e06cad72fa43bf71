"""Where the time of a run went, from records with made-up times."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.spec.messages import DRIVER_KILLED
from orchestrator.track.goodput import Goodput, goodput

Record = dict[str, Any]


def started(time: float) -> Record:
    return {"kind": "RunStarted", "time": time}


def run_ended(time: float) -> Record:
    return {"kind": "RunEnded", "time": time, "status": "FINISHED"}


def attempt(time: float) -> Record:
    return {"kind": "AttemptStarted", "time": time, "attempt": 1}


def phase(name: str, time: float, worker: int = 0) -> Record:
    return {"kind": "Beacon", "time": time, "phase": name, "worker": worker}


def ready(time: float, step: int = 0) -> Record:
    return {"kind": "Ready", "time": time, "worker": 0, "start_step": step}


def block(time: float, first: int, steps: int, wait: float = 0.0, worker: int = 0) -> Record:
    return {
        "kind": "BlockDone",
        "time": time,
        "worker": worker,
        "first_step": first,
        "num_steps": steps,
        "data_wait_s": wait,
    }


def saved(time: float, stall: float) -> Record:
    return {"kind": "Saved", "time": time, "worker": 0, "stall_s": stall}


def death(time: float, worker: int) -> Record:
    return {"kind": "Death", "time": time, "worker": worker}


# Starts at 100; ready to step, after 4 s of starting and 3 s of building and tracing, at 107.
BEGIN = [
    started(100),
    attempt(101),
    phase("connecting", 103),
    phase("building", 104),
    ready(105),
    phase("tracing", 105),
    block(107, 0, 1),
    phase("stepping", 107),
]


def used(found: Goodput) -> dict[str, float]:
    """Return what is not zero."""
    assert sum(found.seconds().values()) == pytest.approx(found.wall_s)
    return {use: seconds for use, seconds in found.seconds().items() if seconds}


def test_a_run_without_failures_is_told_apart() -> None:
    records = [
        *BEGIN,
        block(117, 1, 10, wait=2),  # 10 s, of which 2 s waited
        saved(117, 0.5),
        phase("evaluating", 117),
        phase("stepping", 120),
        block(125, 11, 5),
        phase("exporting", 125),
        run_ended(129),
    ]
    found = goodput(records)
    assert found.wall_s == 29
    assert used(found) == {
        "starting": 4,
        "building": 3,
        "productive": 8 - 0.5 + 5,
        "data_wait": 2,
        "checkpoint_stall": 0.5,
        "evaluation": 3,
        "export": 4,
    }


def test_what_a_failure_took_back_is_lost_and_the_way_back_is_recovering() -> None:
    records = [
        *BEGIN,
        block(117, 1, 10),  # steps 2 to 11, a second each
        death(121, worker=1),  # 4 s into the next block
        attempt(122),
        phase("building", 124),
        ready(125, step=5),
        phase("tracing", 125),
        block(126, 5, 1),
        phase("stepping", 126),
        block(136, 6, 10),
        run_ended(136),
    ]
    # Of the ten steps up to 11 those after 5 were done again: 6 s, and the 4 s of no block.
    assert used(goodput(records)) == {
        "starting": 4,
        "building": 3,
        "productive": 4 + 10,
        "lost_work": 6 + 4,
        "recovering": 5,
    }


def test_time_between_two_commands_is_nobodys() -> None:
    killed = [*BEGIN, block(117, 1, 10)]
    again = [
        started(500),
        attempt(501),
        phase("building", 503),
        ready(504, step=11),
        phase("tracing", 504),
        block(505, 11, 1),
        phase("stepping", 505),
        block(515, 12, 10),
        run_ended(515),
    ]
    found = goodput([*killed, *again])
    assert found.wall_s == 17 + 15
    assert used(found) == {"starting": 4 + 3, "building": 3 + 2, "productive": 20}
    assert found.fraction == pytest.approx(20 / 32)


def test_a_driver_that_was_killed_ended_with_its_last_record() -> None:
    killed = run_ended(123) | {"status": "KILLED", "cause": DRIVER_KILLED}  # by its guardian
    found = goodput([*BEGIN, block(117, 1, 10), killed])
    assert used(found) == {"starting": 4, "building": 3, "productive": 10}
    found = goodput([*BEGIN, block(117, 1, 10), killed | {"cause": "stopped"}])
    assert used(found)["productive"] == 16


def test_waiting_for_resources_is_no_recovering() -> None:
    records = [
        *BEGIN,
        death(110, worker=1),
        {"kind": "Waiting", "time": 140, "seconds": 25},
        attempt(141),
        run_ended(142),
    ]
    assert used(goodput(records)) == {
        "starting": 4,
        "building": 3,
        "productive": 3,  # nothing says yet that it is lost
        "waiting": 25,
        "recovering": 7,
    }


def test_waiting_before_the_first_attempt_is_no_starting() -> None:
    waited = {"kind": "Waiting", "time": 95, "seconds": 90}
    started, *rest = BEGIN
    found = used(goodput([started | {"time": 0}, waited, *rest, run_ended(110)]))
    assert found["waiting"] == 90 and found["starting"] == 14


def test_other_workers_and_late_clocks_change_nothing() -> None:
    mixed = [
        *BEGIN,
        block(117.5, 1, 10, worker=1),
        phase("evaluating", 150, worker=1),
        block(117, 1, 10),
        phase("exporting", 116.5),  # a beacon that was late
        run_ended(118),
    ]
    assert used(goodput(mixed)) == {"starting": 4, "building": 3, "productive": 10, "export": 1}


def test_a_run_that_is_only_started_has_no_time() -> None:
    found = goodput([started(100)])
    assert found.wall_s == 0
    assert found.fraction == 0


def test_a_long_attempt_takes_no_more_memory_and_its_lost_work_is_still_told() -> None:
    found = goodput(BEGIN)
    end, blocks = 107.0, 20_000
    for number in range(blocks):
        end += 0.5
        found.feed(block(end, 10 * number, 10))
    assert len(found._attempt.blocks) <= 4096
    # Back to step 199,000 of 200,000: a hundred blocks of half a second are lost.
    for record in (death(end, 1), attempt(end), ready(end + 1, step=10 * blocks - 1000)):
        found.feed(record)
    assert found.seconds()["lost_work"] == pytest.approx(100 * 0.5)
    assert sum(found.seconds().values()) == pytest.approx(found.wall_s)
