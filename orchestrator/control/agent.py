"""What an actor does on its node: start a TensorFlow process, watch it, fence it. No TensorFlow."""

from __future__ import annotations

import contextlib
import os
import platform
import selectors
import signal
import socket
import sys
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from orchestrator.control import launcher
from orchestrator.control.launcher import Child, Launch
from orchestrator.errors import StartFailed
from orchestrator.spec.channel import REQUEST_BYTES, Unframer
from orchestrator.spec.messages import Death, Ended, Failed, Message, Request

_PACKAGES = ("tensorflow", "tensorflow-cpu", "keras", "ray", "numpy")
_LOG_TAIL_LINES = 20
_LOG_TAIL_BYTES = 8192
_WATCH_INTERVAL_S = 0.5
_PROOF = Path(__file__).resolve().parents[1] / "track" / "mlflow_model.py"
_PROOF_TIMEOUT_S = 240.0
_PROOF_ENV = {
    "TF_FORCE_GPU_ALLOW_GROWTH": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # Progress bars and hints would only fill the log.
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


class Agent:
    """Holds one worker's place on a node, and the worker's process while an attempt runs."""

    def __init__(
        self,
        worker: int,
        run: str,
        *,
        zygote: str | None,
        use_fork: bool,
        driver_silence_s: float,
    ):
        """Begin without a process.

        Args:
            worker: index in TF_CONFIG.
            run: name of the run; agents of a run on a node share a zygote.
            zygote: socket of a zygote that exists already, or None to find or start one.
            use_fork: False starts every process afresh.
            driver_silence_s: the process is killed when the driver has not asked for so long.
        """
        self._worker = worker
        self._run = run
        self._zygote = zygote
        self._use_fork = use_fork
        self._driver_silence_s = driver_silence_s
        self._reserved: socket.socket | None = None
        self._process: _Process | None = None
        self._inbox: list[Message] = []
        self._arrived = threading.Condition()
        self._last_heard = time.monotonic()
        threading.Thread(target=self._fence, name="fence", daemon=True).start()

    def describe_node(self) -> dict[str, Any]:
        """Return what `describe_here` tells about the agent's node."""
        return self.describe_here()

    @staticmethod
    def describe_here() -> dict[str, Any]:
        """Return this node's name, address, versions and assigned GPUs."""
        found = {}
        for package in _PACKAGES:
            try:
                found[package.removesuffix("-cpu")] = version(package)
            except PackageNotFoundError:
                continue
        return {
            "host": socket.gethostname(),
            "ip": _address(),
            "python": platform.python_version(),
            "packages": found,
            "visible_gpus": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
        }

    def warm_up(self) -> None:
        """Have a zygote on this node, so that starting a process is quick."""
        if self._use_fork and self._zygote is None:
            self._zygote = str(launcher.node_zygote(self._run))

    def reserve_port(self, first: int, last: int) -> int:
        """Bind a port of the range and keep it from others until the worker is started.

        TensorFlow's server shares its port with nobody, so it is let go just before.

        Raises:
            StartFailed: every port of the range is taken.
        """
        self._release_port()
        for port in range(first, last + 1):
            reserved = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            try:
                reserved.bind(("", port))
            except OSError:
                reserved.close()
                continue
            self._reserved = reserved
            return port
        raise StartFailed(
            f"no free port in cluster.port_range={first}-{last} on {socket.gethostname()}; give "
            "a range in which nothing listens"
        )

    def start(self, order: bytes, attempt: int, log: str, stacks: str, sys_path: list[str]) -> None:
        """Start the worker's process.

        Args:
            order: the pickled WorkerOrder.
            attempt: number of the attempt, for what this agent tells about the process.
            log: file for the process's output.
            stacks: file for its Python stacks.
            sys_path: folders that the job's code is imported from, before this process's own.

        Raises:
            StartFailed: there is no TensorFlow process to be had.
        """
        self._end_process()
        self._last_heard = time.monotonic()
        self.warm_up()
        self._release_port()
        Path(log).parent.mkdir(parents=True, exist_ok=True)
        launch = Launch(
            log=Path(log),
            stacks=Path(stacks),
            sys_path=_own_paths(sys_path),
            env=dict.fromkeys(("TF_CONFIG", "TF_USE_LEGACY_KERAS")),
            payload=order,
        )
        self._process = _Process(self._worker, attempt, launch, self._launch, self._deliver)

    def poll(self, timeout_s: float) -> list[Message]:
        """Return what was heard, waiting for something at most so long."""
        self._last_heard = time.monotonic()
        with self._arrived:
            self._arrived.wait_for(lambda: bool(self._inbox), timeout_s)
            messages, self._inbox = self._inbox, []
        self._last_heard = time.monotonic()
        return messages

    def request(self, request: Request) -> None:
        """Pass a request on to the worker's process."""
        if self._process is not None:
            self._process.request(request)

    def prove_export(self, export_dir: str, log: str) -> None:
        """Check an export in a process without the project's code; it writes down what it found."""
        own = _own_paths([])
        project = str(Path(__file__).resolve().parents[2])
        # The current folder counts: it is often the project's.
        paths = tuple(path for path in own if path not in ("", project, os.getcwd()))
        launch = Launch(
            log=Path(log),
            sys_path=paths,
            env=_PROOF_ENV,
            script=_PROOF,
            argv=(export_dir,),
        )
        self.warm_up()
        child = self._launch(launch, ())
        try:
            if not child.wait(_PROOF_TIMEOUT_S):
                child.signal(signal.SIGKILL)
        finally:
            child.close()

    def kill(self) -> None:
        """End the worker's process; returns when it is gone."""
        self._end_process()
        self._release_port()

    def _end_process(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
        with self._arrived:
            self._inbox = []

    def _launch(self, launch: Launch, fds: tuple[int, ...]) -> Child:
        if self._use_fork:
            assert self._zygote is not None
            return launcher.fork(Path(self._zygote), launch, fds)
        return launcher.spawn(launch, fds)

    def _deliver(self, messages: list[Message]) -> None:
        with self._arrived:
            self._inbox.extend(messages)
            self._arrived.notify_all()

    def _release_port(self) -> None:
        if self._reserved is not None:
            self._reserved.close()
            self._reserved = None

    def _fence(self) -> None:
        """Kill the process when nobody has listened for too long: the driver may be gone."""
        while True:
            time.sleep(_WATCH_INTERVAL_S)
            process = self._process
            silence = time.monotonic() - self._last_heard
            if process is not None and silence > self._driver_silence_s:
                process.kill(
                    f"was ended by its agent: the driver was silent for {silence:.0f} s "
                    "(cluster.driver_silence_s)"
                )


class _Process:
    """A worker's process with its pipes, read by a thread until it has ended."""

    def __init__(self, worker: int, attempt: int, launch: Launch, start: Any, deliver: Any):
        self._worker = worker
        self._attempt = attempt
        self._log = launch.log
        self._deliver = deliver
        self._killed = False
        self._reason = ""
        self._lock = threading.Lock()
        self._has_ended = False
        self._message_fd, message_end = os.pipe()
        control_end, self._control_fd = os.pipe()
        try:
            self._child: Child = start(launch, (message_end, control_end))
        except BaseException:
            os.close(self._message_fd)
            os.close(self._control_fd)
            raise
        finally:
            os.close(message_end)
            os.close(control_end)
        self._thread = threading.Thread(target=self._read, name="reader", daemon=True)
        self._thread.start()

    def request(self, request: Request) -> None:
        with self._lock:
            if self._has_ended:
                return
            if request is Request.STACKS:
                self._child.signal(signal.SIGUSR1)
                return
            with contextlib.suppress(OSError):  # it has ended, and its death is on the way
                os.write(self._control_fd, REQUEST_BYTES[request])

    def kill(self, reason: str = "") -> None:
        """End the process; its death is told only if there is a reason for it."""
        with self._lock:
            if not self._has_ended:
                self._killed, self._reason = not reason, reason
                self._child.signal(signal.SIGKILL)
        self._thread.join()

    def _read(self) -> None:
        unframer, spoken = Unframer(), False
        with selectors.DefaultSelector() as selector:
            selector.register(self._message_fd, selectors.EVENT_READ)
            selector.register(self._child.pidfd, selectors.EVENT_READ)
            ended = False
            while not ended:
                ready = {key.fd for key, _ in selector.select()}
                # Its last words are still in the pipe when the process has ended.
                ended = self._child.pidfd in ready
                os.set_blocking(self._message_fd, False)
                while data := self._available():
                    messages = list(unframer.feed(data))
                    spoken = spoken or any(isinstance(m, Ended | Failed) for m in messages)
                    if messages:
                        self._deliver(messages)
                if not ended and self._message_fd in ready and data == b"":
                    selector.unregister(self._message_fd)
        status = self._child.exit_status()
        if not spoken and not self._killed:
            self._deliver([self._death(status)])
        with self._lock:
            # From here on the numbers of the descriptors may belong to something else.
            self._has_ended = True
            os.close(self._message_fd)
            os.close(self._control_fd)
            self._child.close()

    def _available(self) -> bytes | None:
        """Return what the pipe holds: nothing yet is None, its end is b""."""
        try:
            return os.read(self._message_fd, 1 << 16)
        except BlockingIOError:
            return None

    def _death(self, status: int | None) -> Death:
        return Death(
            worker=self._worker,
            attempt=self._attempt,
            time=time.time(),
            error=f"its process {self._reason or describe_status(status)}",
            exit_status=status,
            log_path=str(self._log),
            log_tail=log_tail(self._log),
        )


def _address() -> str:
    """Return the address other hosts reach this node by, as far as routing tells."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Nothing is sent: connecting a datagram socket only asks for the route.
            probe.connect(("192.0.2.1", 9))
            address: str = probe.getsockname()[0]
        except OSError:
            return "127.0.0.1"
        return address


def describe_status(status: int | None) -> str:
    """Return an exit status in words."""
    if status is None:
        return "is gone"
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"


def log_tail(path: Path) -> str:
    """Return the last lines of a log; empty if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _LOG_TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-_LOG_TAIL_LINES:])


def _own_paths(first: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys([*first, *sys.path]))
