"""Weights between a checkpoint and Keras's own file, both ways; TensorFlow works in a child."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from orchestrator.control.launcher import TENSORFLOW_ENV
from orchestrator.errors import (
    ConfigError,
    ExitCode,
    JobError,
    OrchestratorError,
    RestoreError,
    StorageError,
)
from orchestrator.runs import merge_overrides, read_overrides
from orchestrator.spec.config import DEFAULT_RUNS_DIR, load_config
from orchestrator.spec.host import local_host
from orchestrator.spec.overrides import key_of
from orchestrator.spec.paths import PROJECT_DIR, RunPaths, typed_path
from orchestrator.spec.plan import make_plan
from orchestrator.weights import KERAS_FILE, find_source

_USAGE = (
    f"weights: `weights FROM to=TO` is known: FROM a run, a checkpoint folder or a {KERAS_FILE} "
    f"file, TO a {KERAS_FILE} file or the folder of a checkpoint"
)
_ERRORS: dict[int, type[OrchestratorError]] = {
    error.exit_code: error for error in (JobError, RestoreError, StorageError)
}


def convert(arguments: list[str], config_dir: Path | None, cwd: Path) -> None:
    """Turn a checkpoint into a `.weights.h5` file, or either into a checkpoint.

    The model is built from the configuration of the run that a checkpoint lies in; for other
    checkpoints and files, `job=NAME` says whose it is.

    Args:
        arguments: FROM, `to=TO`, overrides.
        config_dir: the user's own configuration and modules.
        cwd: what relative paths are relative to.

    Raises:
        OrchestratorError: the weights are not there, do not fit, or cannot be written.
    """
    names = [argument for argument in arguments if "=" not in argument]
    targets = [argument[3:] for argument in arguments if argument.startswith("to=")]
    given = [a for a in arguments if "=" in a and not a.startswith("to=")]
    if len(names) != 1 or len(targets) != 1 or not targets[0]:
        raise ConfigError(_USAGE)
    target = typed_path(targets[0], cwd)
    if target.exists():
        raise ConfigError(f"to={targets[0]}: is there already; choose another name, or remove it")
    if target.suffix in (".h5", ".keras") and not target.name.endswith(KERAS_FILE):
        raise ConfigError(
            f"to={targets[0]}: a file of weights is called {target.stem}{KERAS_FILE}; any other "
            "name is the folder of a checkpoint"
        )
    if not target.parent.is_dir():
        raise ConfigError(f"to={targets[0]}: there is no folder {target.parent}")
    runs_dir = next((o.partition("=")[2] for o in given if key_of(o) == "runs_dir"), None)
    source = Path(find_source(names[0], runs_dir or DEFAULT_RUNS_DIR, cwd, "weights "))
    overrides = merge_overrides(read_overrides(RunPaths(source.parents[1])), given)
    # One device is enough to build a model.
    overrides = [o for o in overrides if key_of(o).split(".")[0] not in ("strategy", "cluster")]
    if not any(key_of(override) == "job" for override in overrides):
        raise ConfigError(f"{source} does not lie in a run: say whose model it is with job=NAME")
    config = load_config(overrides, config_dir)
    plan = make_plan(config, run="converted", host=local_host(), cwd=cwd)
    order = {
        "source": str(source),
        "target": str(target),
        "class_name": config.job.class_name,
        "args": config.job.args,
        "data_path": plan.data_path,
        "data_dir": plan.data_dir,
        "policy": plan.precision.value,
    }
    _run(json.dumps(order), config.code_dirs)


def _run(order: str, code_dirs: list[str]) -> None:
    python_path = [str(PROJECT_DIR), *code_dirs, os.environ.get("PYTHONPATH", "")]
    child = subprocess.run(
        [sys.executable, "-m", "orchestrator.train.later", "orchestrator.train.convert", order],
        env={
            **os.environ,
            **TENSORFLOW_ENV,
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join(filter(None, python_path)),
        },
        capture_output=True,
        text=True,
    )
    if child.returncode == ExitCode.DONE:
        print(child.stdout, end="")
        return
    error = _ERRORS.get(child.returncode)
    if error is None:
        raise JobError(f"the weights could not be converted:\n{child.stderr.strip()}")
    raise error(child.stdout.strip())
