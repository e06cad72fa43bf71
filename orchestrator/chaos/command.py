"""The processes that `chaos` starts: the real train command, and MLflow's server."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from orchestrator.chaos.hosts import Hosts
from orchestrator.errors import StorageError
from orchestrator.runs import merge_overrides
from orchestrator.spec.paths import PROJECT_DIR

# Every process of a run inherits it, also one that is re-parented to init.
_MARK = "ORCHESTRATOR_CHAOS"
_SERVER_TIMEOUT_S = 60.0
_POLL_S = 0.05


class Command:
    """Starts the train command again and again, each time in a session of its own.

    Attributes:
        has_record: whether it writes to MLflow.
    """

    has_record = True

    def __init__(self, arguments: Sequence[str], cwd: Path, log: Path):
        """Start nothing yet.

        Args:
            arguments: of the train command, as typed.
            cwd: what relative paths are relative to.
            log: takes what the commands print, one after the other.
        """
        self.arguments = list(arguments)
        self.cwd = cwd
        self.log = log
        self._mark = secrets.token_hex(8)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *more: str) -> None:
        """Start the command with more arguments than usual."""
        paths = [str(PROJECT_DIR), os.environ.get("PYTHONPATH", "")]
        env = {
            **os.environ,
            _MARK: self._mark,
            # What `make up` keeps is for others: faults strike a Ray of the command's own.
            "XDG_RUNTIME_DIR": str(self.log.parent),
            "SPT_NOENV": "1",  # or Ray's agents write their titles over the mark
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        }
        train = [sys.executable, "-m", "orchestrator", "train", *self.arguments, *more]
        with self.log.open("ab") as output:
            self._process = self._popen(train, env, output)

    @property
    def code(self) -> int | None:
        """The exit code; None while the command runs."""
        assert self._process is not None
        return self._process.poll()

    def send(self, number: int) -> None:
        """Send a signal to the command itself."""
        assert self._process is not None
        self._process.send_signal(number)

    def last_words(self) -> str:
        """Return the last line that was printed but for the exit code's."""
        return self.tail(1)

    def tail(self, num_lines: int = 12) -> str:
        """Return the last lines that were printed but for the exit code's."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        told = [line for line in lines if line.strip() and not line.startswith("exit code")]
        return "\n".join(told[-num_lines:])

    def leftovers(self, patience_s: float) -> list[str]:
        """Return the processes of this run that still live after a while, and end them."""
        deadline = time.monotonic() + patience_s
        while (found := self._living()) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return [f"{pid} {name}" for pid, name in found.items()]

    def close(self) -> None:
        """End whatever still runs."""
        if self._process is not None:
            if self._process.poll() is None:
                self._process.kill()
            self._process.wait()
            self.leftovers(0)

    def _popen(
        self, train: Sequence[str], env: Mapping[str, str], output: IO[bytes]
    ) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            train,
            cwd=self.cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )

    def _living(self) -> dict[int, str]:
        wanted = f"{_MARK}={self._mark}".encode()
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it is gone, or belongs to someone else
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                if state not in "ZX" and wanted in (folder / "environ").read_bytes().split(b"\0"):
                    line = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                    found[int(folder.name)] = line.decode(errors="replace").strip()[:80]
        return found


class OnHosts(Command):
    """Starts the train command on the first of some hosts, with its workers on several of them."""

    def __init__(self, hosts: Hosts, arguments: Sequence[str], cwd: Path, log: Path):
        """Start nothing yet; the other arguments are those of a command."""
        super().__init__(merge_overrides(list(arguments), list(hosts.arguments)), cwd, log)
        self._hosts = hosts

    def _popen(
        self, train: Sequence[str], env: Mapping[str, str], output: IO[bytes]
    ) -> subprocess.Popen[bytes]:
        entered = self._hosts.entered(0, train, self.cwd)
        return super()._popen(entered, {**env, **self._hosts.env}, output)


class Server:
    """A real MLflow server on a loopback port, over a database of its own."""

    def __init__(self, folder: Path):
        """Start it and wait until it answers.

        Raises:
            StorageError: it does not.
        """
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def uri(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def database(self) -> Path:
        """What it writes into."""
        return self._folder / "mlflow.db"

    def start(self, *, wait: bool = True) -> None:
        """Start it, also after `stop`, at the same address."""
        command = [sys.executable, "-m", "mlflow", "server", "--host=127.0.0.1", "--workers=1"]
        command += [f"--port={self._port}", f"--backend-store-uri=sqlite:///{self.database}"]
        command += [f"--artifacts-destination={self._folder / 'artifacts'}"]
        env = {
            **os.environ,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        with (self._folder / "server.log").open("ab") as output:
            self._process = subprocess.Popen(
                command, stdout=output, stderr=output, env=env, start_new_session=True
            )
        if wait:
            self._await()

    def stop(self) -> None:
        """Kill it with its workers."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _await(self) -> None:
        assert self._process is not None
        # A proxy in the environment is not asked for a loopback address.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        deadline = time.monotonic() + _SERVER_TIMEOUT_S
        while True:
            try:
                opener.open(f"{self.uri}/health", timeout=1.0).close()
                return
            except OSError as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    log = self._folder / "server.log"
                    raise StorageError(f"MLflow's server did not start; see {log}") from error
            time.sleep(_POLL_S)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
