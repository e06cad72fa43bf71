"""The command line: compose, plan, then print or launch; exit codes."""

from __future__ import annotations

import contextlib
import difflib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from orchestrator.errors import ConfigError, ExitCode, OrchestratorError

_VERBS = {
    "train": "train a job: train job=mnist strategy=multi_worker strategy.num_workers=2",
    "plan": "print what a run would do, without starting anything",
    "config": "print the resolved configuration",
    "verify": "prove that replicas, workers and micro-batches compute what one device computes",
    "chaos": "prove that a run under faults leaves what an undisturbed one leaves",
    "submit": "run train on a Ray cluster: submit job=mnist cluster.address=http://head:8265 ...",
    "runs": "runs list; runs compare RUN RUN: what differs; runs sync RUN: MLflow once more",
    "weights": "turn a checkpoint into Keras's weights and back: weights RUN to=FILE.weights.h5",
    "ui": "open the MLflow UI",
    "serve": "let a model answer over HTTP: serve run=mnist/RUN, or model=NAME@ALIAS; port= host=",
}
_MEANING = {
    ExitCode.DIFFERENCE: "a difference was found",
    ExitCode.REFUSED: "configuration or plan refused",
    ExitCode.JOB_FAILED: "the job's own code or data failed",
    ExitCode.NOTHING_TO_RESTORE: "no valid checkpoint to resume from",
    ExitCode.STORAGE_FAILED: "the run folder or the record failed",
    ExitCode.CLUSTER_FAILED: "cluster or start-up failed",
    ExitCode.BUDGET_SPENT: "gave up recovering",
    ExitCode.EXPORT_REFUSED: "trained, but the export was refused",
    ExitCode.OUT_OF_TIME: "train.max_time_s is over: stopped, resume goes on",
    ExitCode.INTERRUPTED: "interrupted",
    ExitCode.TERMINATED: "terminated",
}
_INTERNAL_ERROR = 70


def main(argv: list[str]) -> int:
    """Run one command.

    Args:
        argv: the arguments, without the program's name.

    Returns:
        The exit code.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help())
        return int(ExitCode.DONE)
    verb, *rest = argv
    try:
        return _run(verb, rest)
    except OrchestratorError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", ExitCode.INTERRUPTED)
    except BrokenPipeError:
        # Whoever read the output has gone, such as `| head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return int(ExitCode.DONE)
    except Exception:
        traceback.print_exc()
        print("this is a bug in the orchestrator: please report the lines above", file=sys.stderr)
        return _INTERNAL_ERROR


def cli() -> int:
    """Run the console script."""
    return main(sys.argv[1:])


def _run(verb: str, rest: list[str]) -> int:
    verbs: dict[str, Callable[[list[str], Path | None], int]] = {
        "train": _train,
        "plan": _plan,
        "config": _config,
        "verify": _verify,
        "chaos": _chaos,
        "submit": _submit,
        "runs": _runs,
        "weights": _weights,
        "ui": _ui,
        "serve": _serve,
    }
    if verb not in verbs:
        close = difflib.get_close_matches(verb, verbs, n=1)
        meant = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"{verb}: there is no such command{meant} Commands: {', '.join(verbs)}")
    if "-h" in rest or "--help" in rest:
        print(f"{verb}: {_VERBS[verb]}")
        return int(ExitCode.DONE)
    overrides, config_dir = _split_options(rest)
    return verbs[verb](overrides, config_dir)


def _split_options(rest: list[str]) -> tuple[list[str], Path | None]:
    """Separate `--config-dir DIR` from the overrides."""
    overrides: list[str] = []
    config_dir: Path | None = None
    arguments = iter(rest)
    for argument in arguments:
        if argument == "--config-dir":
            folder = next(arguments, None)
            if folder is None:
                raise ConfigError("--config-dir needs a folder")
            config_dir = Path(folder)
        elif argument.startswith("--config-dir="):
            config_dir = Path(argument.partition("=")[2])
        elif argument.startswith("-"):
            raise ConfigError(f"{argument}: there is no such option; keys are set as KEY=VALUE")
        else:
            overrides.append(argument)
    return overrides, config_dir


def _train(overrides: list[str], config_dir: Path | None) -> int:
    from orchestrator.driver import train

    return int(train(overrides, config_dir, Path.cwd()))


def _plan(overrides: list[str], config_dir: Path | None) -> int:
    from orchestrator.spec.config import load_config
    from orchestrator.spec.describe import describe
    from orchestrator.spec.host import local_host
    from orchestrator.spec.plan import make_plan

    config = load_config(overrides, config_dir)
    name = config.run_name or "<run>"
    print(describe(make_plan(config, run=name, host=local_host(), cwd=Path.cwd())), end="")
    return int(ExitCode.DONE)


def _config(overrides: list[str], config_dir: Path | None) -> int:
    from orchestrator.spec.config import load_config, to_yaml

    print(to_yaml(load_config(overrides, config_dir)), end="")
    return int(ExitCode.DONE)


def _verify(overrides: list[str], config_dir: Path | None) -> int:
    from orchestrator.verify import verify

    return _found(verify(overrides, config_dir, Path.cwd()))


def _chaos(overrides: list[str], config_dir: Path | None) -> int:
    from orchestrator.chaos import chaos

    return _found(chaos(overrides, config_dir, Path.cwd()))


def _found(code: ExitCode) -> int:
    """Name the exit code of a command that has told its findings itself."""
    if code is not ExitCode.DONE:
        print(f"exit code {code:d}: {_MEANING[code]}", file=sys.stderr)
    return int(code)


def _submit(overrides: list[str], config_dir: Path | None) -> int:
    from orchestrator.spec.config import load_config

    for override in overrides:
        if override.startswith("cluster=") and override != "cluster=existing":
            raise ConfigError(f"{override}: submit runs on an existing cluster; leave it out")
    config = load_config(["cluster=existing", *overrides], config_dir)
    from orchestrator.control.ray_settings import apply_ray_settings

    apply_ray_settings(config.cluster.name)
    from orchestrator.control.ray_submit import submit

    return submit(config, overrides, config_dir)


def _runs(overrides: list[str], config_dir: Path | None) -> int:
    """Take `list`, `compare RUN RUN [tolerance=1e-5]` or `sync RUN`; RUN is a run's folder."""
    match overrides:
        case ["list", *rest]:
            from orchestrator.listing import list_runs

            return int(list_runs(rest, Path.cwd()))
        case ["sync", run]:
            from orchestrator.driver import sync

            return int(sync(run, Path.cwd()))
        case ["compare", left, right, *rest] if len(rest) < 2:
            from orchestrator.comparison import DEFAULT_TOLERANCE, compare_runs

            tolerance = _tolerance(rest[0]) if rest else DEFAULT_TOLERANCE
            return int(compare_runs(left, right, tolerance, Path.cwd()))
    raise ConfigError(
        "runs: `runs list [job=NAME]`, `runs compare RUN RUN [tolerance=1e-5]` and `runs sync RUN` "
        "are known; RUN is a run's folder"
    )


