"""How a Ray is started on this host, and what of it is changed for that.

Call `ray_settings.apply_ray_settings` before this module is imported.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
from typing import Any

import ray

from orchestrator.errors import StartFailed, first_line, interruptions
from orchestrator.reaper import Reaper
from orchestrator.signals import Echoes

LOOPBACK = "127.0.0.1"
_REGISTRATION_TIMEOUT_S = 30.0
_LOOK_INTERVAL_S = 0.02
_UNUSED_SERVICES = ("start_monitor", "start_api_server", "start_log_monitor")
_HELD_BACK = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM)


def start_local(num_cpus: int, num_gpus: int) -> Reaper:
    """Start a Ray on this host, on loopback, that ends with this process.

    Args:
        num_cpus: what it may hand out, whether there are so many or not.
        num_gpus: the same.

    Returns:
        What ends its processes: to be kept for as long as Ray shall run.

    Raises:
        StartFailed: Ray does not come up.
    """
    reaper = Reaper()
    with ExitStack() as stack:
        stack.enter_context(_out_of_reach(reaper))
        for changed in (
            signal_handlers_kept,
            _without_services,
            _smallest_agent,
            _short_looks,
        ):
            stack.enter_context(changed())
        try:
            with interruptions():
                ray.init(
                    address="local",
                    num_cpus=num_cpus,
                    num_gpus=num_gpus,
                    include_dashboard=False,
                    log_to_driver=False,
                    configure_logging=False,
                    _node_ip_address=LOOPBACK,
                )
        except Exception as error:  # Ray 2.60 raises nothing more precise
            with suppress(Exception):
                ray.shutdown()  # the next attempt begins with none
            reaper.close()
            raise StartFailed(
                f"no Ray came up on this host: {first_line(error)}; its logs are below "
                "RAY_TMPDIR, or TMPDIR; a full disk, `ulimit -u` and a busy host are usual causes"
            ) from error
    keep_quiet()
    leave_out_serializers()
    return reaper


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
def _smallest_agent() -> Iterator[None]:
    """Start the node's agent as where Ray is installed without its dashboard.

    Otherwise `ray.init` imports all that the dashboard needs, to see whether it is there: a second,
    just when TensorFlow is imported. And the agent listens on port 52365, which another Ray that
    starts on this host at the same time would find taken. `ray.init` of Ray 2.60 has no argument
    for it (`_private/services.py`). Another Ray, without this name, starts as it does.
    """
    from ray._private import utils

    ask = getattr(utils, "get_dashboard_dependency_error", None)
    if ask is None:
        yield
        return
    utils.get_dashboard_dependency_error = lambda: ImportError(
        "a Ray for one run has no use for it"
    )
    try:
        yield
    finally:
        utils.get_dashboard_dependency_error = ask


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
def _out_of_reach(reaper: Reaper) -> Iterator[None]:
    """Start Ray's processes where no signal to the command reaches them, and none outlives it.

    A terminal, `timeout` and batch systems send theirs to the whole process group; without its Ray
    the driver could not let the workers save. When the driver is killed, Ray's own follow it, but
    for the node's agents: those try for 60 s to tell a Ray that is gone
    (`_private/process_watcher.py`), so a reaper ends them. Ray 2.60 starts all of them in
    `_private/services.py`; another Ray, without the name, starts them in the driver's group.
    """
    from ray._private import services

    popen = getattr(services, "ConsolePopen", None)
    if popen is None:
        yield
        return

    def start(*args: Any, **kwargs: Any) -> Any:
        process = popen(*args, start_new_session=True, **kwargs)
        reaper.watch(process.pid)
        return process

    services.ConsolePopen = start
    try:
        yield
    finally:
        services.ConsolePopen = popen


@contextmanager
def signal_handlers_kept() -> Iterator[None]:
    """Keep the signal handlers of this process, and a first signal until Ray is there.

    Ray 2.60 replaces the handler of SIGTERM (`_private/worker.py`), so a signal would end the
    driver with exit code 15; its core takes SIGTERM too, in C++, and dies of it; and what a handler
    raises leaves half a Ray that aborts the driver at its end. Another Ray, without the name, only
    has the handlers put back.
    """
    from ray._private import utils

    kept = {int(number): signal.getsignal(number) for number in _HELD_BACK}
    held: list[int] = []
    echoes = Echoes()

    def hold(number: int, frame: FrameType | None) -> None:
        if echoes.has(number):
            return
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


def keep_quiet() -> None:
    """Keep Ray from telling of lost nodes on standard output, in colour: the supervisor tells it.

    `ray.init` of Ray 2.60 has no argument for it (`_private/worker.py`, listen_error_messages);
    another Ray, without the name, goes on telling.
    """
    from ray._private import worker

    if hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = lambda *_, **__: None


def leave_out_serializers() -> None:
    """Keep Ray from importing pyarrow, pydantic and starlette, so as to send objects of theirs.

    None are sent here, and it takes 0.25 s before the first actor is made. Ray 2.60 does it in
    `util/serialization_addons.py`; another Ray, without the name, imports them.
    """
    from ray.util import serialization_addons

    if hasattr(serialization_addons, "apply"):
        serialization_addons.apply = lambda *_: None
