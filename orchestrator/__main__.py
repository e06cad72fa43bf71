"""The command line: compose, plan, then print or launch; exit codes."""

from __future__ import annotations

import contextlib
import difflib
import os
import secrets
import sys
import traceback
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from orchestrator.errors import ConfigError, ExitCode, OrchestratorError, interruptions

_VERBS = {
    "train": "train a job: train job=mnist strategy=multi_worker strategy.num_workers=2",
    "plan": "print what a run would do, without starting anything",
    "doctor": "check all that can be checked before a step: nodes, data, memory, disk, MLflow",
    "config": "print the resolved configuration",
    "verify": "prove that replicas, workers and micro-batches compute what one device computes",
    "chaos": "prove that a run under faults leaves what an undisturbed one leaves",
    "sweep": "train a job with all combinations of values: sweep job=mnist train.seed=1,2,3",
    "submit": "run train on a Ray cluster: submit job=mnist cluster.address=http://head:8265 ...",
    "runs": "runs list; runs status|logs|stop RUN; runs compare RUN RUN; runs sync RUN",
    "weights": "turn a checkpoint into Keras's weights and back: weights RUN to=FILE.weights.h5",
    "ui": "open the MLflow UI",
    "up": "keep a local Ray and TensorFlow at hand: train then begins in a breath; up idle_s=3600",
    "down": "end what up keeps",
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
    return told(lambda: _run(verb, rest))


def told(act: Callable[[], int]) -> int:
    """Do what a process is for; tell an error in the user's words and return its exit code."""
    try:
        with interruptions():
            return act()
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
        "doctor": _doctor,
        "config": _config,
        "verify": _verify,
        "chaos": _chaos,
        "sweep": _sweep,
        "submit": _submit,
        "runs": _runs,
        "weights": _weights,
        "ui": _ui,
        "up": _up,
        "down": _down,
        "serve": _serve,
    }
    if verb not in verbs:
        close = difflib.get_close_matches(verb, verbs, n=1)
        meant = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"{verb}: there is no such command{meant} Commands: {', '.join(verbs)}")
    if "-h" in rest or "--help" in rest:
        print(f"{verb}: {_VERBS[verb]}")
        return int(ExitCode.DONE)
    if verb == "runs":
        rest = ["follow=true" if argument == "-f" else argument for argument in rest]
    overrides, config_dir = _split_options(rest)
    return verbs[verb](overrides, config_dir)


def _one_folder(before: Path | None, folder: str) -> Path:
    if before is not None:
        raise ConfigError(f"--config-dir={folder}: {before} is given already, and one is possible")
    return Path(os.path.expanduser(folder))


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
            config_dir = _one_folder(config_dir, folder)
        elif argument.startswith("--config-dir="):
            config_dir = _one_folder(config_dir, argument.partition("=")[2])
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
    from orchestrator.spec.host import NOT_ASKED, expected_host
    from orchestrator.spec.plan import make_plan
    from orchestrator.spec.schema import ClusterName

    config = load_config(overrides, config_dir)
    name = config.run_name or "<run>"
    print(describe(make_plan(config, run=name, host=expected_host(config), cwd=Path.cwd())), end="")
    if config.cluster.name is ClusterName.existing:
        print(f"hint: {NOT_ASKED}")
    return int(ExitCode.DONE)


def _doctor(overrides: list[str], config_dir: Path | None) -> int:
    from orchestrator.doctor.run import doctor

    return _found(doctor(overrides, config_dir, Path.cwd()), "a problem was found")


def _config(overrides: list[str], config_dir: Path | None) -> int:
    from orchestrator.spec.config import load_config, to_yaml

    print(to_yaml(load_config(overrides, config_dir)), end="")
    return int(ExitCode.DONE)


def _verify(overrides: list[str], config_dir: Path | None) -> int:
    from orchestrator.verify.run import verify

    return _found(verify(overrides, config_dir, Path.cwd()))


def _chaos(overrides: list[str], config_dir: Path | None) -> int:
    from orchestrator.chaos.run import chaos

    return _found(chaos(overrides, config_dir, Path.cwd()))


def _sweep(overrides: list[str], config_dir: Path | None) -> int:
    from orchestrator.sweep.run import sweep

    return _found(sweep(overrides, config_dir, Path.cwd()))


def _found(code: ExitCode, meaning: str = "") -> int:
    """Name the exit code of a command that has told its findings itself."""
    if code is not ExitCode.DONE:
        print(f"exit code {code:d}: {meaning or _MEANING[code]}", file=sys.stderr)
    return int(code)


def _submit(overrides: list[str], config_dir: Path | None) -> int:
    from orchestrator.spec.config import load_config

    for override in overrides:
        if override.startswith("cluster=") and override != "cluster=existing":
            raise ConfigError(f"{override}: submit runs on an existing cluster; leave it out")
    detach, overrides = _take_flag("detach", overrides)
    config = load_config(["cluster=existing", *overrides], config_dir)
    from orchestrator.control.ray_settings import apply_ray_settings

    apply_ray_settings(config.cluster.name)
    from orchestrator.control.ray_submit import submit
    from orchestrator.runs import new_run_name

    name = new_run_name(datetime.now(), secrets.token_hex(2))
    return submit(config, overrides, config_dir, new_name=name, detach=detach)


def _take_flag(key: str, overrides: list[str]) -> tuple[bool, list[str]]:
    """Separate `KEY=true|false`, which says how a command is run, from the overrides."""
    given = [override for override in overrides if override.partition("=")[0] == key]
    for override in given:
        if override not in (f"{key}=true", f"{key}=false"):
            raise ConfigError(f"{override}: {key}=true or {key}=false is meant")
    rest = [override for override in overrides if override not in given]
    return f"{key}=true" in given[-1:], rest


def _runs(arguments: list[str], config_dir: Path | None) -> int:
    from orchestrator.runs_command import runs

    return int(runs(arguments, Path.cwd()))


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
    if known["port"] and not known["port"].isdecimal():
        raise ConfigError(f"port={known['port']}: must be a whole number")
    from orchestrator.spec.config import resolve_uri
    from orchestrator.spec.paths import typed_path
    from orchestrator.spec.plan import absolute_uri
    from orchestrator.track.mlflow_ui import open_ui

    asked = known["tracking.uri"]
    root = typed_path(known["runs_dir"], Path.cwd())
    uri = resolve_uri(asked) if asked else f"sqlite:///{root / 'mlflow.db'}"
    port = int(known["port"]) if known["port"] else None
    return open_ui(
        absolute_uri(uri, Path.cwd()),
        str(root / "mlartifacts"),
        port,
        known["experiment"] or None,
    )


def _up(overrides: list[str], config_dir: Path | None) -> int:
    from orchestrator.keeping import up

    return int(up(overrides))


def _down(overrides: list[str], config_dir: Path | None) -> int:
    from orchestrator.keeping import down

    if overrides:
        raise ConfigError(f"down: {overrides[0]}: it takes no arguments")
    return int(down())


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
