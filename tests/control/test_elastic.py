"""Fewer workers, and more again; a disk or a cluster without room; nodes that go."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from orchestrator.control.supervisor import Interrupted
from orchestrator.errors import ClusterError, StartFailed, StorageError
from orchestrator.spec.messages import Cause, Death, Message, Outcome, Request
from tests.control.desk import Desk
from tests.control.scripted import (
    Line,
    Script,
    Silence,
    block,
    death,
    draining,
    ended,
    ready,
    saved,
)


def elastic(
    folder: Path, *scripts: Script, room: Callable[[float], Mapping[str, int]], **changes: Any
) -> Desk:
    desk = Desk(folder, *scripts, workers=3, strategy__min_workers=2, **changes)
    desk.group.room = room
    return desk


def hosts(count: int) -> dict[str, int]:
    return {f"host-{index}": 1 for index in range(count)}


def all_ready(count: int) -> list[Message]:
    return [ready(worker) for worker in range(count)]


def all_ended(count: int, outcome: Outcome = Outcome.completed) -> list[Message]:
    return [ended(worker, outcome) for worker in range(count)]


def sizes(desk: Desk) -> list[int]:
    return [plan.num_workers for plan, _, _ in desk.group.starts]


# An attempt of two workers that waits for what comes.
TWO: list[Line] = [all_ready(2), [block(0), block(1)]]
STOPPED: list[Line] = [all_ended(2, Outcome.stopped)]


def quiet(seconds: int) -> list[Line]:
    """Return workers that only step, for so many seconds."""
    return [line for _ in range(seconds) for line in ([block(0), block(1)], Silence(0.8))]


def test_a_lost_node_leaves_a_run_with_fewer_workers_and_the_same_batch(tmp_path: Path) -> None:
    room = hosts(3)

    def lose() -> None:
        del room["host-2"]

    first: list[Line] = [all_ready(3), block(), saved(4), lose, death(2, cause=Cause.node)]
    desk = elastic(tmp_path, first, [*TWO, all_ended(2)], room=lambda now: room)
    assert desk.run() is Outcome.completed
    assert sizes(desk) == [3, 2]
    assert [sum(plan.replica_batch_sizes) for plan, _, _ in desk.group.starts] == [16, 16]
    assert desk.notices == ["retry 1 of 1 from step 4 with 2 of 3 workers"]


def test_a_run_that_may_not_shrink_waits_for_its_node(tmp_path: Path) -> None:
    desk = Desk(
        tmp_path,
        [[ready(0), ready(1)], block(), saved(4), death(1, cause=Cause.node)],
        [[ready(0), ready(1)], [ended(0), ended(1)]],
        workers=2,
    )
    desk.group.room = lambda now: hosts(1 if now < 1100.0 else 2)
    assert desk.run() is Outcome.completed
    assert sizes(desk) == [2, 2]
    assert 1100.0 <= desk.group.now < 1103.0
    [wait] = [record for record in desk.records if record["kind"] == "Waiting"]
    assert wait["reason"] == "capacity" and 95.0 < wait["seconds"] < 100.0


def test_what_is_waited_for_is_said_now_and_again(tmp_path: Path) -> None:
    desk = elastic(tmp_path, [*TWO, all_ended(2)], room=lambda now: hosts(1 if now < 1065.0 else 2))
    assert desk.run() is Outcome.completed
    assert [note for note in desk.notices if note.startswith("waiting")] == [
        f"waiting for capacity since {since} s, at most 600 s (recovery.capacity_timeout_s): 2 "
        "worker(s) of 1 CPU each (strategy.min_workers) are needed, there is room for 1 on host-0"
        for since in (0, 30, 60)
    ]


def test_waiting_for_too_long_ends_the_run_as_the_clusters_fault(tmp_path: Path) -> None:
    first: list[Line] = [all_ready(3), block(), saved(4), death(2, cause=Cause.node)]
    desk = elastic(tmp_path, first, room=lambda now: hosts(3 if now < 1001.0 else 1))
    story = desk.story(ClusterError)
    assert "not within 600 s (recovery.capacity_timeout_s)" in story
    assert story.endswith(f"it can go on from step 4: resume={desk.plan.run}")
    assert 1600.0 <= desk.group.now < 1605.0


def test_a_stop_ends_the_waiting_at_once(tmp_path: Path) -> None:
    first: list[Line] = [all_ready(3), block(), saved(4), death(2, cause=Cause.node)]
    desk = elastic(tmp_path, first, room=lambda now: hosts(3 if now < 1001.0 else 1))
    desk.group.on_sleep = lambda now: desk.stop() if now > 1020.0 else None
    assert desk.run() is Outcome.stopped
    assert desk.group.now < 1021.0


def test_a_second_stop_ends_the_waiting_as_an_interruption(tmp_path: Path) -> None:
    desk = elastic(tmp_path, room=lambda now: {})
    desk.group.on_sleep = lambda now: (desk.stop(), desk.stop())
    with pytest.raises(Interrupted):
        desk.run()


def test_time_that_was_waited_is_on_record_however_the_waiting_ends(tmp_path: Path) -> None:
    desk = elastic(tmp_path, room=lambda now: {})
    desk.group.on_sleep = lambda now: (desk.stop(), desk.stop()) if now > 1007.0 else None
    with pytest.raises(Interrupted):
        desk.run()
    [wait] = [record for record in desk.records if record["kind"] == "Waiting"]
    assert wait["reason"] == "capacity" and 6.5 < wait["seconds"] < 8.0


class FullDisk(Desk):
    """A desk on whose disk no folder finds room: a file is where that of checkpoints would be."""

    def fill(self) -> None:
        shutil.rmtree(self.plan.paths.checkpoints_dir, ignore_errors=True)
        self.plan.paths.root.mkdir(parents=True, exist_ok=True)
        self.plan.paths.checkpoints_dir.write_bytes(b"")

    def newest_checkpoint(self) -> tuple[int, str] | None:
        """Fill the disk when the first attempt is over."""
        if any(isinstance(message, Death) for message in self.told):
            self.fill()
        return super().newest_checkpoint()


FAILING: list[Line] = [ready(), block(), saved(4), death()]


def test_a_disk_that_is_full_between_attempts_is_waited_for(tmp_path: Path) -> None:
    desk = FullDisk(tmp_path, FAILING, [ready(0, 4), ended()])
    desk.group.on_sleep = lambda now: (
        desk.plan.paths.checkpoints_dir.unlink(missing_ok=True) if now > 1040.0 else None
    )
    assert desk.run() is Outcome.completed
    [told] = [note for note in desk.notices if note.startswith("DEGRADED")]
    assert "cannot make the folder" in told and "recovery.capacity_timeout_s" in told
    [wait] = [record for record in desk.records if record["kind"] == "Waiting"]
    assert wait["reason"] == "storage" and 30.0 < wait["seconds"] < 42.0


def test_a_disk_that_stays_full_ends_the_run_as_the_storages_fault(tmp_path: Path) -> None:
    desk = FullDisk(tmp_path, FAILING)
    assert "cannot make the folder" in desk.story(StorageError)
    assert 600.0 < desk.group.now - 1000.0 < 610.0


def test_a_disk_that_is_full_at_the_start_is_told_at_once(tmp_path: Path) -> None:
    desk = FullDisk(tmp_path)
    desk.fill()
    assert "cannot make the folder" in desk.story(StorageError)
    assert desk.group.now == 1000.0


def test_an_elastic_run_begins_with_what_there_is(tmp_path: Path) -> None:
    desk = elastic(tmp_path, [*TWO, all_ended(2)], room=lambda now: hosts(2))
    assert desk.run() is Outcome.completed
    assert sizes(desk) == [2]
    assert desk.notices == [
        "there is room for 2 of 3 workers: training with 2 (strategy.min_workers=2)"
    ]


def test_any_other_run_begins_without_a_look_at_the_room(tmp_path: Path) -> None:
    desk = Desk(tmp_path, ClusterError("too small"), workers=2)
    desk.group.room = lambda now: {}
    assert desk.story(ClusterError) == "too small"


def test_a_smaller_attempt_saves_and_makes_way_once_there_is_room_for_a_while(
    tmp_path: Path,
) -> None:
    desk = elastic(
        tmp_path,
        [*TWO, *quiet(20), saved(8), *STOPPED],
        [all_ready(3), [block(0), block(1), block(2)], all_ended(3)],
        room=lambda now: hosts(2 if now < 1010.0 else 3),
        recovery__max_restarts=0,
    )
    assert desk.run() is Outcome.completed
    assert sizes(desk) == [2, 3]
    assert desk.group.requests == [Request.SAVE_AND_STOP]
    assert desk.began == [(1, None), (2, "step-8")]
    assert desk.notices[1] == (
        "there is room for 3 workers: saving, then going on with 3 instead of 2"
    )
    assert [r["num_workers"] for r in desk.records if r.get("decision") == "grow"] == [3]


def test_room_that_is_soon_gone_again_is_not_used(tmp_path: Path) -> None:
    desk = elastic(
        tmp_path,
        [*TWO, *quiet(30), all_ended(2)],
        # For 3 s out of every 10.
        room=lambda now: hosts(3 if now % 10.0 < 3.0 and now > 1001.0 else 2),
    )
    assert desk.run() is Outcome.completed
    assert desk.group.requests == []


def test_a_run_grows_when_the_new_host_is_ready(tmp_path: Path) -> None:
    when: list[float] = []
    desk = elastic(
        tmp_path,
        [*TWO, *quiet(40), *STOPPED],
        [all_ready(3), all_ended(3)],
        room=lambda now: hosts(2 if now < 1001.0 else 3),
    )
    desk.group.is_ready = lambda now: now > 1025.0
    notice = desk.notices.append
    desk.supervisor._notice = lambda text: (when.append(desk.group.now), notice(text))[1]  # type: ignore
    assert desk.run() is Outcome.completed
    assert 1025.0 < when[-1] < 1028.0


def test_a_stop_of_the_user_wins_over_growing(tmp_path: Path) -> None:
    desk = elastic(
        tmp_path,
        [*TWO, *quiet(20), lambda: desk.stop(), *STOPPED],
        room=lambda now: hosts(2 if now < 1005.0 else 3),
    )
    assert desk.run() is Outcome.stopped
    assert sizes(desk) == [2]


def test_a_run_that_completes_while_it_should_grow_is_complete(tmp_path: Path) -> None:
    desk = elastic(
        tmp_path,
        [*TWO, *quiet(20), all_ended(2)],
        room=lambda now: hosts(2 if now < 1005.0 else 3),
    )
    assert desk.run() is Outcome.completed
    assert desk.group.requests == [Request.SAVE_AND_STOP]


def test_a_stop_by_the_workers_own_clock_is_not_taken_for_growing(tmp_path: Path) -> None:
    desk = elastic(tmp_path, [*TWO, *quiet(3), *STOPPED], room=lambda now: hosts(2))
    assert desk.run() is Outcome.stopped


def test_a_failure_while_making_way_costs_a_restart_and_the_run_grows_with_it(
    tmp_path: Path,
) -> None:
    desk = elastic(
        tmp_path,
        [*TWO, *quiet(20), death(1)],
        [all_ready(3), all_ended(3)],
        room=lambda now: hosts(2 if now < 1005.0 else 3),
    )
    assert desk.run() is Outcome.completed
    assert sizes(desk) == [2, 3]
    assert desk.notices[-1] == "retry 1 of 1 from step 0"


def test_growing_costs_no_budget(tmp_path: Path) -> None:
    third: list[Line] = [all_ready(3), block(), death(2)]
    desk = elastic(
        tmp_path,
        [*TWO, *quiet(20), *STOPPED],
        third,
        [all_ready(3), all_ended(3)],
        room=lambda now: hosts(2 if now < 1005.0 else 3),
    )
    assert desk.run() is Outcome.completed
    assert desk.notices[-1] == "retry 1 of 1 from step 0"


def test_a_host_that_fails_twice_at_the_start_is_avoided_and_that_is_said(tmp_path: Path) -> None:
    error = StartFailed("no process")
    error.worker = 1
    desk = Desk(
        tmp_path,
        error,
        error,
        [[ready(0), ready(1)], [ended(0), ended(1)]],
        workers=2,
        recovery__max_start_restarts=3,
    )
    desk.group.room = lambda now: hosts(3)
    desk.group.places = {0: "host-0", 1: "host-1"}
    assert desk.run() is Outcome.completed
    assert desk.group.avoided == [frozenset(), frozenset(), frozenset({"host-1"})]
    assert "not on host-1: it failed twice in a row" in desk.notices[-1]


def test_a_node_that_goes_is_left_for_the_others_at_no_cost(tmp_path: Path) -> None:
    desk = Desk(
        tmp_path,
        [[ready(0), ready(1)], block(), draining(1), saved(4), all_ended(2, Outcome.stopped)],
        [[ready(0), ready(1)], all_ended(2)],
        workers=2,
        recovery__max_restarts=0,
        recovery__max_node_restarts=0,
    )
    desk.group.room = lambda now: hosts(3)
    assert desk.run() is Outcome.completed
    assert desk.group.requests == [Request.SAVE_AND_STOP]
    assert desk.began == [(1, None), (2, "step-4")]
    assert desk.notices == ["host-1 is to be left: saving, then going on elsewhere"]


def test_an_elastic_run_leaves_a_node_that_goes_with_fewer_workers(tmp_path: Path) -> None:
    first: list[Line] = [all_ready(3), block(), draining(2), saved(4)]
    desk = elastic(
        tmp_path,
        [*first, all_ended(3, Outcome.stopped)],
        [*TWO, all_ended(2)],
        room=lambda now: hosts(3 if now < 1000.3 else 2),
    )
    assert desk.run() is Outcome.completed
    assert sizes(desk) == [3, 2]


def test_a_run_that_can_go_nowhere_else_ends_saved_when_its_node_goes(tmp_path: Path) -> None:
    script: list[Line] = [[ready(0), ready(1)], block(), draining(1), saved(4)]
    desk = Desk(tmp_path, [*script, all_ended(2, Outcome.stopped)], workers=2)
    desk.group.room = lambda now: hosts(1)
    assert desk.run() is Outcome.stopped
    assert desk.notices[-1].startswith("there is no room elsewhere: 2 worker(s)")
    assert desk.group.now < 1005.0
