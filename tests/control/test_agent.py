"""The agent in this process, with real workers that it starts, watches and ends."""

from __future__ import annotations

import math
import os
import pickle
import platform
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from orchestrator.control.agent import Agent
from orchestrator.control.code import code_digest
from orchestrator.control.folders import prepare
from orchestrator.control.launcher import Zygote
from orchestrator.control.worker_process import (
    catches,
    describe_status,
    log_tail,
    process_state,
)
from orchestrator.errors import StartFailed
from orchestrator.spec.messages import (
    BlockDone,
    Cause,
    Death,
    Ended,
    Failed,
    Message,
    Outcome,
    Phase,
    Request,
    Stacks,
    WorkerOrder,
)
from orchestrator.spec.plan import RunPlan
from tests.control.conftest import is_gone, wait_until
from tests.plans import tiny_plan

# A user's module beside the configuration: a job that never gets its data.
WAITING_JOB = """
import os
import threading

from tests.train.tiny import Tiny


class Waiting(Tiny):
    def source(self, split):
        print("waiting as", os.getpid(), flush=True)
        threading.Event().wait()
"""
WAITING = {"job__class_name": "waiting_job.Waiting"}
# A driver that listens until the worker waits for its data, and then only holds its agent.
SILENT_DRIVER = """
import sys
from pathlib import Path
from orchestrator.control.agent import Agent
from orchestrator.control.worker_process import log_tail

zygote, order, log, code_dir = sys.argv[1:]
agent = Agent(0, "run", zygote=zygote, use_fork=True, driver_silence_s=0.5)
agent.start(Path(order).read_bytes(), 1, log, f"{log}.stacks", [code_dir])
while "waiting as" not in log_tail(Path(log)):
    agent.poll(0.1)
input()
"""


@pytest.fixture
def agent(zygote: Zygote) -> Agent:
    """An agent that never thinks its driver gone."""
    return make_agent(zygote)


def make_agent(zygote: Zygote | None, worker: int = 0, driver_silence_s: float = math.inf) -> Agent:
    return Agent(
        worker,
        "run",
        zygote=None if zygote is None else str(zygote.socket_path),
        use_fork=zygote is not None,
        driver_silence_s=driver_silence_s,
    )


def order(plan: RunPlan, attempt: int) -> bytes:
    return pickle.dumps(
        WorkerOrder(
            plan=plan,
            worker=0,
            attempt=attempt,
            addresses=(),
            visible_gpus="",
            restore_from=None,
        )
    )


def start(agent: Agent, folder: Path, attempt: int = 1, **changes: Any) -> RunPlan:
    """Start the worker of the tiny plan; modules in `folder` can be imported by its job."""
    plan = tiny_plan(folder, **changes)
    prepare(plan.paths, attempt)
    log, stacks = plan.paths.worker_log(attempt, 0), plan.paths.worker_stacks(attempt, 0)
    agent.start(order(plan, attempt), attempt, str(log), str(stacks), [str(folder)])
    return plan


def waiting_pid(plan: RunPlan, attempt: int = 1) -> int:
    """Wait until the worker of a waiting job waits, and return its pid."""
    log = plan.paths.worker_log(attempt, 0)

    def found() -> re.Match[str] | None:
        return re.search(r"waiting as (\d+)\n", log.read_text() if log.exists() else "")

    wait_until(found, "the job waits for its data")
    match = found()
    assert match is not None
    return int(match[1])


def heard_until(agent: Agent, *kinds: type[Message]) -> list[Message]:
    """Poll until a message of one of the kinds is the last one."""
    told: list[Message] = []

    def came() -> bool:
        told.extend(agent.poll(0.1))
        return any(isinstance(message, kinds) for message in told)

    wait_until(came, " or ".join(kind.__name__ for kind in kinds))
    return told


@pytest.fixture
def job_dir(tmp_path: Path) -> Path:
    """A folder with the module of the waiting job."""
    (tmp_path / "waiting_job.py").write_text(WAITING_JOB)
    return tmp_path


def test_a_worker_is_heard_from_its_first_beacon_to_its_end(agent: Agent, tmp_path: Path) -> None:
    start(agent, tmp_path, attempt=3)
    told = heard_until(agent, Ended, Failed, Death)
    assert isinstance(told[-1], Ended) and told[-1].outcome is Outcome.completed
    assert sum(m.num_steps for m in told if isinstance(m, BlockDone)) == 12
    assert {message.attempt for message in told} == {3}


