"""Runs the driver itself on a cluster, through Ray's job API.

Call `ray_settings.apply_ray_settings` before this module is imported.
"""

from __future__ import annotations

import getpass
import signal
import socket
import tempfile
import time
import urllib.parse
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from orchestrator.control.authentication import refuse_open_cluster
from orchestrator.control.ray_jobs import (
    CODE,
    JOB,
    POLL_S,
    RUN,
    RUNS_DIR,
    Submitted,
    being_trained,
    command_line,
    connect,
    exit_code,
    follow,
    hand_in,
    new_id,
    run_folder,
)
from orchestrator.control.upload import USERS_DIR, stage
from orchestrator.errors import ClusterError, ConfigError, Interrupted
from orchestrator.spec.schema import Code, RunConfig

# `ray job stop`, which others may use, gives the driver so long to save; 3 s by default.
_ENVIRONMENT = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}}
# How long a driver may take to say which run it has taken up.
_NAMING_S = 120.0
_FOUND_BY_DRIVER = ("auto", "latest")


def submit(
    config: RunConfig,
    overrides: list[str],
    config_dir: Path | None,
    *,
    new_name: str,
    detach: bool,
) -> int:
    """Submit a training as a Ray job, show its output and wait for its end.

    A signal leaves the job alone: it goes on. With `resume=auto`, a job that still trains is
    watched again: a loop that has lost sight of it neither disturbs it nor begins another run.

    Args:
        config: validated, with `cluster=existing` and the address of Ray's dashboard.
        overrides: as typed.
        config_dir: the user's own configuration and modules, uploaded with the project.
        new_name: of the run, if it is a new one and has no `run_name`.
        detach: return as soon as the run has a name.

    Returns:
        The exit code of the driver on the cluster; 0 where it was left to itself, 128 and more
        where a signal ended the watching.

    Raises:
        ConfigError: the address, run folder or record cannot work from a cluster.
        ClusterError: no job server answers, it is open to anybody, or the job could not be started.
    """
    _refuse(config)
    address = config.cluster.address
    assert address is not None
    if not config.cluster.allow_unauthenticated:
        refuse_open_cluster(address)
    client = connect(address)
    again = _still_trained(client, config)
    if again is not None:
        job, run = again.job, again.name.rpartition("/")[2] or None
        words = "is trained already and watched again; nothing is submitted"
    else:
        job, run, words = new_id(config.job.name), _run_name(config, new_name), ""
    with _Leaving() as leaving:
        try:
            if again is None:
                _send(client, job, config, overrides, config_dir, run)
            name = f"run {config.job.name}/{run}" if run else f"resume={config.resume}"
            print(" ".join(filter(None, [f"job {job} at {address}: {name}", words])), flush=True)
            if detach:
                _tell_how_to_look(address, _name(client, job, config, run))
                return 0
            print("Ctrl-C leaves it running; `runs stop` saves and stops it", flush=True)
            follow(client, job)
        except KeyboardInterrupt:
            leaving.is_over = True
            return _leave(client, job, address, config, run, leaving.number)
        except ClusterError:
            _tell_how_to_look(address, f"{config.job.name}/{run}" if run else job)
            raise
    return exit_code(client, job)


def _still_trained(client: Any, config: RunConfig) -> Submitted | None:
    """Return the job that `resume=auto` would be refused for, if it came from here."""
    if config.resume != "auto":
        return None
    return being_trained(client, config.job.name, config.runs_dir)


class _Leaving:
    """Turns signals into the end of watching, also those that come twice.

    SIGINT stays ignored where the parent ignores it, as a shell does for what runs in the
    background; SIGTERM is always heeded.
    """

    def __init__(self) -> None:
        self.number = signal.SIGINT
        self.is_over = False
        self._kept: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Leaving:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number == signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN:
                self._kept[number] = signal.signal(number, self._leave)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._kept.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _leave(self, number: int, frame: FrameType | None) -> None:
        if not self.is_over:
            self.number = signal.Signals(number)
            raise Interrupted


