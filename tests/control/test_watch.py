"""The watchdog on a clock of its own: who is blamed, when, and who never is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from orchestrator.control.attempt import Attempt
from orchestrator.control.watch import Watchdog, patience_s, suspects
from orchestrator.spec.messages import BlockDone, Death, Message, Phase, Request
from orchestrator.spec.plan import RunPlan
from orchestrator.spec.schema import StrategyName
from tests.control.scripted import (
    ScriptedGroup,
    beacon,
    block,
    ended,
    ready,
    saved,
    stacks,
)
from tests.control.test_stacks import IN_THE_BLOCK, IN_THE_FEEDER, LIFE, dump
from tests.plans import tiny_plan

START_TIMEOUT_S = 30.0
START_PATIENCE_S = 100.0
STEP_PATIENCE_S = 10.0
TICK_S = 0.25
_LOOP = (Phase.tracing, Phase.stepping, Phase.calling_back, Phase.evaluating, Phase.saving)
_BEFORE = (Phase.starting, Phase.importing, Phase.connecting)


class Watched:
    """A watchdog with an attempt of three workers, and a clock that only `quiet` moves."""

    def __init__(self, folder: Path, workers: int = 3, **changes: Any):
        self.plan: RunPlan = tiny_plan(
            folder,
            strategy__name=StrategyName.multi_worker,
            strategy__num_workers=workers,
            recovery__start_patience_s=START_PATIENCE_S,
            recovery__step_patience_s=STEP_PATIENCE_S,
            cluster__start_timeout_s=START_TIMEOUT_S,
            **changes,
        )
        self.now = 1000.0
        self.group = ScriptedGroup()
        self.attempt = Attempt.begin(1, 0, workers, self.now)
        self.dog = Watchdog(self.plan, self.group, lambda: self.now)
        self.answers: dict[int, str] = {}

    def tell(self, *messages: Message) -> None:
        for message in messages:
            told = dataclasses.replace(message, attempt=self.attempt.number)
            self.attempt.observe(told, self.now)

    def beat(self) -> None:
        """Let every worker send the beacon that tells nothing new."""
        for worker, seen in self.attempt.workers.items():
            if seen.phase is not None and seen.ended is None:
                self.tell(beacon(worker, seen.phase, seen.step))

    def quiet(self, seconds: float, *, beats: bool = True) -> Death | None:
        """Let time pass; return what the watchdog says first."""
        end = self.now + seconds
        while self.now < end - 1e-9:
            self.now += TICK_S
            if beats:
                self.beat()
            if (death := self.dog.look(self.attempt)) is not None:
                return death
            if self.group.requests and self.answers:
                self.tell(*(stacks(worker, text) for worker, text in self.answers.items()))
        return None

    def step(self, step: int = 4) -> None:
        """Let every worker make its first block and go on stepping."""
        for worker in self.attempt.workers:
            self.tell(ready(worker), beacon(worker, Phase.tracing), block(worker, 0, step))
            self.tell(beacon(worker, Phase.stepping, step))


def test_nothing_is_said_as_long_as_there_is_progress(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    watched.step()
    for step in range(4, 40, 4):
        assert watched.quiet(STEP_PATIENCE_S - 2) is None
        watched.tell(*(block(worker, step) for worker in range(3)))
    assert watched.group.requests == []


def test_the_worker_whose_stack_is_outside_the_block_is_blamed(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    watched.step()
    watched.answers = {0: IN_THE_BLOCK, 1: IN_THE_BLOCK, 2: IN_THE_FEEDER}
    death = watched.quiet(STEP_PATIENCE_S + 2)
    assert death is not None and death.worker == 2
    assert death.error.startswith("it is stuck on host-2 while stepping after step 4, since ")
    assert ", at /home/me/jobs/mine.py:20 in helper; workers 0 and 1 wait in" in death.error
    assert death.log_tail.splitlines()[:2] == [
        "/home/me/jobs/mine.py:20 in helper",
        "/home/me/jobs/mine.py:49 in fetch",
    ]
    assert death.log_tail.splitlines()[-1].endswith("logs/attempt-1/worker-*.stacks")


def test_stacks_are_asked_for_before_patience_ends_so_that_it_ends_in_time(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    watched.step()
    began = watched.now
    watched.answers = {0: IN_THE_BLOCK, 1: IN_THE_BLOCK, 2: IN_THE_FEEDER}
    assert watched.quiet(STEP_PATIENCE_S + 2) is not None
    assert watched.now - began == STEP_PATIENCE_S
    assert watched.group.requests == [Request.STACKS]


def test_stacks_that_do_not_come_are_waited_for_a_moment_only(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    watched.step()
    began = watched.now
    death = watched.quiet(STEP_PATIENCE_S + 5)
    assert death is not None and "could not write its Python stack" in death.error
    assert watched.now - began <= STEP_PATIENCE_S + 1


def test_a_worker_that_is_behind_by_steps_is_blamed_whatever_the_stacks_say(
    tmp_path: Path,
) -> None:
    watched = Watched(tmp_path)
    watched.step()
    watched.tell(block(0, 4), block(2, 4))
    watched.answers = {0: IN_THE_FEEDER, 1: IN_THE_BLOCK, 2: IN_THE_FEEDER}
    death = watched.quiet(STEP_PATIENCE_S + 2)
    assert death is not None and death.worker == 1
    assert death.error.endswith(", inside TensorFlow")


def test_when_all_are_in_the_block_nobody_is_said_to_wait(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    watched.step()
    watched.answers = dict.fromkeys(range(3), IN_THE_BLOCK)
    death = watched.quiet(STEP_PATIENCE_S + 2)
    assert death is not None
    assert death.error.endswith("inside TensorFlow like all others: a collective does not return")


def test_silence_is_told_apart_from_a_lack_of_progress(tmp_path: Path) -> None:
    watched = Watched(tmp_path, workers=1)
    watched.step()
    watched.answers = {0: IN_THE_FEEDER}
    assert "interpreter lock" not in str(watched.quiet(STEP_PATIENCE_S + 2))
    watched = Watched(tmp_path, workers=1)
    watched.step()
    watched.answers = {0: IN_THE_FEEDER}
    death = watched.quiet(STEP_PATIENCE_S + 2, beats=False)
    assert death is not None and "told nothing for 10 s: a call holds Python's" in death.error


@pytest.mark.parametrize(
    ("phase", "seconds"),
    [
        *((phase, START_TIMEOUT_S) for phase in (None, *_BEFORE)),
        (Phase.stepping, STEP_PATIENCE_S),
        *((phase, START_PATIENCE_S) for phase in Phase if phase not in (*_BEFORE, Phase.stepping)),
    ],
)
def test_each_phase_has_its_own_patience(
    tmp_path: Path, phase: Phase | None, seconds: float
) -> None:
    watched = Watched(tmp_path)
    watched.attempt.workers[0].phase = phase
    assert patience_s(watched.attempt.workers[0], watched.attempt, watched.plan) == seconds


@pytest.mark.parametrize(
    ("traced_s", "walls_s", "block_s", "seconds"),
    [
        pytest.param(0.0, [0.5] * 9, 0.5, 10.0, id="short blocks"),
        pytest.param(0.0, [0.5] * 9 + [4.0], 0.5, 20.0, id="five times the slowest of a few"),
        # 1 % of 200 blocks may be slower.
        pytest.param(0.0, [0.5] * 198 + [60.0] * 2, 0.5, 10.0, id="but for the slowest 1 %"),
        pytest.param(0.0, [60.0] + [0.5] * 200, 0.5, 10.0, id="old blocks are forgotten"),
        pytest.param(0.0, [0.5] * 9, 30.0, 150.0, id="train.block_s is longer than patience"),
        pytest.param(40.0, [], 0.5, 200.0, id="only the block that traced is known"),
        pytest.param(40.0, [0.5], 0.5, 10.0, id="tracing is forgotten then"),
    ],
)
def test_patience_with_steps_follows_the_blocks(
    tmp_path: Path, traced_s: float, walls_s: list[float], block_s: float, seconds: float
) -> None:
    watched = Watched(tmp_path, train__block_s=block_s)

    def done(wall_s: float) -> BlockDone:
        return BlockDone(
            **{name: getattr(block(), name) for name in ("worker", "attempt", "time", "ledger")},
            first_step=0,
            num_steps=1,
            wall_s=wall_s,
            data_wait_s=0.0,
        )

    if traced_s:
        watched.tell(beacon(0, Phase.tracing), done(traced_s))
    watched.tell(*(done(wall_s) for wall_s in walls_s), beacon(0, Phase.stepping, 1))
    assert patience_s(watched.attempt.workers[0], watched.attempt, watched.plan) == seconds


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase is not Phase.stepping])
def test_progress_within_a_phase_is_no_stall_however_long_it_takes(
    tmp_path: Path, phase: Phase
) -> None:
    watched = Watched(tmp_path, workers=1)
    for part in range(5):
        watched.tell(beacon(0, phase, detail=f"{part} of 5"))
        assert watched.quiet(START_TIMEOUT_S - 1, beats=False) is None


@pytest.mark.parametrize("phase", [p for p in _LOOP if p is not Phase.stepping])
def test_workers_that_wait_for_one_in_a_patient_phase_are_patient_too(
    tmp_path: Path, phase: Phase
) -> None:
    watched = Watched(tmp_path)
    watched.step()
    watched.tell(beacon(0, phase, 4))
    assert watched.quiet(START_PATIENCE_S - 2) is None
    assert watched.quiet(5) is not None


def test_a_worker_that_waits_for_the_chiefs_export_is_not_blamed(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    watched.step()
    watched.tell(beacon(1, Phase.ending, 4), beacon(2, Phase.ending, 4))
    for part in range(9):
        watched.tell(beacon(0, Phase.exporting, 4, detail=f"{part} MB written"))
        assert watched.quiet(START_PATIENCE_S - 2, beats=False) is None


def test_a_worker_that_has_ended_is_not_waited_for(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    watched.step()
    watched.tell(ended(1), ended(2), block(0, 4))
    watched.answers = {0: IN_THE_FEEDER}
    death = watched.quiet(STEP_PATIENCE_S + 2)
    assert death is not None and death.worker == 0


@pytest.mark.parametrize(
    ("phases", "blamed"),
    [
        ([Phase.connecting, None, Phase.connecting], [1]),
        ([Phase.connecting, Phase.starting, None], [1, 2]),
        ([Phase.tracing, Phase.loading_data, Phase.building], [1]),
        ([Phase.restoring, Phase.tracing, Phase.building], [2]),
        ([Phase.stepping, Phase.evaluating, Phase.saving], [0, 1, 2]),
        ([Phase.exporting, Phase.ending, Phase.ending], [0]),
    ],
)
def test_of_workers_at_one_step_those_in_the_earliest_phase_are_behind(
    tmp_path: Path, phases: list[Phase | None], blamed: list[int]
) -> None:
    watched = Watched(tmp_path)
    for worker, phase in enumerate(phases):
        watched.attempt.workers[worker].phase = phase
    assert suspects(watched.attempt) == blamed


def test_a_peer_that_is_missing_at_the_start_is_named_with_its_address(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    watched.attempt.workers[1].host = "host-b (10.0.0.2:20001)"
    watched.tell(beacon(0, Phase.connecting), beacon(2, Phase.connecting))
    watched.answers = {0: dump(LIFE), 2: dump(LIFE), 1: ""}
    death = watched.quiet(START_TIMEOUT_S + 2)
    assert death is not None and death.worker == 1
    assert "it is stuck on host-b (10.0.0.2:20001) while starting, since " in death.error


def test_checkpoints_written_beside_a_stuck_step_are_no_progress(tmp_path: Path) -> None:
    watched = Watched(tmp_path, workers=1)
    watched.step()
    assert watched.quiet(STEP_PATIENCE_S - 2) is None
    watched.tell(saved(4))
    assert watched.quiet(5) is not None


def test_a_worker_that_moves_when_its_stacks_were_asked_for_goes_on(tmp_path: Path) -> None:
    watched = Watched(tmp_path, workers=1)
    watched.step()
    assert watched.quiet(STEP_PATIENCE_S - 0.5) is None
    assert watched.group.requests == [Request.STACKS]
    watched.tell(block(0, 4))
    assert watched.quiet(STEP_PATIENCE_S - 2) is None
    assert watched.quiet(5) is not None
    assert watched.group.requests == [Request.STACKS] * 2


@pytest.mark.parametrize("absence_s", [STEP_PATIENCE_S + 1, 600.0])
def test_a_supervisor_that_did_not_listen_blames_nobody_for_it(
    tmp_path: Path, absence_s: float
) -> None:
    watched = Watched(tmp_path)
    watched.step()
    assert watched.quiet(5) is None
    watched.now += absence_s  # its process was stopped, or a disk let it wait
    assert watched.quiet(STEP_PATIENCE_S - 6) is None
    assert watched.quiet(5) is not None


def test_a_debugger_that_speaks_for_its_worker_is_no_stall(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    watched.step()
    for second in range(60):
        watched.tell(beacon(1, Phase.stepping, 4, detail=f"held by a debugger at {second}"))
        assert watched.quiet(1, beats=False) is None
