"""The worker's end of its pipes to the agent."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import threading
from typing import NoReturn

from orchestrator.spec.channel import REQUEST_BYTES, frame
from orchestrator.spec.messages import Message, Request

_REQUESTS = {byte: request for request, byte in REQUEST_BYTES.items()}


class Link:
    """Sends messages and receives requests; when the agent is gone, so is this process."""

    def __init__(self, message_fd: int, control_fd: int):
        self._message_fd = message_fd
        self._control_fd = control_fd
        self._write_lock = threading.Lock()
        # A lock that `pending` holds would stop a signal's handler, and with it this thread.
        self._pending: queue.SimpleQueue[Request] = queue.SimpleQueue()
        threading.Thread(target=self._listen, name="link", daemon=True).start()

    def send(self, message: Message) -> None:
        """Hand a message to the agent; callable from any thread."""
        data = memoryview(frame(message))
        with self._write_lock:
            while data:
                data = data[os.write(self._message_fd, data) :]

    def pending(self) -> set[Request]:
        """Return the requests that came since the last call."""
        requests = set()
        with contextlib.suppress(queue.Empty):
            while True:
                requests.add(self._pending.get_nowait())
        return requests

    def ask(self, request: Request) -> None:
        """Note a request; callable from any thread and from a signal's handler."""
        self._pending.put(request)

    def stay(self) -> NoReturn:
        """Do nothing until the agent ends this process or is gone itself."""
        while True:
            threading.Event().wait()

    def _listen(self) -> None:
        while byte := os.read(self._control_fd, 1):
            self.ask(_REQUESTS[byte])
        # The agent is gone: nobody would hear what this process does from here on.
        os.kill(os.getpid(), signal.SIGKILL)
