"""One start of a run while this process holds it: record, supervisor and screen wired together."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable

from orchestrator.changes import compare_data
from orchestrator.control.group import WorkerGroup
from orchestrator.control.inline_group import InlineGroup
from orchestrator.control.supervisor import Supervisor
from orchestrator.errors import (
    ExitCode,
    ExportError,
    Interrupted,
    OrchestratorError,
    interruptions,
)
from orchestrator.guardian import Guard
from orchestrator.patience import JournalPatience
from orchestrator.provenance import provenance
from orchestrator.resumption import Ancestry, Checkpoints
from orchestrator.runs import (
    Past,
)
from orchestrator.screen import Screen
from orchestrator.signals import Stops
from orchestrator.spec.describe import experiment_name, params_of
from orchestrator.spec.messages import (
    BlockDone,
    DataUsed,
    Evaluated,
    Message,
    Outcome,
    is_kept,
    to_record,
)
from orchestrator.spec.plan import RunPlan
from orchestrator.spec.secrets import mask_overrides, mask_text
from orchestrator.summary import Tally, next_commands, summarise
from orchestrator.track.facts import RunFacts
from orchestrator.track.journal import read
from orchestrator.track.mlflow_projection import Report, check
from orchestrator.track.origin import origin
from orchestrator.track.record import Record
from orchestrator.train import store

# How long MLflow may take at the end: of a run that is done, was stopped, or must end at once.
_FINISH_DEADLINE_S = 60.0
_STOP_DEADLINE_S = 10.0
_HURRY_DEADLINE_S = 0.7


class Training:
    """What a command does with a run from the first worker to the last line on the screen."""

    def __init__(
        self,
        plan: RunPlan,
        replan: Callable[[int], RunPlan],
        past: Past | None,
        overrides: list[str],
        group: WorkerGroup,
        screen: Screen,
        stops: Stops,
        guard: Guard,
        start: float,
    ):
        self._plan = plan
        self._past = past
        self._screen = screen
        self._stops = stops
        self._guard = guard
        self._start = start
        self._tally = Tally()
        self._group = group
        facts = make_facts(plan, mask_overrides(overrides))
        if plan.config.tracking.required:
            check(facts)
        # Until the record has an end, the guardian is to write one.
        guard.hand_over()
        self._record = Record(plan.paths.journal, facts, notice=screen.notice)
        self._tracking = False
        self._is_stopping = False
        self._ancestry = Ancestry()
        if past is not None:
            self._ancestry = Ancestry(past.last_step, past.starts, past.last_evaluation)
        self._supervisor = Supervisor(
            group,
            plan,
            observe=self._observe,
            began=self._began,
            notice=screen.notice,
            newest_checkpoint=Checkpoints(plan.paths, read, screen.notice, self._ancestry).newest,
            journal=self._record.add,
            together=self._record.together,
            replan=replan,
            first_attempt=1 + (past.attempts if past is not None else 0),
        )
        self._patience = JournalPatience(
            self._record, plan, notice=screen.notice, stop=self._save_and_stop
        )

    def run(self) -> ExitCode:
        """Train, and leave a true record however it ends."""
        status, cause = "FAILED", "the driver failed"
        try:
            self._stops.hand_over(self._stop)
            if self._stops.is_asked:
                raise Interrupted
            with interruptions():
                outcome = self._supervise()
            status = "FINISHED" if outcome is Outcome.completed else "KILLED"
            cause = "" if outcome is Outcome.completed else "stopped"
            if self._patience.is_over:
                status, cause = "FAILED", "the journal could not be written"
            self._check_proof(outcome)
        except KeyboardInterrupt:
            status, cause = "KILLED", "ended at once" if self._stops.is_hurried else "stopped"
        except OrchestratorError as error:
            status, cause = "FAILED", mask_text(str(error))
            if self._stops.is_hurried:  # inline the worker takes the signal for a failure
                status, cause = "KILLED", "ended at once"
            else:
                self._screen.keep(cause)
                raise
        except Exception as error:
            cause = f"the driver failed: {mask_text(repr(error))}"
            raise
        finally:
            report = self._end(status, cause)
            self._stops.hand_over(lambda reason: True)  # it is leaving already
        self._patience.refuse()
        self._summarise(status, report)
        return ExitCode.DONE if status == "FINISHED" else self._stops.exit_code

    def _supervise(self) -> Outcome:
        if isinstance(self._group, InlineGroup):
            return self._group.serve(self._supervisor.run)
        return self._supervisor.run()

    def _observe(self, message: Message) -> None:
        if isinstance(message, DataUsed) and self._past is not None:
            said = compare_data(self._past, message, self._plan.config.resume_allow)
            if said:
                self._screen.notice(said)
        if is_kept(message):
            self._record.add(to_record(message))
        if isinstance(message, BlockDone) and message.worker == 0:
            self._ancestry.reached(message.last_step)
        if isinstance(message, Evaluated):
            self._ancestry.evaluated(message.step)
        self._patience.watch()
        self._tally.observe(message)
        self._screen.observe(message)
        if not self._tracking and isinstance(message, BlockDone):
            # Importing MLflow costs seconds of CPU: not before a step has been made.
            self._tracking = True
            self._record.start_tracking()

    def _began(self, attempt: int, restore_from: str | None, num_workers: int) -> None:
        self._tally.last_step = store.start_of(restore_from)
        self._ancestry.began(attempt, self._tally.last_step)
        self._record.add(
            {
                "kind": "AttemptStarted",
                "time": time.time(),
                "attempt": attempt,
                "restore_from": restore_from,
                "num_workers": num_workers,
                "total_steps": self._plan.total_steps,
            }
        )

    def _stop(self, reason: str) -> bool:
        """Ask the workers to save and stop; tell whether there are any to wait for."""
        self._save_and_stop()
        # Inline the worker has the main thread, and looks for requests itself.
        can_save = isinstance(self._group, InlineGroup) or self._supervisor.can_save
        if can_save:
            self._screen.notice(f"{reason}: saving, then stopping; Ctrl-C ends it at once")
        else:
            self._screen.notice(f"{reason}: stopping; there is nothing to save")
        return can_save

    def _save_and_stop(self) -> None:
        """Ask once, whoever wants it: asked twice the supervisor would end everything."""
        if not self._is_stopping:
            self._is_stopping = True
            self._supervisor.stop()

    def _check_proof(self, outcome: Outcome) -> None:
        """Raise ExportError if the clean process refused the exported model."""
        if outcome is not Outcome.completed or not self._plan.config.export.enabled:
            return
        path = self._plan.paths.proof
        try:
            proof = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ExportError(
                f"the exported model was not proven: {path} is missing ({error}); see "
                f"{self._plan.paths.logs_dir}. The checkpoints are whole"
            ) from error
        if not proof.get("passed"):
            raise ExportError(
                f"the exported model does not answer like the trained one: {proof.get('error')}; "
                f"see {path}. The checkpoints are whole"
            )
        if self._record.failing_s:
            return  # the journal lacks what there is to look up
        complaint = origin(read(self._plan.paths.journal)).complaint()
        if complaint:
            shutil.rmtree(self._plan.paths.mlflow_model_dir, ignore_errors=True)
            raise ExportError(
                f"the exported model is not the one that was asked for: {complaint} "
                f"(export.weights={self._plan.config.export.weights.value}). The checkpoints are "
                "whole: resume the run to export again"
            )

    def _end(self, status: str, cause: str) -> Report:
        """Close the record; a signal cuts short the wait for MLflow, the guardian goes on."""
        self._stops.hand_over(None)
        finished = status == "FINISHED"
        commands = next_commands(self._plan, self._tally.last_step, finished=finished)
        limit_s: float | None = _STOP_DEADLINE_S if status == "KILLED" else _FINISH_DEADLINE_S
        if status == "KILLED" and not self._tracking:
            limit_s = None  # no step was made: MLflow has nothing to learn, and takes seconds
        with self._screen.timed("writing the record"):
            while True:
                try:
                    if self._stops.is_hurried and limit_s is not None:
                        limit_s = min(limit_s, _HURRY_DEADLINE_S)
                    report = self._record.end(status, cause, limit_s, commands)
                    break
                except KeyboardInterrupt:
                    limit_s = None if limit_s is None else 0.0
        # An earlier driver may have left the run RUNNING in MLflow, which this one did not ask.
        is_untold = limit_s is None and self._past is not None
        if not report.missing and not is_untold:
            self._guard.take_back()
        return report

    def _summarise(self, status: str, report: Report) -> None:
        limit_s = self._plan.config.train.max_time_s
        if self._stops.exit_code is ExitCode.OUT_OF_TIME and not self._tally.steps:
            self._screen.notice(
                f"train.max_time_s={limit_s:g} was over before a step was made; raise it"
            )
        if report.missing:
            self._screen.notice(
                f"MLflow lacks the last records ({report.missing}); for two minutes they are sent "
                f"in the background; after that: orchestrator runs sync {self._plan.paths.root}"
            )
        wall_s = time.monotonic() - self._start
        self._screen.finish(summarise(self._plan, self._tally, status, report, wall_s))


def make_facts(plan: RunPlan, overrides: list[str]) -> RunFacts:
    """Collect what the record needs to know of a plan."""
    config = plan.config
    return RunFacts(
        run=plan.run,
        job=config.job.name,
        experiment=experiment_name(plan),
        tracking_uri=plan.tracking_uri,
        artifact_root=plan.artifact_root,
        root=str(plan.paths.root),
        log_every_steps=config.tracking.log_every_steps,
        global_batch_size=config.train.global_batch_size,
        timeout_s=config.tracking.timeout_s,
        register=config.export.register,
        alias=config.export.alias,
        params=params_of(plan),
        tags={
            **provenance(overrides, config.code_dirs),
            "orchestrator.strategy": config.strategy.name.value,
            "orchestrator.replicas": str(plan.num_replicas),
            "orchestrator.tracking_uri": mask_text(plan.tracking_uri),
        },
    )
