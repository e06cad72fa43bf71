"""Workers that are stopped or stuck are seen and named; slow ones are left alone."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from orchestrator.spec.paths import RunPaths
from tests.cluster import rig

JOB = ("job=troubled", f"--config-dir={Path(__file__).parent / 'troubled'}")
TWO = ("strategy=multi_worker", "strategy.num_workers=2")
PATIENCE_S = 3.0
# For a busy machine, over what is promised of a quiet one.
SLACK_S = 5.0
# Takes a processor for ten seconds.
HOG = "import time; end = time.monotonic() + 10\nwhile time.monotonic() < end: pass"


@dataclass(frozen=True)
class Trouble:
    """A worker's trouble in a run: when it began, and what was told of it."""

    death: dict[str, Any]
    stacks: dict[int, str]
    detected_s: float


@dataclass(frozen=True)
class Troubles:
    """A run with one trouble after another, as it was when it had ended."""

    ended: rig.Ended
    stuck: Trouble
    holding: Trouble
    stopped: Trouble
    stopped_chief: Trouble
    gone_s: list[float]


class Running:
    """A run on a Ray of its own whose workers are brought into trouble."""

    def __init__(self, folder: Path, *overrides: str):
        self.folder = folder
        self.orders = folder / "orders"
        self.orders.mkdir()
        self.attempt = 1
        self.gone_s: list[float] = []
        self.process = rig.start(
            "train",
            *JOB,
            *TWO,
            f"job.args.orders={self.orders}",
            f"recovery.step_patience_s={PATIENCE_S}",
            "recovery.max_restarts=9",
            "train.steps=400",
            "data.num_eval_examples=0",
            "export.enabled=false",
            *overrides,
            cwd=folder,
        )

    @property
    def run(self) -> RunPaths:
        return rig.runs_in(self.folder)[-1]

    def wait_for_blocks(self) -> None:
        def made() -> int:
            assert self.process.poll() is None, self.process.communicate()[0]
            blocks = rig.records(self.run, "BlockDone") if rig.runs_in(self.folder) else []
            return sum(b["attempt"] == self.attempt for b in blocks) > 6

        rig.wait_for(made, f"blocks of attempt {self.attempt}")

    def get_stuck(self, how: str) -> Trouble:
        """Let worker 1 be stuck in its input."""
        self.wait_for_blocks()
        before = set(self.orders.iterdir())
        order = self.orders / f"hang-{how}"
        order.touch()
        [begun] = rig.wait_for(
            lambda: set(self.orders.iterdir()) - before - {order}, "worker 1 to be stuck"
        )
        return self.trouble(float(begun.name.rpartition("-")[2]))

    def stop(self, worker: int) -> Trouble:
        """Stop a worker's process."""
        self.wait_for_blocks()
        pid = rig.worker_pids(self.run)[worker]
        begun = time.time()
        os.kill(pid, signal.SIGSTOP)
        trouble = self.trouble(begun)
        rig.wait_for(lambda: not rig.is_alive(pid), "the stopped process to be gone")
        self.gone_s.append(time.time() - trouble.death["time"])
        return trouble

    def trouble(self, begun: float) -> Trouble:
        def told() -> list[dict[str, Any]]:
            return [d for d in rig.records(self.run, "Death") if d["attempt"] == self.attempt]

        death = rig.wait_for(told, "a death on record")[0]
        stacks = {
            worker: path.read_text()
            for worker in range(2)
            if (path := self.run.worker_stacks(self.attempt, worker)).exists()
        }
        self.attempt += 1
        return Trouble(death, stacks, death["time"] - begun)


@pytest.fixture(scope="module")
def troubles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Troubles]:
    running = Running(tmp_path_factory.mktemp("troubles"))
    try:
        told = (
            running.get_stuck("sleep"),
            running.get_stuck("gil"),
            running.stop(1),
            running.stop(0),
        )
        ended = rig.finish(running.process, running.folder)
    finally:
        end(running.process)
    found = Troubles(ended, *told, running.gone_s)
    for name in ("stuck", "holding", "stopped", "stopped_chief"):
        print(f"{name}: told after {getattr(found, name).detected_s:.1f} s")
    print(f"stopped ones gone {max(found.gone_s):.1f} s later")
    yield found


