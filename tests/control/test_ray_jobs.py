"""What is made of the answers of Ray's job API."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobStatus

from orchestrator.control.ray_jobs import JOB, RUN, RUNS_DIR, being_trained, connect, exit_code
from orchestrator.errors import ClusterError


@dataclass
class Told:
    """What the job server tells of a job."""

    submission_id: str = "job-1"
    status: JobStatus = JobStatus.FAILED
    driver_exit_code: int | None = None
    message: str = ""
    start_time: int = 0
    metadata: dict[str, str] = field(default_factory=dict)


class Server:
    """A client of a job server that knows some jobs."""

    def __init__(self, *jobs: Told) -> None:
        self.jobs = jobs

    def list_jobs(self) -> list[Told]:
        return list(self.jobs)

    def get_job_info(self, job: str) -> Told:
        for one in self.jobs:
            if one.submission_id == job:
                return one
        raise RuntimeError("Request failed with status code 502")

    def get_job_status(self, job: str) -> JobStatus:
        return self.get_job_info(job).status


@pytest.mark.parametrize(
    ("told", "code"),
    [
        (Told(status=JobStatus.SUCCEEDED, driver_exit_code=0), 0),
        (Told(status=JobStatus.STOPPED), 130),
        (Told(driver_exit_code=7), 7),
        (Told(driver_exit_code=137), 137),
        (Told(driver_exit_code=-9), 137),
        (Told(driver_exit_code=-15), 143),
    ],
)
def test_a_job_ends_with_the_code_that_a_shell_would_tell(told: Told, code: int) -> None:
    assert exit_code(Server(told), "job-1") == code


@pytest.mark.parametrize(
    ("server", "said"),
    [
        (Server(Told(message="its node died")), "job-1 is FAILED: its node died"),
        (Server(), "the job server tells no more of job job-1: .*502"),
    ],
)
def test_a_job_whose_end_nobody_knows_is_a_failure_of_the_cluster(
    server: Server, said: str
) -> None:
    with pytest.raises(ClusterError, match=said):
        exit_code(server, "job-1")


def trained(number: int, status: JobStatus, job: str = "mnist", runs_dir: str = "/runs") -> Told:
    metadata = {JOB: job, RUNS_DIR: runs_dir, RUN: f"run-{number}"}
    return Told(f"job-{number}", status, start_time=number, metadata=metadata)


RUNNING, FAILED = JobStatus.RUNNING, JobStatus.FAILED


@pytest.mark.parametrize(
    ("jobs", "found"),
    [
        ([], None),
        ([trained(1, RUNNING)], "mnist/run-1"),
        ([trained(1, RUNNING), trained(2, RUNNING)], "mnist/run-2"),
        # The newest is what resume=auto goes on with: nobody trains it.
        ([trained(1, RUNNING), trained(2, FAILED)], None),
        ([trained(1, RUNNING), trained(2, FAILED, job="gan")], "mnist/run-1"),
        ([trained(1, RUNNING, runs_dir="/others")], None),
        ([Told(status=RUNNING)], None),
    ],
)
def test_the_newest_training_of_a_job_below_a_folder_is_found_while_it_runs(
    jobs: list[Told], found: str | None
) -> None:
    client: Any = Server(*jobs)
    one = being_trained(client, "mnist", "/runs")
    assert (one and one.name) == found


def test_no_variable_sends_a_job_to_another_cluster(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # where Ray keeps a token, too
    for number, name in enumerate(("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"), 2):
        monkeypatch.setenv(name, f"http://127.0.0.1:{number}")
    with pytest.raises(ClusterError) as refusal:
        connect("http://127.0.0.1:1")
    assert "127.0.0.1:1" in str(refusal.value.__cause__)
    said = capsys.readouterr().err
    assert "RAY_ADDRESS is set and not honoured: http://127.0.0.1:1 is asked" in said
