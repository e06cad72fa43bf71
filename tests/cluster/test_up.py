"""What `up` keeps: runs begin with it, leave nothing in it; it ends with `down` or by itself."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest

from orchestrator.control import kept
from orchestrator.control.kept import Kept, read_state
from tests.cluster import rig
from tests.cluster.rig import Ended, finish, start

QUICK = ("export.enabled=false", "data.num_eval_examples=0", "train.steps=20")
SLOW = (*QUICK, "job.args.delay_ms=20", "train.max_block_steps=4", "train.steps=100000")
_STATE = """
import json, sys, ray
from ray._private import state
ray.init(sys.argv[1], log_to_driver=False, configure_logging=False, _node_ip_address="127.0.0.1")
actors = [actor for actor in state.actors().values() if actor["State"] != "DEAD"]
groups = ray.util.placement_group_table().values()
print(json.dumps({
    "actors": len(actors),
    "groups": len([group for group in groups if group["state"] != "REMOVED"]),
    "free": ray.available_resources().get("CPU", 0) - ray.cluster_resources()["CPU"],
}))
"""


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Path]:
    """A folder for state files, and `down` at the end."""
    folder = tmp_path / "runtime"
    yield folder
    if state_of(folder) is not None:
        finish(start("down", cwd=tmp_path, env=env_of(folder)), tmp_path)


def env_of(runtime: Path) -> dict[str, str]:
    return {"XDG_RUNTIME_DIR": str(runtime)}


def state_of(runtime: Path) -> Kept | kept.Gone | None:
    name = next(runtime.glob("orchestrator/up-*.json"), None)
    return read_state(name) if name is not None else None


def kept_in(runtime: Path) -> Kept:
    state = state_of(runtime)
    assert isinstance(state, Kept), state
    return state


def call(verb: str, *arguments: str, runtime: Path, more: Mapping[str, str] | None = None) -> Ended:
    """Run a command to its end; what it says comes in one line."""
    cwd = runtime.parent
    ended = finish(start(verb, *arguments, cwd=cwd, env={**env_of(runtime), **(more or {})}), cwd)
    return dataclasses.replace(ended, out=" ".join(ended.out.split()))


def up(runtime: Path, *arguments: str) -> Kept:
    ended = call("up", *arguments, runtime=runtime)
    assert ended.code == 0, ended.out
    return kept_in(runtime)


def inside(state: Kept) -> dict[str, float]:
    """Return what is in the kept Ray, as another driver with its token sees it."""
    done = subprocess.run(
        [sys.executable, "-c", _STATE, state.address],
        env={
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": state.token,
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        },
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def tree(state: Kept) -> list[psutil.Process]:
    """Return the keeper and all processes below it."""
    keeper = psutil.Process(state.keeper.pid)
    return [keeper, *keeper.children(recursive=True)]


def test_runs_begin_with_what_is_kept_and_see_changed_code(tmp_path: Path, runtime: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(rig.MINE, mine, ignore=shutil.ignore_patterns("__pycache__"))
    job = ("job=blobs", f"--config-dir={mine}", *QUICK)
    state = up(runtime)
    processes = tree(state)
    assert "start it anew" not in call("up", runtime=runtime).out

    first = call("train", *job, runtime=runtime)
    assert first.code == 0, first.out
    assert "begins with what `make up` keeps" in first.out and "starting Ray" not in first.out
    code = next(mine.rglob("blobs.py"))
    text = code.read_text()
    marked = text.replace(
        "def model(self)", "def on_end(self, model): return 'changed'\n\n    def model(self)", 1
    )
    assert marked != text
    code.write_text(marked)
    second = call("train", *job, runtime=runtime)
    assert second.code == 0, second.out
    assert "begins with what" in second.out and "changed" in second.out
    assert "changed" not in first.out
    token = Path(state.token).read_text()
    assert token not in first.out + second.out
    assert token not in "".join(path.read_text() for path in runtime.rglob("*") if path.is_file())

    ended = call("down", runtime=runtime)
    assert ended.code == 0, ended.out
    assert psutil.wait_procs(processes, timeout=5)[1] == []
    assert not Path(state.control).parent.exists()
    assert call("down", runtime=runtime).out.startswith("nothing is kept here")


@pytest.mark.thorough
def test_what_has_another_environment_starts_its_own_and_says_why(runtime: Path) -> None:
    up(runtime)
    more = {"XLA_FLAGS": "--xla_cpu_enable_fast_math=false"}
    ended = call("train", *rig.JOB, *QUICK, runtime=runtime, more=more)
    assert ended.code == 0, ended.out
    assert "XLA_FLAGS is not what it was then" in ended.out and "starting Ray" in ended.out
    again = call("up", runtime=runtime, more=more)
    assert again.code == 0 and "start it anew" in again.out


@pytest.mark.thorough
def test_a_worker_has_the_environment_and_folder_of_its_run(runtime: Path) -> None:
    up(runtime)
    process = start(
        "train",
        *(*rig.JOB, *SLOW),
        cwd=runtime.parent,
        env={**env_of(runtime), "OF_THE_RUN": "1"},
    )
    run = rig.wait_for_step(runtime.parent, 8)
    worker = psutil.Process(rig.worker_pids(run)[0])
    # /proc shows what a process was started with: the zygote's. Its folder is its own.
    assert worker.cwd() == str(runtime.parent)
    rig.interrupt(process)
    assert finish(process, runtime.parent).code == 130


@pytest.mark.thorough
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_ended_leaves_nothing_in_what_is_kept(
    runtime: Path, number: signal.Signals
) -> None:
    state = up(runtime)
    two = ("strategy=multi_worker", "strategy.num_workers=2", "run_name=ended")
    process = start("train", *rig.JOB, *SLOW, *two, cwd=runtime.parent, env=env_of(runtime))
    run = rig.wait_for_step(runtime.parent, 8)
    refused = call("down", runtime=runtime)
    assert refused.code == 6 and f"blobs/ended (process {process.pid})" in refused.out
    workers = rig.worker_pids(run).values()
    process.send_signal(number)
    finish(process, runtime.parent)
    rig.wait_for(lambda: not any(rig.is_alive(pid) for pid in workers), "the workers' end", 10)
    rig.wait_for(lambda: inside(state) == {"actors": 0, "groups": 0, "free": 0}, "an empty Ray", 10)
    ended = call("train", *rig.JOB, *QUICK, runtime=runtime)
    assert ended.code == 0 and "begins with what" in ended.out, ended.out


@pytest.mark.thorough
def test_a_killed_worker_is_replaced_as_without(runtime: Path) -> None:
    up(runtime)
    more = ("checkpoint.every_steps=20", "train.steps=160", "strategy=multi_worker")
    arguments = (*rig.JOB, *SLOW, *more, "strategy.num_workers=2")
    process = start("train", *arguments, cwd=runtime.parent, env=env_of(runtime))
    run = rig.wait_for_step(runtime.parent, 50)
    os.kill(rig.worker_pids(run)[1], signal.SIGKILL)
    ended = finish(process, runtime.parent)
    assert ended.code == 0 and "retry 1 of" in ended.out, ended.out
    assert len(rig.losses(run)) == 160


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["raylet", "gcs_server", "zygote", "keeper"])
def test_what_is_killed_is_noticed_said_and_cleared(runtime: Path, name: str) -> None:
    state = up(runtime)
    processes = tree(state)
    struck = state.keeper if name == "keeper" else state.processes[name]
    os.kill(struck.pid, signal.SIGKILL)
    begin = time.monotonic()
    ended = call("train", *rig.JOB, *QUICK, runtime=runtime)
    assert ended.code == 0, ended.out
    assert "what `make up` kept has ended" in ended.out and "starting Ray" in ended.out
    assert name in ended.out
    print(f"{name} killed: the whole cold run took {time.monotonic() - begin:.1f} s")
    assert psutil.wait_procs(processes, timeout=10)[1] == []
    assert not Path(state.control).parent.exists()
    assert call("down", runtime=runtime).out.startswith("nothing is kept here")


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
def test_a_ray_that_is_killed_under_a_run_ends_it_truly(runtime: Path, name: str) -> None:
    state = up(runtime)
    process = start("train", *rig.JOB, *SLOW, cwd=runtime.parent, env=env_of(runtime))
    run = rig.wait_for_step(runtime.parent, 8)
    workers = rig.worker_pids(run).values()
    os.kill(state.processes[name].pid, signal.SIGKILL)
    ended = finish(process, runtime.parent)
    assert ended.code != 0, ended.out
    print(ended.out)
    rig.wait_for(lambda: not any(rig.is_alive(pid) for pid in workers), "the workers' end", 10)
    rig.wait_for(lambda: rig.database(runtime.parent)[0]["status"] != "RUNNING", "a status", 30)


@pytest.mark.thorough
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_down_ends_what_is_half_dead(runtime: Path, number: signal.Signals) -> None:
    state = up(runtime)
    processes = tree(state)
    os.kill(state.keeper.pid, number)
    ended = call("down", runtime=runtime)
    assert ended.code == 0 and "ended what was left" in ended.out, ended.out
    assert psutil.wait_procs(processes, timeout=5)[1] == []
    assert not Path(state.control).parent.exists()


@pytest.mark.thorough
def test_it_ends_by_itself_and_says_so_once(runtime: Path) -> None:
    state = up(runtime, "idle_s=2")
    processes = tree(state)
    assert psutil.wait_procs(processes, timeout=20)[1] == []
    assert not Path(state.control).parent.exists()
    told = call("down", runtime=runtime)
    assert told.code == 0 and "no run has used it for 2 s" in told.out
    assert "no run" not in call("down", runtime=runtime).out


@pytest.mark.thorough
def test_a_run_that_finds_no_room_starts_its_own(runtime: Path) -> None:
    state = up(runtime)
    share = (f"cluster.cpus_per_worker={state.cpus}", "run_name=first")
    process = start("train", *rig.JOB, *SLOW, *share, cwd=runtime.parent, env=env_of(runtime))
    rig.wait_for_step(runtime.parent, 8)
    ended = call("train", *rig.JOB, *QUICK, runtime=runtime)
    assert ended.code == 0, ended.out
    assert "blobs/first" in ended.out and "starting Ray" in ended.out
    rig.interrupt(process)
    assert finish(process, runtime.parent).code == 130


@pytest.mark.thorough
def test_another_ray_is_neither_joined_nor_ended(runtime: Path, ray_cluster: object) -> None:
    others = [p for p in psutil.process_iter() if "raylet" in p.name() or "gcs_server" in p.name()]
    assert others
    up(runtime)
    ended = call("train", *rig.JOB, *QUICK, runtime=runtime)
    assert ended.code == 0, ended.out
    assert call("down", runtime=runtime).code == 0
    assert all(other.is_running() for other in others)


@pytest.mark.thorough
def test_twenty_runs_leave_it_as_it_was(runtime: Path) -> None:
    state = up(runtime)
    arguments = (*rig.JOB, *QUICK)

    def look() -> dict[str, int]:
        """Return processes, threads, open files and memory of what stays, in kB."""
        found = {"processes": len(tree(state))}
        for name, each in {"keeper": state.keeper, **state.processes}.items():
            process = psutil.Process(each.pid)
            found[f"{name} files"] = process.num_fds()
            found[f"{name} kB"] = process.memory_full_info().uss // 1024
        found["shm"] = len(list(Path("/dev/shm").iterdir()))
        found["folder kB"] = (
            sum(
                path.stat().st_size
                for path in Path(state.control).parent.rglob("*")
                if path.is_file() and not path.is_symlink()
            )
            // 1024
        )
        return found

    seen = []
    for number in range(21):
        ended = call("train", *arguments, runtime=runtime)
        assert ended.code == 0 and "begins with what" in ended.out, ended.out
        rig.wait_for(lambda: len(tree(state)) >= seen[0]["processes"] if seen else True, "refill")
        seen.append(look())
        print(number, seen[-1])
    assert inside(state) == {"actors": 0, "groups": 0, "free": 0}
    first, last = seen[0], seen[-1]
    assert last["processes"] <= first["processes"]
    assert last["shm"] <= first["shm"]
    for name in first:
        if name.endswith("files"):
            # Ray 2.60's gcs_server keeps a socket of every driver that joined it, of 20,000.
            own = len(seen) if name == "gcs_server files" else 0
            assert last[name] <= first[name] + 5 + own, name
        if name.endswith("kB"):
            assert last[name] <= first[name] + 1024 * len(seen), name
