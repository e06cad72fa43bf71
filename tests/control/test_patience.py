"""Workers that fall silent or behind: who is blamed, and how long they are waited for."""

from __future__ import annotations

from pathlib import Path

from orchestrator.errors import BudgetSpent, StartFailed
from orchestrator.spec.messages import Death, Outcome, Phase, Request
from tests.control.desk import START_PATIENCE_S, STEP_PATIENCE_S, WELL, Desk
from tests.control.scripted import Line, Silence, beacon, block, death, ended, ready, stacks


def test_a_first_block_that_compiles_for_minutes_is_not_waited_for(tmp_path: Path) -> None:
    tracing = beacon(phase=Phase.tracing)
    desk = Desk(tmp_path, [[ready(), tracing], lambda: desk.stop(), Silence(8.0), Silence(8.0)])
    assert desk.run() is Outcome.stopped
    assert desk.group.requests == [Request.SAVE_AND_STOP]


def test_a_block_that_is_long_is_waited_for_once_one_was_made(tmp_path: Path) -> None:
    told = [ready(), beacon(phase=Phase.tracing), block()]
    slow: list[Line] = [Silence(8.0), block(0, 4, 1), Silence(8.0), block(0, 5, 1), Silence(8.0)]
    desk = Desk(tmp_path, [told, lambda: desk.stop(), *slow, ended(outcome=Outcome.stopped)])
    assert desk.run() is Outcome.stopped
    assert desk.group.now > 1000.0 + 24


def test_silence_beyond_patience_is_the_death_of_the_worker_that_is_behind(
    tmp_path: Path,
) -> None:
    script: list[Line] = [
        [ready(0), ready(1)],
        [block(0, 0, 4), block(1, 0, 3)],
        Silence(STEP_PATIENCE_S + 1),
    ]
    desk = Desk(tmp_path, script, workers=2, recovery__max_restarts=0)
    story = desk.story(BudgetSpent)
    assert story.startswith("worker 1 on host-1 failed at step 3 while stepping")
    assert "it is stuck on host-1 while stepping after step 3, since " in story
    assert "it has told nothing for 11 s" in story


def test_a_worker_that_waits_for_one_that_makes_progress_is_not_blamed(tmp_path: Path) -> None:
    moving: list[Line] = [
        line for step in range(1, 5) for line in (Silence(6.0), block(0, step, 1))
    ]
    script: list[Line] = [[block(0, 0, 1), block(1, 0, 8)], *moving, [ended(0), ended(1)]]
    desk = Desk(tmp_path, script, workers=2, recovery__max_restarts=0)
    assert desk.run() is Outcome.completed


def test_stacks_are_asked_for_before_a_stalled_group_is_killed(tmp_path: Path) -> None:
    desk = Desk(tmp_path, [block(), Silence(STEP_PATIENCE_S + 1)], recovery__max_restarts=0)
    desk.story()
    assert desk.group.calls == ["start 1 from None", "request stacks", "kill"]


def test_the_stacks_of_a_stalled_worker_are_told(tmp_path: Path) -> None:
    dump = 'Current thread 0x01 (most recent call first):\n  File "mine.py", line 3 in source\n'
    script: list[Line] = [block(), Silence(STEP_PATIENCE_S - 0.5), stacks(0, dump)]
    desk = Desk(tmp_path, script, recovery__max_restarts=0)
    story = desk.story()
    assert "at mine.py:3 in source" in story
    assert "  | mine.py:3 in source\n  | Python stacks of all workers: " in story


def test_a_stall_is_on_record_as_a_death(tmp_path: Path) -> None:
    desk = Desk(tmp_path, [block(), Silence(STEP_PATIENCE_S + 1)], WELL)
    desk.run()
    [stall] = [message for message in desk.told if isinstance(message, Death)]
    assert (stall.worker, stall.attempt, stall.exit_status) == (0, 1, None)


def test_a_death_heard_while_stacks_are_written_is_told_instead_of_the_stall(
    tmp_path: Path,
) -> None:
    script: list[Line] = [block(), Silence(STEP_PATIENCE_S - 0.5), death()]
    desk = Desk(tmp_path, script, recovery__max_restarts=0)
    assert "death of worker 0" in desk.story()
    assert [message.error for message in desk.told if isinstance(message, Death)] == [
        "death of worker 0"
    ]


def test_before_the_first_step_patience_is_long(tmp_path: Path) -> None:
    long: list[Line] = [beacon(phase=Phase.tracing), Silence(START_PATIENCE_S - 1)]
    assert Desk(tmp_path, [ready(), *long, block(), ended()]).run() is Outcome.completed


def test_the_long_patience_ends_too(tmp_path: Path) -> None:
    script: list[Line] = [beacon(phase=Phase.building), Silence(START_PATIENCE_S + 2)]
    desk = Desk(tmp_path, script, recovery__max_restarts=0)
    assert "stuck while building, since " in desk.story(StartFailed)


def test_a_worker_that_never_says_a_word_is_given_the_limit_of_the_start(tmp_path: Path) -> None:
    desk = Desk(tmp_path, [Silence(40.0)], recovery__max_restarts=0, cluster__start_timeout_s=30.0)
    before = desk.group.now
    assert "stuck while starting" in desk.story(StartFailed)
    assert desk.group.now - before < 30.0 + 2.0 + 1.0  # and the others' story


def test_after_the_first_step_patience_is_short(tmp_path: Path) -> None:
    quiet: list[Line] = [block(), Silence(STEP_PATIENCE_S - 1), block(0, 4), ended()]
    assert Desk(tmp_path, quiet).run() is Outcome.completed
    stalled = Desk(tmp_path, [block(), Silence(STEP_PATIENCE_S + 1)], recovery__max_restarts=0)
    assert "stuck while stepping after step 4" in stalled.story(BudgetSpent)


def test_after_a_restart_patience_is_long_again(tmp_path: Path) -> None:
    traced: list[Line] = [beacon(phase=Phase.tracing), Silence(START_PATIENCE_S - 1)]
    desk = Desk(tmp_path, [ready(), block(), death()], [ready(), *traced, block(), ended()])
    assert desk.run() is Outcome.completed


def test_a_worker_that_has_ended_is_not_blamed_for_the_others(tmp_path: Path) -> None:
    script: list[Line] = [
        [ready(0), ready(1), block(0), block(1), ended(1)],
        *[line for n in range(3) for line in (Silence(STEP_PATIENCE_S - 2), block(0, 4 + n))],
        ended(0),
    ]
    assert Desk(tmp_path, script, workers=2, recovery__max_restarts=0).run() is Outcome.completed


def test_a_worker_that_speaks_while_stacks_are_dumped_goes_on(tmp_path: Path) -> None:
    script: list[Line] = [ready(), block(), Silence(STEP_PATIENCE_S - 0.5), block(0, 4), ended()]
    desk = Desk(tmp_path, script, recovery__max_restarts=0)
    assert desk.run() is Outcome.completed
    assert desk.group.requests == [Request.STACKS]
