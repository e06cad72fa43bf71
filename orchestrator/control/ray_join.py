"""How the driver's process comes to Ray: it starts one, or joins one that exists.

Call `ray_settings.apply_ray_settings` before this module is imported.
"""

from __future__ import annotations

import functools
import os
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import ray

from orchestrator.control.launcher import standard_error_in
from orchestrator.errors import ClusterError
from orchestrator.spec.plan import Host, RunPlan
from orchestrator.spec.schema import ClusterConfig

LOOPBACK = "127.0.0.1"
_CONNECT_TIMEOUT_S = 5.0
_REGISTRATION_TIMEOUT_S = 30.0
_LOOK_INTERVAL_S = 0.02
_UNUSED_SERVICES = ("start_monitor", "start_api_server", "start_log_monitor")
_HELD_BACK = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM)
PROJECT_DIR = str(Path(__file__).resolve().parents[2])
# What an upload to other nodes leaves behind.
NOT_UPLOADED = [".git", ".venv", "data", "runs", "**/__pycache__", ".pytest_cache", ".*_cache"]


def start_local(plan: RunPlan) -> None:
    """Start a Ray for one run, on loopback, with what the plan needs."""
    gpus = plan.num_workers * plan.devices_per_worker if plan.device_kind == "GPU" else 0
    with ExitStack() as stack:
        for changed in (
            _signal_handlers_kept,
            _session_of_its_own,
            _without_services,
            _any_agent_port,
            _short_looks,
        ):
            stack.enter_context(changed())
        ray.init(
            address="local",
            num_cpus=plan.num_workers * plan.cpus_per_worker,
            num_gpus=gpus,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            _node_ip_address=LOOPBACK,
        )
    _keep_quiet()


def join(config: ClusterConfig) -> Host:
    """Join an existing Ray cluster and tell what each of its nodes offers.

    Raises:
        ClusterError: nothing answers at the address, the token is missing or wrong, or the cluster
            runs another version of Ray or Python.
    """
    if not ray.is_initialized():
        address = config.address or "auto"
        _dial(address)
        _join(address)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    others = [node for node in nodes if node["NodeManagerAddress"] not in _own_addresses()]
    if others and "RAY_JOB_ID" not in os.environ and not _has_upload():
        # Other nodes do not see this checkout; a submitted job has brought its own upload.
        ray.shutdown()
        _join(config.address or "auto", upload=PROJECT_DIR)
    cpus = [int(node["Resources"].get("CPU", 0)) for node in nodes]
    gpus = [int(node["Resources"].get("GPU", 0)) for node in nodes]
    return Host(num_cpus=max(cpus, default=1) or 1, num_gpus=min(gpus, default=0))


def leave() -> None:
    """Leave the cluster; it goes on."""
    if ray.is_initialized():
        ray.shutdown()


def _join(address: str, upload: str | None = None) -> None:
    environment = {"working_dir": upload, "excludes": NOT_UPLOADED} if upload else None
    with tempfile.TemporaryFile() as chatter:
        try:
            with _signal_handlers_kept(), standard_error_in(chatter):
                ray.init(
                    address=address,
                    log_to_driver=False,
                    configure_logging=False,
                    runtime_env=environment,
                )
        except Exception as error:
            chatter.seek(0)
            raise _why_not_joined(address, error, chatter.read().decode()) from error
    _keep_quiet()


def _keep_quiet() -> None:
    """Keep Ray from telling of lost nodes on standard output, in colour: the supervisor tells it.

    `ray.init` of Ray 2.60 has no argument for it (`_private/worker.py`, listen_error_messages);
    another Ray, without the name, goes on telling.
    """
    from ray._private import worker

    if hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = lambda *_, **__: None


def _why_not_joined(address: str, error: Exception, chatter: str) -> ClusterError:
    """Tell apart what Ray calls a failed connection; its core says more on standard error."""
    text = f"{error}\n{chatter}"
    if "ersion mismatch" in text:
        return ClusterError(
            f"the Ray cluster at {address} runs other versions: {first_line(error)}; this is Ray "
            f"{ray.__version__} on Python {sys.version.split()[0]}"
        )
    if re.search("token|unauthenticated", text, re.IGNORECASE):
        return ClusterError(
            f"the Ray cluster at {address} does not take the token, or there is none; set "
            "RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file with the cluster's token"
        )
    return ClusterError(
        f"no Ray cluster at cluster.address={address}: {first_line(error)}; start one with "
        "`ray start --head`, name another address, or use cluster=local"
    )


