"""A worker's TensorFlow process as its agent sees it: two pipes, a death, a log."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import threading
import time
from pathlib import Path
from typing import Any

from orchestrator.control.launcher import Child, Launch
from orchestrator.spec.channel import REQUEST_BYTES, Unframer
from orchestrator.spec.messages import Death, Ended, Failed, Request

_LOG_TAIL_LINES = 20
_LOG_TAIL_BYTES = 8192


class WorkerProcess:
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
        """Pass a request on; a process that has ended gets none."""
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
