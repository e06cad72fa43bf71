"""A peer that never comes to the strategy, a process held by a debugger, memory that runs out."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from orchestrator.control.launcher import Launch, Zygote, fork
from orchestrator.control.process_group import ProcessGroup
from orchestrator.control.supervisor import Supervisor
from orchestrator.errors import StartFailed
from orchestrator.spec.messages import Beacon, Cause, Death, Failed, Message
from orchestrator.spec.schema import StrategyName
from tests.control.conftest import is_gone, wait_until
from tests.control.test_agent import (
    WAITING,
    WAITING_JOB,
    heard_until,
    make_agent,
    start,
    waiting_pid,
)
from tests.plans import tiny_plan

PORTS = (21600, 21699)
START_TIMEOUT_S = 4.0
SLACK_S = 5.0
MEMORY_CGROUPS = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
# Takes more and more memory, in the cgroup that it is given.
GREEDY_JOB = """
import os
from pathlib import Path

from tests.train.tiny import Tiny


class Greedy(Tiny):
    def __init__(self, cgroup):
        (Path(cgroup) / "cgroup.procs").write_text(str(os.getpid()))

    def source(self, split):
        kept = []
        while True:
            kept.append(os.urandom(1 << 22))
"""
# A job that asks for more than any machine has.
TOO_MUCH_JOB = """
import numpy as np

from tests.train.tiny import Tiny


class TooMuch(Tiny):
    def source(self, split):
        return np.ones(1 << 55)
"""
PTRACE_ATTACH, PTRACE_DETACH = 16, 17
# Holds a process as a debugger does, until its input ends.
DEBUGGER = f"""
import ctypes, os, sys
libc, pid = ctypes.CDLL(None, use_errno=True), int(sys.argv[1])
if libc.ptrace({PTRACE_ATTACH}, pid, None, None):
    sys.exit(os.strerror(ctypes.get_errno()))