def test_without_fork_a_worker_started_afresh_is_heard_too(tmp_path: Path) -> None:
    agent = make_agent(None)
    start(agent, tmp_path, export__enabled=False)
    assert isinstance(heard_until(agent, Ended, Failed, Death)[-1], Ended)


def test_a_worker_whose_job_fails_tells_so_and_is_no_death(agent: Agent, tmp_path: Path) -> None:
    start(agent, tmp_path, job__class_name="tests.train.tiny.Missing")
    [failed] = [m for m in heard_until(agent, Failed, Death) if isinstance(m, Failed | Death)]
    assert isinstance(failed, Failed) and failed.cause is Cause.job


def test_a_worker_asked_to_save_and_stop_ends_stopped(agent: Agent, tmp_path: Path) -> None:
    start(agent, tmp_path, train__steps=10_000_000)
    heard_until(agent, BlockDone)
    agent.request(Request.SAVE_AND_STOP)
    last = heard_until(agent, Ended, Failed, Death)[-1]
    assert isinstance(last, Ended) and last.outcome is Outcome.stopped


def test_a_killed_worker_is_a_death_with_its_status_and_the_end_of_its_log(
    agent: Agent, job_dir: Path
) -> None:
    plan = start(agent, job_dir, **WAITING)
    pid = waiting_pid(plan)
    os.kill(pid, signal.SIGKILL)
    death = heard_until(agent, Death)[-1]
    assert isinstance(death, Death)
    assert (death.worker, death.attempt, death.exit_status) == (0, 1, -9)
    assert death.error == "its process was ended by SIGKILL"
    assert death.log_path == str(plan.paths.worker_log(1, 0))
    assert death.log_tail.splitlines()[-1] == f"waiting as {pid}"


def test_what_a_worker_said_before_it_was_killed_is_heard(agent: Agent, job_dir: Path) -> None:
    plan = start(agent, job_dir, **WAITING)
    os.kill(waiting_pid(plan), signal.SIGKILL)
    phases = [getattr(message, "phase", None) for message in heard_until(agent, Death)]
    assert phases == [Phase.connecting, Phase.loading_data, None]


def test_kill_returns_when_the_process_is_gone(agent: Agent, job_dir: Path) -> None:
    pid = waiting_pid(start(agent, job_dir, **WAITING))
    agent.kill()
    assert is_gone(pid)


def test_what_is_killed_on_purpose_is_no_death(agent: Agent, job_dir: Path) -> None:
    waiting_pid(start(agent, job_dir, **WAITING))
    agent.kill()
    assert agent.poll(0.0) == []


def test_a_process_that_has_ended_by_itself_is_left_alone(agent: Agent, job_dir: Path) -> None:
    plan = start(agent, job_dir, **WAITING)
    os.kill(waiting_pid(plan), signal.SIGKILL)
    heard_until(agent, Death)
    # Its descriptors may belong to something else by now.
    for request in Request:
        agent.request(request)
    agent.kill()
    agent.kill()


def test_a_second_start_ends_the_first_process(agent: Agent, job_dir: Path) -> None:
    first = waiting_pid(start(agent, job_dir, **WAITING))
    second = waiting_pid(start(agent, job_dir, attempt=2, **WAITING), attempt=2)
    assert is_gone(first) and not is_gone(second)
    agent.kill()


def test_stacks_are_written_on_request(agent: Agent, job_dir: Path) -> None:
    plan = start(agent, job_dir, **WAITING)
    waiting_pid(plan)
    agent.request(Request.STACKS)
    stacks = plan.paths.worker_stacks(1, 0)
    [told] = [m for m in heard_until(agent, Stacks) if isinstance(m, Stacks)]
    assert "waiting_job.py" in told.text and told.text in stacks.read_text()
    agent.kill()


