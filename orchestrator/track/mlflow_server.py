"""One of MLflow's servers in a process group of its own: its port, its start and its end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from orchestrator.errors import ConfigError
from orchestrator.reaper import Reaper

LOOPBACK = "127.0.0.1"
_POLL_S = 0.1
# What a server may take to close its connections before it is killed.
_END_S = 3.0
_TAIL_LINES = 5


def free_port(host: str, asked: int | None, ports: Iterable[int]) -> int:
    """Return the port that was asked for, or the first one of `ports` that is free.

    Raises:
        ConfigError: it is taken or not allowed, all of them are, or the host is none of this
            machine's.
    """
    tried = list(ports) if asked is None else [asked]
    for port in tried:
        with _socket(host) as probe:
            # As servers do: a connection that was closed a minute ago does not hold the port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
                return port
            except (OSError, OverflowError):
                continue
    with _socket(host) as probe:
        try:
            probe.bind((host, 0))
        except OSError as error:
            raise ConfigError(
                f"host={host}: this machine cannot listen there ({error.strerror}); name one of "
                "its own addresses, or 0.0.0.0 for all"
            ) from error
    if asked is not None:
        raise ConfigError(f"port={asked} is taken or not allowed; name another one, or none")
    raise ConfigError(f"the ports {tried[0]} to {tried[-1]} are all taken; name one: port=...")


def _socket(host: str) -> socket.socket:
    return socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)


def url_of(host: str, port: int) -> str:
    """Return the address at which this machine asks a server that listens on a host."""
    if host in ("0.0.0.0", "::"):
        host = LOOPBACK if host == "0.0.0.0" else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextmanager
def running(
    command: Sequence[str], log: Path, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server, which ends with everything it has started when the block or this process ends.

    SIGTERM and SIGHUP raise KeyboardInterrupt from here on, as Ctrl-C does.

    Args:
        command: what to run.
        log: takes its output.
        environment: variables besides those of this process.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    env = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", **environment}
    reaper = Reaper()
    with log.open("w") as output:
        # A session of its own: Ctrl-C reaches this process alone, which ends the whole group.
        server = subprocess.Popen(
            command, stdout=output, stderr=output, env=env, start_new_session=True
        )
    try:
        reaper.watch(server.pid)
        yield server
    finally:
        _end(server)
        reaper.close()


def answers_soon(server: subprocess.Popen[bytes], url: str, timeout_s: float) -> bool:
    """Wait until a server answers a page; tell whether it did before it ended or time was up."""
    deadline = time.monotonic() + timeout_s
    # A proxy in the environment is not asked for an address of this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        try:
            opener.open(url, timeout=1.0).close()
            return server.poll() is None
        except OSError:
            if server.poll() is not None or time.monotonic() > deadline:
                return False
        time.sleep(_POLL_S)


def tail(log: Path) -> str:
    """Return the log's path and its last lines."""
    lines = log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
    return "\n".join([f"{log}:", *lines])


def _end(server: subprocess.Popen[bytes]) -> None:
    """End the server and what it forked, also when the server itself has gone already."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it is ending already
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
        except ProcessLookupError:
            break
        deadline = time.monotonic() + _END_S
        while _is_there(server) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
    server.wait()


def _is_there(server: subprocess.Popen[bytes]) -> bool:
    """Tell whether a process of a server's group lives; one that only waits to be reaped does not.

    A server that was killed leaves its children to others, who may take their time to reap them.
    """
    server.poll()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # After the name in brackets, which may hold anything: state, parent, group.
            state, _, group = path.read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue  # it has gone meanwhile
        if int(group) == server.pid and state != "Z":
            return True
    return False
