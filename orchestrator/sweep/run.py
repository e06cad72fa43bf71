"""`sweep`: trains a job with all combinations of values, some at a time.

Each child is the train command in a process of its own, on a configuration that was frozen when the
sweep was first called. What is known of a child stands in the journal of its run, so a sweep that
was killed goes on where its children are.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

from orchestrator.errors import ConfigError, ExitCode
from orchestrator.guardian import Guard, guarded
from orchestrator.keeping import could_be_kept
from orchestrator.lease import Lease
from orchestrator.signals import Stops
from orchestrator.spec.config import load_kept
from orchestrator.spec.overrides import key_of
from orchestrator.spec.paths import RunPaths
from orchestrator.spec.plan import tracking_store
from orchestrator.spec.schema import RunConfig
from orchestrator.spec.sweep import sweep_rules
from orchestrator.sweep.folder import (
    Sweep,
    find_sweep,
    own_overrides,
    typed_runs_dir,
)
from orchestrator.sweep.freeze import freeze_sweep
from orchestrator.sweep.halving import is_behind, rank, rungs, value_at
from orchestrator.sweep.record import SweepRecord
from orchestrator.sweep.screen import SweepScreen
from orchestrator.sweep.state import (
    ChildState,
    has_ended,
    keep_stopped,
    start_child,
    states_of,
    stop_child,
)
from orchestrator.sweep.table import metric_of
from orchestrator.terminal import figure

_POLL_S = 0.2
# Children that were asked to end at once have this long; then their input breaks.
_HURRY_S = 1.2


def sweep(overrides: list[str], config_dir: Path | None, cwd: Path) -> ExitCode:
    """Train all children of a sweep, or those that are left.

    Args:
        overrides: as typed; some keys have several values.
        config_dir: the user's own configuration and modules.
        cwd: what relative paths are relative to.

    Returns:
        DONE if all children have finished or were stopped for being behind; the code of the first
        that failed; or that of an interruption.

    Raises:
        OrchestratorError: no child was started.
    """
    for own in own_overrides(overrides):
        if "{" in own:
            raise ConfigError(
                f"{own}: what says how a sweep is made is one plain value for each key, such as "
                "sweep.halving.factor=3"
            )
    stops = Stops()
    with stops, ExitStack() as stack:
        runs_dir = typed_runs_dir(overrides, cwd)
        found = find_sweep(overrides, config_dir, runs_dir, lambda text: print(text, flush=True))
        is_first = found is None
        if found is None:
            found = freeze_sweep(overrides, config_dir, cwd)
        lease = Lease(RunPaths(found.paths.root))
        stack.callback(lease.release)
        config = _settings(found, overrides)
        guard = stack.enter_context(
            guarded(
                RunPaths(found.paths.root),
                *tracking_store(config, found.cwd),
                module="orchestrator.sweep.guardian",
            )
        )
        return Sweeping(found, config, stops, guard).run(is_first=is_first)


def _settings(found: Sweep, overrides: list[str]) -> RunConfig:
    """Return the first child's configuration, with what this command says about the sweep."""
    text = found.paths.config(found.children[0].name).read_text()
    typed = {key_of(o): o.partition("=")[2].strip("'\"") for o in own_overrides(overrides)}
    changes = {key: None if value == "null" else value for key, value in typed.items()}
    config = load_kept(text, changes, found.config_dir)
    errors = list(sweep_rules(config))
    if errors:
        raise ConfigError("\n".join(errors))
    return config