def _tolerance(text: str) -> float:
    key, _, value = text.partition("=")
    with contextlib.suppress(ValueError):
        if key == "tolerance" and float(value) >= 0:
            return float(value)
    raise ConfigError(f"runs compare: {text}: tolerance=NUMBER is meant, at least 0")


def _weights(overrides: list[str], config_dir: Path | None) -> int:
    """Take `FROM to=TO`, and overrides that say whose model it is where FROM does not."""
    from orchestrator.conversion import convert

    convert(overrides, config_dir, Path.cwd())
    return int(ExitCode.DONE)


def _ui(overrides: list[str], config_dir: Path | None) -> int:
    """Take `runs_dir=`, `tracking.uri=`, `experiment=` and `port=`; no job is needed."""
    from orchestrator.spec.config import DEFAULT_RUNS_DIR

    known = {"runs_dir": DEFAULT_RUNS_DIR, "tracking.uri": "", "port": "", "experiment": ""}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or key not in known:
            raise ConfigError(f"ui: {override}: takes {', '.join(f'{key}=' for key in known)}")
        known[key] = value
    if known["port"] and not known["port"].isdigit():
        raise ConfigError(f"port={known['port']}: must be a whole number")
    from orchestrator.track.mlflow_ui import open_ui

    root = Path.cwd() / known["runs_dir"]
    port = int(known["port"]) if known["port"] else None
    return open_ui(
        known["tracking.uri"] or f"sqlite:///{root / 'mlflow.db'}",
        str(root / "mlartifacts"),
        port,
        known["experiment"] or None,
    )


def _serve(overrides: list[str], config_dir: Path | None) -> int:
    """Take `run=` or `model=`, and `port=`, `host=`, `runs_dir=`, `tracking.uri=`."""
    from orchestrator.serving import serve

    return serve(overrides, Path.cwd())


def _help() -> str:
    lines = [
        "Trains TensorFlow jobs on one device, all GPUs of a host, or many hosts, through Ray.",
        "",
        "usage: orchestrator VERB [KEY=VALUE ...] [--config-dir DIR]",
        "",
    ]
    lines += [f"  {verb:<8}{text}" for verb, text in _VERBS.items()]
    lines += ["", "`orchestrator config job=NAME` prints every key; docs/config.md explains them."]
    return "\n".join(lines)


def _fail(text: str, code: ExitCode) -> int:
    """Tell an error in the user's words, then what the exit code means."""
    red, plain = ("\033[31m", "\033[0m") if sys.stderr.isatty() else ("", "")
    with contextlib.suppress(OSError):  # nobody reads any more
        print(f"{red}{text}{plain}\nexit code {code:d}: {_MEANING[code]}", file=sys.stderr)
    return int(code)


if __name__ == "__main__":
    sys.exit(cli())
