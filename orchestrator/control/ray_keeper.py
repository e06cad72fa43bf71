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
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from orchestrator.control import kept
from orchestrator.control.keeper import Keeper
from orchestrator.control.launcher import Launch, Zygote, fork, start_zygote
from orchestrator.control.processes import Process
from orchestrator.control.ray_settings import apply_ray_settings
from orchestrator.control.scratch import scratch_folder
from orchestrator.errors import OrchestratorError
from orchestrator.spec.schema import ClusterName

# Of Ray's processes that wait to become agents; more workers than these start their own.
_MOST_IDLE = 4
_IMPORT_TIMEOUT_S = 120.0


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


def _keep(order: dict[str, Any], stack: ExitStack) -> None:
    folder = stack.enter_context(scratch_folder())
    token = _write_token(folder)
    apply_ray_settings(ClusterName.local, token)
    zygote = start_zygote(idle_s=math.inf)
    stack.callback(zygote.close)

    import ray

    from orchestrator.control.ray_idle import IdleWorkers
    from orchestrator.control.ray_start import LOOPBACK, start_local

    start_local(order["cpus"], order["gpus"])
    processes = _processes(zygote)
    is_well = [True]
    stack.callback(lambda: ray.shutdown() if is_well[0] else None)
    (node,) = ray.nodes()
    idle = IdleWorkers(
        processes["raylet"].pid,
        f"{LOOPBACK}:{node['NodeManagerPort']}",
        min(order["cpus"], _MOST_IDLE),
    )
    _await_tensorflow(zygote)
    idle.await_all()

    control = folder / "control"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(control))
    listener.listen(16)
    path, own = Path(order["state"]), Process.of(os.getpid())

    def rest() -> str:
        state = kept.read_state(path)
        if not isinstance(state, kept.Kept) or state.keeper != own:
            return "its state file is gone"
        idle.refill()
        return ""

    keeper = Keeper(
        listener,
        cpus=order["cpus"],
        gpus=order["gpus"],
        idle_s=order["idle_s"],
        processes=processes,
        rest=rest,
    )
    state = kept.Kept(
        keeper=own,
        processes=processes,
        since=time.time(),
        control=str(control),
        zygote=str(zygote.socket_path),
        address=ray.get_runtime_context().gcs_address,
        token=str(token),
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
        if any(not process.is_alive for process in processes.values()):
            # Half a Ray is not asked to end: it would be waited for.
            is_well[0] = False
            for process in processes.values():
                process.kill()


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