class Sweeping:
    """One command's work on a sweep."""

    def __init__(self, found: Sweep, config: RunConfig, stops: Stops, guard: Guard):
        """Read how far the children are; start nothing yet."""
        self._sweep = found
        self._config = config
        self._stops = stops
        self._guard = guard
        self._states = states_of(found)
        self._is_stopping = False
        asked = config.sweep.parallel
        self._at_once = found.parallel if asked == "auto" else int(asked)
        self._metric, self._mode = metric_of(config.best)
        halving = config.sweep.halving
        self._rungs = [] if halving.factor is None else rungs(halving.factor, halving.first)
        for state in self._states:
            state.judged = {rung for rung in self._rungs if self._value(state, rung) is not None}
        self._screen = SweepScreen(found, self._states, config.best)
        self._record = SweepRecord(found, config, self._screen.say)

    def run(self, *, is_first: bool) -> ExitCode:
        """Train what is left."""
        self._tell(is_first=is_first)
        left = [state for state in self._states if state.is_open]
        if not left:
            self._screen.table()
            if not self._sweep.paths.recorded.exists():
                self._record.end(self._states, hurried=False, stopped=False)
                self._say_what_next()
            self._screen.say(
                f"\nall {len(self._states)} children are done; to train them again give the sweep "
                "another name: sweep.name=NAME"
            )
            return ExitCode.DONE
        try:
            self._stops.hand_over(self._stop)
            with self._screen:
                self._train(left)
        except KeyboardInterrupt:
            self._is_stopping = True
            self._hurry()
        self._stops.hand_over(None)
        self._screen.table()
        self._record.end(self._states, hurried=self._stops.is_hurried, stopped=self._is_stopping)
        if self._record.is_late:
            self._guard.hand_over()
        self._say_what_next()
        return self._code()

    def _tell(self, *, is_first: bool) -> None:
        count, name = len(self._states), self._sweep.name
        self._screen.say(f"sweep {name}: {count} children, {self._at_once} at a time")
        self._screen.say(f"sweep folder {self._sweep.paths.root}")
        if not is_first:
            words = [state.status for state in self._states]
            told = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))
            self._screen.say(f"begun before: {told}; configurations are those of the first call")
        if sum(state.is_open for state in self._states) > 1 and could_be_kept(self._config):
            self._screen.say(
                "each child starts a Ray and imports TensorFlow for itself; after `make up` they "
                "begin in a breath"
            )

    def _train(self, left: list[ChildState]) -> None:
        pending, running = list(left), list[ChildState]()
        while running or (pending and not self._is_stopping):
            for state in list(pending):
                if self._is_stopping or len(running) >= self._at_once:
                    break
                if state.is_taken:
                    continue  # a killed sweep's child still saves
                state.look()
                pending.remove(state)
                if not state.is_open:
                    continue
                self._screen.started(state)
                start_child(self._sweep, state)
                running.append(state)
            self._look(running)
            self._screen.tick()
            time.sleep(_POLL_S)

    def _look(self, running: list[ChildState]) -> None:
        """Take note of what the children have done, and stop those that are behind."""
        for state in list(running):
            state.look()
            self._judge(state)
            if has_ended(state):
                running.remove(state)
                self._screen.ended(state)
        self._record.update(self._states)

    def _judge(self, state: ChildState) -> None:
        factor = self._config.sweep.halving.factor
        for rung in self._rungs:
            value = self._value(state, rung)
            if factor is None or rung in state.judged or value is None or self._is_stopping:
                continue
            state.judged.add(rung)
            reached = [self._value(other, rung) for other in self._states if other is not state]
            others = [other for other in reached if other is not None]
            if state.stopped or not is_behind(value, others, factor, self._mode):
                continue
            place = f"{rank(value, others, self._mode)} of {len(others) + 1}"
            why = (
                f"stopped at {rung:.0%} of its steps as number {place}: eval/{self._metric} "
                f"{figure(value)} (sweep.halving)"
            )
            keep_stopped(self._sweep, state, why)
            stop_child(state)

    def _value(self, state: ChildState, rung: float) -> float | None:
        return value_at(rung, state.listed.evaluated, self._metric, state.child.total_steps)

    def _stop(self, reason: str) -> bool:
        """Ask all children to save and stop; tell whether there are any to wait for."""
        self._is_stopping = True
        running = [state for state in self._states if state.process is not None]
        for state in running:
            if not state.stopped:  # a second signal would keep it from saving
                stop_child(state)
        return bool(running)

    def _hurry(self) -> None:
        """End children at once after a second signal."""
        running = [state for state in self._states if state.process is not None]
        for state in running:
            stop_child(state, at_once=True)
        deadline = time.monotonic() + _HURRY_S
        while running and time.monotonic() < deadline:
            running = [state for state in running if not has_ended(state)]
            time.sleep(0.02)

    def _say_what_next(self) -> None:
        missing = self._record.missing
        if missing:
            self._screen.say(
                f"note: MLflow lacks the last of the sweep ({missing}); the same command writes it"
            )
        if any(state.is_open for state in self._states):
            self._screen.say("\nthe same command goes on with the children that are not finished")

    def _code(self) -> ExitCode:
        if self._is_stopping:
            return self._stops.exit_code
        left = [state for state in self._states if state.is_open]
        if not left:
            return ExitCode.DONE
        failed = [state for state in left if state.status == "failed"]
        code = (failed or left)[0].code
        return ExitCode(code) if code in list(ExitCode) and code else ExitCode.JOB_FAILED