@contextmanager
def _without_services() -> Iterator[None]:
    """Leave out what a Ray for one run has no use for: autoscaler, job server and log streamer.

    Each is a Python process that takes half a second of CPU just when TensorFlow is imported, and
    `ray.init` of Ray 2.60 has no argument for it (`_private/node.py`). Another Ray, without these
    names, starts with all of them.
    """
    from ray._private.node import Node

    kept = {name: getattr(Node, name) for name in _UNUSED_SERVICES if hasattr(Node, name)}
    for name in kept:
        setattr(Node, name, lambda self, *_, **__: None)
    try:
        yield
    finally:
        for name, method in kept.items():
            setattr(Node, name, method)


@contextmanager
def _any_agent_port() -> Iterator[None]:
    """Let the node's agent listen on any free port.

    Ray 2.60 gives it port 52365 on every node and `ray.init` has no argument for it
    (`_private/parameter.py`); another Ray that starts on this host at the same time would find it
    taken, and then takes no jobs. Another version of Ray, without these names, starts as it does.
    """
    from ray._private.node import Node

    begin = Node.__init__

    def begin_on_any_port(self: Any, ray_params: Any, *args: Any, **kwargs: Any) -> None:
        if hasattr(ray_params, "dashboard_agent_listen_port"):
            ray_params.dashboard_agent_listen_port = 0
        begin(self, ray_params, *args, **kwargs)

    Node.__init__ = begin_on_any_port
    try:
        yield
    finally:
        Node.__init__ = begin


@contextmanager
def _short_looks() -> Iterator[None]:
    """Look every few milliseconds whether the raylet has registered.

    Ray 2.60 looks once, then sleeps a whole second (GlobalStateAccessor::GetNode, called by
    `_private/node.py`); a raylet takes 0.7 to 1.5 s, so every start would lose up to that second.
    Another Ray, without these names, starts as it does.
    """
    from ray._private import services

    ask = getattr(services, "get_node", None)
    if ask is None:
        yield
        return

    def wait_and_ask(gcs_address: str, node_id: str) -> Any:
        with suppress(Exception):
            gcs = ray._raylet.GcsClient(address=gcs_address)
            deadline = time.monotonic() + _REGISTRATION_TIMEOUT_S
            while time.monotonic() < deadline and not gcs.get_all_node_info(timeout=1):
                time.sleep(_LOOK_INTERVAL_S)
        return ask(gcs_address, node_id)

    services.get_node = wait_and_ask
    try:
        yield
    finally:
        services.get_node = ask


@contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """Keep the signal handlers of this process, and a first signal until Ray is there.

    Ray 2.60 replaces the handler of SIGTERM (`_private/worker.py`), so a signal would end the
    driver with exit code 15; its core takes SIGTERM too, in C++, and dies of it; and what a handler
    raises leaves half a Ray that aborts the driver at its end. Another Ray, without the name, only
    has the handlers put back.
    """
    from ray._private import utils

    kept = {int(number): signal.getsignal(number) for number in _HELD_BACK}
    held: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        held.append(number)
        handler = kept[number]
        if len(held) > 1 and callable(handler):
            handler(held[0], frame)
            handler(number, frame)

    replace = getattr(utils, "set_sigterm_handler", None)
    if replace is not None:
        utils.set_sigterm_handler = lambda handler: None
    for number, handler in kept.items():
        if callable(handler):
            signal.signal(number, hold)
    try:
        yield
    finally:
        if replace is not None:
            utils.set_sigterm_handler = replace
        for number, handler in kept.items():
            signal.signal(number, handler)
        if len(held) == 1:
            os.kill(os.getpid(), held[0])


@contextmanager
def _session_of_its_own() -> Iterator[None]:
    """Start Ray's processes where signals to the command's process group do not reach them.

    A terminal, `timeout` and batch systems send theirs to the whole group; without its Ray the
    driver could not let the workers save. Ray 2.60 starts all of them in `_private/services.py`;
    another Ray, without the name, starts them in the driver's group.
    """
    from ray._private import services

    popen = getattr(services, "ConsolePopen", None)
    if popen is None:
        yield
        return
    services.ConsolePopen = functools.partial(popen, start_new_session=True)
    try:
        yield
    finally:
        services.ConsolePopen = popen


def _dial(address: str) -> None:
    """Find out within seconds whether anything listens; Ray itself tries for much longer."""
    host, colon, port = address.rpartition(":")
    if address == "auto" or not colon:
        return
    if "://" in address or not port.isdigit():
        raise ClusterError(
            f"cluster.address={address} is not auto or host:port; name the port of the head's GCS, "
            "6379 unless it was started otherwise"
        )
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ClusterError(
            f"nothing answers at cluster.address={address}: {error}; start Ray there with "
            f"`ray start --head --port={port}`, or use cluster=local"
        ) from error


def _own_addresses() -> set[str]:
    return {LOOPBACK, "localhost", ray.util.get_node_ip_address()}


def _has_upload() -> bool:
    return bool(ray.get_runtime_context().runtime_env.get("working_dir"))


def first_line(error: BaseException) -> str:
    """Return what an error says first."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