os.waitpid(pid, 0)
print("attached", flush=True)
sys.stdin.read()
libc.ptrace({PTRACE_DETACH}, pid, None, None)
"""


@pytest.fixture
def warm(zygote: Zygote, tmp_path: Path) -> Zygote:
    """A zygote that has imported TensorFlow."""
    script = tmp_path / "nothing.py"
    script.touch()
    launch = Launch(log=tmp_path / "nothing.log", sys_path=tuple(sys.path), script=script)
    child = fork(zygote.socket_path, launch)
    child.wait(60.0)
    child.close()
    return zygote


@pytest.fixture
def job_dir(tmp_path: Path) -> Path:
    """A folder with the modules of the jobs."""
    (tmp_path / "waiting_job.py").write_text(WAITING_JOB)
    (tmp_path / "greedy_job.py").write_text(GREEDY_JOB)
    (tmp_path / "too_much_job.py").write_text(TOO_MUCH_JOB)
    return tmp_path


def descendants() -> set[psutil.Process]:
    found = psutil.Process().children(recursive=True)
    return {process for process in found if not is_gone(process.pid)}


def test_a_peer_that_is_missing_at_the_start_ends_it_in_time(warm: Zygote, tmp_path: Path) -> None:
    plan = tiny_plan(
        tmp_path,
        strategy__name=StrategyName.multi_worker,
        strategy__num_workers=2,
        cluster__start_timeout_s=START_TIMEOUT_S,
        recovery__max_restarts=0,
    )
    # Worker 1 hangs in a file of its own before anything else, as on a file system that does.
    stacks = plan.paths.worker_stacks(1, 1)
    stacks.parent.mkdir(parents=True)
    os.mkfifo(stacks)
    told: list[Message] = []
    began: list[float] = []
    group = ProcessGroup(zygote=warm.socket_path, ports=PORTS)
    supervisor = Supervisor(
        group,
        plan,
        observe=told.append,
        began=lambda attempt, path, num_workers: began.append(time.time()),
        notice=lambda text: None,
        newest_checkpoint=lambda: None,
    )
    before = descendants()
    with pytest.raises(StartFailed) as raised:
        supervisor.run()
    [death] = [message for message in told if isinstance(message, Death)]
    assert death.worker == 1
    where = group.where(1)
    assert re.fullmatch(r"127\.0\.0\.1:216\d\d", where)
    assert death.error.startswith(f"it is stuck on {where} while starting, since ")
    assert "it could not write its Python stack" in death.error
    assert death.error.endswith("worker 0 waits for it")
    assert f"worker 1 on {where} failed" in str(raised.value)
    print(f"a missing peer, limit {START_TIMEOUT_S:g} s: told after {death.time - began[0]:.1f} s")
    assert death.time - began[0] < START_TIMEOUT_S + 2 + SLACK_S
    assert descendants() <= before


def test_a_process_held_by_a_debugger_is_not_stopped(warm: Zygote, job_dir: Path) -> None:
    agent = make_agent(warm)
    pid = waiting_pid(start(agent, job_dir, **WAITING))
    debugger = subprocess.Popen(
        [sys.executable, "-c", DEBUGGER, str(pid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert debugger.stdout is not None
    if not debugger.stdout.readline():
        agent.kill()
        pytest.skip(f"processes cannot be traced here: {debugger.communicate()[1].strip()}")
    told: list[Message] = []

    def held_for_a_while() -> bool:
        told.extend(agent.poll(0.1))
        return len({m.detail for m in told if isinstance(m, Beacon) and m.detail}) > 3

    wait_until(held_for_a_while, "the agent speaks for it")
    assert not [message for message in told if isinstance(message, Death)]
    held = [m for m in told if isinstance(m, Beacon) and "debugger" in m.detail]
    assert f"held by a debugger (process {debugger.pid})" in held[-1].detail
    assert not held[-1].begins
    debugger.communicate()
    assert not is_gone(pid)
    agent.kill()


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A cgroup that allows 400 MB, of either version."""
    root = next((root for root in MEMORY_CGROUPS if (root / "cgroup.procs").exists()), None)
    folder = None if root is None else root / f"detect-{os.getpid()}"
    try:
        if folder is None:
            raise OSError("no memory cgroup is mounted")
        folder.mkdir()
        limit = folder / "memory.limit_in_bytes"
        (limit if limit.exists() else folder / "memory.max").write_text(str(400 << 20))
    except OSError as error:
        if folder is not None and folder.exists():
            folder.rmdir()
        pytest.skip(f"no cgroup with a limit can be made here: {error}")
    yield folder
    wait_until(lambda: not (folder / "cgroup.procs").read_text(), "its processes are gone")
    folder.rmdir()


def test_a_worker_killed_by_the_kernel_for_its_memory_is_told_with_its_figures(
    warm: Zygote, job_dir: Path, cgroup: Path
) -> None:
    agent = make_agent(warm)
    start(agent, job_dir, job__class_name="greedy_job.Greedy", job__args={"cgroup": str(cgroup)})
    death = heard_until(agent, Death, Failed)[-1]
    assert isinstance(death, Death) and death.exit_status == -9
    assert re.match(
        r"its process was ended by the kernel's OOM killer: it held \d+ MiB", death.error
    )
    assert f"the limit of its cgroup ({cgroup}/memory." in death.error
    assert "is 400 MiB; give the worker more memory" in death.error
    agent.kill()


def test_a_job_that_asks_for_too_much_memory_is_told_with_its_figures(
    warm: Zygote, job_dir: Path
) -> None:
    agent = make_agent(warm)
    start(agent, job_dir, job__class_name="too_much_job.TooMuch")
    failed = heard_until(agent, Death, Failed)[-1]
    assert isinstance(failed, Failed) and failed.cause is Cause.job
    assert re.search(
        r"Unable to allocate 256\. PiB.*; worker 0 held [\d.]+ [GM]iB of memory, at most "
        r"[\d.]+ [GM]iB, the limit of .* is [\d.]+ [GM]iB: .*train\.micro_batches=2",
        failed.error,
    ), failed.error
    agent.kill()