def test_a_process_that_would_die_of_the_request_is_not_asked_for_stacks(
    agent: Agent, tmp_path: Path
) -> None:
    plan = tiny_plan(tmp_path)
    stacks = plan.paths.worker_stacks(1, 0)
    stacks.parent.mkdir(parents=True)
    os.mkfifo(stacks)  # it hangs where it opens the file, before it can handle the signal
    log = str(plan.paths.worker_log(1, 0))
    agent.start(order(plan, 1), 1, log, str(stacks), [])
    agent.request(Request.STACKS)
    [told] = [m for m in heard_until(agent, Stacks, Death) if isinstance(m, Stacks | Death)]
    assert isinstance(told, Stacks) and told.text == ""
    agent.kill()


def test_a_stopped_process_is_ended_and_told(agent: Agent, job_dir: Path) -> None:
    pid = waiting_pid(start(agent, job_dir, **WAITING))
    os.kill(pid, signal.SIGSTOP)
    death = heard_until(agent, Death)[-1]
    assert isinstance(death, Death)
    assert death.error.startswith("its process was stopped (SIGSTOP or the like, nobody knows by")
    assert is_gone(pid)


@pytest.mark.parametrize(
    ("status", "state", "tracer"),
    [
        ("Name:\tT\nState:\tS (sleeping)\nTracerPid:\t0\n", "S", 0),
        ("State:\tT (stopped)\nTracerPid:\t0\n", "T", 0),
        ("State:\tt (tracing stop)\nTracerPid:\t17\n", "t", 17),
        ("State:\tD (disk sleep)\nTracerPid:\t0\n", "D", 0),
    ],
)
def test_the_state_of_a_process(tmp_path: Path, status: str, state: str, tracer: int) -> None:
    (tmp_path / "42").mkdir()
    (tmp_path / "42" / "status").write_text(status)
    assert process_state(42, tmp_path) == (state, tracer)
    assert process_state(43, tmp_path) == ("", 0)


def test_a_handled_signal_is_told_from_one_that_ends_the_process(tmp_path: Path) -> None:
    (tmp_path / "42").mkdir()
    mask = 1 << (signal.SIGUSR1 - 1) | 1 << (signal.SIGINT - 1)
    (tmp_path / "42" / "status").write_text(f"SigIgn:\tffff\nSigCgt:\t{mask:016x}\n")
    assert catches(42, signal.SIGUSR1, tmp_path)
    assert not catches(42, signal.SIGUSR2, tmp_path)
    assert not catches(43, signal.SIGUSR1, tmp_path)


