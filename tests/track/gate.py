"""A gate before a real MLflow server: it asks for a password, and can be in every bad state."""

from __future__ import annotations

import base64
import contextlib
import http.client
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_HOP_BY_HOP = ("connection", "transfer-encoding", "content-length", "host", "keep-alive")


class State(Enum):
    """What the gate does with a request."""

    open = "passes it on"
    failing = "answers 500"
    losing = "passes it on and loses the answer"
    hanging = "does nothing, for as long as it is in this state"


class Gate:
    """Passes requests on to a server.

    Attributes:
        uri: its address.
        state: what it does with the next request.
        refused: how many requests came without the right password.
        passed: how many requests it passed on.
    """

    def __init__(self, server: str, credentials: str | None = None):
        """Open it; `credentials` is `name:password`, None lets everybody through."""
        self.state = State.open
        self.refused = self.passed = 0
        self._target = urllib.parse.urlsplit(server)
        self._wanted = credentials and f"Basic {base64.b64encode(credentials.encode()).decode()}"
        self._is_closing = threading.Event()
        gate = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                with contextlib.suppress(ConnectionError):  # the client did not wait
                    super().handle_one_request()

            def log_message(self, *_: object) -> None: ...

            def do(self) -> None:
                gate.handle(self)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.uri = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """Close it."""
        self._is_closing.set()
        self._http.shutdown()
        self._http.server_close()

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        """Do what the state says."""
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        if self._wanted and request.headers.get("Authorization") != self._wanted:
            self.refused += 1
            return _answer(request, 401, b"who are you?")
        state = self.state
        while self.state is state is State.hanging and not self._is_closing.wait(0.02):
            continue
        if state is State.failing:
            return _answer(
                request, 500, b'{"error_code": "INTERNAL_ERROR", "message": "disk full"}'
            )
        if state is State.hanging:
            request.close_connection = True
            return None
        status, headers, answer = self._pass_on(request, body)
        if state is State.losing:
            request.close_connection = True
            return None
        return _answer(request, status, answer, headers)

    def _pass_on(
        self, request: BaseHTTPRequestHandler, body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        self.passed += 1
        connection = http.client.HTTPConnection(self._target.netloc, timeout=60)
        kept = {k: v for k, v in request.headers.items() if k.lower() not in _HOP_BY_HOP}
        with contextlib.closing(connection):
            try:
                connection.request(request.command, request.path, body, kept)
                answer = connection.getresponse()
                headers = {k: v for k, v in answer.getheaders() if k.lower() not in _HOP_BY_HOP}
                return answer.status, headers, answer.read()
            except OSError as error:
                return 502, {}, str(error).encode()


def _answer(
    request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None
) -> None:
    request.send_response(status)
    for name, value in (headers or {}).items():
        request.send_header(name, value)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)


@contextmanager
def gate_to(server: str, credentials: str | None = None) -> Iterator[Gate]:
    """Have a gate while a block runs."""
    gate = Gate(server, credentials)
    try:
        yield gate
    finally:
        gate.close()
