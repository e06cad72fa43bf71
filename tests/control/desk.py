"""A supervisor on scripts and a clock that only polls move, with everything it is given."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from orchestrator.control.supervisor import Supervisor
from orchestrator.errors import OrchestratorError
from orchestrator.spec.messages import Message, Outcome, Saved
from orchestrator.spec.plan import Host, RunPlan, make_plan
from orchestrator.spec.schema import StrategyName
from tests.control.scripted import Line, Script, ScriptedGroup, block, ended, ready
from tests.plans import tiny_config

START_PATIENCE_S = 120.0
STEP_PATIENCE_S = 10.0
# An attempt of one worker from start to end.
WELL: list[Line] = [ready(), block(), ended()]


class Desk:
    """A supervisor with everything it is given, and what it told."""

    def __init__(
        self,
        folder: Path,
        *scripts: Script,
        workers: int = 1,
        first_attempt: int = 1,
        checkpoint: Saved | None = None,
        **changes: Any,
    ):
        """Make a desk.

        Args:
            folder: where the run folder is.
            scripts: what each attempt brings.
            workers: how many workers the plan has.
            first_attempt: later than 1 for a resumed run.
            checkpoint: one that is there from the beginning.
            changes: of the configuration, as `tiny_plan` takes them.
        """
        if workers > 1:
            changes["strategy__name"] = StrategyName.multi_worker
            changes["strategy__num_workers"] = workers
        if "recovery__max_restarts" in changes:
            changes.setdefault("recovery__max_start_restarts", changes["recovery__max_restarts"])
        self.config = tiny_config(
            recovery__start_patience_s=START_PATIENCE_S,
            recovery__step_patience_s=STEP_PATIENCE_S,
            **changes,
        )
        self.folder = folder
        self.plan = self.replan(workers)
        self.group = ScriptedGroup(*scripts)
        self.told: list[Message] = []
        self.began: list[tuple[int, str | None]] = []
        self.records: list[Mapping[str, Any]] = []
        self.notices: list[str] = []
        self._checkpoint = checkpoint
        self.supervisor = Supervisor(
            self.group,
            self.plan,
            observe=self.told.append,
            began=lambda attempt, path, num_workers: self.began.append((attempt, path)),
            notice=self.notices.append,
            newest_checkpoint=self.newest_checkpoint,
            journal=self.records.append,
            replan=self.replan,
            first_attempt=first_attempt,
            clock=self.group.clock,
            sleep=self.group.sleep,
        )

    def replan(self, num_workers: int) -> RunPlan:
        return make_plan(
            self.config,
            run="20260101-000000-abcd",
            host=Host(num_cpus=2, num_gpus=0),
            cwd=self.folder,
            num_workers=num_workers,
        )

    def newest_checkpoint(self) -> tuple[int, str] | None:
        told = [message for message in self.told if isinstance(message, Saved)]
        newest = told[-1] if told else self._checkpoint
        return None if newest is None else (newest.step, newest.path)

    def run(self) -> Outcome:
        return self.supervisor.run()

    def stop(self) -> None:
        self.supervisor.stop()

    def story(self, error: type[OrchestratorError] = OrchestratorError) -> str:
        """Run to a bitter end and return what the user reads; the error is of just this class."""
        with pytest.raises(error) as raised:
            self.run()
        assert error in (raised.type, OrchestratorError)
        return str(raised.value)
