"""A worker's TensorFlow process as its agent sees it: two pipes, a state, a death, a log."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import selectors
import signal
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

from orchestrator.control.launcher import Child, Launch
from orchestrator.spec.channel import REQUEST_BYTES, Unframer
from orchestrator.spec.memory import (
    Memory,
    MemoryLimit,
    bytes_text,
    memory_limit,
    memory_of,
    oom_kills,
    still_counted,
)
from orchestrator.spec.messages import Beacon, Death, Ended, Failed, Request, Stacks

_LOG_TAIL_LINES = 20
_LOG_TAIL_BYTES = 8192
_INSPECT_INTERVAL_S = 0.5
# A stop that is over sooner is none: shells and profilers stop processes for moments.
_STOPPED_S = 1.5
# Looks before the death that the kernel's counters are compared with: it counts before it kills.
_COUNTED_LOOKS = 4
# How long a process may take to write its stacks, and the pause after which they are whole.
_STACKS_TIMEOUT_S = 1.0
_STACKS_PAUSE_S = 0.05


class WorkerProcess:
    """A worker's process with its pipes, read by a thread until it has ended."""

    def __init__(self, worker: int, attempt: int, launch: Launch, start: Any, deliver: Any):
        self._worker = worker
        self._attempt = attempt
        self._log = launch.log
        self._stacks = launch.stacks
        self._deliver = deliver
        self._killed = False
        self._reason = ""
        self._lock = threading.Lock()
        self._has_ended = False
        self._last_beacon: Beacon | None = None
        self._memory: Memory | None = None
        self._limit: MemoryLimit | None = None
        self._oom_kills: deque[dict[Path, int]] = deque(maxlen=_COUNTED_LOOKS)
        self._stopped_since: float | None = None
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

    @property
    def pid(self) -> int:
        """The process's number on its node."""
        return self._child.pid

    def request(self, request: Request) -> None:
        """Pass a request on; a process that has ended gets none."""
        with self._lock:
            if self._has_ended:
                return
            if request is Request.STACKS:
                threading.Thread(target=self._tell_stacks, name="stacks", daemon=True).start()
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
            ended, inspected = False, -_INSPECT_INTERVAL_S
            while not ended:
                if time.monotonic() - inspected >= _INSPECT_INTERVAL_S:
                    inspected = time.monotonic()
                    self._inspect()
                ready = {key.fd for key, _ in selector.select(_INSPECT_INTERVAL_S)}
                # Its last words are still in the pipe when the process has ended.
                ended = self._child.pidfd in ready
                os.set_blocking(self._message_fd, False)
                while data := self._available():
                    messages = list(unframer.feed(data))
                    spoken = spoken or any(isinstance(m, Ended | Failed) for m in messages)
                    for message in messages:
                        if isinstance(message, Beacon):
                            self._last_beacon = message
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

    def _inspect(self) -> None:
        """Look at the process: is it stopped, what does it hold?"""
        pid = self._child.pid
        state, tracer = process_state(pid)
        now = time.monotonic()
        if state != "T" or tracer:
            self._stopped_since = None
        elif self._stopped_since is None:
            self._stopped_since = now
        elif now - self._stopped_since >= _STOPPED_S and not self._killed:
            self._reason = (
                "was stopped (SIGSTOP or the like, nobody knows by whom) and, still stopped after "
                f"{now - self._stopped_since:.1f} s, ended by its agent"
            )
            self._child.signal(signal.SIGKILL)
        if state == "t" and tracer:
            self._tell_held(tracer)
        if (memory := memory_of(pid)) is None:
            return  # it is ending: its cgroup may be another one already
        self._memory, self._limit = memory, memory_limit(pid)
        self._oom_kills.append(oom_kills(pid))

    def _tell_held(self, tracer: int) -> None:
        """Speak for a process that a debugger holds: it can send no beacons itself."""
        if self._last_beacon is not None:
            detail = f"held by a debugger (process {tracer}) at {time.strftime('%H:%M:%S')}"
            held = dataclasses.replace(
                self._last_beacon, time=time.time(), detail=detail, begins=False
            )
            self._deliver([held])

    def _tell_stacks(self) -> None:
        """Let the process write its stacks, and deliver them; nothing if it cannot."""
        path, text = self._stacks, ""
        with self._lock:
            can_write = not self._has_ended and catches(self._child.pid, signal.SIGUSR1)
            if path is not None and can_write and path.is_file():
                before = path.stat().st_size
                self._child.signal(signal.SIGUSR1)
            else:
                path = None  # the signal would end a process that does not catch it
        deadline = time.monotonic() + _STACKS_TIMEOUT_S
        while path is not None and time.monotonic() < deadline:
            time.sleep(_STACKS_PAUSE_S)
            with contextlib.suppress(OSError), path.open(errors="replace") as file:
                file.seek(before)
                written = file.read()
                if written and written == text:
                    break
                text = written
        self._deliver(
            [Stacks(worker=self._worker, attempt=self._attempt, time=time.time(), text=text)]
        )

    def _why_ended(self, status: int | None) -> str:
        """Return how the process ended, as the end of a sentence about it."""
        if self._reason:
            return self._reason
        if status == -signal.SIGKILL and self._was_out_of_memory():
            return f"was ended by the kernel's OOM killer: {self._memory_in_words()}"
        return describe_status(status)

    def _was_out_of_memory(self) -> bool:
        if not self._oom_kills:
            return False
        before = self._oom_kills[0]
        after = still_counted(before)
        return any(after.get(file, 0) > count for file, count in before.items())

    def _memory_in_words(self) -> str:
        held = "" if self._memory is None else f"it held {bytes_text(self._memory.peak_bytes)}"
        limit = ""
        if self._limit is not None:
            limit = f"the limit {self._limit.source} is {bytes_text(self._limit.num_bytes)}"
        advice = (
            "give the worker more memory, keep less data in it, or lower train.global_batch_size "
            "or raise train.micro_batches"
        )
        return f"{', '.join(filter(None, [held, limit]))}; {advice}"

    def _death(self, status: int | None) -> Death:
        return Death(
            worker=self._worker,
            attempt=self._attempt,
            time=time.time(),
            error=f"its process {self._why_ended(status)}",
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


def process_state(pid: int, proc: Path = Path("/proc")) -> tuple[str, int]:
    """Return a process's state, such as R, S, D, T (stopped) or t (held), and who traces it.

    Returns:
        The letter, "" for a process that is gone, and the tracer's pid or 0.
    """
    try:
        status = (proc / str(pid) / "status").read_text(errors="replace")
    except OSError:
        return "", 0
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return fields.get("State", "").strip()[:1], int(fields.get("TracerPid", "0"))


def catches(pid: int, number: int, proc: Path = Path("/proc")) -> bool:
    """Tell whether a process has a handler for a signal."""
    try:
        status = (proc / str(pid) / "status").read_text(errors="replace")
    except OSError:
        return False
    caught = next((line.split()[1] for line in status.splitlines() if line[:7] == "SigCgt:"), "0")
    return bool(int(caught, 16) >> (number - 1) & 1)


def log_tail(path: Path) -> str:
    """Return the last lines of a log; empty if there is none."""
    if not path.is_file():
        return ""  # of a pipe, nothing would ever come
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _LOG_TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-_LOG_TAIL_LINES:])
