"""What a run says at its end: results, the model, and what can be done next."""

from __future__ import annotations

import json
import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.screen import Summary
from orchestrator.spec.config import DEFAULT_RUNS_DIR
from orchestrator.spec.messages import BlockDone, Evaluated, Message
from orchestrator.spec.paths import PROJECT_DIR
from orchestrator.spec.plan import RunPlan
from orchestrator.track.mlflow_projection import Report


@dataclass(slots=True)
class Tally:
    """What the summary needs of all messages."""

    steps: int = 0
    timed_steps: int = 0
    stepping_s: float = 0.0
    last_step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)

    def observe(self, message: Message) -> None:
        """Count what a message adds."""
        if isinstance(message, BlockDone) and message.worker == 0:
            # The first block of an attempt traces: its time says nothing about the speed.
            if self.steps and message.num_steps > 1:
                self.timed_steps += message.num_steps
                self.stepping_s += message.wall_s
            self.steps += message.num_steps
            self.last_step = message.last_step
        elif isinstance(message, Evaluated):
            self.metrics = {f"eval/{name}": value for name, value in message.metrics.items()}


def summarise(plan: RunPlan, tally: Tally, status: str, report: Report, wall_s: float) -> Summary:
    """Return what the screen shows last.

    Args:
        plan: of the run.
        tally: of all its messages.
        status: FINISHED or KILLED.
        report: what has become of the record in MLflow.
        wall_s: seconds since the command was given.
    """
    speed = None
    if tally.stepping_s > 0:
        speed = tally.timed_steps * plan.config.train.global_batch_size / tally.stepping_s
    finished = status == "FINISHED"
    exported = finished and plan.config.export.enabled
    return Summary(
        title="finished" if finished else f"stopped at step {tally.last_step:,}",
        metrics=tally.metrics,
        steps=tally.steps,
        wall_s=wall_s,
        examples_per_s=speed,
        model=report.model_uri or (str(plan.paths.export_dir) if exported else None),
        commands=next_commands(plan, tally.last_step, finished=finished, url=report.url),
    )


def next_commands(
    plan: RunPlan, last_step: int, *, finished: bool, url: str | None = None
) -> list[tuple[str, str]]:
    """Return what can be done next: a word and a command to copy.

    Args:
        plan: of the run.
        last_step: the last step done.
        finished: whether the run has come to its end.
        url: of the run's page in MLflow, where there is one.
    """
    exported = finished and plan.config.export.enabled
    job, runs_dir = plan.config.job.name, plan.config.runs_dir
    folder = "" if runs_dir == DEFAULT_RUNS_DIR else f"runs_dir={runs_dir} "
    own = "".join(f"--config-dir={path} " for path in plan.config.code_dirs[1:])
    commands = [("review", url or _command("ui", "", folder))]
    if exported:
        commands.append(("serve", _command("serve", f"run={job}/{plan.run}", folder)))
        commands.append(("load", _load(plan.paths.saved_model_dir)))
    resume = f"{own}{folder}resume={plan.run}"
    patience = plan.config.best.patience
    if finished and patience is not None and last_step < plan.total_steps:
        resume += f" best.patience={2 * patience}"  # it ended early: more steps change nothing
    elif finished and plan.config.train.steps is not None:
        resume += f" train.steps={2 * plan.config.train.steps}"
    elif finished and plan.config.train.epochs is not None:
        resume += f" train.epochs={2 * plan.config.train.epochs:g}"
    commands.append(
        ("train on" if finished else "resume", _command("train", f"conf={job}", resume))
    )
    return commands


def _load(saved_model: Path) -> str:
    """Return a command that loads a SavedModel, as any program with TensorFlow does."""
    code = (
        f"import tensorflow as tf; model = tf.saved_model.load({json.dumps(str(saved_model))}); "
        'print(model.signatures["serving_default"].structured_input_signature)'
    )
    python = Path(sys.executable)
    shown = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python
    return f"{shlex.quote(str(shown))} -c {shlex.quote(code)}"


def _command(verb: str, named: str, args: str) -> str:
    """Return a command of make where its Makefile is, else the same of the console script."""
    if Path.cwd() == PROJECT_DIR:
        return " ".join(filter(None, ["make", verb, named, args and f'args="{args.strip()}"']))
    script = Path(sys.executable).with_name("orchestrator")
    program = shlex.quote(str(script)) if os.access(script, os.X_OK) else "orchestrator"
    return " ".join(filter(None, [program, verb, named.replace("conf=", "job="), args.strip()]))
