"""The commands `up` and `down`, and how `train` comes to what is kept."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from orchestrator.control import holding, kept
from orchestrator.control.holding import Hold
from orchestrator.control.kept import Kept
from orchestrator.errors import ClusterError, ConfigError, ExitCode
from orchestrator.spec.environment import inspect_for
from orchestrator.spec.host import local_host
from orchestrator.spec.paths import PROJECT_DIR
from orchestrator.spec.plan import RunPlan
from orchestrator.spec.schema import ClusterName, RunConfig

DEFAULT_IDLE_S = 3600.0
_START_TIMEOUT_S = 180.0
_ANSWER_S = 5.0
_END_S = 15.0
_LOOK_S = 0.02
_LOG_LINES = 15


def up(arguments: list[str]) -> ExitCode:
    """Keep a local Ray, and a process with TensorFlow imported, until `down`.

    Args:
        arguments: `idle_s=SECONDS`: end by itself when no run has used it for so long.

    Raises:
        ConfigError: an argument that is not known.
        ClusterError: it does not start.
    """
    idle_s = _idle_s(arguments)
    path = kept.state_file()
    with _locked(path):
        if _is_kept(path):
            return ExitCode.DONE
        begin = time.monotonic()
        keeper = _start(path, idle_s)
        state = _await_ready(keeper, path)
        took_s = time.monotonic() - begin
    resources = f"{state.cpus} CPU" + (f" and {state.gpus} GPU" if state.gpus else "")
    print(f"started a Ray with {resources} and imported TensorFlow: {took_s:.1f} s")
    print(
        f"kept by process {keeper.pid} until `make down`, or until no run has used it for "
        f"{idle_s:g} s; `make train` begins with it"
    )
    return ExitCode.DONE


def down() -> ExitCode:
    """End what `up` has started in this checkout; nothing else.

    Raises:
        ClusterError: a run is training on it.
    """
    path = kept.state_file()
    with _locked(path):
        state = kept.read_state(path)
        if not isinstance(state, Kept):
            path.unlink(missing_ok=True)
            why = f": {state.why}" if state is not None else ""
            print(f"nothing is kept here{why}")
            return ExitCode.DONE
        try:
            connection, answer = holding.ask(state, {"ask": "end"}, _ANSWER_S)
            connection.close()
        except OSError:
            holding.clear(state)
            path.unlink(missing_ok=True)
            print("ended what was left of it: its keeper was dead or did not answer")
            return ExitCode.DONE
        if holders := answer["holders"]:
            raise ClusterError(
                f"{' and '.join(holders)} trains on what is kept; let it save and stop first, with "
                "Ctrl-C there or with `kill -TERM` of that process, then `make down` again"
            )
        if not holding.await_end(state, _END_S):
            holding.clear(state)
        path.unlink(missing_ok=True)
    print("ended: no Ray and no TensorFlow is kept here any more")
    return ExitCode.DONE


def could_be_kept(config: RunConfig) -> bool:
    """Tell whether runs like this one would begin with what `up` keeps, and nothing is kept."""
    if config.cluster.name is not ClusterName.local or not config.cluster.fork:
        return False
    try:
        return not isinstance(kept.read_state(kept.state_file()), Kept)
    except ClusterError:
        return False  # nothing can be kept here


def hold_for(config: RunConfig, plan: RunPlan) -> tuple[Hold | None, list[str]]:
    """Claim what is kept here for a run, if there is anything and it fits.

    Args:
        config: how to reach Ray: only a local cluster comes to what is kept, and only by forks.
        plan: what the run needs.

    Returns:
        The claim, to be closed by the caller, and what to tell the user.
    """
    if config.cluster.name is not ClusterName.local or not config.cluster.fork:
        return None, []
    try:
        path = kept.state_file()
    except ClusterError:
        return None, []  # nobody can have kept anything there
    gpus = plan.num_workers * plan.devices_per_worker if plan.device_kind == "GPU" else 0
    cpus = plan.num_workers * plan.cpus_per_worker
    hold, text = holding.take_hold(path, cpus, gpus, config.job.name)
    if hold is not None:
        text = f"begins with what `make up` keeps (process {hold.kept.keeper.pid})"
    return hold, [text] if text else []


def _idle_s(arguments: list[str]) -> float:
    idle_s = DEFAULT_IDLE_S
    for argument in arguments:
        key, _, value = argument.partition("=")
        try:
            idle_s = float(value) if key == "idle_s" else 0.0
        except ValueError:
            idle_s = 0.0
        if not idle_s > 0:
            raise ConfigError(
                f"up: {argument}: idle_s=SECONDS is known, above 0: end when no run has used it "
                "for so long"
            )
    return idle_s


def _is_kept(path: Path) -> bool:
    """Tell, also the user, whether something is kept already; what is left of it is cleared."""
    state = kept.read_state(path)
    if not isinstance(state, Kept):
        return False
    try:
        connection, answer = holding.ask(state, {"ask": "look"}, _ANSWER_S)
        connection.close()
    except OSError:
        print("what was kept here does not answer any more: ending what is left of it")
        holding.clear(state)
        return False
    use = f", {' and '.join(answer['holders'])} trains on it" if answer["holders"] else ""
    since = datetime.fromtimestamp(state.since)
    print(f"kept already, by process {state.keeper.pid} since {since:%Y-%m-%d %H:%M:%S}{use}")
    if differing := kept.differences(state, kept.surroundings(_environment())):
        print(
            f"{kept.listed(differing)} not what it was then: `make train` will not use it; "
            "`make down` and `make up` start it anew"
        )
    return True


def _environment() -> dict[str, str]:
    """Return the environment without what a run would not honour."""
    _, changes = inspect_for(os.environ, ClusterName.local)
    environ = dict(os.environ)
    for name, value in changes.items():
        environ.pop(name, None)
        if value is not None:
            environ[name] = value
    return environ


def _start(path: Path, idle_s: float) -> subprocess.Popen[bytes]:
    """Start the keeper, in a session of its own, and give it its order."""
    environ, host = _environment(), local_host()
    order = {
        "state": str(path),
        "idle_s": idle_s,
        "cpus": host.num_cpus,
        "gpus": host.num_gpus,
        "surroundings": kept.surroundings(environ),
        "variables": sorted(environ),
    }
    own_path = os.pathsep.join(filter(None, [str(PROJECT_DIR), environ.get("PYTHONPATH")]))
    descriptor = os.open(path.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as log:
        keeper = subprocess.Popen(
            [sys.executable, "-m", "orchestrator.control.ray_keeper"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            cwd="/",
            env={**environ, "PYTHONPATH": own_path},
            start_new_session=True,
        )
    assert keeper.stdin is not None
    keeper.stdin.write(json.dumps(order).encode())
    keeper.stdin.close()
    return keeper


def _await_ready(keeper: subprocess.Popen[bytes], path: Path) -> Kept:
    """Wait until the keeper says that all is there.

    Raises:
        ClusterError: it ended, or takes too long.
    """
    deadline = time.monotonic() + _START_TIMEOUT_S
    try:
        while True:
            state = kept.read_state(path)
            if isinstance(state, Kept) and state.keeper.pid == keeper.pid:
                return state
            if keeper.poll() is not None:
                break
            if time.monotonic() > deadline:
                keeper.terminate()
                break
            time.sleep(_LOOK_S)
    except KeyboardInterrupt:
        keeper.terminate()
        keeper.wait()
        raise
    log = path.with_suffix(".log").read_text(errors="replace").splitlines()[-_LOG_LINES:]
    raise ClusterError("\n  ".join(["nothing could be kept:", *log]))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let only one `up` or `down` of a checkout be at work."""
    with path.with_suffix(".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
