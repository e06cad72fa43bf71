"""The command `runs`: what can be asked about runs, here or on the head of a cluster."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.errors import ConfigError, ExitCode
from orchestrator.spec.paths import RunPaths

GRAMMAR = """\
runs: RUN is a run's folder, <job>/<run> or its name; address=http://HEAD:8265 asks a cluster
  runs list [job=NAME] [runs_dir=FOLDER] [address=...]   status, steps, result, age
  runs status RUN [runs_dir=FOLDER] [address=...]        where it is, how it fares, what failed
  runs logs RUN [-f] [worker=N] [address=...]            what was written; -f follows
  runs stop RUN [force=true] [address=...]               save and stop; again, or by force: end now
  runs compare RUN RUN [tolerance=1e-5] [runs_dir=...]   what differs
  runs sync RUN [tracking.uri=...] [runs_dir=...]        write the record into MLflow once more"""
_DEFAULT_DIR = "runs"


def runs(arguments: list[str], cwd: Path) -> int:
    """Do what `runs` was asked for.

    Args:
        arguments: as typed, the first a word.
        cwd: what relative paths are relative to.

    Returns:
        The exit code.

    Raises:
        ConfigError: the word or one of the keys is not known, or there is no such run.
    """
    match arguments:
        case ["list", *rest]:
            return _list(rest, cwd)
        case ["status" | "logs" | "stop" as word, run, *rest]:
            keys = {"status": (), "logs": ("worker", "follow"), "stop": ("force",)}[word]
            settings = _settings(word, rest, (*keys, "runs_dir", "address", "via"))
            if settings.get("address"):
                return _ask_remotely(word, run, settings)
            return int(_answer(word, run, settings, cwd))
        case ["sync", run, *rest]:
            return int(_sync(run, _settings("sync", rest, ("runs_dir", "tracking.uri")), cwd))
        case ["compare", left, right, *rest]:
            settings = _settings("compare", rest, ("runs_dir", "tolerance"))
            return int(_compare((left, right), settings, cwd))
    raise ConfigError(GRAMMAR)


def _answer(word: str, run: str, settings: Mapping[str, str], cwd: Path) -> ExitCode:
    """Answer from a run folder that this machine sees."""
    from orchestrator.status import print_status

    worker, follow = _worker(settings), _flag(settings, "follow")
    force, via = _flag(settings, "force"), settings.get("via")
    paths = _find(run, settings, cwd)
    if word == "status":
        return print_status(paths, via)
    if word == "logs":
        from orchestrator.logs import print_logs

        return print_logs(paths, worker, follow=follow)
    from orchestrator.stopping import stop

    return stop(paths, force=force, address=via)


def _find(run: str, settings: Mapping[str, str], cwd: Path) -> RunPaths:
    from orchestrator.status import find_run_folder

    return find_run_folder(run, settings.get("runs_dir", _DEFAULT_DIR), cwd)


def _sync(run: str, settings: Mapping[str, str], cwd: Path) -> ExitCode:
    from orchestrator.driver import sync
    from orchestrator.spec.config import resolve_uri
    from orchestrator.spec.plan import absolute_uri

    paths, given = _find(run, settings, cwd), settings.get("tracking.uri")
    return sync(paths, absolute_uri(resolve_uri(given), cwd) if given else None)


def _compare(runs: tuple[str, str], settings: Mapping[str, str], cwd: Path) -> ExitCode:
    from orchestrator.comparison import DEFAULT_TOLERANCE, compare_runs

    given = settings.get("tolerance")
    tolerance = DEFAULT_TOLERANCE if given is None else _tolerance(given)
    left, right = (_find(run, settings, cwd) for run in runs)
    return compare_runs(left, right, tolerance)


def _list(arguments: list[str], cwd: Path) -> int:
    if not any(argument.startswith("address=") for argument in arguments):
        from orchestrator.listing import list_runs

        return int(list_runs(arguments, cwd))
    settings = _settings("list", arguments, ("job", "runs_dir", "address"))
    client, jobs = _client(settings["address"])
    known = jobs.submitted(client)
    folders = {one.runs_dir: one.is_installed for one in reversed(known)}
    if runs_dir := settings.get("runs_dir"):
        folders = {runs_dir: folders.get(runs_dir, False)}
    if not folders:
        print(f"no runs were submitted to {settings['address']}")
    job = [f"job={settings['job']}"] if settings.get("job") else []
    code = 0
    for folder, is_installed in folders.items():
        asked = ["runs", "list", f"runs_dir={folder}", *job]
        code = jobs.ask(client, asked, is_installed=is_installed) or code
    return code


def _ask_remotely(word: str, run: str, settings: Mapping[str, str]) -> int:
    """Let the head of a cluster answer about a run that was submitted there."""
    _worker(settings)
    address = settings["address"]
    client, jobs = _client(address)
    one = jobs.find(client, run)
    if word == "logs" and "worker" not in settings:
        # Ray keeps what the driver prints, and has it also where no run came to be.
        if _flag(settings, "follow"):
            jobs.follow(client, one.job)
        else:
            jobs.print_log(client, one.job)
        return int(ExitCode.DONE)
    if one.folder is None:
        raise ConfigError(
            f"{run}: its driver has not said yet which run it trains; what it says: "
            f"runs logs {one.job} address={address}"
        )
    passed = [f"{key}={value}" for key, value in settings.items() if key not in ("address", "via")]
    asked = ["runs", word, one.folder, *passed]
    if word != "logs":
        asked.append(f"via={address}")
    code: int = jobs.ask(client, asked, is_installed=one.is_installed)
    return code


def _client(address: str) -> tuple[Any, Any]:
    """Return a client of a job server, and the module that speaks through it."""
    from orchestrator.control.ray_settings import apply_ray_settings
    from orchestrator.spec.schema import ClusterName

    apply_ray_settings(ClusterName.existing)
    from orchestrator.control import ray_jobs

    return ray_jobs.connect(address), ray_jobs


def _settings(word: str, arguments: list[str], known: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        key = key.removeprefix("cluster.")
        if not equals or key not in known:
            raise ConfigError(f"runs {word}: {argument} is not known here\n{GRAMMAR}")
        found[key] = value
    return found


def _worker(settings: Mapping[str, str]) -> int | None:
    text = settings.get("worker")
    if text is None or text.isdecimal():
        return None if text is None else int(text)
    raise ConfigError(f"worker={text}: the index of a worker is meant, from 0")


def _flag(settings: Mapping[str, str], key: str) -> bool:
    text = settings.get(key, "false")
    if text in ("true", "false"):
        return text == "true"
    raise ConfigError(f"{key}={text}: {key}=true or {key}=false is meant")


def _tolerance(text: str) -> float:
    with contextlib.suppress(ValueError):
        if float(text) >= 0:
            return float(text)
    raise ConfigError(f"runs compare: tolerance={text}: tolerance=NUMBER is meant, at least 0")
