"""A process that has imported TensorFlow, initialised nothing, and is forked into workers.

Importing TensorFlow takes 6 to 10 s, forking a process that has done it takes milliseconds. The
zygote stays single-threaded and never imports the project's or a job's modules into itself: a
child drops what little of the project the zygote needed, so changed code is picked up.

Protocol, on a Unix socket, one connection a child: the client sends two lengths (with the child's
pipe ends attached as SCM_RIGHTS), a JSON header and a payload; the zygote answers one JSON line
with the pid, and one with the wait status when the child has ended; or one with an error. A client
that hangs up takes its child with it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import faulthandler
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from orchestrator.imports import uncollected
from orchestrator.spec.channel import receive_request, unpack_request
from orchestrator.train.later import put_off

_REQUEST_TIMEOUT_S = 5.0
_PR_SET_PDEATHSIG = 1
_MORE_ROOM = "raise the limit on processes (`ulimit -u`, a container's pids.max) or on memory there"


def main(argv: list[str]) -> int:
    """Listen, import TensorFlow, then fork a child for each request until there is no owner."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", required=True)
    parser.add_argument("--owner-fd", type=int, help="exit when this pipe closes")
    parser.add_argument("--idle-s", type=float, default=30.0, help="exit when unused for so long")
    options = parser.parse_args(argv)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # The name appears when it can be dialled, not a moment before.
    listener.bind(f"{options.socket}.new")
    listener.listen(64)
    os.rename(f"{options.socket}.new", options.socket)
    problem = _import_tensorflow()
    zygote = _Zygote(listener, options.owner_fd, options.idle_s, problem)
    try:
        zygote.serve()
    finally:
        zygote.close()
        # The folder is the zygote's: nothing else lies in it but the lock of those who look for it.
        shutil.rmtree(Path(options.socket).parent, ignore_errors=True)
    return 0


def _import_tensorflow() -> str:
    """Import what every worker needs; return what went wrong, or nothing."""
    put_off()
    try:
        # Children share its pages as long as their collector leaves them alone.
        with uncollected():
            import keras
            import tensorflow as tf

            # Attributes that load modules on first use.
            _ = (keras.Model, keras.optimizers.Adam, tf.distribute.MultiWorkerMirroredStrategy)
            _ = (tf.saved_model.save, tf.raw_ops.SaveV2, tf.train.load_checkpoint)
    except Exception:
        return f"TensorFlow cannot be imported:\n{traceback.format_exc()}"
    return ""


