"""Ray's job API: how commands reach a cluster from any machine that reaches its head.

What is asked of a run that was submitted is answered by the same command on the head node, in a
small job of its own: there are the run folder and the lease, and only there is it known whether the
driver lives. Ray's own `job stop` is used for no training: it kills the driver after some seconds,
and its children too.

Call `ray_settings.apply_ray_settings` before this module is imported.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.job_submission import JobStatus, JobSubmissionClient

from orchestrator.control.authentication import proxy_for, refuse_open_token
from orchestrator.control.upload import stage
from orchestrator.errors import ClusterError, ConfigError, ExitCode
from orchestrator.spec.secrets import mask_text

# What a job of ours tells about itself to whoever lists jobs.
RUN, JOB, RUNS_DIR, CODE, ASKED = (
    f"orchestrator.{word}" for word in ("run", "job", "runs_dir", "code", "asked")
)
INSTALLED = "installed"
POLL_S = 0.2
_SETTLE_S = 10.0
_AGENT_PATIENCE_S = 30.0
# What the job server says until then (ray 2.60, dashboard/modules/job/job_head.py).
_NO_AGENT = "No available agent"
# What Ray 2.60 writes into a job's log before the command's own words (job_supervisor.py), and when
# a driver joins or leaves the cluster (_private/worker.py).
_RAYS_WORDS = re.compile(
    r"^(Running entrypoint for job .*|\d{4}-\d\d-\d\d [\d:,]+\t(INFO|WARNING) \w+\.py:\d+ -- .*)\n",
    re.MULTILINE,
)
_FOLDER = re.compile(r"^run folder (.+)$", re.MULTILINE)
# The first Python that has Ray runs the command: the submitter's own path, where all machines have
# one image, else what is on the head node's PATH.
# In one line, as Ray prints it.
_FIND_PYTHON = (
    'own=$1; shift; for python in "$own" python3 python; do "$python" -c "import ray" 2>/dev/null '
    '&& exec "$python" -m orchestrator "$@"; done; echo "no Python with Ray on the PATH of the '
    'head node: start Ray there from its environment" >&2; exit 6'
)


@dataclass(frozen=True, slots=True)
class Submitted:
    """A training that was handed in as a job.

    Attributes:
        job: Ray's id of it.
        name: `<job>/<run>`; empty as long as only the driver knows the run.
        folder: the run folder; None as long as it is not known.
        runs_dir: what the folder lies below.
        is_installed: whether the project is on the nodes already.
    """

    job: str
    name: str
    folder: str | None
    runs_dir: str
    is_installed: bool


def connect(address: str) -> Any:
    """Return a client of the job server at an address.

    Raises:
        ConfigError: the token's file is open to others.
        ClusterError: no job server answers.
    """
    refuse_open_token(os.environ)
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        # The client (ray 2.60, dashboard/utils.py) would go there instead.
        if os.environ.pop(name, None) not in (None, "", address):
            print(f"{name} is set and not honoured: {address} is asked", file=sys.stderr)
    if proxy := proxy_for(address):
        print(
            f"{address} is asked through the proxy {mask_text(proxy)}, which sees the cluster's "
            "token: put the head into no_proxy if it can be reached without",
            file=sys.stderr,
        )
    logging.disable(logging.INFO)  # what the client of the job API tells about itself
    try:
        return JobSubmissionClient(address)
    except Exception as error:
        text = str(error).strip().splitlines()
        raise ClusterError(
            f"no Ray job server at cluster.address={address}: {text[0] if text else error}; start "
            "Ray there with `ray start --head`, or name another address. A cluster with a token "
            "wants RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        ) from error


def command_line(arguments: Sequence[str]) -> str:
    """Return what runs the orchestrator on the head node."""
    return shlex.join(["sh", "-c", _FIND_PYTHON, "sh", sys.executable, *arguments])


def new_id(word: str) -> str:
    """Return an id for a job; chosen here, so that it is known even where the answer is lost."""
    return f"orchestrator-{word}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def hand_in(client: Any, job: str, folder: Path | None, **settings: Any) -> None:
    """Submit a job.

    The job server answers before the head's agent, which takes the jobs, has announced itself.

    Args:
        client: of the job server.
        job: the job's id.
        folder: what to upload; None for nothing.
        settings: what else `submit_job` takes.

    Raises:
        ClusterError: the cluster takes no job.
    """
    environment = settings.pop("runtime_env", {})
    if folder is not None:
        environment = {**environment, "working_dir": str(folder)}
    deadline = time.monotonic() + _AGENT_PATIENCE_S
    while True:
        try:
            client.submit_job(submission_id=job, runtime_env=environment, **settings)
            return
        except Exception as error:
            if _NO_AGENT not in str(error) or time.monotonic() > deadline:
                raise ClusterError(f"Ray takes no job: {error}") from error
            time.sleep(POLL_S)


def follow(client: Any, job: str) -> None:
    """Print what a job prints until it ends.

    Raises:
        ClusterError: the job server is gone.
    """

    async def tail() -> None:
        async for text in client.tail_job_logs(job):
            with suppress(OSError):  # nobody reads any more; the job goes on
                print(_RAYS_WORDS.sub("", text), end="", flush=True)

    try:
        asyncio.run(tail())
    except Exception as error:
        raise _gone(job, error) from error


def _gone(job: str, error: Exception) -> ClusterError:
    return ClusterError(f"the job server tells no more of job {job}: {error}")


def print_log(client: Any, job: str) -> None:
    """Print what a job has printed so far.

    Raises:
        ClusterError: Ray has its log no more.
    """
    try:
        text = client.get_job_logs(job)
    except Exception as error:
        raise _gone(job, error) from error
    print(_RAYS_WORDS.sub("", text), end="", flush=True)


def exit_code(client: Any, job: str) -> int:
    """Return the exit code of a job's command, as a shell has it, waiting for it a little.

    Raises:
        ClusterError: Ray did not run it, with the reason, or tells no more of it.
    """
    deadline = time.monotonic() + _SETTLE_S
    try:
        while not client.get_job_status(job).is_terminal() and time.monotonic() < deadline:
            time.sleep(POLL_S)
        info = client.get_job_info(job)
    except Exception as error:
        raise _gone(job, error) from error
    if info.status == JobStatus.SUCCEEDED:
        return int(ExitCode.DONE)
    if info.status == JobStatus.STOPPED:
        return int(ExitCode.INTERRUPTED)
    if code := int(info.driver_exit_code or 0):
        # Where `sh` replaces itself by the command, a signal that ends it is told below zero.
        return code if code > 0 else 128 - code
    raise ClusterError(f"Ray job {job} is {info.status.value}: {info.message}")


def ask(client: Any, arguments: Sequence[str], *, is_installed: bool) -> int:
    """Run a command of this project on the head node, in a small job, and print what it prints.

    Args:
        client: of the job server.
        arguments: of the command.
        is_installed: whether the project is there already; else it is uploaded, once.

    Returns:
        The command's exit code.
    """
    job = new_id("asks")
    with tempfile.TemporaryDirectory(prefix="orch-ask-") as name:
        folder = None if is_installed else Path(name)
        if folder is not None:
            stage(folder, None)
        hand_in(
            client, job, folder, entrypoint=command_line(arguments), metadata={ASKED: "question"}
        )
    try:
        follow(client, job)
        return exit_code(client, job)
    finally:
        _forget(client, job)


def _forget(client: Any, job: str) -> None:
    """Take a question off the list of jobs; one whose answer nobody waits for any more is ended."""
    with suppress(Exception):
        if not client.get_job_status(job).is_terminal():
            client.stop_job(job)
            deadline = time.monotonic() + _SETTLE_S
            while not client.get_job_status(job).is_terminal() and time.monotonic() < deadline:
                time.sleep(POLL_S)
        client.delete_job(job)


def submitted(client: Any) -> list[Submitted]:
    """Return the trainings that were handed in, the newest first."""
    return [_submitted(client, one.submission_id, one.metadata) for one in _trainings(client)]


def being_trained(client: Any, job: str, runs_dir: str) -> Submitted | None:
    """Return what was handed in last of a job, by its name and folder; None if that has ended."""
    for one in _trainings(client):
        if (one.metadata[JOB], one.metadata[RUNS_DIR]) == (job, runs_dir):
            is_over = one.status.is_terminal()
            return None if is_over else _submitted(client, one.submission_id, one.metadata)
    return None


def _trainings(client: Any) -> list[Any]:
    """Return what Ray knows of the trainings that were handed in, the newest first."""
    try:
        jobs = [job for job in client.list_jobs() if RUNS_DIR in (job.metadata or {})]
    except Exception as error:
        raise ClusterError(f"the job server lists no jobs: {error}") from error
    return sorted(jobs, key=lambda job: job.start_time or 0, reverse=True)


def find(client: Any, run: str) -> Submitted:
    """Return the newest job of a run, which is named by itself, as `<job>/<run>`, or by Ray's id.

    Raises:
        ConfigError: there is none.
    """
    known = submitted(client)
    for one in known:
        if run in (one.job, one.name, one.name.rpartition("/")[2], one.folder):
            return one
    names = ", ".join(one.name or one.job for one in known[:5]) or "none"
    raise ConfigError(
        f"{run}: no job of this run was submitted there; newest: {names}. A run that was not "
        "submitted is found on a machine that sees its folder"
    )


def run_folder(client: Any, job: str) -> str | None:
    """Return the run folder that a job's driver has told in its log, if it is there to be read."""
    try:
        found = _FOLDER.search(client.get_job_logs(job))
    except Exception:  # Ray's client raises RuntimeError for whatever a lost node answers
        return None
    return found[1].strip() if found else None


def _submitted(client: Any, job: str, metadata: dict[str, str]) -> Submitted:
    runs_dir, name = metadata[RUNS_DIR], metadata[JOB]
    run = metadata.get(RUN)
    # A run that is resumed by `auto` or `latest` is known to its driver only.
    folder = f"{runs_dir}/{name}/{run}" if run else run_folder(client, job)
    return Submitted(
        job=job,
        name=f"{name}/{folder.rpartition('/')[2]}" if folder else "",
        folder=folder,
        runs_dir=runs_dir,
        is_installed=metadata.get(CODE) == INSTALLED,
    )
