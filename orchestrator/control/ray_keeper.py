"""The process behind `make up`: it owns a Ray and a zygote until `down`, or until nobody comes.

What it has started ends with it, however it ends: the kernel tells Ray's processes (they are
started with PR_SET_PDEATHSIG, from the main thread), a pipe the zygote, and another the shell that
removes the temporary folder.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import signal
import socket
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from orchestrator.control import kept
from orchestrator.control.keeper import Keeper
from orchestrator.control.launcher import Launch, Zygote, fork, start_zygote
from orchestrator.control.processes import Process
from orchestrator.control.ray_settings import apply_ray_settings
from orchestrator.control.scratch import scratch_folder
from orchestrator.errors import OrchestratorError
from orchestrator.spec.schema import ClusterName

if TYPE_CHECKING:
    from orchestrator.control.ray_idle import IdleWorkers

# Of Ray's processes that wait to become agents; more workers than these start their own.
_MOST_IDLE = 4
_IMPORT_TIMEOUT_S = 120.0
# What Ray 2.60 imports into an actor when it is made, 0.25 s of work. Nothing of the project.
_PRELOADED = "numpy,pyarrow.json,pydantic.main,pydantic.v1.dataclasses,starlette.datastructures"


class _Ended(BaseException):
    """Somebody has sent SIGTERM."""


def main() -> int:
    """Keep what the order on standard input says."""
    order = json.load(sys.stdin)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end)
    try:
        with ExitStack() as stack:
            _keep(order, stack)
    except OrchestratorError as error:
        print(error, file=sys.stderr)
        return int(error.exit_code)
    except _Ended:
        return 0
    return 0


@dataclass(slots=True)
class _Made:
    """What is kept.

    Attributes:
        folder: for everything temporary, removed at the end.
        processes: what must live, by name.
        idle: Ray's processes that wait to become agents.
        is_well: whether Ray can be asked to end.
    """

    folder: Path
    token: Path
    zygote: Zygote
    address: str
    processes: dict[str, Process]
    idle: IdleWorkers
    is_well: bool = True


def _keep(order: dict[str, Any], stack: ExitStack) -> None:
    path, own = Path(order["state"]), Process.of(os.getpid())
    made = _make(order, stack)
    control = made.folder / "control"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(control))
    listener.listen(16)

    def rest() -> str:
        state = kept.read_state(path)
        if not isinstance(state, kept.Kept) or state.keeper != own:
            return "its state file is gone"
        made.idle.refill()
        return ""

    keeper = Keeper(
        listener,
        cpus=order["cpus"],
        gpus=order["gpus"],
        idle_s=order["idle_s"],
        processes=made.processes,
        rest=rest,
    )
    state = kept.Kept(
        keeper=own,
        processes=made.processes,
        since=time.time(),
        control=str(control),
        zygote=str(made.zygote.socket_path),
        address=made.address,
        token=str(made.token),
        cpus=order["cpus"],
        gpus=order["gpus"],
        surroundings=order["surroundings"],
        variables=order["variables"],
    )
    kept.write_state(path, state)
    why = "it was ended by SIGTERM"
    try:
        why = keeper.serve()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _take_leave(path, own, why)
        keeper.close()
        made.is_well = all(process.is_alive for process in made.processes.values())


def _make(order: dict[str, Any], stack: ExitStack) -> _Made:
    """Start a zygote and Ray at once, and wait until both are warm."""
    folder = stack.enter_context(scratch_folder())
    token = _write_token(folder)
    apply_ray_settings(ClusterName.local, token)
    num_idle = min(order["cpus"], _MOST_IDLE)
    os.environ.update(
        {
            # Else one of Ray's processes would wait for each core of the host.
            "RAY_prestart_worker_first_driver": "0",
            "RAY_num_workers_soft_limit": str(num_idle),
            "RAY_preload_python_modules": _PRELOADED,
        }
    )
    zygote = start_zygote(idle_s=math.inf)
    stack.callback(zygote.close)

    import ray

    from orchestrator.control.ray_idle import IdleWorkers
    from orchestrator.control.ray_start import LOOPBACK, start_local

    stack.callback(start_local(order["cpus"], order["gpus"]).close)
    processes = _processes(zygote)
    (node,) = ray.nodes()
    manager = f"{LOOPBACK}:{node['NodeManagerPort']}"
    made = _Made(
        folder=folder,
        token=token,
        zygote=zygote,
        address=ray.get_runtime_context().gcs_address,
        processes=processes,
        idle=IdleWorkers(processes["raylet"].pid, manager, num_idle),
    )
    stack.callback(_end_ray, made)
    made.idle.refill()
    _await_tensorflow(zygote)
    made.idle.await_all()
    return made


def _end_ray(made: _Made) -> None:
    """Ask Ray to end; half a Ray would be waited for, and is left to what `start_local` gave."""
    import ray

    if made.is_well:
        ray.shutdown()


def _take_leave(path: Path, own: Process, why: str) -> None:
    """Say, for the next command, why this ends; nothing where `down` has asked for it."""
    state = kept.read_state(path)
    if not isinstance(state, kept.Kept) or state.keeper != own:
        return
    if why:
        kept.write_state(path, kept.Gone(why))
    else:
        path.unlink(missing_ok=True)


def _write_token(folder: Path) -> Path:
    path = folder / "token"
    with open(path, "w", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(secrets.token_hex(32))
    return path


def _processes(zygote: Zygote) -> dict[str, Process]:
    """Return what must live: Ray 2.60 knows its own by name (`_private/node.py`)."""
    from ray._private import worker

    found = {"zygote": Process.of(zygote.pid)}
    for name, infos in worker._global_node.all_processes.items():
        for info in infos:
            found[name] = Process.of(info.process.pid)
    # Its agents take seconds to notice that a raylet was killed; it ends when one of them does.
    for child in psutil.Process(found["raylet"].pid).children():
        with suppress(psutil.Error, IndexError):
            title = child.cmdline()[0]
            if title.startswith("ray::") and title.endswith("Agent"):
                found[title.removeprefix("ray::")] = Process.of(child.pid)
    return found


def _await_tensorflow(zygote: Zygote) -> None:
    """Wait until TensorFlow is imported; only then a child comes.

    Raises:
        StartFailed: it cannot be imported.
    """
    nothing = Path(os.devnull)
    child = fork(zygote.socket_path, Launch(log=nothing, sys_path=(), script=nothing))
    child.wait(_IMPORT_TIMEOUT_S)
    child.close()


def _end(_number: int, _frame: object) -> None:
    raise _Ended


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: what is left of a Ray that died could hold the interpreter.
    os._exit(code)