class _Zygote:
    """The single-threaded server."""

    def __init__(self, listener: socket.socket, owner_fd: int | None, idle_s: float, problem: str):
        self._listener = listener
        self._owner_fd = owner_fd
        self._idle_s = idle_s
        self._problem = problem
        self._children: dict[int, socket.socket] = {}
        self._last_use = time.monotonic()
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        if owner_fd is not None:
            self._selector.register(owner_fd, selectors.EVENT_READ)
        self._woken, wakeup = os.pipe()
        os.set_blocking(wakeup, False)
        os.set_blocking(self._woken, False)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        # Ctrl-C at a terminal goes to the driver, which asks workers to save.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._wakeup = wakeup
        self._selector.register(self._woken, selectors.EVENT_READ)

    def serve(self) -> None:
        """Fork a child for each request until the owner is gone or nobody has asked for long."""
        while True:
            for key, _ in self._selector.select(timeout=1.0):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fd == self._owner_fd:
                    return
                elif key.fd == self._woken:
                    os.read(self._woken, 4096)
                else:
                    self._hung_up(key.data)
            self._reap()
            if self._children:
                self._last_use = time.monotonic()
            elif time.monotonic() - self._last_use > self._idle_s:
                return

    def close(self) -> None:
        """End the children and stop listening."""
        for pid in self._children:
            os.kill(pid, signal.SIGKILL)
        self._listener.close()

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        connection.settimeout(_REQUEST_TIMEOUT_S)
        self._last_use = time.monotonic()
        try:
            header, payload, fds = receive_request(connection)
        except (OSError, ValueError):
            connection.close()
            return
        if self._problem:
            _answer(connection, {"error": self._problem})
            connection.close()
        else:
            self._fork(connection, header, payload, fds)
        for fd in fds:
            os.close(fd)

    def _fork(
        self, connection: socket.socket, header: dict[str, Any], payload: bytes, fds: list[int]
    ) -> None:
        try:
            pid = os.fork()
        except OSError as error:  # the children of others go on
            why = f"no process can be made on {socket.gethostname()}: {error.strerror}"
            _answer(connection, {"error": f"{why}; {_MORE_ROOM}"})
            connection.close()
            return
        if pid == 0:
            try:
                self._forget()
                connection.close()
                run_child(header, payload, fds)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(70)
        self._children[pid] = connection
        self._selector.register(connection, selectors.EVENT_READ, pid)
        _answer(connection, {"pid": pid})

    def _forget(self) -> None:
        """Close, in a child, everything that belongs to the zygote."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self._selector.close()
        self._listener.close()
        os.close(self._woken)
        os.close(self._wakeup)
        if self._owner_fd is not None:
            os.close(self._owner_fd)
        for connection in self._children.values():
            connection.close()

    def _hung_up(self, pid: int) -> None:
        connection = self._children[pid]
        try:
            if connection.recv(1):
                return
        except OSError:
            pass
        self._selector.unregister(connection)
        os.kill(pid, signal.SIGKILL)

    def _reap(self) -> None:
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            connection = self._children.pop(pid, None)
            if connection is None:
                continue
            if connection in self._selector.get_map():
                self._selector.unregister(connection)
            _answer(connection, {"status": os.waitstatus_to_exitcode(status)})
            connection.close()


def _answer(connection: socket.socket, answer: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # nobody waits for it any more
        connection.sendall(json.dumps(answer).encode() + b"\n")


def run_child(header: dict[str, Any], payload: bytes, fds: list[int]) -> NoReturn:
    """Become what a request asks for; ends the process.

    Args:
        header: `sys_path`, `cwd`, `env` (None unsets), `log` (file for output), `stacks` (file
            for Python stacks on SIGUSR1), and for a script `script` and `argv`.
        payload: the pickled WorkerOrder of a worker.
        fds: the worker's ends of the pipes for messages and for control.
    """
    os.setsid()
    # The zygote answers for its children: none outlives it.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _redirect_output(header["log"])
    for name, value in header["env"].items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    os.chdir(header["cwd"])
    _drop_project()
    sys.path[:] = header["sys_path"]
    if header["stacks"]:
        stacks = open(header["stacks"], "a")  # noqa: SIM115 - open as long as the process lives
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    if "script" in header:
        sys.argv = [header["script"], *header["argv"]]
        status = _run_script(header["script"])
    else:
        status = _run_worker(payload, fds)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: TensorFlow's threads may hold the interpreter for seconds at its end.
    os._exit(status)


def _redirect_output(log: str) -> None:
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    devnull = os.open(os.devnull, os.O_RDONLY)
    os.dup2(devnull, 0)
    os.close(devnull)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False, errors="replace")
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False, errors="replace")


def _drop_project() -> None:
    """Forget the project's modules, and the import hook of an editable installation."""
    for name in [name for name in sys.modules if name.split(".")[0] == "orchestrator"]:
        del sys.modules[name]
    sys.meta_path[:] = [
        finder
        for finder in sys.meta_path
        if not getattr(finder, "__module__", "").startswith("__editable__")
    ]


def _run_worker(payload: bytes, fds: list[int]) -> int:
    import pickle

    from orchestrator.spec.messages import Request
    from orchestrator.train.link import Link

    with uncollected():  # TensorFlow, where this is no fork
        from orchestrator.train.worker import run

    link = Link(*fds)
    signal.signal(signal.SIGTERM, lambda *_: link.ask(Request.SAVE_AND_STOP))
    order = pickle.loads(payload)
    status = run(order, link.send, link.pending)
    if status == 0 and order.addresses:
        # Others may still be in the last collective, and a peer that leaves breaks it: all stay
        # until the driver has heard that all have ended, and ends them.
        link.stay()
    return status


def _run_script(script: str) -> int:
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as leaving:
        if leaving.code is None or isinstance(leaving.code, int):
            return leaving.code or 0
        print(leaving.code, file=sys.stderr)  # as Python itself does
        return 1
    return 0


def fresh() -> NoReturn:
    """Run one child in this process instead of a fork; the request comes on standard input."""
    header, payload = unpack_request(sys.stdin.buffer.read())
    put_off()
    run_child(header, payload, header["fds"])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--fresh"]:
        fresh()
    sys.exit(main(sys.argv[1:]))
