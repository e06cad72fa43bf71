"""How the driver's process comes to Ray: it starts one, or joins one that exists.

Call `ray_settings.apply_ray_settings` before this module is imported.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import tempfile
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray._private import services
from ray._private.grpc_utils import init_grpc_channel
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from orchestrator.control.kept import Kept
from orchestrator.control.launcher import standard_error_in
from orchestrator.control.ray_nodes import may_hold_workers
from orchestrator.control.ray_start import (
    LOOPBACK,
    keep_quiet,
    leave_out_serializers,
    signal_handlers_kept,
)
from orchestrator.control.upload import stage, users_dir
from orchestrator.errors import ClusterError, first_line
from orchestrator.spec.plan import Host
from orchestrator.spec.schema import ClusterConfig, Code

_CONNECT_TIMEOUT_S = 5.0


def join(
    config: ClusterConfig,
    code_dirs: Sequence[str] = (),
    tell: Callable[[str], None] = lambda text: None,
) -> Host:
    """Join an existing Ray cluster and tell what each of its nodes offers.

    Args:
        config: how to reach it.
        code_dirs: where the job's code lies, this project first; uploaded where other nodes do not
            see it. Nothing for who only wants to know the size.
        tell: takes what was uploaded, in one line.

    Raises:
        ConfigError: the user's own folder cannot be uploaded.
        ClusterError: nothing answers at the address, the token is missing or wrong, or the cluster
            runs another version of Ray or Python.
    """
    address = _meant(config.address, os.environ)
    if not ray.is_initialized():
        is_ours = address == (config.address or "auto")
        _dial(address, "cluster.address" if is_ours else "RAY_ADDRESS")
        _join(address)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    others = [node for node in nodes if node["NodeManagerAddress"] not in _own_addresses()]
    is_uploaded = "RAY_JOB_ID" in os.environ or config.code is Code.installed or has_upload()
    if others and code_dirs and not is_uploaded:
        # Other nodes do not see this checkout; a submitted job has brought its own upload.
        ray.shutdown()
        with tempfile.TemporaryDirectory(prefix="orch-upload-") as folder:
            tell(f"upload {stage(Path(folder), users_dir(code_dirs))}")
            _join(address, upload=folder)
    return common_size([node for node in nodes if may_hold_workers(node, config)] or nodes)


def common_size(nodes: Sequence[Mapping[str, Any]]) -> Host:
    """Return what each node offers that would train: those with GPUs, if any has some.

    A head has often none, and would else put every worker on its CPU.

    Args:
        nodes: as Ray tells of them.
    """
    cpus, gpus = ([int(n["Resources"].get(kind, 0)) for n in nodes] for kind in ("CPU", "GPU"))
    return Host(num_cpus=max(cpus, default=1) or 1, num_gpus=min(filter(None, gpus), default=0))


def _meant(address: str | None, environment: Mapping[str, str]) -> str:
    """Return the address that Ray itself takes: `auto` is what RAY_ADDRESS says, if it is set."""
    return environment.get("RAY_ADDRESS") or "auto" if address in (None, "auto") else address


def leave() -> None:
    """Leave the cluster; it goes on."""
    if ray.is_initialized():
        ray.shutdown()


def join_kept(kept: Kept) -> None:
    """Join the Ray that `make up` keeps on this host.

    Raises:
        ClusterError: it has just gone, or does not answer.
    """
    try:
        _join(kept.address, node_ip=LOOPBACK)
    except ClusterError as error:
        raise ClusterError(
            f"the Ray that `make up` keeps at {kept.address} does not answer: "
            f"{first_line(error.__cause__ or error)}; `make down` ends what is left of it"
        ) from error


def _join(address: str, upload: str | None = None, node_ip: str | None = None) -> None:
    environment = {"working_dir": upload} if upload else None
    with tempfile.TemporaryFile() as chatter:
        try:
            with signal_handlers_kept(), standard_error_in(chatter):
                ray.init(
                    address=address,
                    log_to_driver=False,
                    configure_logging=False,
                    runtime_env=environment,
                    _node_ip_address=node_ip,
                )
        except Exception as error:
            chatter.seek(0)
            raise _why_not_joined(address, error, chatter.read().decode()) from error
    keep_quiet()
    leave_out_serializers()


def _why_not_joined(address: str, error: Exception, chatter: str) -> ClusterError:
    """Tell apart what Ray calls a failed connection; its core says more on standard error."""
    text = f"{error}\n{chatter}"
    if "ersion mismatch" in text:
        return ClusterError(
            f"the Ray cluster at {address} runs other versions: {first_line(error)}; this is Ray "
            f"{ray.__version__} on Python {sys.version.split()[0]}"
        )
    if re.search("token|unauthenticated", text, re.IGNORECASE):
        return _wrong_token(address)
    return ClusterError(
        f"no Ray cluster at cluster.address={address}: {first_line(error)}; start one with "
        "`ray start --head`, name another address, or use cluster=local"
    )


def _dial(address: str, name: str = "cluster.address") -> None:
    """Find out within seconds whether anything listens and takes us; Ray itself tries for longer.

    Args:
        address: of the head.
        name: what has named it.
    """
    if address == "auto":
        if here := _head_here():
            _refuse_wrong_token(here)
        return
    host, colon, port = address.rpartition(":")
    if ":" in host and "://" not in address:
        raise ClusterError(
            f"{name}={address} is an address of version 6: Ray's nodes and TensorFlow's workers "
            "are reached by version 4 here; name the head by that, or by its name"
        )
    if not (colon or name == "RAY_ADDRESS"):
        return
    if "://" in address or not port.isdecimal():
        url = urllib.parse.urlsplit(address)
        head = url.hostname if "://" in address and url.hostname else "HEAD"
        raise ClusterError(
            f"{name}={address} is not auto or host:port: `submit` and `runs` ask the head's job "
            "server, here the port of its GCS is meant, 6379 unless it was started otherwise; "
            f"give cluster.address={head}:6379"
        )
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ClusterError(
            f"nothing answers at {name}={address}: {error}; start Ray there with "
            f"`ray start --head --port={port}`, or use cluster=local"
        ) from error
    _refuse_wrong_token(address)


def _head_here() -> str | None:
    """Return what Ray means by `auto`, or None if it finds nothing, which it tells itself."""
    with suppress(Exception):  # Ray 2.60's own way; another Ray may have another
        found: str | None = services.canonicalize_bootstrap_address("auto")
        return found
    return None


def _refuse_wrong_token(address: str) -> None:
    """Ask a head whether it takes our token, or none; to learn that from `ray.init` takes 20 s.

    Whatever else is the matter with it, Ray tells better.

    Args:
        address: host:port of its GCS.

    Raises:
        ClusterError: it wants a token, and there is none or another.
    """
    try:
        with init_grpc_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
            stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
            stub.CheckAlive(gcs_service_pb2.CheckAliveRequest(), timeout=_CONNECT_TIMEOUT_S)
    except Exception as error:
        code = getattr(error, "code", lambda: None)()
        if getattr(code, "name", "") == "UNAUTHENTICATED":
            raise _wrong_token(address) from error


def _wrong_token(address: str) -> ClusterError:
    return ClusterError(
        f"the Ray cluster at {address} does not take the token, or there is none; set "
        "RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file with the cluster's token"
    )


def _own_addresses() -> set[str]:
    return {LOOPBACK, "localhost", ray.util.get_node_ip_address()}


def has_upload() -> bool:
    """Tell whether this driver has brought the project to the nodes."""
    return bool(ray.get_runtime_context().runtime_env.get("working_dir"))