@pytest.fixture
def silent_driver(zygote: Zygote, job_dir: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a process that holds an agent and falls silent."""
    drivers: list[subprocess.Popen[str]] = []

    def run(plan: RunPlan) -> subprocess.Popen[str]:
        prepare(plan.paths, 1)
        order_path = job_dir / "order"
        order_path.write_bytes(order(plan, 1))
        log = plan.paths.worker_log(1, 0)
        arguments = [str(zygote.socket_path), str(order_path), str(log), str(job_dir)]
        command = [sys.executable, "-c", SILENT_DRIVER, *arguments]
        drivers.append(subprocess.Popen(command, stdin=subprocess.PIPE, text=True))
        return drivers[-1]

    yield run
    for driver in drivers:
        driver.kill()
        driver.communicate()


def test_a_worker_whose_driver_fell_silent_is_ended(
    silent_driver: Callable[[RunPlan], subprocess.Popen[str]], job_dir: Path
) -> None:
    plan = tiny_plan(job_dir, **WAITING)
    driver = silent_driver(plan)
    pid = waiting_pid(plan)
    wait_until(lambda: is_gone(pid), "the worker ends")
    assert driver.poll() is None, "the worker ended with its agent, not with the silence"


def test_a_question_that_was_long_on_its_way_keeps_no_worker(zygote: Zygote, job_dir: Path) -> None:
    agent = make_agent(zygote, driver_silence_s=0.5)
    lived = time.monotonic()
    start(agent, job_dir, **WAITING)
    deaths: list[Death] = []

    def asked_in_vain() -> bool:
        told = agent.poll(0.05, alive_at=lived)
        deaths.extend(message for message in told if isinstance(message, Death))
        return bool(deaths)

    wait_until(asked_in_vain, "the worker ends")
    assert "the driver was silent for" in deaths[0].error


def test_an_order_that_was_long_on_its_way_starts_no_worker(zygote: Zygote, job_dir: Path) -> None:
    agent = make_agent(zygote, driver_silence_s=0.1)
    made = time.monotonic()
    wait_until(lambda: time.monotonic() - made > 0.2, "the driver counts as gone")
    with pytest.raises(StartFailed, match="the driver was silent for"):
        start(agent, job_dir, **WAITING)
    agent.poll(0.0)
    start(agent, job_dir, **WAITING)
    agent.kill()


def test_a_worker_whose_agent_is_killed_is_ended(
    silent_driver: Callable[[RunPlan], subprocess.Popen[str]], job_dir: Path
) -> None:
    plan = tiny_plan(job_dir, **WAITING)
    driver = silent_driver(plan)
    pid = waiting_pid(plan)
    driver.kill()
    wait_until(lambda: is_gone(pid), "the worker ends")


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        yield listener.getsockname()[1]


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True


def test_a_reserved_port_is_of_the_range_and_kept_from_others(
    agent: Agent, taken_port: int
) -> None:
    port = agent.reserve_port(taken_port, taken_port + 100)
    assert taken_port < port <= taken_port + 100
    assert not is_free(port)
    agent.kill()


def test_agents_of_one_node_reserve_different_ports(zygote: Zygote, taken_port: int) -> None:
    agents = [make_agent(zygote, worker) for worker in range(2)]
    first, second = (agent.reserve_port(taken_port, taken_port + 100) for agent in agents)
    assert first != second
    for agent in agents:
        agent.kill()


def test_a_reserved_port_is_let_go_when_its_worker_starts(
    agent: Agent, job_dir: Path, taken_port: int
) -> None:
    # TensorFlow's server shares its port with nobody, so not with the agent either.
    port = agent.reserve_port(taken_port, taken_port + 100)
    assert not is_free(port)
    waiting_pid(start(agent, job_dir, **WAITING))
    assert is_free(port)
    agent.kill()


def test_kill_gives_the_reserved_port_back(agent: Agent, taken_port: int) -> None:
    port = agent.reserve_port(taken_port, taken_port + 100)
    agent.kill()
    assert is_free(port)


def test_a_range_without_a_free_port_is_refused_by_its_key(agent: Agent, taken_port: int) -> None:
    with pytest.raises(StartFailed, match=f"cluster.port_range={taken_port}-{taken_port}"):
        agent.reserve_port(taken_port, taken_port)


def test_a_node_is_described_with_the_versions_that_must_agree() -> None:
    node = Agent.describe_here()
    assert node["host"] == socket.gethostname()
    assert node["python"] == platform.python_version()
    assert node["packages"].keys() == {"tensorflow", "keras", "ray", "numpy", "mlflow"}
    assert node["packages"]["numpy"] == version("numpy")
    socket.inet_aton(node["ip"])


def test_two_tensorflows_on_a_node_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("tensorflow", "tensorflow_cpu"):
        info = tmp_path / f"{package}-2.20.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: {package.replace('_', '-')}\nVersion: 2.20.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    packages = Agent.describe_here()["packages"]
    assert (packages["tensorflow"], packages["tensorflow-cpu"]) == ("2.20.0", "2.20.0")


def test_the_projects_digest_covers_its_jobs(tmp_path: Path) -> None:
    digests = []
    for number, text in enumerate(("rate = 1", "rate = 2")):
        project = tmp_path / str(number)
        (project / "jobs").mkdir(parents=True)
        (project / "jobs" / "mnist.py").write_text(text)
        digests.append(code_digest(project))
    assert digests[0] != digests[1]
    assert Agent.describe_here(with_project=True)["project"] == code_digest()
    assert Agent.describe_here()["project"] == ""


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (None, "is gone"),
        (70, "ended with status 70"),
        (-11, "was ended by SIGSEGV"),
        (-99, "was ended by signal 99"),
    ],
)
def test_an_exit_status_is_told_in_words(status: int | None, words: str) -> None:
    assert describe_status(status) == words


def test_the_tail_of_a_log_is_its_last_twenty_lines(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("".join(f"line {number}\n" for number in range(1, 5001)))
    assert log_tail(log).splitlines() == [f"line {number}" for number in range(4981, 5001)]


def test_a_log_that_is_not_there_has_no_tail(tmp_path: Path) -> None:
    assert log_tail(tmp_path / "missing") == ""
