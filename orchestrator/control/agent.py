"""What an actor does on its node: start a TensorFlow process, watch it, fence it. No TensorFlow."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import secrets
import signal
import socket
import sys
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from orchestrator.control import launcher
from orchestrator.control.addresses import interface_addresses, routed_address
from orchestrator.control.code import code_digest
from orchestrator.control.launcher import Child, Launch
from orchestrator.control.sampler import Sampler
from orchestrator.control.upload import importable
from orchestrator.control.worker_process import WorkerProcess
from orchestrator.errors import StartFailed
from orchestrator.spec.messages import NO_ATTEMPT, Message, Request
from orchestrator.spec.paths import PROJECT_DIR

_PACKAGES = ("tensorflow", "tensorflow-cpu", "keras", "ray", "numpy", "mlflow")
_WATCH_INTERVAL_S = 0.2
_IMPORT_TIMEOUT_S = 60.0
_PROOF = PROJECT_DIR / "orchestrator" / "track" / "mlflow_model.py"
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
        surroundings: str | None = None,
    ):
        """Begin without a process.

        Args:
            worker: index in TF_CONFIG.
            run: folder of the run; agents of a run on a node share a zygote.
            zygote: socket of a zygote that exists already, or None to find or start one.
            use_fork: False starts every process afresh.
            driver_silence_s: the process is killed when the driver has not asked for so long.
            surroundings: JSON file with the `cwd` and the `environment` (null unsets) of the
                processes; None for those that agent and zygote have, which are the driver's then.
        """
        self._worker = worker
        self._run = run
        self._zygote = zygote
        self._has_node_zygote = zygote is None
        self._use_fork = use_fork
        self._driver_silence_s = driver_silence_s
        self._environment: dict[str, str | None] = {}
        if surroundings is not None:
            told = json.loads(Path(surroundings).read_text())
            os.chdir(told["cwd"])
            self._environment = told["environment"]
        self._reserved: socket.socket | None = None
        self._process: WorkerProcess | None = None
        self._sampler: Sampler | None = None
        self._inbox: list[Message] = []
        self._arrived = threading.Condition()
        self._last_heard = time.monotonic()
        threading.Thread(target=self._fence, name="fence", daemon=True).start()

    def describe_node(self, with_project: bool = False) -> dict[str, Any]:
        """Return what `describe_here` tells about the agent's node."""
        return self.describe_here(with_project)

    @staticmethod
    def describe_here(with_project: bool = False) -> dict[str, Any]:
        """Return this node's name, addresses, versions, assigned GPUs and Ray's authentication.

        Args:
            with_project: tell a digest of the project's code, too; else it is empty.
        """
        return {
            "host": socket.gethostname(),
            "ip": routed_address(),
            "interfaces": interface_addresses(),
            "python": platform.python_version(),
            "packages": _packages(),
            "project": code_digest() if with_project else "",
            "auth_mode": os.environ.get("RAY_AUTH_MODE", "").lower(),
            "visible_gpus": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
        }

    def warm_up(self, wait: bool = False) -> None:
        """Have a zygote on this node, so that starting a process is quick.

        Args:
            wait: return only when it has imported TensorFlow.
        """
        if self._use_fork and self._has_node_zygote:
            # Each time: one that was idle for long, while there was no room, has ended.
            self._zygote = str(launcher.node_zygote(self._run))
        if self._use_fork and wait:
            # The first child comes when TensorFlow is imported; an empty script does nothing.
            empty = Path(os.devnull)
            child = self._launch(Launch(log=empty, sys_path=(), script=empty), ())
            child.wait(_IMPORT_TIMEOUT_S)
            child.close()

    def reserve_port(self, first: int, last: int) -> int:
        """Bind a port of the range and keep it from others until the worker is started.

        TensorFlow's server shares its port with nobody, so it is let go just before. Runs that
        share a range rarely meet, because each begins to look somewhere else.

        Raises:
            StartFailed: every port of the range is taken.
        """
        self._release_port()
        ports = range(first, last + 1)
        begin = secrets.randbelow(len(ports))
        for port in [*ports[begin:], *ports[:begin]]:
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

    def start(self, order: bytes, attempt: int, log: str, stacks: str, sys_path: list[str]) -> int:
        """Start the worker's process; return its pid.

        Args:
            order: the pickled WorkerOrder.
            attempt: number of the attempt, for what this agent tells about the process.
            log: file for the process's output.
            stacks: file for its Python stacks.
            sys_path: folders that the job's code is imported from, before this process's own.

        Raises:
            StartFailed: there is no TensorFlow process to be had, or the order comes so late that
                the driver has given this agent up.
        """
        self._end_process()
        if (silence_s := self._silence_s()) > self._driver_silence_s:
            raise StartFailed(
                f"the driver was silent for {silence_s:.0f} s (cluster.driver_silence_s)"
            )
        self.warm_up()
        self._release_port()
        Path(log).parent.mkdir(parents=True, exist_ok=True)
        launch = Launch(
            log=Path(log),
            stacks=Path(stacks),
            sys_path=_own_paths(importable(sys_path)),
            env=dict.fromkeys(("TF_CONFIG", "TF_USE_LEGACY_KERAS")),
            payload=order,
        )
        self._process = WorkerProcess(self._worker, attempt, launch, self._launch, self._deliver)
        return self._process.pid

    def poll(self, timeout_s: float, alive_at: float | None = None) -> list[Message]:
        """Return what was heard, waiting for something at most so long.

        Args:
            timeout_s: how long.
            alive_at: when, by this process's monotonic clock, the driver certainly lived; None for
                this moment. A question may have been on its way for long, and nobody waits for the
                answer any more.
        """
        self._last_heard = max(self._last_heard, alive_at or time.monotonic())
        with self._arrived:
            self._arrived.wait_for(lambda: bool(self._inbox), timeout_s)
            messages, self._inbox = self._inbox, []
        return messages

    def request(self, request: Request) -> None:
        """Pass a request on to the worker's process."""
        if self._process is not None:
            self._process.request(request)

    def sample_node(self, name: str | None, every_s: float | None) -> None:
        """Tell from now on how busy this node is, also while no worker runs.

        Args:
            name: of the node in the record; None to tell nothing more.
            every_s: seconds between two samples; None for none.
        """
        if self._sampler is not None:
            self._sampler.stop()
        self._sampler = None
        if name is not None:
            self._sampler = Sampler(self._worker, name, every_s, self._deliver)

    def prove_export(self, export_dir: str, log: str) -> None:
        """Check an export in a process without the project's code; it writes down what it found.

        It is ended like a worker when the driver is silent: another attempt may export there.
        """
        own = _own_paths([])
        # The current folder counts: it is often the project's.
        paths = tuple(path for path in own if path not in ("", str(PROJECT_DIR), os.getcwd()))
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
            deadline = time.monotonic() + _PROOF_TIMEOUT_S
            while not child.wait(_WATCH_INTERVAL_S):
                if time.monotonic() > deadline or self._silence_s() > self._driver_silence_s:
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
            self._inbox = [told for told in self._inbox if told.attempt == NO_ATTEMPT]

    def _launch(self, launch: Launch, fds: tuple[int, ...]) -> Child:
        if self._environment:
            launch = dataclasses.replace(launch, env={**self._environment, **launch.env})
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

    def _silence_s(self) -> float:
        """Return for how long the driver has not listened."""
        return time.monotonic() - self._last_heard

    def _fence(self) -> None:
        """Kill the process when nobody has listened for too long: the driver may be gone."""
        while True:
            time.sleep(_WATCH_INTERVAL_S)
            process = self._process
            silence = self._silence_s()
            if process is not None and silence > self._driver_silence_s:
                process.kill(
                    f"was ended by its agent: the driver was silent for {silence:.0f} s "
                    "(cluster.driver_silence_s)"
                )


def _packages() -> dict[str, str]:
    """Return the versions of the packages that nodes must share.

    `tensorflow-cpu` counts as `tensorflow`; where both are, which one is imported is not known.
    """
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if "tensorflow" not in found and "tensorflow-cpu" in found:
        found = {"tensorflow": found.pop("tensorflow-cpu"), **found}
    return found


def _own_paths(first: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys([*first, *sys.path]))