def _refuse(config: RunConfig) -> None:
    """Refuse what only makes sense on the machine where it was typed."""
    errors = []
    address = config.cluster.address or ""
    if urllib.parse.urlsplit(address).scheme not in ("http", "https"):
        errors.append(
            f"cluster.address={address}: submit talks to Ray's dashboard; give "
            "address=http://HEAD:8265"
        )
    if not Path(config.runs_dir).is_absolute():
        errors.append(
            f"runs_dir={config.runs_dir}: the driver runs on the cluster, where a relative folder "
            "is lost; set runs_dir to an absolute path that every node sees"
        )
    uri = config.tracking.uri
    if uri is None or uri.startswith("sqlite:"):
        errors.append(
            f"tracking.uri={uri or 'null, a SQLite file'}: a cluster needs an MLflow server; set "
            "tracking.uri=http://SERVER:5000"
        )
    if errors:
        raise ConfigError("\n".join(errors))


def _run_name(config: RunConfig, new_name: str) -> str | None:
    """Return the run's name, chosen here for a new run; None where only the driver can find it."""
    if config.resume is not None:
        return None if config.resume in _FOUND_BY_DRIVER else config.resume
    return config.run_name or new_name


def _arguments(
    config: RunConfig, overrides: list[str], config_dir: Path | None, run: str | None
) -> list[str]:
    """Return what the driver on the cluster is called with."""
    ours = ("cluster=", "cluster.address=")
    arguments = [override for override in overrides if not override.startswith(ours)]
    arguments += ["cluster=existing", "cluster.address=auto"]
    if config.resume is None and config.run_name is None:
        arguments.append(f"run_name={run}")
    if not Path(config.data.cache_dir).is_absolute():
        # Beside the runs, where every node sees it and the next job finds it again.
        arguments.append(f"data.cache_dir={Path(config.runs_dir) / 'data'}")
    if config_dir is not None:
        folder = USERS_DIR if config.cluster.code is Code.upload else config_dir
        arguments.append(f"--config-dir={folder}")
    return arguments


def _send(
    client: Any,
    job: str,
    config: RunConfig,
    overrides: list[str],
    config_dir: Path | None,
    run: str | None,
) -> None:
    """Upload the code, unless the nodes have it, and hand in the job."""
    arguments = _arguments(config, overrides, config_dir, run)
    code = config.cluster.code
    metadata = {JOB: config.job.name, RUNS_DIR: config.runs_dir, CODE: code.value}
    metadata["orchestrator.by"] = f"{_user()} on {socket.gethostname()}"
    if run is not None:
        metadata[RUN] = run
    with tempfile.TemporaryDirectory(prefix="orch-submit-") as name:
        folder = Path(name) if code is Code.upload else None
        if folder is not None:
            print(f"upload {stage(folder, config_dir)}", flush=True)
        hand_in(
            client,
            job,
            folder,
            entrypoint=command_line(["train", *arguments]),
            metadata=metadata,
            runtime_env=_ENVIRONMENT,
        )


def _name(client: Any, job: str, config: RunConfig, run: str | None) -> str:
    """Return how commands call the run, which a driver that looks for one says first."""
    if run is not None:
        return f"{config.job.name}/{run}"
    deadline = time.monotonic() + _NAMING_S
    while time.monotonic() < deadline and not client.get_job_status(job).is_terminal():
        if folder := run_folder(client, job):
            return f"{config.job.name}/{folder.rpartition('/')[2]}"
        time.sleep(POLL_S)
    return job


def _leave(
    client: Any, job: str, address: str, config: RunConfig, run: str | None, number: signal.Signals
) -> int:
    """Say what becomes of a job that is not watched any more."""
    try:
        client.get_job_info(job)
    except Exception:
        print("\nended before the job was handed in", flush=True)
    else:
        print(f"\n{number.name}: not watched any more; the job goes on", flush=True)
        folder = None
        if run is None:
            with suppress(Exception):
                folder = run_folder(client, job)
        found = run or (folder.rpartition("/")[2] if folder else None)
        _tell_how_to_look(address, f"{config.job.name}/{found}" if found else job)
    return 128 + number


def _tell_how_to_look(address: str, name: str) -> None:
    for word, how in (
        ("look", f"status {name}"),
        ("logs", f"logs {name} -f"),
        ("stop", f"stop {name}"),
    ):
        print(f'  {word}  make runs args="{how} address={address}"', flush=True)


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "somebody"
