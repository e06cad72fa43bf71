"""How TensorFlow processes come to be: forked from a zygote, or started afresh."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from orchestrator.errors import StartFailed
from orchestrator.spec.channel import pack_request
from orchestrator.spec.paths import PROJECT_DIR

_ZYGOTE = "orchestrator.train.zygote"
_DIAL_TIMEOUT_S = 10.0
_DIGEST = 16
# A Unix socket's name has 107 bytes.
_LONGEST_FOLDER = 107 - len(f"/orch-{2**32 - 1}-") - _DIGEST - len("/zygote")
TENSORFLOW_ENV = {
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "TF_ENABLE_ONEDNN_OPTS": "1",
    "KERAS_BACKEND": "tensorflow",
    "PYTHONUNBUFFERED": "1",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What a TensorFlow process shall do.

    Attributes:
        log: file that takes its output.
        sys_path: where it imports from.
        env: variables to set, or to unset where the value is None.
        payload: the pickled WorkerOrder of a worker.
        stacks: file for Python stacks, written on SIGUSR1.
        script: a Python file to run instead of a worker, with `argv`.
    """

    log: Path
    sys_path: tuple[str, ...]
    env: Mapping[str, str | None] = field(default_factory=dict)
    payload: bytes = b""
    stacks: Path | None = None
    script: Path | None = None
    argv: tuple[str, ...] = ()

    def header(self, fds: tuple[int, ...] = ()) -> dict[str, Any]:
        """Return the request's header."""
        header: dict[str, Any] = {
            "log": str(self.log),
            "sys_path": list(self.sys_path),
            "cwd": os.getcwd(),
            "env": dict(self.env),
            "stacks": str(self.stacks or ""),
            "fds": list(fds),
        }
        if self.script is not None:
            header |= {"script": str(self.script), "argv": list(self.argv)}
        return header


