"""What a sweep leaves behind: tables and a plot in its folder, and its run in MLflow."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence

from orchestrator.provenance import provenance
from orchestrator.spec.plan import tracking_store
from orchestrator.spec.schema import RunConfig
from orchestrator.sweep.folder import Sweep, values_text
from orchestrator.sweep.state import ChildState
from orchestrator.sweep.table import best_of, csv_table, markdown, metric_of
from orchestrator.track.facts import RunFacts
from orchestrator.track.mlflow_sweep import Ending, ParentRun
from orchestrator.track.sweep_plot import Curve, draw_curves

_DEADLINE_S = 30.0
_STOP_DEADLINE_S = 10.0
_HURRY_DEADLINE_S = 0.3


class SweepRecord:
    """The record of a sweep while a command works on it."""

    def __init__(self, sweep: Sweep, config: RunConfig, notice: Callable[[str], None]):
        """Touch nothing yet.

        Args:
            sweep: whose record it is.
            config: of its first child.
            notice: shown to the user.
        """
        self._sweep = sweep
        self._best = config.best
        self._notice = notice
        self._parent = ParentRun(facts_of(sweep, config), sweep.began, notice)

    @property
    def missing(self) -> str:
        """Why MLflow lacks something; empty if it has everything."""
        return self._parent.missing

    @property
    def is_late(self) -> bool:
        """Whether MLflow was still at work when the time of `end` was over."""
        return self._parent.is_late

    def update(self, states: Sequence[ChildState]) -> None:
        """Tell MLflow's thread of the children that have a run there."""
        for state in states:
            if state.mlflow_run is not None:
                self._parent.adopt(state.mlflow_run, state.stopped)
        # Importing MLflow costs seconds of CPU: not before a child has done so too.
        if any(state.mlflow_run is not None for state in states):
            self._parent.start()

    def end(self, states: Sequence[ChildState], *, hurried: bool, stopped: bool) -> None:
        """Write tables, plot and MLflow's run."""
        self.update(states)
        paths = self._sweep.paths
        text = markdown(self._sweep, states, self._best)
        try:
            paths.table.write_text(text)
            paths.csv.write_text(csv_table(self._sweep, states, self._best))
            if not hurried:
                self._draw(states)
        except Exception as error:  # of a disk, or of a label that cannot be drawn
            self._notice(f"the sweep's tables could not be written: {error}")
        winner = best_of(states, self._best)
        metrics, tags = {}, {}
        if winner is not None:
            found = winner.listed.evaluated
            metrics = {f"best/{name}": value for name, value in found[max(found)].items()}
            if (value := winner.result(self._best)) is not None:
                metrics[f"best/{metric_of(self._best)[0]}"] = value
            tags["orchestrator.sweep.best"] = winner.child.run
        status = "FINISHED"
        if any(state.is_open for state in states):
            status = "KILLED" if stopped else "FAILED"
        files = [paths.table, paths.csv, paths.plot, paths.sweep]
        deadline_s = _STOP_DEADLINE_S if stopped else _DEADLINE_S
        self._parent.finish(
            Ending(
                status=status,
                text=text,
                files=files,
                time_ms=round(time.time() * 1000),
                metrics=metrics,
                tags=tags,
            ),
            _HURRY_DEADLINE_S if hurried else deadline_s,
        )
        if status == "FINISHED" and not self.missing:
            paths.recorded.touch()

    def _draw(self, states: Sequence[ChildState]) -> None:
        name, _ = metric_of(self._best)
        winner = best_of(states, self._best)
        curves = []
        for state in states:
            found = state.listed.evaluated
            points = [(step, found[step][name]) for step in sorted(found) if name in found[step]]
            label = f"{state.child.name} {values_text(state.child.values)}"
            curves.append(Curve(label, points, is_best=state is winner))
        draw_curves(self._sweep.paths.plot, curves, f"eval/{name}")


def facts_of(sweep: Sweep, config: RunConfig) -> RunFacts:
    """Return what the record of the parent needs to know."""
    uri, artifact_root = tracking_store(config, sweep.cwd)
    swept = {
        key: ", ".join(dict.fromkeys(child.values[key] for child in sweep.children))
        for key in sweep.keys
    }
    tags = provenance(sweep.overrides, config.code_dirs)
    command = f"orchestrator sweep {shlex.join(sweep.overrides)}"
    said = {"orchestrator.command": command, "mlflow.source.name": "orchestrator sweep"}
    return RunFacts(
        run=sweep.name,
        job=config.job.name,
        experiment=config.tracking.experiment or config.job.name,
        tracking_uri=uri,
        artifact_root=artifact_root,
        root=str(sweep.paths.root),
        log_every_steps=config.tracking.log_every_steps,
        global_batch_size=config.train.global_batch_size,
        timeout_s=config.tracking.timeout_s,
        register=None,
        params=swept,
        tags={**tags, **said},
    )
