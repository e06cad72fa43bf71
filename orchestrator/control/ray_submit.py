"""Runs the driver itself on a cluster, through Ray's job API.

Call `ray_settings.apply_ray_settings` before this module is imported.
"""

from __future__ import annotations

import asyncio
import logging
import shlex
import shutil
import sys
import tempfile
import time
import urllib.parse
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray.job_submission import JobStatus, JobSubmissionClient

from orchestrator.errors import ClusterError, ConfigError, ExitCode
from orchestrator.spec.config import PROJECT_DIR
from orchestrator.spec.schema import RunConfig

_CODE = ("orchestrator", "conf", "jobs")
_USERS_DIR = "config_dir"
_POLL_S = 0.2
_STOP_TIMEOUT_S = 120.0
_SETTLE_S = 10.0
_AGENT_PATIENCE_S = 30.0
# What the job server says until then (ray 2.60, dashboard/modules/job/job_head.py).
_NO_AGENT = "No available agent"
_SCRIPT = "run.sh"
# The first Python that has Ray runs the driver: the submitter's own path, where all machines have
# one image, else what is on the head node's PATH.
_FIND_PYTHON = """own=$1
shift
for python in "$own" python3 python; do
    "$python" -c 'import ray' 2>/dev/null && exec "$python" -m orchestrator "$@"
done
echo 'no Python with Ray on the PATH of the head node: start Ray there from its environment' >&2
exit 6
"""


def submit(config: RunConfig, overrides: list[str], config_dir: Path | None) -> int:
    """Submit a training as a Ray job, show its output and wait for its end.

    Args:
        config: validated, with `cluster=existing` and the address of Ray's dashboard.
        overrides: as typed.
        config_dir: the user's own configuration and modules, uploaded with the project.

    Returns:
        The exit code of the driver on the cluster.

    Raises:
        ConfigError: the address, run folder or record cannot work from a cluster.
        ClusterError: no job server answers, or the job could not be started.
    """
    _refuse(config)
    logging.disable(logging.INFO)  # what the client of the job API tells about itself
    address = config.cluster.address
    assert address is not None
    client = _connect(address)
    arguments = _arguments(config, overrides, config_dir)
    with tempfile.TemporaryDirectory(prefix="orch-submit-") as folder:
        _stage(Path(folder), config_dir)
        job = _hand_in(client, address, Path(folder), arguments)
    print(f"job {job} at {address}; Ctrl-C saves and stops it", flush=True)
    try:
        asyncio.run(_follow(client, job))
    except KeyboardInterrupt:
        _stop(client, job)
    return _exit_code(client, job)


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


def _connect(address: str) -> Any:
    try:
        return JobSubmissionClient(address)
    except Exception as error:
        text = str(error).strip().splitlines()
        raise ClusterError(
            f"no Ray job server at cluster.address={address}: {text[0] if text else error}; start "
            "Ray there with `ray start --head`, or name another address. A cluster with a token "
            "wants RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        ) from error


def _arguments(config: RunConfig, overrides: list[str], config_dir: Path | None) -> list[str]:
    """Return what the driver on the cluster is called with."""
    ours = ("cluster=", "cluster.address=")
    arguments = [override for override in overrides if not override.startswith(ours)]
    arguments += ["cluster=existing", "cluster.address=auto"]
    if not Path(config.data.cache_dir).is_absolute():
        # Beside the runs, where every node sees it and the next job finds it again.
        arguments.append(f"data.cache_dir={Path(config.runs_dir) / 'data'}")
    if config_dir is not None:
        arguments.append(f"--config-dir={_USERS_DIR}")
    return arguments


def _hand_in(client: Any, address: str, folder: Path, arguments: list[str]) -> str:
    """Submit the staged folder as a job and return its id.

    The job server answers before the head's agent, which takes the jobs, has announced itself.
    """
    deadline = time.monotonic() + _AGENT_PATIENCE_S
    while True:
        try:
            job: str = client.submit_job(
                entrypoint=shlex.join(["sh", _SCRIPT, sys.executable, "train", *arguments]),
                runtime_env={
                    "working_dir": str(folder),
                    # `ray job stop` gives the driver so long to save; 3 s by default.
                    "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"},
                },
            )
            return job
        except Exception as error:
            if _NO_AGENT not in str(error) or time.monotonic() > deadline:
                raise ClusterError(f"Ray at {address} takes no job: {error}") from error
            time.sleep(_POLL_S)


def _stage(folder: Path, config_dir: Path | None) -> None:
    """Copy what the cluster needs; Ray would upload the environment and the runs too."""
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    (folder / _SCRIPT).write_text(_FIND_PYTHON)
    for name in _CODE:
        shutil.copytree(PROJECT_DIR / name, folder / name, ignore=ignore)
    if config_dir is not None:
        shutil.copytree(config_dir, folder / _USERS_DIR, ignore=ignore)


async def _follow(client: Any, job: str) -> None:
    """Print what the job prints until it ends."""
    async for text in client.tail_job_logs(job):
        with suppress(OSError):  # nobody reads any more; the job goes on
            print(text, end="", flush=True)


def _stop(client: Any, job: str) -> None:
    """Let the driver save and stop; interrupted again, leave it to do so alone."""
    print("\nstopping the job: it saves first", flush=True)
    client.stop_job(job)
    deadline = time.monotonic() + _STOP_TIMEOUT_S
    with suppress(KeyboardInterrupt):
        while time.monotonic() < deadline and not client.get_job_status(job).is_terminal():
            time.sleep(_POLL_S)


def _exit_code(client: Any, job: str) -> int:
    """Return the driver's own exit code; its last lines say why Ray did not run it, if so."""
    deadline = time.monotonic() + _SETTLE_S
    while not client.get_job_status(job).is_terminal() and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    info = client.get_job_info(job)
    if info.status == JobStatus.SUCCEEDED:
        return int(ExitCode.DONE)
    if info.status == JobStatus.STOPPED:
        return int(ExitCode.INTERRUPTED)
    if info.driver_exit_code:
        return int(info.driver_exit_code)
    raise ClusterError(f"Ray job {job} is {info.status.value}: {info.message}")