class Child:
    """A TensorFlow process: its pid, a descriptor that tells its death, its exit status."""

    def __init__(
        self,
        pid: int,
        connection: socket.socket | None = None,
        process: subprocess.Popen[bytes] | None = None,
    ):
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self._connection = connection
        self._process = process

    def exit_status(self, timeout_s: float = 1.0) -> int | None:
        """Return the exit status of the ended process, negative for a signal; None if unknown."""
        if self._process is not None:
            return self._process.wait(timeout_s)
        assert self._connection is not None
        try:
            answer = _read_line(self._connection, timeout_s)
        except (OSError, ValueError):
            return None
        return answer.get("status")

    def wait(self, timeout_s: float) -> bool:
        """Wait for the end of the process; tell whether it came."""
        return bool(select.select([self.pidfd], [], [], timeout_s)[0])

    def signal(self, number: int) -> None:
        """Send a signal; a process that is gone is left alone."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def close(self) -> None:
        """Close what was held for the process. The zygote kills a child that still lives."""
        os.close(self.pidfd)
        if self._connection is not None:
            self._connection.close()


class Zygote:
    """A zygote that this process owns: it ends when this process does."""

    def __init__(self, socket_path: Path, process: subprocess.Popen[bytes], owner_fd: int):
        self.socket_path = socket_path
        self._process = process
        self._owner_fd: int | None = owner_fd

    @property
    def pid(self) -> int:
        """Its process number."""
        return self._process.pid

    def close(self) -> None:
        """End the zygote and its children; again does nothing."""
        if self._owner_fd is None:
            return
        os.close(self._owner_fd)
        self._owner_fd = None
        try:
            self._process.wait(2.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self.socket_path.parent, ignore_errors=True)  # a killed one leaves its socket


def start_zygote(idle_s: float = 3600.0) -> Zygote:
    """Start a zygote in the background; it can be asked for children at once."""
    directory = Path(tempfile.mkdtemp(prefix="orch-", dir=_short_folder()))  # mode 0700
    socket_path = directory / "zygote"
    read_end, write_end = os.pipe()
    command = _zygote_command(socket_path, idle_s)
    process = subprocess.Popen(
        [*command, "--owner-fd", str(read_end)],
        env=_zygote_env(),
        pass_fds=[read_end],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(read_end)
    return Zygote(socket_path, process, write_end)


def node_zygote(run: str, idle_s: float = 30.0) -> Path:
    """Return the socket of this node's zygote for a run, started if there is none.

    All agents of a run on a node share it. It belongs to no agent and ends when it was idle.

    Args:
        run: what tells the run from all others, such as its folder.
        idle_s: how long it waits for somebody to ask.
    """
    digest = hashlib.sha256(run.encode()).hexdigest()[:_DIGEST]
    directory = _short_folder() / f"orch-{os.getuid()}-{digest}"
    directory.mkdir(mode=0o700, exist_ok=True)
    if directory.stat().st_uid != os.getuid() or directory.stat().st_mode & 0o077:
        raise StartFailed(f"{directory} belongs to somebody else or is open to others; remove it")
    socket_path = directory / "zygote"
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _answers(socket_path):
            socket_path.unlink(missing_ok=True)
            # A shell in between: the zygote must not be the child of an agent that Ray ends.
            command = shlex.join(_zygote_command(socket_path, idle_s))
            subprocess.run(
                ["/bin/sh", "-c", f"{command} >/dev/null 2>&1 </dev/null &"],
                env=_zygote_env(),
                start_new_session=True,
                check=True,
            )
            _await(socket_path)
    return socket_path


def fork(socket_path: Path, launch: Launch, fds: tuple[int, ...] = ()) -> Child:
    """Ask a zygote for a child; waits while it still imports TensorFlow.

    Raises:
        StartFailed: there is no zygote, or it could not import TensorFlow.
    """
    try:
        _await(socket_path)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(str(socket_path))
        lengths, body = pack_request(launch.header(), launch.payload)
        socket.send_fds(connection, [lengths], list(fds))
        connection.sendall(body)
        answer = _read_line(connection, None)
    except (OSError, ValueError) as error:
        raise StartFailed(f"the zygote at {socket_path} does not answer: {error}") from error
    if "error" in answer:
        raise StartFailed(answer["error"])
    return Child(answer["pid"], connection=connection)


def spawn(launch: Launch, fds: tuple[int, ...] = ()) -> Child:
    """Start a process afresh, where forking is unsafe (`cluster.fork=false`)."""
    lengths, body = pack_request(launch.header(fds), launch.payload)
    process = subprocess.Popen(
        [sys.executable, "-m", _ZYGOTE, "--fresh"],
        env=_zygote_env(),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=fds,
    )
    assert process.stdin is not None
    process.stdin.write(lengths + body)
    process.stdin.close()
    return Child(process.pid, process=process)


@contextlib.contextmanager
def standard_error_in(file: IO[bytes]) -> Iterator[None]:
    """Send to a file what C++ writes to standard error."""
    sys.stderr.flush()
    kept = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _short_folder() -> Path:
    """Return the folder for temporary files, or /tmp where its name is too long for a socket."""
    folder = Path(tempfile.gettempdir())
    return folder if len(os.fsencode(folder)) <= _LONGEST_FOLDER else Path("/tmp")


def _zygote_command(socket_path: Path, idle_s: float) -> list[str]:
    return [sys.executable, "-m", _ZYGOTE, "--socket", str(socket_path), "--idle-s", str(idle_s)]


def _zygote_env() -> dict[str, str]:
    paths = [str(PROJECT_DIR), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, **TENSORFLOW_ENV, "PYTHONPATH": os.pathsep.join(paths)}


def _answers(socket_path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(str(socket_path)) == 0


def _await(socket_path: Path) -> None:
    """Wait until a zygote that was just started listens."""
    deadline = time.monotonic() + _DIAL_TIMEOUT_S
    while not socket_path.exists():
        if time.monotonic() > deadline:
            raise StartFailed(f"no zygote came up at {socket_path}")
        time.sleep(0.01)


def _read_line(connection: socket.socket, timeout_s: float | None) -> dict[str, Any]:
    connection.settimeout(timeout_s)
    line = b""
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte:
            raise ValueError("it hung up")
        line += byte
    answer: dict[str, Any] = json.loads(line)
    return answer
