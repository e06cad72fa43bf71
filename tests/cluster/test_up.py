"""What `up` keeps: runs begin with it, leave nothing in it, and it ends with `down` or by itself."""

from __future__ import annotations

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
SLOW = (*QUICK, "job.args.delay_ms=20", "train.max_block_steps=4", "train.steps=4000")
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
    cwd = runtime.parent
    return finish(start(verb, *arguments, cwd=cwd, env={**env_of(runtime), **(more or {})}), cwd)


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
    assert "starts it anew" not in call("up", runtime=runtime).out

    first = call("train", *job, runtime=runtime)
    assert first.code == 0, first.out
    assert "joining Ray" in first.out and "starting Ray" not in first.out
    code = next(mine.rglob("blobs.py"))
    text = code.read_text()
    marked = text.replace(
        "def model(self)", "def on_end(self, model): return 'changed'\n\n    def model(self)", 1
    )
    assert marked != text
    code.write_text(marked)
    second = call("train", *job, runtime=runtime)
    assert second.code == 0, second.out
    assert "joining Ray" in second.out and "changed" in second.out
    assert "changed" not in first.out
    token = Path(state.token).read_text()
    assert token not in first.out + second.out
    assert token not in "".join(path.read_text() for path in runtime.rglob("*") if path.is_file())

    ended = call("down", runtime=runtime)
    assert ended.code == 0, ended.out
    assert psutil.wait_procs(processes, timeout=5)[1] == []
    assert not Path(state.control).parent.exists()
    assert call("down", runtime=runtime).out.startswith("nothing is kept here")
