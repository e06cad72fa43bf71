"""Ray's settings that live in the environment: Ray reads them when it is imported."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from orchestrator.control.authentication import token_file
from orchestrator.spec.environment import loopback_without_proxy
from orchestrator.spec.schema import ClusterName

SETTINGS = {
    # Under plain `uv run`, Ray would ship the project to every worker and run uv there.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    # An actor that is ended has nothing to clean up: Ray need not wait 5 s for it.
    "RAY_kill_worker_timeout_milliseconds": "500",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray announces a change of default about this variable on the terminal.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
}


def apply_ray_settings(cluster: ClusterName, token: Path | None = None) -> None:
    """Set what Ray must find in the environment; call before anything imports Ray.

    A Ray of a run's own gets a token that is written nowhere, one that is kept has a file with it.
    An existing cluster is joined with the token that is there; without any, Ray says so.

    Args:
        cluster: how Ray is reached.
        token: file with the token of the local Ray that is kept.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if cluster is ClusterName.local:
        # A raylet dials its own object store, often a moment before that listens, and tries again
        # after this pause: 1 s in Ray 2.60. The product of the two, 10 s, stays what it is.
        os.environ.setdefault("RAY_raylet_client_connect_timeout_milliseconds", "20")
        os.environ.setdefault("RAY_raylet_client_num_connect_attempts", "500")
        os.environ["RAY_AUTH_MODE"] = "token"
        if token is None:
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        else:
            os.environ.pop("RAY_AUTH_TOKEN", None)
            os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
    else:
        # The head may be at the other end of a tunnel: a proxy is not to have its token.
        os.environ.update(loopback_without_proxy(os.environ))
        if _token_is_there():
            os.environ.setdefault("RAY_AUTH_MODE", "token")


def _token_is_there() -> bool:
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or token_file(os.environ) is not None
