"""The worker's end of its pipes to the agent."""

from __future__ import annotations

import os
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
        self._pending: set[Request] = set()
        self._pending_lock = threading.Lock()
        threading.Thread(target=self._listen, name="link", daemon=True).start()

    def send(self, message: Message) -> None:
        """Hand a message to the agent; callable from any thread."""
        data = memoryview(frame(message))
        with self._write_lock:
            while data:
                data = data[os.write(self._message_fd, data) :]

    def pending(self) -> set[Request]:
        """Return the requests that came since the last call."""
        with self._pending_lock:
            requests, self._pending = self._pending, set()
        return requests

    def ask(self, request: Request) -> None:
        """Note a request, also one that came by signal."""
        with self._pending_lock:
            self._pending.add(request)

    def stay(self) -> NoReturn:
        """Do nothing until the agent ends this process or is gone itself."""
        while True:
            threading.Event().wait()

    def _listen(self) -> None:
        while byte := os.read(self._control_fd, 1):
            self.ask(_REQUESTS[byte])
        # The agent is gone: nobody would hear what this process does from here on.
        os.kill(os.getpid(), signal.SIGKILL)