def end(process: subprocess.Popen[str]) -> None:
    """End a command that a failed test has left."""
    if process.poll() is None:
        process.kill()
        process.communicate()


def test_a_worker_stuck_in_its_input_is_named_with_its_line_of_code(troubles: Troubles) -> None:
    death = troubles.stuck.death
    assert death["worker"] == 1
    assert re.search(r"it is stuck on \S+ while stepping after step \d+, since ", death["error"])
    assert "troubled.py:20 in sleep_for_ever: time.sleep(FOR_EVER_S)" in death["error"]
    assert death["error"].endswith("worker 0 waits in the all-reduce")
    assert PATIENCE_S - 1 < troubles.stuck.detected_s < PATIENCE_S + 1 + SLACK_S


def test_a_worker_that_holds_the_interpreter_is_named_too(troubles: Troubles) -> None:
    death = troubles.holding.death
    assert death["worker"] == 1
    assert "troubled.py:25 in hold_the_interpreter: ctypes.PyDLL" in death["error"]
    assert "a call holds Python's interpreter lock" in death["error"]
    assert troubles.holding.detected_s < PATIENCE_S + 1 + SLACK_S


@pytest.mark.parametrize("kind", ["stuck", "holding"])
def test_the_python_stacks_of_all_workers_are_kept(kind: str, troubles: Troubles) -> None:
    stacks = getattr(troubles, kind).stacks
    assert "troubled.py" in stacks[1] and "troubled.py" not in stacks[0]
    assert "train/step.py" in stacks[0]


@pytest.mark.parametrize(("kind", "worker"), [("stopped", 1), ("stopped_chief", 0)])
def test_a_stopped_process_is_a_death_that_says_so(
    kind: str, worker: int, troubles: Troubles
) -> None:
    trouble = getattr(troubles, kind)
    assert trouble.death["worker"] == worker
    assert "its process was stopped (SIGSTOP or the like" in trouble.death["error"]
    assert trouble.detected_s < 5 + SLACK_S


def test_a_stopped_process_is_ended(troubles: Troubles) -> None:
    assert max(troubles.gone_s) < 2 + SLACK_S


def test_the_run_ends_well_after_every_trouble(troubles: Troubles) -> None:
    assert troubles.ended.code == 0, troubles.ended.out
    assert rig.last_step(troubles.ended.run) == 400
    assert "worker 1 is lost: it is stuck on" in troubles.ended.out


def test_signs_of_life_do_not_fill_the_journal(troubles: Troubles) -> None:
    run = troubles.ended.run
    beacons = rig.records(run, "Beacon")
    assert all(beacon["begins"] for beacon in beacons)
    assert rig.records(run, "Stacks") == []


@pytest.mark.thorough
def test_what_takes_its_time_is_no_stall(tmp_path: Path) -> None:
    # Everything takes longer than the patience with steps, and nothing tells of it by itself.
    long_s = PATIENCE_S + 1.0
    slow = [f"job.args.{name}_s={long_s}" for name in ("trace", "eval", "block")]
    process = rig.start(
        "train",
        *JOB,
        *TWO,
        *slow,
        "job.args.fsync_s=0.7",
        "checkpoint.every_steps=116",  # the one at the end waits for it
        "train.steps=120",
        f"recovery.step_patience_s={PATIENCE_S}",
        "export.enabled=false",
        cwd=tmp_path,
    )
    hogs: list[subprocess.Popen[bytes]] = []
    try:
        rig.wait_for_step(tmp_path, 4)
        hogs += [subprocess.Popen([sys.executable, "-c", HOG]) for _ in range(12)]
        ended = rig.finish(process, tmp_path)
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()
        end(process)
    assert ended.code == 0, ended.out
    run = ended.run
    assert [r["attempt"] for r in rig.records(run, "AttemptStarted")] == [1], ended.out
    assert rig.records(run, "Evaluated")[0]["wall_s"] > long_s
    assert max(r["wall_s"] for r in rig.records(run, "Saved")) > PATIENCE_S
    assert max(r["wall_s"] for r in rig.records(run, "BlockDone")) > long_s  # it was traced
