"""One run under fire: faults one after the other, and what was seen of each."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orchestrator.chaos.scene import Ends, Fault, NotRun, Scene
from orchestrator.control.processes import Process

# A first checkpoint, or a first step of a new attempt, may take as long as a start.
_SETTLE_S = 180.0
# The longest patience that a stalled worker may enjoy, and the start that follows.
_OUTCOME_S = 240.0
_EXIT_S = 60.0
# Training that goes on for so many intervals between checkpoints has not noticed the fault.
_IGNORED_INTERVALS = 5
# Steps of one interval between checkpoints that a fault is spread over.
_SPREAD = 20


@dataclass(slots=True)
class Row:
    """What was seen of one fault; times in seconds from the moment it struck.

    Attributes:
        step: the last step on record when it struck.
        detected_s: until the failure was on record.
        fenced_s: until every process of the old attempt was gone.
        resumed_s: until the first block after it was on record.
        steps_lost: steps that were made again.
        trouble: what went wrong; empty if nothing did.
        not_run: why it was not injected; empty if it was.
        note: something to tell that is no trouble.
    """

    fault: Fault
    step: int = 0
    detected_s: float | None = None
    fenced_s: float | None = None
    resumed_s: float | None = None
    steps_lost: int | None = None
    trouble: str = ""
    not_run: str = ""
    note: str = ""

    @property
    def is_late(self) -> bool:
        """Tell whether it was on record later than promised."""
        limit = self.fault.promised_s
        return limit is not None and self.detected_s is not None and self.detected_s > limit


class Storm:
    """Injects faults into a run, one when the one before it is over."""

    def __init__(self, scene: Scene, run: str, seed: int, tell: Callable[[Row], None]):
        """Prepare.

        Args:
            scene: of a command that is not started yet.
            run: the run's name.
            seed: of the steps that faults fall on.
            tell: called with each row when it is known.
        """
        self._scene = scene
        self._run = run
        self._random = random.Random(seed)
        self._tell = tell
        self._is_over = ""

    def go(self, faults: Sequence[Fault]) -> tuple[list[Row], str]:
        """Start the run, inject all faults, wait for its end.

        Returns:
            A row for each fault, and why the run did not end well; empty if it did.
        """
        scene = self._scene
        scene.command.start(f"run_name={self._run}")
        rows = []
        for fault in faults:
            row = self._row(fault)
            rows.append(row)
            self._tell(row)
        if not self._is_over:
            scene.watch.until(lambda: scene.command.code is not None, _OUTCOME_S)
            if scene.command.code is None:
                self._is_over = f"the run did not end, {self._where()}"
            elif scene.command.code != 0:
                self._is_over = self._exit()
        return rows, self._is_over

    def _row(self, fault: Fault) -> Row:
        row = Row(fault)
        scene, watch = self._scene, self._scene.watch
        if self._is_over or not self._settle():
            self._is_over = self._is_over or f"the run was not ready for {fault.name.value}"
            row.not_run = "the run was over"
            return row
        scene.struck, scene.notes, scene.trouble = [], [], ""
        scene.aim()
        row.step, attempt = watch.step, watch.attempt
        scene.paths.chaos_dir.mkdir(exist_ok=True)
        try:
            fault.inject(scene)
        except NotRun as error:
            row.not_run = str(error)
            return row
        except ProcessLookupError as error:
            row.trouble = f"a process was gone before it was struck: {error}"
        self._see(row, attempt)
        if not row.trouble:
            row.trouble = scene.trouble or fault.after(scene) or self._too_much_lost(row)
        row.note = ", ".join(scene.notes)
        return row

    def _settle(self) -> bool:
        """Wait until the attempt has saved, and then for a step of the schedule."""
        scene, watch = self._scene, self._scene.watch
        ready = scene.until(
            lambda: (
                watch.is_stepping
                and watch.saved > watch.began_at
                and len(watch.pids) == scene.num_workers
            ),
            _SETTLE_S,
        )
        target = watch.step + self._random.randrange(_SPREAD)
        return ready and scene.until(lambda: watch.step >= target, _SETTLE_S)

    def _see(self, row: Row, attempt: int) -> None:
        """Wait for what must come of a fault that struck in this attempt."""
        match row.fault.ends:
            case Ends.restart:
                self._see_restart(row, attempt)
            case Ends.resume:
                self._see_resume(row)
            case Ends.nothing:
                if self._scene.command.code is not None:
                    self._go_on(row, self._exit())
                elif self._scene.watch.attempt != attempt:
                    row.trouble = f"the group restarted, {self._where()}"

    def _see_restart(self, row: Row, first: int) -> None:
        scene, watch, moment = self._scene, self._scene.watch, self._scene.moment
        old, group = watch.attempt, scene.group

        def seen() -> bool:
            self._note(row, old, group)
            return (watch.attempt > old and watch.is_stepping) or self._is_ignored(row, old)

        if not scene.until(seen, _OUTCOME_S):
            if scene.command.code is not None:
                self._go_on(row, self._exit())
            else:
                row.trouble = self._is_over = f"it did not restart, {self._where()}"
            return
        if watch.attempt == old:
            row.trouble = f"nothing came of it, {self._where()}"
            return
        row.resumed_s = time.time() - moment
        # Of two attempts that were struck the later one may have made no step.
        done = max(watch.done[attempt] for attempt in range(first, watch.attempt))
        row.steps_lost = done - watch.began_at

    def _is_ignored(self, row: Row, attempt: int) -> bool:
        """Tell whether the attempt goes on as if nothing had happened."""
        watch = self._scene.watch
        is_far = watch.step >= row.step + _IGNORED_INTERVALS * self._scene.every_steps
        return watch.attempt == attempt and is_far

    def _note(self, row: Row, old: int, group: Sequence[Process]) -> None:
        """Note the moment at which each thing is true for the first time."""
        watch, moment = self._scene.watch, self._scene.moment
        if row.detected_s is None and old in watch.failed_at:
            row.detected_s = max(0.0, watch.failed_at[old] - moment)
        if row.fenced_s is None and not any(process.is_alive for process in group):
            row.fenced_s = time.time() - moment

    def _see_resume(self, row: Row) -> None:
        scene, watch = self._scene, self._scene.watch
        old, group = watch.attempt, scene.group

        def ended() -> bool:
            self._note(row, old, group)
            is_over = scene.command.code is not None and row.fenced_s is not None
            return is_over or self._is_ignored(row, old)

        in_time = watch.until(ended, _EXIT_S)
        code = scene.command.code
        if code is None:
            row.trouble = f"nothing came of it, {self._where()}"
            self._is_over = "" if in_time else f"the command did not end within {_EXIT_S:g} s"
            return
        if row.fenced_s is None:
            row.trouble = "workers outlive the command"
        if code not in row.fault.codes:
            wanted = " or ".join(map(str, row.fault.codes))
            row.trouble = f"exit code {code} instead of {wanted}: {scene.command.last_words()}"
        self._go_on(row, row.trouble)
        row.steps_lost = watch.done[old] - watch.began_at if row.resumed_s is not None else None

    def _go_on(self, row: Row, trouble: str) -> None:
        """Resume a run whose command has ended."""
        row.trouble = trouble
        scene, watch = self._scene, self._scene.watch
        old = watch.attempt
        scene.command.start(f"resume={self._run}")
        if scene.until(lambda: watch.attempt > old and watch.is_stepping, _OUTCOME_S):
            row.resumed_s = time.time() - scene.moment
            return
        self._is_over = f"the run could not go on, {self._where()}: {scene.command.last_words()}"
        row.trouble = row.trouble or self._is_over

    def _too_much_lost(self, row: Row) -> str:
        limit = row.fault.lost_intervals * self._scene.every_steps
        if row.steps_lost is None or row.steps_lost <= limit:
            return ""
        return f"{row.steps_lost} steps were lost, more than {limit}"

    def _exit(self) -> str:
        command = self._scene.command
        return f"the run ended with exit code {command.code}: {command.last_words()}"

    def _where(self) -> str:
        return f"attempt {self._scene.watch.attempt} at step {self._scene.watch.step}"
